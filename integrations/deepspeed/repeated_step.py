"""DeepSpeed: one step of the optimizer in two of the engine's, whose gradients are seen in its step() alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine

from trustratio.optimizers.sharding.layout import LayoutError

from .internals import DeepSpeedOptimizer, DeepSpeedZeroOptimizer_Stage3, scales_by_torch

__all__ = ["hold", "refuse_two_steps"]

COUNTS = ("global_steps", "global_samples")


class WaitingScheduler:
    """A scheduler that does not step, and is in all else the one that waits: checkpoints save and load that."""

    def __init__(self, scheduler: Any):
        self.waiting = scheduler

    def step(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    def __getattr__(self, name: str) -> Any:
        if name == "waiting" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.waiting, name)


def hold(reference: weakref.ref[DeepSpeedEngine]) -> Callable[[bool], None]:
    """Keep the engine's scheduler as it is until what is returned is called; that can put back its counts of steps."""
    engine = reference()
    assert engine is not None, "an engine in use"
    counts = {name: getattr(engine, name) for name in COUNTS}
    if engine.lr_scheduler is not None:
        engine.lr_scheduler = WaitingScheduler(engine.lr_scheduler)
    return partial(_let_go, reference, counts)


def _let_go(reference: weakref.ref[DeepSpeedEngine], counts: dict[str, int], is_repeated: bool) -> None:
    engine = reference()
    if engine is None:
        return
    if isinstance(engine.lr_scheduler, WaitingScheduler):
        engine.lr_scheduler = engine.lr_scheduler.waiting
    if is_repeated:
        for name, count in counts.items():
            setattr(engine, name, count)


def refuse_two_steps(engine: DeepSpeedEngine, wrapper: DeepSpeedOptimizer | None) -> None:
    """Raise LayoutError if the engine cannot take one step in two, or clips by what nobody tells."""
    problem = None
    if isinstance(engine, PipelineEngine):
        problem = "pipeline stages run their batches in train_batch() alone"
    elif isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3) and (
        wrapper.swap_optimizer or wrapper.params_in_nvme_and_cpu
    ):
        problem = "weights on NVMe cannot be moved: set offload_optimizer.device and offload_param.device to cpu"
    elif engine.gradient_clipping() > 0 and (how := _why_clipping_is_unknown(wrapper)):
        problem = f"{how}: set gradient_clipping to 0"
    if problem is not None:
        raise LayoutError(
            f"no sample of the curvature can be taken under this DeepSpeed engine: {problem}, or interval=None"
        )


def _why_clipping_is_unknown(wrapper: DeepSpeedOptimizer | None) -> str | None:
    if wrapper is None:
        return "stage 0 in fp32 clips gradients, by default to 1.0, and does not tell by what"
    if getattr(wrapper, "has_moe_layers", False):
        return "gradients of experts are clipped by norms that are not told"
    if scales_by_torch(wrapper):
        return "torch's GradScaler holds the loss scale, and the norm that clips is not told"
    return None
