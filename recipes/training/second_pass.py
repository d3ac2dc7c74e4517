"""Samples of the curvature, for which an update's micro-batches are run a second time at moved weights.

The optimizers of `trustratio.optimizers.curvature` want one every so many updates. Everything else is of one update:
its schedule, its counts, its loss and the norm of its gradient are those of the first pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from deepspeed import DeepSpeedEngine
from torch.optim import Optimizer

from trustratio.optimizers import CurvatureAdamW, CurvatureSGD

from ..common.errors import RecipeError
from ..configuration.config import RecipeConfig
from ..model.optimizer import sample_interval


def check_second_pass(config: RecipeConfig, settings: Mapping[str, Any] | None) -> None:
    """Check that the samples that the optimizer wants can be taken.

    Args:
        config: with stage and precision settled.
        settings: complete DeepSpeed configuration, None without DeepSpeed.

    Raises:
        RecipeError: something takes the second pass for other data, or DeepSpeed leaves no way to it.
    """
    problem = _problem(config, settings or {})
    if sample_interval(config.optimizer) is not None and problem:
        raise RecipeError(
            f"--optimizer {config.optimizer.name} runs an update's micro-batches a second time for a sample of the "
            f"curvature, and {problem}, or optimizer.interval=null, which takes no samples"
        )


def _problem(config: RecipeConfig, settings: Mapping[str, Any]) -> str:
    """Return what is in the way, and what to do; "" if nothing is."""
    run = config.run
    if run.noise_scale or run.batch_from_noise:
        option = "run.batch_from_noise" if run.batch_from_noise else "run.noise_scale"
        return f"{option}=true would count them among the groups of the gradient noise: leave it out"
    zero = settings.get("zero_optimization") or {}
    for part in ("offload_optimizer", "offload_param"):
        if (zero.get(part) or {}).get("device") == "nvme":
            return f"weights on NVMe cannot be moved: set {part}.device to cpu"
    stage_0 = config.training.zero_stage == 0 and config.training.precision == "fp32"
    if settings and stage_0 and settings["gradient_clipping"] > 0:
        return (
            "DeepSpeed's stage 0 in fp32 does not tell by what it clips: use --zero_stage 1 or set "
            "training.gradient_clipping=0"
        )
    return ""


def wants_second_pass(optimizer: Optimizer) -> bool:
    """Ask, before the first forward pass of an update, whether there is to be a second pass over its micro-batches."""
    return isinstance(optimizer, CurvatureSGD | CurvatureAdamW) and optimizer.wants_curvature()


@contextlib.contextmanager
def second_pass(optimizer: Optimizer, engine: DeepSpeedEngine | None = None) -> Iterator[Any]:
    """Run the micro-batches of an update a second time in the block.

    Args:
        optimizer: which wants it.
        engine: that steps it. It has ended the first pass by its step(), and has to end the second one so in the block.

    Yields:
        With an engine, the norm of the first pass's gradient before clipping, which the engine forgets; else None, and
        if that gradient overflowed: the update is then made of the second one.
    """
    assert isinstance(optimizer, CurvatureSGD | CurvatureAdamW)
    if engine is None:
        with optimizer.curvature():
            yield None
        return
    overflowed = not engine.was_step_applied()
    skipped = engine.skipped_steps - overflowed  # the second step() says whether the update is skipped
    norm = None if overflowed else engine.get_global_grad_norm()
    with optimizer.curvature():
        engine.skipped_steps = skipped
        yield norm
