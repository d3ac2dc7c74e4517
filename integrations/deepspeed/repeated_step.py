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


def hold(reference: weakref.ref[DeepSpeedEngine]) -> Callable[[], None]:
    """Keep the engine's scheduler and counts as they are until what is returned is called."""
    engine = reference()
    assert engine is not None, "an engine in use"
    scheduler, counts = engine.lr_scheduler, {name: getattr(engine, name) for name in COUNTS}
    engine.lr_scheduler = None
    return partial(_let_go, reference, scheduler, counts)


def _let_go(reference: weakref.ref[DeepSpeedEngine], scheduler: Any, counts: dict[str, int]) -> None:
    engine = reference()
    if engine is not None:
        engine.lr_scheduler = scheduler
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
        return "stage 0 in fp32 clips gradients and does not tell by what"
    if getattr(wrapper, "has_moe_layers", False):
        return "gradients of experts are clipped by norms that are not told"
    if scales_by_torch(wrapper):
        return "torch's GradScaler holds the loss scale, and the norm that clips is not told"
    return None
