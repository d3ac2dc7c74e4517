"""Anomaly scores, and samplers made of them, are those of one process however the rows are split over ranks."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, skip_first_batches
from torch.utils.data import DataLoader

from trustratio.recipes.rules.anomalies import anomaly_scores
from trustratio.recipes.rules.anomaly_sampler import LadSampler

from ..references.anomalies import lad, made_up
from .pool import WorkerPool

SAMPLES, FEATURES, CLASSES = 211, 5, 3


def ranks_of_rows(split: str, ranks: int) -> np.ndarray:
    """Which rank has which row."""
    _, labels = made_up(SAMPLES, FEATURES, CLASSES)
    return {
        "blocks": np.arange(SAMPLES) * ranks // SAMPLES,
        "uneven": np.minimum(np.arange(SAMPLES) // 17, ranks - 1),
        "in turn": np.arange(SAMPLES) % ranks,
        "by class": labels % ranks,
        "all on the last": np.full(SAMPLES, ranks - 1),
    }[split]


def score(split: str, iterations: int, scale: float = 1.0) -> dict[str, Any]:
    """Runs on every rank."""
    x, labels = made_up(SAMPLES, FEATURES, CLASSES)
    mine = ranks_of_rows(split, dist.get_world_size()) == dist.get_rank()
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        scores, anomalous = anomaly_scores(scale * x[mine], labels[mine], iterations, dist.group.WORLD)
    return {"rows": mine, "scores": scores, "anomalous": anomalous, "all_reduces": all_reduce.call_count}


def together(answers: list[dict[str, Any]], what: str) -> torch.Tensor:
    whole = torch.zeros(SAMPLES, dtype=answers[0][what].dtype)
    for answer in answers:
        whole[torch.from_numpy(answer["rows"])] = answer[what]
    return whole


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("split", ["blocks", "uneven", "in turn", "by class", "all on the last"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_any_split_gives_the_scores_of_one_process(
    pool: WorkerPool, split: str, iterations: int, world_size: int
) -> None:
    """Bit for bit, and those of the reference but for rounding."""
    x, labels = made_up(SAMPLES, FEATURES, CLASSES)
    expected = anomaly_scores(x, labels, iterations)
    answers = pool.run(score, split, iterations)
    assert torch.equal(together(answers, "scores"), expected.scores)
    assert torch.equal(together(answers, "anomalous"), expected.anomalous)
    reference, anomalous = lad(x, labels, iterations)
    np.testing.assert_allclose(together(answers, "scores"), reference, rtol=1e-9, atol=1e-12)
    assert np.array_equal(together(answers, "anomalous"), anomalous)
    # Five in each round, and five more where the highest quarter is sought.
    assert {answer["all_reduces"] for answer in answers} <= {5 * iterations + 5 * cut for cut in range(iterations + 1)}


def score_equal(iterations: int) -> dict[str, Any]:
    """Runs on every rank: rows of few different numbers, so that equal scores lie at the border of the quarter."""
    x = np.array([[float(n % 4 == 0) * (n % 20), n % 5] for n in range(SAMPLES)])
    mine = np.arange(SAMPLES) % dist.get_world_size() == dist.get_rank()
    scores, anomalous = anomaly_scores(x[mine], iterations=iterations, group=dist.group.WORLD)
    whole = anomaly_scores(x, iterations=iterations)
    assert torch.equal(scores, whole.scores[mine])
    assert torch.equal(anomalous, whole.anomalous[mine])
    return {"anomalous": int(whole.anomalous.sum())}


@pytest.mark.parametrize("world_size", [2, 3])
def test_equal_scores_at_the_border(pool: WorkerPool, world_size: int) -> None:
    for answer in pool.run(score_equal, 1):
        assert 0 < answer["anomalous"] < SAMPLES // 4


class Unreadable:
    """What cannot be read for a reason that has nothing to do with numbers."""

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise MemoryError("no room for 8 TB")


def refused(case: str) -> str:
    """Runs on every rank: what the last one was given is wrong."""
    last = dist.get_rank() == dist.get_world_size() - 1
    x, labels = torch.ones(4, 2), torch.tensor([0, 0, 1, 1])
    options: dict[str, Any] = {}
    if last:
        x, labels, options = {
            "nan": (torch.tensor([[0.0, 1.0], [2.0, float("nan")]]), labels[:2], {}),
            "width": (torch.ones(4, 3), labels, {}),
            "length": (x, labels[:2], {}),
            "iterations": (x, labels, {"iterations": 2}),
            "classes": (x, torch.tensor([0, 0, 1, 2]), {}),
            "sparse": (x.to_sparse(), labels, {}),
            "another error": (Unreadable(), labels, {}),
        }[case]
    if case == "classes":
        options = {"classes": 4}
    try:
        anomaly_scores(x, labels, group=dist.group.WORLD, **options)
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("nan", "rank 1: features must be finite, got nan in row 1, column 1"),
        ("width", "features must have the same number of columns on every rank, got [2, 3] by rank"),
        ("length", "rank 1: labels must have one number per sample, shape (4,), got (2,)"),
        ("iterations", "iterations, classes, and whether there are labels must be the same on every rank"),
        (
            "sparse",
            "rank 1: features must be a dense tensor that holds its numbers, got a sparse one (torch.float32)",
        ),
        ("another error", "rank 1: MemoryError: no room for 8 TB"),
        ("classes", "every class from 0 to 3 must have a sample, got none of [3]"),
    ],
)
@pytest.mark.parametrize("world_size", [2])
def test_what_is_wrong_on_one_rank_is_said_on_all(pool: WorkerPool, case: str, message: str, world_size: int) -> None:
    assert pool.run(refused, case) == [message] * world_size


def nobody() -> list[str]:
    """Runs on every rank."""
    messages = []
    try:
        anomaly_scores(torch.ones(0, 2), group=dist.group.WORLD)
    except ValueError as error:
        messages.append(str(error))
    alone = dist.new_group([0])
    if dist.get_rank() == 1:
        for attempt in (anomaly_scores, LadSampler):
            try:
                attempt(torch.ones(3, 2), torch.zeros(3), group=alone)
            except ValueError as error:
                messages.append(str(error))
    return messages


@pytest.mark.parametrize("world_size", [2])
def test_no_rows_and_another_group(pool: WorkerPool, world_size: int) -> None:
    one, other = pool.run(nobody)
    assert one == ["features must have at least one row, on some rank, got none"]
    assert other == [*one, *["group must be a process group that this rank is in"] * 2]


# Samplers -----------------------------------------------------------------------------------------------------------

TABLE = {"sample": 0.4, "anomalous": 0.1, "every": 2, "seed": 3}


def sampled(split_scoring: bool, epochs: int) -> dict[str, Any]:
    """Runs on every rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x, labels = made_up(SAMPLES, FEATURES, CLASSES)
    where = {"num_replicas": ranks, "rank": rank}
    if split_scoring:
        rows = np.minimum(np.arange(SAMPLES) // 17, ranks - 1) == rank
        sampler = LadSampler(lambda: x[rows], labels, group=dist.group.WORLD, **where, **TABLE)
    else:
        sampler = LadSampler(x, labels, **where, **TABLE)
    loader = DataLoader(range(SAMPLES), batch_size=8, sampler=sampler)
    taken = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        taken.append(torch.cat(list(loader)).tolist())
    return {"taken": taken, "sample": sampler.training_sample().tolist()}


@pytest.mark.parametrize("split_scoring", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_epochs_of_one_process(pool: WorkerPool, split_scoring: bool, world_size: int) -> None:
    x, labels = made_up(SAMPLES, FEATURES, CLASSES)
    answers = pool.run(sampled, split_scoring, 3)
    alone = LadSampler(x, labels, num_replicas=1, rank=0, **TABLE)
    for epoch in range(3):
        alone.set_epoch(epoch)
        order = list(alone)
        parts = [answer["taken"][epoch] for answer in answers]
        share = -(-len(order) // world_size)
        assert [len(part) for part in parts] == [share] * world_size
        for rank, part in enumerate(parts):
            assert part == (order + order)[rank : share * world_size : world_size]
    assert all(answer["sample"] == alone.training_sample().tolist() for answer in answers)


def accelerated() -> dict[str, Any]:
    """Runs on every rank: accelerate splits the batches, and goes to the next epoch by itself, but after a resume."""
    accelerator = Accelerator(cpu=True)

    def prepared(state: dict[str, Any] | None = None) -> Any:
        x, labels = made_up(SAMPLES, FEATURES, CLASSES)
        sampler = LadSampler(x, labels, num_replicas=1, rank=0, **TABLE)
        if state is not None:
            sampler.load_state_dict(state)
        return sampler, accelerator.prepare(DataLoader(range(SAMPLES), batch_size=7, sampler=sampler))

    sampler, loader = prepared()
    epochs = [torch.cat(list(loader)).tolist() for _ in range(4)]
    sampler.set_epoch(1)
    _, again = prepared(sampler.state_dict(taken=0))
    resumed = []
    for epoch in range(1, 4):
        again.set_epoch(epoch)
        batches = skip_first_batches(again, 2) if epoch == 1 else again
        resumed.append(torch.cat(list(batches)).tolist())
    return {"epochs": epochs, "resumed": resumed}


@pytest.mark.parametrize("world_size", [2])
def test_accelerate_splits_the_batches(pool: WorkerPool, world_size: int) -> None:
    answers = pool.run(accelerated)
    x, labels = made_up(SAMPLES, FEATURES, CLASSES)
    alone = LadSampler(x, labels, num_replicas=1, rank=0, **TABLE)
    for epoch in range(4):
        alone.set_epoch(epoch)
        order = list(alone)
        parts = [answer["epochs"][epoch] for answer in answers]
        assert parts[0][:7] + parts[1][:7] + parts[0][7:14] == order[:21]
        assert set(parts[0] + parts[1]) == set(order)
    for answer in answers:
        assert answer["resumed"] == [answer["epochs"][1][14:], *answer["epochs"][2:]]


def sampler_errors() -> list[str]:
    """Runs on every rank."""
    x, labels = made_up(SAMPLES, FEATURES, CLASSES)
    rank, world = dist.get_rank(), dist.group.WORLD

    def fails() -> Any:
        if rank == 1:
            raise RuntimeError("out of memory")
        return x[:100]

    where = {"num_replicas": 2, "rank": rank, "group": world}
    attempts = [
        lambda: LadSampler(x, labels),
        lambda: LadSampler(lambda: x, labels, num_replicas=2, rank=rank),
        lambda: list(LadSampler(fails, labels, **where)),
        lambda: list(LadSampler(lambda: x[:100], labels, **where)),
        lambda: list(LadSampler(lambda: x[:106, : 3 + rank] if rank else x[:105, :3], labels, **where)),
    ]
    messages = []
    for attempt in attempts:
        try:
            attempt()
            messages.append("nothing")
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("world_size", [2])
def test_samplers_are_refused_on_all_ranks(pool: WorkerPool, world_size: int) -> None:
    answers = pool.run(sampler_errors)
    assert answers[0] == answers[1]
    several, alone, failed, rows, width = answers[0]
    assert several.startswith("there are several processes: give num_replicas and rank")
    assert alone.startswith("features is a function and there are several processes: give group")
    assert failed == "features of rank 1 cannot be had: RuntimeError: out of memory"
    assert rows == "features must have 211 rows over all ranks, one per label, got [100, 100] by rank"
    assert width == "features must have the same number of columns on every rank, got [3, 4] by rank"


DIFFERENCES = {
    "seed": "seed must be the same on every rank, got [3, 4] by rank",
    "anomalous": "anomalous must be the same on every rank, got [0.1, 0.2] by rank",
    "classes": "classes must be the same on every rank, got [None, 3] by rank",
    "epoch": "epoch must be the same on every rank, got [0, 1] by rank",
    "labels": "labels (by their fingerprint) must be the same on every rank, got ",
    "function": "callable(features) must be the same on every rank, got [False, True] by rank",
    "rank": "rank must be each number from 0 to num_replicas - 1 = 1 equally often, got [0, 0] by rank of the group",
    "rank of two loaders": "rank must be each number from 0 to num_replicas - 1 = 1 equally often, got [1, 1] by rank",
}


def differing() -> dict[str, str]:
    """Runs on every rank: the last one's sampler differs."""
    x, labels = made_up(SAMPLES, FEATURES, CLASSES)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    last = rank == ranks - 1
    mine = x[np.arange(SAMPLES) * ranks // SAMPLES == rank]
    messages = {}
    for case in [*DIFFERENCES, "nothing"]:
        options: dict[str, Any] = {**TABLE, "num_replicas": ranks, "rank": rank, "group": dist.group.WORLD}
        features, of_all = mine, labels
        if case.startswith("rank"):
            options["rank"] = 0 if case == "rank" else 1
        elif last:
            features = (lambda: mine) if case == "function" else mine
            of_all = labels[::-1] if case == "labels" else labels
            options.update(
                {"seed": {"seed": 4}, "anomalous": {"anomalous": 0.2}, "classes": {"classes": 3}}.get(case, {})
            )
        sampler = LadSampler(features, of_all, **options)
        sampler.set_epoch(int(last and case == "epoch"))
        try:
            list(sampler)
            messages[case] = "no message"
        except ValueError as error:
            messages[case] = str(error)
    return messages


@pytest.mark.parametrize("world_size", [2])
def test_ranks_that_differ_are_named_on_all(pool: WorkerPool, world_size: int) -> None:
    one, other = pool.run(differing)
    assert one == other
    assert one.pop("nothing") == "no message"
    for case, message in DIFFERENCES.items():
        assert one[case].startswith(message), case
