"""What may be unpickled of a checkpoint: tensors, plain values and DeepSpeed's own records, nothing that runs code."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ..common.errors import RecipeError
from ..runs.folder import ENVIRONMENT

# What DeepSpeed 0.19.8 pickles besides tensors and plain values.
_OF_DEEPSPEED = (DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address)
_VARIABLES = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}


def _to_the_cpu(storage: Any, location: str) -> Any:
    return storage if location.startswith("cpu:") else None


# Trainers of transformers 5.17 and older load to "cpu:0" on ranks without a GPU, a place that torch.load does not know.
torch.serialization.register_package(11, lambda storage: None, _to_the_cpu)


@contextmanager
def tensors_only(checkpoint: Path) -> Iterator[None]:
    """Let torch.load unpickle nothing else in the block, DeepSpeed's own calls with `weights_only=False` included.

    Raises:
        RecipeError: a file of the checkpoint holds something else.
    """
    before = {name: os.environ.get(name) for name in _VARIABLES}
    os.environ.update(_VARIABLES)
    try:
        with torch.serialization.safe_globals(list(_OF_DEEPSPEED)):
            yield
    except UnpicklingError as error:
        unknown = re.search(r"GLOBAL (\S+)", str(error))
        raise RecipeError(
            f"{checkpoint} holds more than tensors and DeepSpeed's own data{f' ({unknown[1]})' if unknown else ''}, "
            f"not loaded: a file of it is damaged or foreign, or of other versions of torch, DeepSpeed, NumPy or "
            f"transformers; continue it with those that {ENVIRONMENT} of its run names"
        ) from error
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
