"""Leaving out of an update's loss the masked tokens that the model predicts best already: `data.discard_smallest`.

The abstract of Gao, Zhong 2020 (arXiv 2012.08795) has it: samples with small losses are discarded. How the paper does
it is unverified. A sample is a masked token here: the loss is a mean over them, each is a classification
of its own, and how well a sequence as a whole is predicted depends on which two or twenty of its tokens are masked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from ..common.progress import PROGRESS
from ..data.masking import MaskedBatch
from ..rules.large_batch import smallest_kept_loss
from .engines import Observed


def without_smallest_losses(
    engine: Observed, batches: Sequence[MaskedBatch], discard: float
) -> tuple[list[MaskedBatch], int]:
    """Drop the predictions with the smallest losses of the whole global batch from an update (collective).

    All losses are computed first, in a pass without gradients. The mean over what is left, and so the gradient, is the
    same however the batch is cut into micro-batches and ranks, as long as rounding does not change the order of losses.

    Args:
        engine: in training mode. Its random state is left as it was found, so that the passes that follow draw the same
            dropout masks.
        batches: this rank's micro-batches of the update, on the host.
        discard: share of the predictions to drop, rounded down to whole ones; ties are kept, and NaN.

    Returns:
        The micro-batches with what is kept, and the number of predictions before, over all ranks.
    """
    losses = _losses(engine, batches)
    predicted = int(engine.sum_over_ranks(torch.tensor([len(losses)], device="cpu")))
    kept = ~(losses < smallest_kept_loss(losses, discard, predicted, engine.sum_over_ranks))
    parts = kept.split([len(batch.labels) for batch in batches])
    return [batch.keep(part) for batch, part in zip(batches, parts, strict=True)], predicted


def _losses(engine: Observed, batches: Sequence[MaskedBatch]) -> torch.Tensor:
    """Return the losses of all predictions of all micro-batches, on the host."""
    with torch.no_grad(), _random_state_kept(engine.device):
        losses = []
        for batch in batches:
            losses.append(engine.losses(batch.to(engine.device)).float())
            PROGRESS.move()
        return torch.cat(losses).cpu()


def _random_state_kept(device: torch.device) -> contextlib.AbstractContextManager[None]:
    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)
