"""LIIT: train on a sample of the data that has the most anomalous of every class (Guggilam, Chandola, Patra 2023)."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Sampler

from .anomalies import anomaly_scores
from .labelled_features import as_features, as_labels, as_whole, fingerprint, refuse_empty, refuse_other_groups

__all__ = ["LadSampler"]

SETTINGS = ("samples", "sample", "anomalous", "every", "iterations", "seed", "num_replicas", "drop_last")
"""What must be the same where a state is loaded, and on all ranks of a group."""

DATA = ("labels", "features")
"""What of the data a state has fingerprints of."""


class LadSampler(Sampler[int]):
    r"""Indices of a training sample that is made anew every few epochs, after LIIT (arXiv 2303.00954).

    The sample has of each class the members with the highest `anomaly_scores`, a fraction ``anomalous`` of them and at
    least one, and is filled up to a fraction ``sample`` of the data with others, drawn uniformly without replacement.
    Epochs from 0 to ``every`` - 1 go over one sample, each in an order of its own; then it is made anew, with other
    uniform draws, and with new scores if ``features`` is a function. An epoch is one pass over the sample.

    A pass goes over the epoch that `set_epoch` named last, however far passes before it went and whatever workers ask
    for ahead: call it before each. Without it a second pass repeats the indices of the first, and warns.

    Order and sample depend on seed, epoch and scores alone, so they are the same on all ranks. Rank r of n takes the
    places r, r + n, ... of each epoch's order, which is filled up from its start, as `DistributedSampler` does.

    Args:
        features: (samples, features), or a function that returns them, called whenever the sample is made: e.g. what
            the model makes of the data by now. A table is not copied: leave it as it is. With ``group`` those of this
            rank's samples, which are consecutive and follow those of the rank before.
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
            scores all, and nothing compares them. Needed for a function where there are several processes: models on
            two ranks may differ in their last bits, and samples with them.

    Raises:
        ValueError: If an argument is out of range, or features and labels do not fit; also later, of a function's
            features. Where there are several processes, if nobody said how they share an epoch. Where a group scores,
            on all of its ranks, if they differ in labels, options or epoch, or their rank numbers leave out indices.

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
        refuse_other_groups(group)
        self.sample = _fraction("sample", sample, above=0.0)
        self.anomalous = _fraction("anomalous", anomalous)
        self.every, self.iterations = as_whole("every", every, 1), as_whole("iterations", iterations, 1)
        self.seed = as_whole("seed", seed, 0)
        self.classes = None if classes is None else as_whole("classes", classes, 1)
        self.drop_last, self.group = bool(drop_last), group
        if labels is None and (callable(features) or group is not None):
            raise ValueError("labels must be given with a function or a group: they say how many samples there are")
        self.features = features if callable(features) else as_features(features)
        whole = len(self.features) if isinstance(self.features, torch.Tensor) and group is None else None
        self.labels = as_labels(labels, whole, self.classes).cpu()
        self.samples = len(self.labels)
        self._shared_by = num_replicas
        self.num_replicas, self.rank = _replicas(num_replicas, rank)
        self._check_group()
        self._check_sizes()
        self.epoch = 0
        self._scores: torch.Tensor | None = None
        self._made: tuple[int, torch.Tensor] | None = None
        self._fingerprints: dict[str, str | None] | None = None
        self._start = 0  # of passes over this epoch
        self._taken = 0  # by that pass over it which handed out an index last
        self._is_new = True  # until a pass over it begins

    @property
    def size(self) -> int:
        """Samples in the training sample."""
        return max(1, round(self.sample * self.samples))

    def __len__(self) -> int:
        """Indices that this rank takes in a whole epoch."""
        share = self.size / self.num_replicas
        return math.floor(share) if self.drop_last else math.ceil(share)

    def __iter__(self) -> Iterator[int]:
        """Begin a pass over this epoch, or over what `load_state_dict` left of it; passes do not disturb each other."""
        _replicas(self._shared_by, self.rank)
        self._check_group()
        if not self._is_new:
            what = "nothing is left of" if self._start == len(self) else "another pass over the same indices of"
            warnings.warn(f"{what} epoch {self.epoch}: call set_epoch(epoch) before each pass", stacklevel=2)
        self._is_new = False
        return self._pass(self.epoch, self._order(), self._start)

    def _pass(self, epoch: int, order: list[int], taken: int) -> Iterator[int]:
        for index in order[taken:]:
            taken += 1
            if epoch == self.epoch:
                self._taken = taken
            yield index

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; in the one that a loaded state was in, to where it was.

        That place is kept, for all passes over its epoch, until another epoch is set.
        """
        epoch = as_whole("epoch", epoch, 0)
        if epoch != self.epoch:
            self.epoch, self._start = epoch, 0
        self._taken, self._is_new = self._start, True

    def training_sample(self) -> torch.Tensor:
        """Indices of this epoch's sample, int64 (size,), ascending; made if it is not yet."""
        period = self.epoch // self.every
        if self._made is None or self._made[0] != period:
            self._made = period, self._make(period)
        return self._made[1]

    def state_dict(self, taken: int | None = None) -> dict[str, Any]:
        """Return where the sampler is, and the sample, to go on from in a new process.

        Args:
            taken: Indices of this epoch that this rank is done with, those before a resume among them; 0 if somebody
                else skips batches. More than there are, as batches x batch size may be, mean all. None: those that the
                pass which handed out an index last has handed out, which is more than the training is done with where
                a loader with workers asks for batches ahead.
        """
        here = self._taken if taken is None else min(as_whole("taken", taken, 0), len(self))
        settings = {name: getattr(self, name) for name in SETTINGS}
        period, indices = self._made or (None, None)
        where = {"epoch": self.epoch, "taken": here, "period": period, "indices": indices}
        return {**where, "settings": settings, **self._fingerprints_of_data()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another sampler of the same data and options was when `state_dict` was called.

        Raises:
            ValueError: If data or options were others, or it is no state; nothing is changed then. Features are
                compared where both samplers have a table of all of them: neither a function nor a group's.
        """
        missing = [key for key in ("epoch", "taken", "period", "indices", "settings", *DATA) if key not in state]
        if missing:
            raise ValueError(f"this is no state of a LadSampler: it lacks {', '.join(missing)}")
        for name in SETTINGS:
            theirs = state["settings"].get(name)
            if theirs != getattr(self, name):
                raise ValueError(
                    f"the state is of a sampler with {name}={theirs!r}, this one has {getattr(self, name)!r}"
                )
        for name, here in self._fingerprints_of_data().items():
            if None not in (here, state[name]) and here != state[name]:
                raise ValueError(f"the state is of a sampler of other {name}: it goes on with the same numbers only")
        self.epoch, self._start = state["epoch"], state["taken"]
        self._taken, self._is_new = self._start, self._start < len(self)
        self._made = None if state["period"] is None else (state["period"], state["indices"])

    def _fingerprints_of_data(self) -> dict[str, str | None]:
        if self._fingerprints is None:
            table = None if callable(self.features) or self.group is not None else fingerprint(self.features)
            self._fingerprints = {"labels": fingerprint(self.labels), "features": table}
        return self._fingerprints

    # Making the sample and its order

    def _order(self) -> list[int]:
        """Return the epoch's indices for this rank."""
        sample = self.training_sample()
        order = sample[torch.randperm(len(sample), generator=self._generator("order", self.epoch), device="cpu")]
        total = len(self) * self.num_replicas
        repeated = order.repeat(math.ceil(total / len(order)))[:total]
        return repeated[self.rank :: self.num_replicas].tolist()

    def _make(self, period: int) -> torch.Tensor:
        chosen = torch.zeros(self.samples, dtype=torch.bool, device="cpu")
        by_score = self._scores_of_all().argsort(descending=True, stable=True)
        for label, count in self._anomalous_of_classes().items():
            chosen[by_score[self.labels[by_score] == label][:count]] = True
        others = (~chosen).nonzero().squeeze(1)
        drawn = torch.randperm(len(others), generator=self._generator("sample", period), device="cpu")
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
        features, wrong = torch.empty(0, device="cpu"), None
        try:
            features = self._current_features()
        except Exception as error:  # a rank that ends here would leave the others waiting
            wrong = error
        message = wrong and f"{type(wrong).__name__}: {wrong}"
        messages, rows, options = zip(*_gathered((message, len(features), self._options()), group), strict=True)
        for rank, of_rank in enumerate(messages):
            if of_rank is not None:
                raise ValueError(f"features of rank {rank} cannot be had: {of_rank}") from wrong
        self._compare(options)
        if sum(rows) != self.samples:
            raise ValueError(
                f"features must have {self.samples} rows over all ranks, one per label, got {list(rows)} by rank"
            )
        return features, list(rows)

    def _options(self) -> dict[str, Any]:
        """What a group's ranks compare."""
        options = {name: getattr(self, name) for name in (*SETTINGS, "classes", "epoch", "rank")}
        labels = self._fingerprints_of_data()["labels"]
        return {**options, "labels (by their fingerprint)": labels, "callable(features)": callable(self.features)}

    def _compare(self, options: Sequence[dict[str, Any]]) -> None:
        """Raise ValueError if ranks would draw different samples, or not take turns."""
        for name in options[0]:
            found = [of_rank[name] for of_rank in options]
            if name != "rank" and any(value != found[0] for value in found):
                raise ValueError(f"{name} must be the same on every rank, got {found} by rank")
        ranks = [of_rank["rank"] for of_rank in options]
        each, rest = divmod(len(ranks), self.num_replicas)
        if not rest and sorted(ranks) != sorted([*range(self.num_replicas)] * each):
            raise ValueError(
                f"rank must be each number from 0 to num_replicas - 1 = {self.num_replicas - 1} equally often, "
                f"got {ranks} by rank of the group"
            )

    def _keep(self, scores: torch.Tensor) -> torch.Tensor:
        self._scores = None if callable(self.features) else scores
        return scores

    def _anomalous_of_classes(self) -> dict[int, int]:
        labels, counts = self.labels.unique(return_counts=True)
        # In floats 0.29 x 100 lies just below 29.
        chosen = [max(1, math.floor(self.anomalous * count * (1 + 1e-12))) for count in counts.tolist()]
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
        return torch.Generator("cpu").manual_seed(random.Random(f"{purpose} {self.seed} {number}").getrandbits(63))


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
    replicas, place = as_whole("num_replicas", num_replicas, 1), as_whole("rank", rank, 0)
    if place >= replicas:
        raise ValueError(f"rank must be a whole number from 0 to num_replicas - 1 = {replicas - 1}, got {rank!r}")
    return replicas, place


def _fraction(name: str, value: Any, above: float | None = None) -> float:
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not 0 <= number <= 1 or number == above:
        raise ValueError(f"{name} must be a fraction in {'[' if above is None else '('}0, 1], got {value!r}")
    return number
