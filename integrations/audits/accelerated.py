"""The DeepSpeed engine that accelerate makes."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from trustratio.optimizers.sharding.internals import Internals

from .configurations import Configuration

__all__ = ["prepared_engine"]

INTERNALS = Internals("accelerate", "accelerate", "1.10.0 to 1.15.0")


def prepared_engine(configuration: Configuration, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Any:
    """The DeepSpeed engine that `Accelerator.prepare` makes of model and optimizer; None: that of the section."""
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState
    from accelerate.utils import DummyOptim

    _forget_accelerators()
    asked = os.environ.get("ACCELERATE_USE_DEEPSPEED")
    try:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        if not torch.cuda.is_available():
            PartialState(backend="gloo")  # else it takes every rank for the only one
        plugin = DeepSpeedPlugin(hf_ds_config=dict(configuration.options))
        accelerator = Accelerator(deepspeed_plugin=plugin)
        trainable = [p for p in model.parameters() if p.requires_grad]
        engine, _ = accelerator.prepare(model, DummyOptim(trainable) if optimizer is None else optimizer)
        return engine
    finally:
        if asked is None:
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        _forget_accelerators()


def _forget_accelerators() -> None:
    """Accelerate keeps what the first Accelerator of a process was, which the next one must not find."""
    from accelerate.state import AcceleratorState, GradientState

    INTERNALS.read(AcceleratorState, "_reset_state")(reset_partial_state=True)
    INTERNALS.read(GradientState, "_reset_state")()
