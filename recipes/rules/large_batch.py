"""Rules for large batches: how to change the learning rate, the regime, the data and the batch. No optimizer.

All are small functions of numbers and tensors. Learning-rate schedules are in `schedules`. Where a formula could
not be checked against its paper or official code, the docstring says so.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from .global_batch import BatchPlan, plan_batch

LR_RULES = ("linear", "sqrt")


def scale_learning_rate(lr: float, base_batch: int, batch: int, rule: str = "sqrt") -> float:
    """Carry a learning rate that works at one batch size over to another.

    Args:
        lr: the rate at `base_batch`.
        base_batch: samples per update there, at least 1.
        batch: samples per update to scale to, at least 1.
        rule: "linear", lr * batch / base_batch (Goyal et al. 2017), or "sqrt", lr * sqrt(batch / base_batch)
            (Krizhevsky 2014; Hoffer et al. 2017, whose code has it; the LAMB paper's recipe).
    """
    ratio = _batch_ratio(base_batch, batch)
    if rule not in LR_RULES:
        raise ValueError(f"rule must be one of {', '.join(map(repr, LR_RULES))}, got {rule!r}")
    return lr * (ratio if rule == "linear" else math.sqrt(ratio))


def adapt_regime(epochs: int, milestones: Sequence[int], base_batch: int, batch: int) -> tuple[int, list[int]]:
    """Regime adaptation: train as many updates as the small batch did (Hoffer et al. 2017, arXiv 1705.08741).

    Epochs and the milestones of the learning rate are multiplied by ceil(batch / base_batch), as in the authors' code
    (eladhoffer/bigBatch, --regime_bb_fix), which also scales the rate by the square root and clips at norm 5.

    Args:
        epochs: of the small-batch regime.
        milestones: epochs at which its rate changes.
        base_batch: its samples per update.
        batch: samples per update now.

    Returns:
        The epochs and milestones for `batch`.
    """
    factor = max(1, math.ceil(_batch_ratio(base_batch, batch)))
    return epochs * factor, [milestone * factor for milestone in milestones]


class GhostBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation over ghost batches: each slice of the batch has its own statistics (Hoffer et al. 2017).

    The running statistics take in the k ghost batches one after the other, which in closed form is

        running <- (1 - momentum)^k running + sum_i (1 - momentum)^i momentum * mean_i,  i = 0 for the last.

    The authors' code does the former; that the paper prints the latter is from memory. Inputs have any number of
    dimensions from 2 on, channels second. In evaluation this is plain batch normalisation. Parameters and buffers have
    the names of `nn.BatchNorm2d`, so state dicts are exchangeable.

    Args:
        num_features: channels.
        ghost_size: samples per ghost batch, at least 1. A batch is cut into batch // ghost_size parts, equal or one
            sample apart; so none has fewer samples than `ghost_size`, unless the whole batch has.
        options: those of `nn.BatchNorm2d`: eps, momentum, affine, track_running_stats.
    """

    def __init__(self, num_features: int, ghost_size: int, **options: Any):
        if ghost_size < 1:
            raise ValueError(f"ghost_size must be at least 1, got {ghost_size!r}")
        super().__init__(num_features, **options)
        self.ghost_size = ghost_size

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input must have at least 2 dimensions (samples, channels), got {input.dim()}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise; in training, each ghost batch by itself."""
        if not self.training:
            return super().forward(input)
        parts = input.tensor_split(max(1, len(input) // self.ghost_size))
        return torch.cat([super(GhostBatchNorm, self).forward(part) for part in parts])

    @classmethod
    def convert(cls, module: nn.Module, ghost_size: int) -> nn.Module:
        """Replace every `nn.BatchNorm` in a module by a ghost one that shares its parameters and buffers."""
        if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            for name, child in module.named_children():
                module.add_module(name, cls.convert(child, ghost_size))
            return module
        ghost = cls(
            module.num_features,
            ghost_size,
            eps=module.eps,
            momentum=module.momentum,
            affine=False,
            track_running_stats=module.track_running_stats,
        )
        ghost.affine, ghost.training = module.affine, module.training
        ghost._parameters, ghost._buffers = module._parameters, module._buffers
        return ghost


def gradient_noise_variance(base_batch: int, batch: int) -> float:
    """Return the variance sigma^2 = batch / base_batch - 1 of `gradient_noise_weights`.

    With it the noisy mean gradient of the large batch varies as the plain one of the small batch does, where the mean
    gradient is small beside the samples' own. Hoffer et al. 2017 have sigma^2 proportional to the batch; this constant
    is derived, the paper's is unverified, and the authors' code has no such noise.
    """
    return max(0.0, _batch_ratio(base_batch, batch) - 1.0)


def gradient_noise_weights(
    samples: int, variance: float, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Draw the weights z_n ~ N(1, variance) of multiplicative gradient noise, one per sample, shape (samples,).

    ``(losses * z).mean().backward()`` gives the gradient (1/B) sum_n z_n g_n.
    """
    if variance < 0:
        raise ValueError(f"variance must be at least 0, got {variance!r}")
    return 1.0 + math.sqrt(variance) * torch.randn(samples, generator=generator, device=device)


def batch_size_at(step: int, schedule: Sequence[tuple[int, int]]) -> int:
    """Return the global batch of update number `step`.

    Args:
        step: counted from 0.
        schedule: (first update, global batch) pairs; the first pair begins at 0, and firsts ascend.
    """
    firsts = [first for first, _ in schedule]
    if not firsts or firsts[0] != 0 or any(a >= b for a, b in pairwise(firsts)):
        raise ValueError(f"schedule must begin at update 0 and ascend, got {list(schedule)!r}")
    return schedule[bisect_right(firsts, step) - 1][1]


def batch_plan_at(step: int, schedule: Sequence[tuple[int, int]], micro_batch: int, ranks: int) -> BatchPlan:
    """Return how the global batch of update `step` is made from micro-batches: the accumulation it implies.

    Args:
        step: counted from 0.
        schedule: as for `batch_size_at`.
        micro_batch: samples per rank and pass; constant, so that memory and shapes do not change.
        ranks: data-parallel processes.

    Raises:
        RecipeError: if micro_batch x ranks does not divide that batch; the nearest possible ones are named.
    """
    return plan_batch(batch_size_at(step, schedule), micro_batch, ranks)


def batch_instead_of_decay(batch: int, decays: Sequence[tuple[int, float]]) -> list[tuple[int, int]]:
    """Turn a step-wise decay of the learning rate into a growth of the batch (Smith et al. 2017, arXiv 1711.00489).

    Where the rate would be multiplied by a factor below 1, the batch is divided by it instead and the rate stays.

    Args:
        batch: the first global batch.
        decays: (update, factor) pairs, ascending.

    Returns:
        A schedule for `batch_size_at`. An update of the schedule counts updates of the new run, which are fewer than
        the old run's for the same samples: give updates accordingly.
    """
    schedule, size = [(0, batch)], float(batch)
    for step, factor in decays:
        if not 0 < factor <= 1:
            raise ValueError(f"a decay factor must be in (0, 1], got {factor!r}")
        size /= factor
        schedule.append((step, round(size)))
    return schedule


def large_loss_mask(losses: torch.Tensor, discard: float, among: torch.Tensor | None = None) -> torch.Tensor:
    """Choose the samples to keep when those with the smallest losses are discarded.

    ``losses[large_loss_mask(losses, 0.2)].mean()`` is the loss over the other 80 %. A generic form of a guidance method
    that the abstract of arXiv 2012.08795 (CBLR) names; the paper's own procedure is unverified.

    Args:
        losses: per sample, shape (samples,).
        discard: fraction in [0, 1) to discard, rounded down to whole samples.
        among: losses that the fraction refers to, e.g. those of all ranks, all-gathered; `losses` themselves if None,
            which is cheaper and nearly the same on large shards of a shuffled batch.

    Returns:
        Boolean, shape (samples,). Ties are kept, and NaN, which counts as the largest.
    """
    _require_share(discard)
    with torch.no_grad():
        values = losses.detach() if among is None else among.detach()
        dropped = int(discard * values.numel())
        if dropped == 0:
            return torch.ones_like(losses, dtype=torch.bool)
        smallest_kept = values.flatten().kthvalue(dropped + 1).values
        return ~(losses.detach() < smallest_kept)


def smallest_kept_loss(
    losses: torch.Tensor,
    discard: float,
    total: int | None = None,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
) -> torch.Tensor:
    """Return the smallest loss that is kept when the losses of all ranks together are discarded from (collective).

    The same number as `large_loss_mask` finds among all ranks' losses, but they are not gathered: each digit of it, in
    base 256, follows from how many losses have which. Four small sums over the ranks, however many losses there are.

    Args:
        losses: this rank's, fp32, shape (samples,); there may be none.
        discard: fraction in [0, 1) of all ranks' losses to discard, rounded down to whole samples.
        total: losses of all ranks together; None: there is one rank.
        sum_over_ranks: adds up an int64 vector of 256 counts over all ranks; the default is for one rank.

    Returns:
        A scalar on the CPU, the same on every rank: keep what is not smaller, which ties and NaN are not. It is -inf if
        nothing is discarded, and NaN, than which nothing is smaller, if too many losses are.
    """
    _require_share(discard)
    bits = _ordered_bits(losses.detach().float().cpu())
    before = int(discard * (len(bits) if total is None else total))
    if before == 0:
        return torch.tensor(-math.inf, device="cpu")
    found = 0
    for shift in (24, 16, 8, 0):
        digits = (bits[bits >> (shift + 8) == found] >> shift) & 255
        up_to = sum_over_ranks(torch.bincount(digits, minlength=256)).cpu().cumsum(0)
        digit = int((up_to <= before).sum())
        before -= int(up_to[digit - 1]) if digit else 0
        found = found << 8 | digit
    return _of_ordered_bits(found)


def staleness_learning_rate(lr: float, delay: float, reference_delay: float = 1.0) -> float:
    """Return the learning rate for asynchronous updates whose gradients are `delay` updates old.

    Inversely proportional to the delay, lr * reference_delay / delay (Giladi et al. 2020, arXiv 1909.12340), and never
    above lr. The rule is quoted from memory, unverified; the authors' example also sets momentum to 0.

    Args:
        lr: the rate that is stable at `reference_delay`.
        delay: updates between reading the weights and applying the gradient, at least 0.
        reference_delay: above 0.
    """
    if delay < 0 or reference_delay <= 0:
        raise ValueError(f"delay must be at least 0 and reference_delay above 0, got {delay!r} and {reference_delay!r}")
    return lr * min(1.0, reference_delay / delay) if delay > 0 else lr


def _require_share(discard: float) -> None:
    if not 0 <= discard < 1:
        raise ValueError(f"discard must be in [0, 1), got {discard!r}")


_SIGN = 2**31


def _ordered_bits(values: torch.Tensor) -> torch.Tensor:
    """Return int64 numbers below 2^32 in the order of fp32 values: zeros alike, NaN of either sign the largest."""
    bits = (values + 0.0).masked_fill(values.isnan(), math.nan).view(torch.int32).long()
    return torch.where(bits < 0, ~bits, bits + _SIGN)


def _of_ordered_bits(number: int) -> torch.Tensor:
    bits = number - _SIGN if number >= _SIGN else ~number
    return torch.tensor(bits, dtype=torch.int32, device="cpu").view(torch.float32)


def _batch_ratio(base_batch: int, batch: int) -> float:
    for name, value in (("base_batch", base_batch), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")
    return batch / base_batch
