"""What has failed in its constructor, or was forgotten, may live on, as in a traceback. It keeps nobody from a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from deepspeed.runtime.lr_schedules import OneCycle, WarmupLR
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Trainer, TrainingArguments

from trustratio.integrations import fsdp1, transformers
from trustratio.optimizers import LAMB, LayoutError


def named(model: torch.nn.Module) -> LAMB:
    return LAMB(list(model.named_parameters()), lr=0.1)


def failure_of(construct: Callable[[], Any]) -> BaseException:
    """The error, whose traceback holds the object."""
    with pytest.raises((ValueError, RuntimeError)) as caught:
        construct()
    return caught.value


def stepped(model: torch.nn.Module, optimizer: LAMB) -> int:
    """How many layers a step has."""
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    return len(optimizer.trust_ratios())


@contextmanager
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def failed_accelerator(optimizer: LAMB) -> Any:
    return failure_of(lambda: Accelerator(cpu=True, mixed_precision="other"))


def accelerator_without_state(optimizer: LAMB) -> Any:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    AcceleratorState._reset_state(reset_partial_state=True)
    return accelerator


def failed_warmup(optimizer: LAMB) -> Any:
    return failure_of(lambda: WarmupLR(optimizer, warmup_max_lr=[0.1] * 3))


def failed_cycle(optimizer: LAMB) -> Any:
    return failure_of(lambda: OneCycle(optimizer, cycle_min_lr=[0.1] * 3, cycle_max_lr=[0.1] * 3))


@pytest.mark.parametrize(
    "leave", [failed_accelerator, accelerator_without_state, failed_warmup, failed_cycle], ids=lambda one: one.__name__
)
def test_a_step(leave: Callable[[LAMB], Any]) -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = named(model)
    left = leave(optimizer)
    assert stepped(model, optimizer) == 2
    assert left is not None


def wrapped(*dtypes: torch.dtype) -> FullyShardedDataParallel:
    model = torch.nn.Sequential(*[torch.nn.Linear(4, 4, dtype=dtype) for dtype in dtypes])
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


def test_a_step_with_fsdp1() -> None:
    with alone():
        left = failure_of(lambda: wrapped(torch.float32, torch.bfloat16))
        model = wrapped(torch.float32)
        assert stepped(model, named(model)) == 2
        assert "uniform dtype" in str(left)


def test_a_handle_in_use_that_lacks_its_parameter_is_an_error() -> None:
    with alone():
        model = wrapped(torch.float32)
        flat = vars(model._handle).pop("flat_param")
        with pytest.raises(LayoutError, match=r"has no FlatParamHandle\.flat_param"):
            list(fsdp1._runs())
        assert flat is not None


def test_the_import_beside_a_trainer(tmp_path: Path) -> None:
    left = failure_of(lambda: Trainer(model=None, args=TrainingArguments(str(tmp_path), use_cpu=True)))
    backend = transformers.TrainerBackend()  # as the import makes one
    backend.before_step(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))]))
    assert "model" in str(left)
