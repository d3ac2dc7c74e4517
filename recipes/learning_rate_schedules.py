"""Learning-rate schedules as pure functions of the step, usable with `torch.optim.lr_scheduler.LambdaLR`."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def resolve_warmup(warmup: float, total_steps: int) -> int:
    """Return the warm-up in steps: a value below 1 is a fraction of `total_steps`, from 1 on a number of steps."""
    return round(warmup * total_steps) if warmup < 1 else int(warmup)


def warmup_polynomial(step: int, warmup_steps: int, total_steps: int, degree: float = 1.0, final: float = 0.0) -> float:
    """Return the factor on the peak learning rate for the update number `step` (counted from 0).

    Warm-up: (step + 1) / warmup_steps, so the first update is not lost to a rate of zero and the last warm-up
    update has the peak rate. Then final + (1 - final) * (1 - p)^degree, where p grows from 0 to 1 over the updates
    after the warm-up and would reach 1 one update past the last. Degree 1 is BERT's linear decay, 0.5 the one of
    NVIDIA's LAMB recipe. From `total_steps` on the factor is `final`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    remaining = max(0, total_steps - step) / max(1, total_steps - warmup_steps)
    return final + (1.0 - final) * min(1.0, remaining) ** degree


def polynomial_scheduler(
    warmup_steps: int, total_steps: int, degree: float = 1.0, final: float = 0.0
) -> Callable[[Optimizer], LambdaLR]:
    """Return a factory that puts `warmup_polynomial` on an optimizer; DeepSpeed takes such a factory."""

    def make(optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: warmup_polynomial(step, warmup_steps, total_steps, degree, final))

    return make
