"""LAD: how anomalous each sample is, by the large deviations principle (Guggilam, Chandola, Patra 2023).

A sample is anomalous if, in some feature, it is far from the mean of every class. Rows may be split over ranks in any
way: scores and labels are those of one process, bit for bit.

Per round, over the ranks, K classes and D features (fp64 and int64 numbers):

    1. all-reduce (max), 2KD: between which bounds the regular members of each class lie
    2. all-reduce (sum), 4KD: their sums and sums of squares between these bounds
    3. all-reduce (max), 2: the smallest and the largest deviation
    4. all-reduce (sum), 4: mean and variance of the scores, for the threshold
    5. all-reduce (sum), K: the samples at or above the threshold, by class
    6. if they are too many, 4 all-reduces (sum) of 65,536 find the highest quarter, and the fifth is repeated

Before the first, one gather compares what the ranks were given. Sums are of integers, so that no order of the rows
shows in their last bits, which could carry a sample over the threshold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from trustratio.optimizers.sharding.local_tensors import reduction_device

from .labelled_features import as_features, as_labels, as_whole, refuse_empty, refuse_other_groups

__all__ = ["Anomalies", "anomaly_scores"]

FEWEST_REGULAR = 3
"""Classes with fewer members that are not anomalous are described by all of their members."""

LARGEST_THRESHOLD = 0.95
LARGEST_SHARE = 0.25

ROUNDING = 2.0**-40
"""Relative difference up to which deviations are alike: else scores would be made of rounding errors."""

_ROWS = 1 << 14  # that are worked on together
_UNIT = 2.0**26
_DIGIT = 16
_LARGEST = torch.finfo(torch.float64).max


class Anomalies(NamedTuple):
    """What `anomaly_scores` returns, for this rank's samples.

    Attributes:
        scores: fp64 (samples,), in [0, 1]: 0 for the least and 1 for the most anomalous sample of all ranks.
        anomalous: bool (samples,).
    """

    scores: torch.Tensor
    anomalous: torch.Tensor


@torch.no_grad()
def anomaly_scores(
    features: Any,
    labels: Any = None,
    iterations: int = 3,
    group: dist.ProcessGroup | None = None,
    classes: int | None = None,
) -> Anomalies:
    r"""Score samples by large deviations anomaly detection (LAD, arXiv 2303.00954).

    Of each class k the mean μ and the population variance s² are taken over its n members that are not anomalous (all
    members if fewer than three are left). A sample's deviation is that of its worst feature, from its nearest class:

        a = min_k max_d (x_d - μ_kd)² / (2 s²_kd n_k)        score = (a - min a) / (max a - min a)

    A feature whose variance is zero counts 0; a class all of whose features have none, as one of a single sample, is no
    class to be near to. Anomalous are the scores from min(0.95, mean + 2·variance) on, with the variance (not the
    deviation) of the scores, over N - 1. If these are more than min(N/4, D), the N/4 samples (rounded down) with the
    highest scores are anomalous instead; of equal scores at that border none is. Then follows the next round, with the
    members that are not anomalous now. In the first one nobody is.

    Args:
        features: (samples, features) of this rank, real numbers: a dense tensor, or what numpy makes an array of,
            such as lists or a DataFrame; any dtype, computed in fp64. A rank may have no samples.
        labels: The class or cluster of each sample, whole numbers, (samples,). None: all are of one class.
        iterations: Rounds, at least 1. Time and memory of one grow with samples x features, and its time with
            the number of classes: each sample is compared with each of them.
        group: The ranks over which the samples are split, in any way; each passes its own and gets its own back. None:
            all samples are here, and nothing is sent.
        classes: If given, labels must be 0 to classes - 1, and each of them must occur.

    Returns:
        `Anomalies`: scores and anomalous, (samples,) each, on the device of the features. A pair, so that
        ``scores, anomalous = anomaly_scores(x)`` works. All scores are 0, and nothing is anomalous, where all samples
        deviate alike.

    Raises:
        ValueError: On all ranks of the group, if features or labels have a wrong shape or numbers that are not finite,
            there are no samples, a class is empty, iterations is below 1, or ranks differ in features or options. With
            a group any other error in reading them becomes one, so that no rank is left waiting.

    Source: score, threshold and quarter are those of the authors' code (sreelekh/LAD, lib/lad_functions.py at f8fb86d).
    That has the variance over n - 1, of all samples where fewer than three members are left, and divides by the number
    of all members, which shows where there are several classes; and it moves samples to their nearest cluster after
    each round. Here labels stay, as they may be classes. The default of iterations is unverified.
    """
    rows = _gathered(features, labels, iterations, group, classes)
    regular = rows.sizes
    anomalous = torch.zeros(len(rows.classes), dtype=torch.bool, device=rows.features.device)
    for _ in range(iterations):
        scores = rows.scores(rows.statistics(anomalous, regular))
        anomalous, counts = rows.choose(scores)
        regular = rows.sizes - counts
    return Anomalies(scores, anomalous)


@dataclass(frozen=True)
class _Statistics:
    """Of each class: members that were counted (K,), mean (K, D), deviation (K, D); 0 where features do not count."""

    counts: torch.Tensor
    mean: torch.Tensor
    deviation: torch.Tensor

    def usable(self) -> Iterator[_Class]:
        """Yield those classes that a sample can be near to."""
        for count, mean, deviation in zip(self.counts, self.mean, self.deviation, strict=True):
            usable = deviation > 0
            if usable.any():
                columns = None if usable.all() else usable
                yield _Class(count, mean[usable].unsqueeze(1), deviation[usable].unsqueeze(1), columns)


class _Class(NamedTuple):
    """Number of members that were counted, mean and deviation (features, 1) of the features that count (None: all)."""

    members: torch.Tensor
    mean: torch.Tensor
    deviation: torch.Tensor
    columns: torch.Tensor | None


@dataclass(frozen=True)
class _Rows:
    """The samples of this rank, and what is known of all.

    Attributes:
        features: (samples, D), as given.
        classes: int64 (samples,), from 0 to K - 1.
        by_class: int64 (samples,): the rows of class 0, then those of class 1, and so on.
        sizes: int64 (K,): samples of each class, over all ranks.
        group: Over which they are split.
    """

    features: torch.Tensor
    classes: torch.Tensor
    by_class: torch.Tensor
    sizes: torch.Tensor
    group: dist.ProcessGroup | None

    @property
    def total(self) -> int:
        return int(self.sizes.sum())

    def statistics(self, anomalous: torch.Tensor, regular: torch.Tensor) -> _Statistics:
        """Describe each class by its regular members.

        Args:
            anomalous: bool (samples,).
            regular: int64 (K,): how many are not, over all ranks.
        """
        few = regular < FEWEST_REGULAR
        counted = ~anomalous | few[self.classes]
        counts = torch.where(few, self.sizes, regular)
        low, high = self._bounds(counted)
        middle, half = low / 2 + high / 2, high / 2 - low / 2
        # Between the bounds, in [-1, 1], small numbers beside large ones keep their digits.
        scale = torch.where(half > 0, half, torch.ones_like(half))
        sums = torch.zeros(2, 2, *middle.shape, dtype=torch.int64, device=middle.device)
        for k, members in self._members(counted):
            t = members.sub_(middle[k]).div_(scale[k]).clamp_(-1.0, 1.0)
            sums[:, :, k] += torch.stack([_integers(t), _integers(t.square())])
        first, second = _numbers(_reduced(sums, self.group)) / counts.unsqueeze(1)
        variance = torch.where(half > 0, second - first.square(), 0.0).clamp_(min=0.0)
        return _Statistics(counts, middle + scale * first, scale * variance.sqrt())

    def scores(self, of: _Statistics) -> torch.Tensor:
        """Each sample's deviation, from 0 for the smallest of all ranks to 1 for the largest; fp64 (samples,)."""
        classes = list(of.usable())
        chunks = [_deviations(x.to(torch.float64), classes) for x in self.features.split(_ROWS)]
        a = torch.cat(chunks)
        extremes = a.new_full((2,), -torch.inf)
        if len(a):
            extremes = torch.stack([a.max(), -a.min()])
        largest, smallest = _reduced(extremes, self.group, dist.ReduceOp.MAX) * extremes.new_tensor([1.0, -1.0])
        spread = largest - smallest
        if spread <= ROUNDING * largest:
            return torch.zeros_like(a)
        return (a - smallest) / spread

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which samples are anomalous, bool (samples,), and how many are in each class over all ranks (K,)."""
        sums = torch.stack([_integers(scores.unsqueeze(1)), _integers(scores.square().unsqueeze(1))])
        first, second = _numbers(_reduced(sums, self.group)).squeeze(1)
        mean = first / self.total
        variance = (second - first * mean) / max(1, self.total - 1)
        anomalous = scores >= (mean + 2 * variance).clamp(max=LARGEST_THRESHOLD)
        counts = self._count(anomalous)
        if int(counts.sum()) > min(LARGEST_SHARE * self.total, self.features.shape[1]):
            anomalous = scores > self._nth_largest(scores, int(LARGEST_SHARE * self.total))
            counts = self._count(anomalous)
        return anomalous, counts

    def _count(self, chosen: torch.Tensor) -> torch.Tensor:
        return _reduced(torch.bincount(self.classes[chosen], minlength=len(self.sizes)), self.group)

    def _nth_largest(self, scores: torch.Tensor, n: int) -> torch.Tensor:
        """The score above which there are at most `n` of all ranks': that of place n, counted from 0."""
        # fp64 numbers that are not negative sort as their bits do; each reduction fixes the next sixteen.
        keys, prefix, place = scores.view(torch.int64), 0, n
        for shift in range(64 - _DIGIT, -1, -_DIGIT):
            known = keys if shift == 64 - _DIGIT else keys[keys >> (shift + _DIGIT) == prefix]
            digits = (known >> shift) & ((1 << _DIGIT) - 1)
            histogram = _reduced(torch.bincount(digits, minlength=1 << _DIGIT), self.group)
            above = histogram.sum() - histogram.cumsum(0)
            digit = int((above > place).sum())
            place -= int(above[digit])
            prefix = (prefix << _DIGIT) + digit
        return torch.tensor(prefix, device=scores.device).view(torch.float64)

    def _bounds(self, counted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The smallest and largest number of each class and feature, over all ranks, (K, D) each."""
        shape = 2, len(self.sizes), self.features.shape[1]
        bounds = torch.full(shape, -torch.inf, dtype=torch.float64, device=self.features.device)
        for k, members in self._members(counted):
            bounds[:, k] = bounds[:, k].maximum(torch.stack([members.amax(dim=0), -members.amin(dim=0)]))
        high, low = _reduced(bounds, self.group, dist.ReduceOp.MAX)
        return -low, high

    def _members(self, counted: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield some of a class's rows that are counted at a time: the class, and a copy of the features in fp64."""
        sizes = torch.bincount(self.classes, minlength=len(self.sizes)).tolist()
        for k, rows in enumerate(self.by_class.split(sizes)):
            for some in rows[counted[rows]].split(_ROWS):
                if len(some):
                    yield k, self.features[some].to(torch.float64)


def _deviations(x: torch.Tensor, classes: Sequence[_Class]) -> torch.Tensor:
    """How far each row is from the class that it is nearest to, fp64 (rows,)."""
    columns = x.t().contiguous()  # maxima over a few columns are slow along rows
    nearest = x.new_full((len(x),), torch.inf)
    for k in classes:
        there = columns if k.columns is None else columns[k.columns]
        distance = (there - k.mean).div_(k.deviation).abs_().amax(dim=0)
        nearest = nearest.minimum(distance.square_().div_(2).div_(k.members).clamp_(max=_LARGEST))
    return torch.where(nearest.isinf(), 0.0, nearest)  # where no class has a variance


# Sums that do not depend on their order -----------------------------------------------------------------------------


def _integers(values: torch.Tensor) -> torch.Tensor:
    """Sums over the rows of numbers in [-1, 1] as two integers, in units of 2⁻²⁶ and 2⁻⁵²; int64 (2, columns)."""
    high = (values * _UNIT).round()
    low = ((values * _UNIT - high) * _UNIT).round()
    return torch.stack([part.to(torch.int64).sum(dim=0) for part in (high, low)])


def _numbers(integers: torch.Tensor) -> torch.Tensor:
    """The sums in fp64; `integers` has the two of each in its second dimension."""
    high, low = integers.to(torch.float64).unbind(dim=1)
    return high / _UNIT + low / _UNIT**2


def _reduced(
    numbers: torch.Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> torch.Tensor:
    if group is None or dist.get_world_size(group) == 1:
        return numbers
    sent = numbers.to(reduction_device(group, numbers.device))
    dist.all_reduce(sent, op, group=group)
    return sent.to(numbers.device)


# What was given -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Given:
    """What a rank was given, for the others: what is wrong with it, or its features, options and samples by label."""

    wrong: str | None
    features: int = 0
    options: tuple[Any, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()


def _gathered(
    features: Any, labels: Any, iterations: int, group: dist.ProcessGroup | None, classes: int | None
) -> _Rows:
    """Check what all ranks were given, and count their classes."""
    refuse_other_groups(group)
    try:
        x, of_samples = _checked(features, labels, iterations, classes)
        sizes = tuple(zip(*(t.tolist() for t in of_samples.unique(return_counts=True)), strict=True))
        given = _Given(
            None, x.shape[1], (int(iterations), None if classes is None else int(classes), labels is None), sizes
        )
    except Exception as error:  # a rank that ends here would leave the others waiting
        if group is None:
            raise
        given = _Given(str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")
    everyone = [given]
    if group is not None:
        everyone = [given] * dist.get_world_size(group)
        dist.all_gather_object(everyone, given, group=group)
    known = _agreed(everyone, classes)
    of_all = torch.tensor(list(known), device=x.device)
    counts = torch.tensor(list(known.values()), device=x.device)
    of_rows = torch.searchsorted(of_all, of_samples)
    return _Rows(x, of_rows, of_rows.argsort(stable=True), counts, group)


def _agreed(everyone: Sequence[_Given], classes: int | None) -> dict[int, int]:
    """Return how many samples of each label there are over all ranks, by label in ascending order."""
    several = len(everyone) > 1
    for rank, given in enumerate(everyone):
        if given.wrong is not None:
            raise ValueError(f"rank {rank}: {given.wrong}" if several else given.wrong)
    widths = [given.features for given in everyone]
    if len(set(widths)) > 1:
        raise ValueError(f"features must have the same number of columns on every rank, got {widths} by rank")
    if len({given.options for given in everyone}) > 1:
        raise ValueError("iterations, classes, and whether there are labels must be the same on every rank")
    sizes: Counter[int] = Counter()
    for given in everyone:
        sizes.update(dict(given.sizes))
    if not sizes:
        raise ValueError(f"features must have at least one row{', on some rank' if several else ''}, got none")
    refuse_empty(sizes, classes)
    return dict(sorted((label, count) for label, count in sizes.items() if count))


def _checked(features: Any, labels: Any, iterations: int, classes: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features (samples, D) and labels (samples,) as tensors on one device."""
    as_whole("iterations", iterations, 1)
    x = as_features(features)
    return x, as_labels(labels, len(x), classes).to(x.device)
