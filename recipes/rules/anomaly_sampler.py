"""LIIT: train on a sample of the data that has the most anomalous of every class (Guggilam, Chandola, Patra 2023)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Sampler

from .anomalies import anomaly_scores
from .labelled_features import as_features, as_labels, refuse_empty

__all__ = ["LadSampler"]

SETTINGS = ("samples", "sample", "anomalous", "every", "iterations", "seed", "num_replicas", "drop_last")
"""What must be the same where a state is loaded."""


class LadSampler(Sampler[int]):
    r"""Indices of a training sample that is made anew every few epochs, after LIIT (arXiv 2303.00954).

    The sample has of each class the members with the highest `anomaly_scores`, a fraction ``anomalous`` of them and at
    least one, and is filled up to a fraction ``sample`` of the data with others, drawn uniformly without replacement.
    Epochs from 0 to ``every`` - 1 go over one sample, each in an order of its own; then it is made anew, with other
    uniform draws, and with new scores if ``features`` is a function. An epoch is one pass over the sample.

    Order and sample depend on seed, epoch and scores alone, so they are the same on all ranks. Rank r of n takes the
    places r, r + n, ... of each epoch's order, which is filled up from its start, as `DistributedSampler` does.

    Args:
        features: (samples, features), or a function that returns them, called whenever the sample is made: e.g. what
            the model makes of the data by now. With ``group`` those of this rank's samples, which are consecutive and
            follow those of the rank before.
        labels: The class of each sample of the data, whole numbers, (samples,). None: all are of one class.
        sample: Size of the sample as a fraction of the data, in (0, 1].
        anomalous: Fraction of each class's members that are in the sample because of their scores, in [0, 1]; rounded
            down, but at least one of each class.
        every: Epochs for which a sample is kept, at least 1.
        iterations: Rounds of `anomaly_scores`.
        classes: As in `anomaly_scores`.
        seed: Of the draws and orders.
        num_replicas: Processes that share an epoch. Needed where there are several: their number if each has a loader
            of its own, 1 if whatever makes the loader splits batches, as accelerate and the Trainer do.
        rank: This process, from 0 to num_replicas - 1; needed with num_replicas.
        drop_last: Leave out what does not fill all ranks, in place of repeating samples.
        group: Split the scoring over these ranks; every one of them must then begin the same epochs. None: each process
            scores all. Needed for a function where there are several processes: models on two ranks may differ in
            their last bits, and samples with them.

    Raises:
        ValueError: If an argument is out of range, or features and labels do not fit; also later, of a function's
            features. Where there are several processes, if nobody said how they share an epoch.

    Source: that the sample is made of LAD's scores, again and again, and has the most anomalous of each class, is in
    the paper's abstract. Its size, the number of anomalous samples, how the others are drawn and how often it is made
    are unverified: the paper was not at hand. ``sample``, ``anomalous`` and ``every`` stand for other readings.
    """

    def __init__(
        self,
        features: Any | Callable[[], Any],
        labels: Any = None,
        *,
        sample: float = 0.5,
        anomalous: float = 0.1,
        every: int = 1,
        iterations: int = 3,
        classes: int | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        drop_last: bool = False,
        group: dist.ProcessGroup | None = None,
    ):
        _check_fraction("sample", sample, above=0.0)
        _check_fraction("anomalous", anomalous)
        for name, number, least in (("every", every, 1), ("iterations", iterations, 1), ("seed", seed, 0)):
            _check_whole(name, number, least)
        if labels is None and (callable(features) or group is not None):
            raise ValueError("labels must be given with a function or a group: they say how many samples there are")
        self.features = features if callable(features) else as_features(features)
        whole = len(self.features) if isinstance(self.features, torch.Tensor) and group is None else None
        self.labels = as_labels(labels, whole, classes).cpu()
        self.samples = len(self.labels)
        self.sample, self.anomalous, self.every, self.iterations = sample, anomalous, every, iterations
        self.classes, self.seed, self.drop_last, self.group = classes, seed, drop_last, group
        self._shared_by = num_replicas
        self.num_replicas, self.rank = _replicas(num_replicas, rank)
        self._check_group()
        self._check_sizes()
        self.epoch = 0
        self._scores: torch.Tensor | None = None
        self._made: tuple[int, torch.Tensor] | None = None
        self._taken = 0  # by this rank, of this epoch
        self._resume_at = 0
        self._is_over = False

    @property
    def size(self) -> int:
        """Samples in the training sample."""
        return max(1, round(self.sample * self.samples))

    def __len__(self) -> int:
        """Indices that this rank takes in a whole epoch."""
        share = self.size / self.num_replicas
        return math.floor(share) if self.drop_last else math.ceil(share)

    def __iter__(self) -> Iterator[int]:
        """Go over this epoch, or what is left of it after `load_state_dict`.

        An epoch that was gone over to its end is followed by the next one, also without `set_epoch`.
        """
        _replicas(self._shared_by, self.rank)
        self._check_group()
        if self._is_over:
            self.set_epoch(self.epoch + 1)
        self._taken, self._resume_at = self._resume_at, 0
        order = self._order()
        for index in order[self._taken :]:
            self._taken += 1
            self._is_over = self._taken == len(order)
            yield index
        self._is_over = True

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; in the one that a loaded state was in, to where it was."""
        _check_whole("epoch", epoch, 0)
        if epoch != self.epoch:
            self.epoch, self._resume_at = epoch, 0
        self._taken, self._is_over = 0, False

    def training_sample(self) -> torch.Tensor:
        """Indices of this epoch's sample, int64 (size,), ascending; made if it is not yet."""
        period = self.epoch // self.every
        if self._made is None or self._made[0] != period:
            self._made = period, self._make(period)
        return self._made[1]

    def state_dict(self, taken: int | None = None) -> dict[str, Any]:
        """Return where the sampler is, and the sample, to go on from in a new process.

        Args:
            taken: Indices of this epoch that this rank is done with; 0 if somebody else skips batches. None: those that
                were handed out, which is more where a loader with workers asks for batches ahead of the training.
        """
        if taken is not None:
            _check_whole("taken", taken, 0)
            if taken > len(self):
                raise ValueError(f"taken must be at most {len(self)}, what a rank takes in an epoch, got {taken}")
        settings = {name: getattr(self, name) for name in SETTINGS}
        period, indices = self._made or (None, None)
        here = (self._taken or self._resume_at) if taken is None else taken
        return {"epoch": self.epoch, "taken": here, "period": period, "indices": indices, "settings": settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another sampler of the same data and options was when `state_dict` was called.

        Raises:
            ValueError: If the options were others, or it is no state; nothing is changed then.
        """
        missing = [key for key in ("epoch", "taken", "period", "indices", "settings") if key not in state]
        if missing:
            raise ValueError(f"this is no state of a LadSampler: it lacks {', '.join(missing)}")
        for name in SETTINGS:
            theirs = state["settings"].get(name)
            if theirs != getattr(self, name):
                raise ValueError(
                    f"the state is of a sampler with {name}={theirs!r}, this one has {getattr(self, name)!r}"
                )
        self.epoch, self._resume_at, self._taken = state["epoch"], state["taken"], 0
        self._made = None if state["period"] is None else (state["period"], state["indices"])
        self._is_over = self._resume_at == len(self)

    # Making the sample and its order

    def _order(self) -> list[int]:
        """Return the epoch's indices for this rank."""
        sample = self.training_sample()
        order = sample[torch.randperm(len(sample), generator=self._generator("order", self.epoch))]
        total = len(self) * self.num_replicas
        repeated = order.repeat(math.ceil(total / len(order)))[:total]
        return repeated[self.rank :: self.num_replicas].tolist()

    def _make(self, period: int) -> torch.Tensor:
        chosen = torch.zeros(self.samples, dtype=torch.bool)
        by_score = self._scores_of_all().argsort(descending=True, stable=True)
        for label, count in self._anomalous_of_classes().items():
            chosen[by_score[self.labels[by_score] == label][:count]] = True
        others = (~chosen).nonzero().squeeze(1)
        drawn = torch.randperm(len(others), generator=self._generator("sample", period))
        chosen[others[drawn[: self.size - int(chosen.sum())]]] = True
        return chosen.nonzero().squeeze(1)

    def _scores_of_all(self) -> torch.Tensor:
        """The score of each sample of the data, on the CPU; kept, unless a function gives the features."""
        if self._scores is not None:
            return self._scores
        if self.group is not None:
            return self._keep(self._scores_of_ranks(self.group))
        features = self._current_features()
        if len(features) != self.samples:
            raise ValueError(f"features must have a row for each of the {self.samples} labels, got {len(features)}")
        return self._keep(anomaly_scores(features, self.labels, self.iterations, classes=self.classes).scores.cpu())

    def _current_features(self) -> torch.Tensor:
        return as_features(self.features()) if callable(self.features) else self.features

    def _scores_of_ranks(self, group: dist.ProcessGroup) -> torch.Tensor:
        features, rows = self._features_of_ranks(group)
        here = self.labels.split(rows)[dist.get_rank(group)]
        scores = anomaly_scores(features, here, self.iterations, group).scores.cpu()
        return torch.cat(_gathered(scores, group))

    def _features_of_ranks(self, group: dist.ProcessGroup) -> tuple[torch.Tensor, list[int]]:
        """Return the features of this rank's samples, and how many each rank has."""
        features, wrong = torch.empty(0), None
        try:
            features = self._current_features()
        except Exception as error:  # a rank that ends here would leave the others waiting
            wrong = error
        found = _gathered(f"{type(wrong).__name__}: {wrong}" if wrong else len(features), group)
        for rank, of_rank in enumerate(found):
            if isinstance(of_rank, str):
                raise ValueError(f"features of rank {rank} cannot be had: {of_rank}") from wrong
        if sum(found) != self.samples:
            raise ValueError(
                f"features must have {self.samples} rows over all ranks, one per label, got {found} by rank"
            )
        return features, found

    def _keep(self, scores: torch.Tensor) -> torch.Tensor:
        self._scores = None if callable(self.features) else scores
        return scores

    def _anomalous_of_classes(self) -> dict[int, int]:
        labels, counts = self.labels.unique(return_counts=True)
        chosen = [max(1, int(self.anomalous * count)) for count in counts.tolist()]
        return dict(zip(labels.tolist(), chosen, strict=True))

    def _check_group(self) -> None:
        if callable(self.features) and self.group is None and _several_processes():
            raise ValueError(
                "features is a function and there are several processes: give group, over which its rows are split, so "
                "that all have the same scores"
            )

    def _check_sizes(self) -> None:
        if not self.samples:
            raise ValueError("features and labels must have at least one sample")
        refuse_empty(self.labels.unique().tolist(), self.classes)
        anomalous = sum(self._anomalous_of_classes().values())
        if anomalous > self.size:
            raise ValueError(
                f"{anomalous} anomalous samples (anomalous={self.anomalous}, at least one of each class) do not fit "
                f"into a sample of {self.size} (sample={self.sample}): make sample larger or anomalous smaller"
            )
        if self.drop_last and self.size < self.num_replicas:
            raise ValueError(f"a sample of {self.size} leaves nothing for {self.num_replicas} ranks: drop_last=False")

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        # Texts, which random.Random hashes alike in every process, keep the draws of two epochs and seeds apart.
        return torch.Generator().manual_seed(random.Random(f"{purpose} {self.seed} {number}").getrandbits(63))


def _gathered(of_rank: Any, group: dist.ProcessGroup) -> list[Any]:
    """Return what each rank of the group has, in their order."""
    everyone = [of_rank] * dist.get_world_size(group)
    dist.all_gather_object(everyone, of_rank, group=group)
    return everyone


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _replicas(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """Return how many processes share an epoch, and which this is."""
    if num_replicas is None:
        if _several_processes():
            raise ValueError(
                "there are several processes: give num_replicas and rank, those of torch.distributed if each process "
                "has a loader of its own, or 1 and 0 if accelerate, the Trainer or another splits the loader's batches"
            )
        if rank not in (None, 0):
            raise ValueError(f"rank needs num_replicas, got rank={rank!r} alone")
        return 1, 0
    _check_whole("num_replicas", num_replicas, 1)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < num_replicas:
        raise ValueError(f"rank must be a whole number from 0 to num_replicas - 1 = {num_replicas - 1}, got {rank!r}")
    return num_replicas, rank


def _check_fraction(name: str, value: Any, above: float | None = None) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1 or value == above:
        raise ValueError(f"{name} must be a fraction in {'[' if above is None else '('}0, 1], got {value!r}")


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
