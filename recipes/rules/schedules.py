"""Learning-rate schedules: each as a pure function of the step, and as a `torch.optim.lr_scheduler` scheduler.

A scheduler's `state_dict()` holds plain numbers, its own parameters among them, so that it can be saved with
`torch.save` and loaded with ``weights_only=True``. The factor multiplies every group's own initial rate.
"""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from trustratio.optimizers.sharding.backends import watch_steps

DECAYS = ("linear", "1-sqrt", "sqrt")
"""Forms of the decay in `warmup_stable_decay`; "sqrt" is another name of "1-sqrt"."""


def resolve_warmup(warmup: float, total_steps: int) -> int:
    """Return the warm-up in steps: a value below 1 is a fraction of `total_steps`, from 1 on a number of steps."""
    return round(warmup * total_steps) if warmup < 1 else int(warmup)


def warmup_polynomial(
    step: float,
    warmup_steps: float,
    total_steps: int,
    degree: float = 1.0,
    final: float = 0.0,
    constant_steps: float = 0,
    warmup_start: int = 0,
    decay_from_start: bool = False,
) -> float:
    """Return the factor on the peak learning rate for the update number `step` (counted from 0). Fractions
    count, of it and of durations.

    Warm-up: (step - warmup_start + 1) / warmup_steps, so the first update is not lost to a rate of zero and the last
    warm-up update has the peak rate. A negative `warmup_start` begins in the middle of the warm-up, as MLPerf's BERT
    reference points do. Then `constant_steps` at the peak (LANS's plateau), then
    final + (1 - final) * (1 - p)^degree, where p grows from 0 to 1 over the remaining updates and would reach 1 one
    update past the last. Degree 1 is BERT's linear decay, 0.5 the one of NVIDIA's LAMB recipe, 2 MLPerf's for LARS.
    From `total_steps` on the factor is `final`.

    With `decay_from_start` p is (step + 1) / total_steps instead, as in NVIDIA's and MLPerf's BERT: the warm-up covers
    the beginning of the decay, so the rate drops when it ends (to 0.846 of the peak with 28.43 % warm-up and degree
    0.5), and the last update has the final rate.
    """
    into_warmup = step - warmup_start
    if into_warmup < warmup_steps:
        return min(1.0, max(0.0, into_warmup + 1) / warmup_steps)
    if decay_from_start:
        remaining = (total_steps - step - 1) / total_steps
    else:
        decay_from = warmup_start + warmup_steps + constant_steps
        remaining = (total_steps - step) / max(1, total_steps - decay_from)
    return final + (1.0 - final) * min(1.0, max(0.0, remaining)) ** degree


def warmup_exponential(
    step: float, warmup_steps: float, decay_rate: float = 0.9, decay_steps: float = 250, degree: float = 2.0
) -> float:
    """Return the factor of DeepSpeed's "EE" schedule (exponential warm-up, exponential decay) for update `step`.

    (step / warmup_steps)^degree, and from `warmup_steps` on decay_rate^((step - warmup_steps) / decay_steps). As in the
    BERT example of DeepSpeed, whose 64K recipe decays by 0.9 every 250 updates (150 in the second phase). Its factor of
    update 0 is zero; that recipe adds an offset of 1e-3 to its rate of 11e-3.
    """
    if step < warmup_steps:
        return (step / warmup_steps) ** degree
    return decay_rate ** ((step - warmup_steps) / decay_steps)


def warmup_stable_decay(
    step: float, warmup_steps: float, total_steps: int, decay_steps: float, final: float = 0.0, decay: str = "linear"
) -> float:
    """Return the factor of the warm-up-stable-decay schedule for update `step`.

    Warm-up as in `warmup_polynomial`, then 1 until `decay_steps` updates are left, then with p growing from 0 to 1 over
    those: final + (1 - final) * (1 - p) for "linear", final + (1 - final) * (1 - sqrt(p)) for "1-sqrt". The length of
    a run can be chosen late, since only its last part depends on it. `decay_steps` 0 is no decay. Both forms as in
    ModernBERT's code (AnswerDotAI/ModernBERT, src/scheduler.py: WarmupStableDecayScheduler, OneMinusSqrtScheduler),
    whose warm-up begins at a rate of zero.
    """
    if decay not in DECAYS:
        raise ValueError(f"decay must be one of {', '.join(map(repr, DECAYS))}, got {decay!r}")
    if step < warmup_steps:
        return min(1.0, (step + 1) / warmup_steps)
    if not decay_steps:
        return 1.0
    past = min(1.0, max(0.0, (step - (total_steps - decay_steps)) / decay_steps))
    return final + (1.0 - final) * (1.0 - (past if decay == "linear" else past**0.5))


class FactorLR(LRScheduler):
    """Sets every group's rate to its initial one times `factor(step)`; a schedule fills in `factor`.

    Attributes:
        counts_updates: that `step()` is called once per update. `accelerator.prepare` would have it called once per
            process, Lightning once per epoch; that is refused at the optimizer's first step, whatever optimizer it is.
    """

    counts_updates = True
    last_epoch: float  # type: ignore[assignment] # between two numbers where updates have different batches

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1):
        watch_steps()  # no optimizer of ours need be there
        super().__init__(optimizer, last_epoch)

    def factor(self, step: float) -> float:
        """Return the factor for the update number `step`, counted from 0."""
        raise NotImplementedError(
            f"{type(self).__name__} must define factor(): what the learning rate is multiplied by"
        )

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """Return the rate of each group for the next update."""
        factor = self.factor(self.last_epoch)
        return [base * factor for base in self.base_lrs]  # type: ignore[misc]


class WarmupPolynomial(FactorLR):
    """`warmup_polynomial` as a scheduler; the arguments are its own."""

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int,
        total_steps: int,
        degree: float = 1.0,
        final: float = 0.0,
        constant_steps: int = 0,
        warmup_start: int = 0,
        decay_from_start: bool = False,
        last_epoch: int = -1,
    ):
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.degree = degree
        self.final = final
        self.constant_steps = constant_steps
        self.warmup_start = warmup_start
        self.decay_from_start = decay_from_start
        super().__init__(optimizer, last_epoch)

    def factor(self, step: float) -> float:
        return warmup_polynomial(
            step,
            self.warmup_steps,
            self.total_steps,
            self.degree,
            self.final,
            self.constant_steps,
            self.warmup_start,
            self.decay_from_start,
        )


class WarmupExponential(FactorLR):
    """`warmup_exponential` (DeepSpeed's EE) as a scheduler; the arguments are its own."""

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int,
        decay_rate: float = 0.9,
        decay_steps: float = 250,
        degree: float = 2.0,
        last_epoch: int = -1,
    ):
        self.warmup_steps = warmup_steps
        self.decay_rate = decay_rate
        self.decay_steps = decay_steps
        self.degree = degree
        super().__init__(optimizer, last_epoch)

    def factor(self, step: float) -> float:
        return warmup_exponential(step, self.warmup_steps, self.decay_rate, self.decay_steps, self.degree)


class WarmupStableDecay(FactorLR):
    """`warmup_stable_decay` as a scheduler; the arguments are its own."""

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int,
        total_steps: int,
        decay_steps: int,
        final: float = 0.0,
        decay: str = "linear",
        last_epoch: int = -1,
    ):
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.decay_steps = decay_steps
        self.final = final
        self.decay = decay
        super().__init__(optimizer, last_epoch)

    def factor(self, step: float) -> float:
        return warmup_stable_decay(step, self.warmup_steps, self.total_steps, self.decay_steps, self.final, self.decay)
