"""What the studies share: batches in an order of their own, the area under the ROC curve, and curves of few points."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from ..rules.anomaly_sampler import LadSampler


def row_order(rows: int, batch: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield the rows of each batch without end, each epoch in a new order; a batch may reach into the next epoch.

    Args:
        rows: of the table.
        batch: rows per update; int64 (batch,) is yielded.
        seed: of the order.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.empty(0, dtype=torch.long, device="cpu")
    while True:
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(rows, generator=generator, device="cpu")])
        yield order[:batch]
        order = order[batch:]


def passes(sampler: LadSampler, batch: int) -> Iterator[torch.Tensor]:
    """Yield the rows of each batch without end, a sampler's epochs in turn; a batch may reach into the next.

    Args:
        sampler: its epochs are set, from the one it is in.
        batch: rows per update; int64 (batch,) is yielded.
    """
    rows, epochs = torch.empty(0, dtype=torch.long, device="cpu"), itertools.count(sampler.epoch)
    while True:
        while len(rows) < batch:
            sampler.set_epoch(next(epochs))
            rows = torch.cat([rows, torch.tensor(list(sampler), device="cpu")])
        yield rows[:batch]
        rows = rows[batch:]


def area_under_roc(logits: torch.Tensor, positive: torch.Tensor) -> float:
    """Return the chance that a positive sample has a higher logit than another one.

    Args:
        logits: shape (samples,).
        positive: bool (samples,), neither all nor none.
    """
    ranks = torch.empty_like(logits, dtype=torch.float64)
    ranks[logits.argsort()] = torch.arange(1, len(logits) + 1, dtype=torch.float64, device=logits.device)
    count = int(positive.sum())
    below = ranks[positive].sum().item() - count * (count + 1) / 2
    return below / (count * (len(logits) - count))


def thinned(values: Sequence[float], most: int, digits: int) -> list[float]:
    """Return every n-th value, about `most` of them (fewer than twice as many), rounded to `digits` decimals."""
    step = max(1, len(values) // most)
    return [round(value, digits) for value in values[::step]]
