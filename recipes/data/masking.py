"""Dynamic masking for masked language modelling, computed from a hash of (seed, epoch, row, position).

No random-number stream is kept: the mask of a row depends on nothing but these numbers, so it is the same at every
rank count, micro-batch size and after a resume, and it differs from epoch to epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from .wordpiece import Vocabulary

VALIDATION_EPOCH = 2**63 - 1
"""Epoch number that validation masks are drawn with: fixed, and never reached by training."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SHARE_MASK, _SHARE_RANDOM = 0.8, 0.1


@dataclass
class MaskedBatch:
    """One micro-batch.

    Attributes:
        input_ids: int64 (sequences, length), with masked and replaced tokens.
        positions: int64 (masked,), indices into the flattened input_ids, ascending.
        labels: int64 (masked,), the original tokens at `positions`.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> MaskedBatch:
        """Return the batch on `device`."""
        move = (t.to(device, non_blocking=True) for t in (self.input_ids, self.positions, self.labels))
        return MaskedBatch(*move)

    def keep(self, kept: torch.Tensor) -> MaskedBatch:
        """Return the batch with some of its predictions only: those where the boolean (masked,) is true."""
        return MaskedBatch(self.input_ids, self.positions[kept], self.labels[kept])


def splitmix64(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64-bit counters into 64 random-looking bits (the output function of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = value + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _position_keys(seed: int, epoch: int, rows: NDArray[np.int64], length: int) -> NDArray[np.uint64]:
    """Return one 64-bit hash per (row, position)."""
    key = splitmix64(np.asarray([seed % 2**64], dtype=np.uint64))
    key = splitmix64(key ^ np.uint64(epoch % 2**64))
    keys = splitmix64(key ^ rows.astype(np.uint64))[:, None]
    return splitmix64(keys ^ np.arange(length, dtype=np.uint64)[None, :])


def _draw(keys: NDArray[np.uint64], draw: int) -> NDArray[np.uint64]:
    """Return 64 random-looking bits per key; `draw` separates several draws at the same position."""
    return splitmix64(keys ^ np.uint64(draw))


def _uniform(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return float64 in [0, 1), from the 53 high bits."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def hashed_uniform(seed: int, epoch: int, rows: NDArray[np.int64], length: int, draw: int) -> NDArray[np.float64]:
    """Return float64 (rows, length) in [0, 1): the numbers that decide on masks (draw 0) and replacements (1)."""
    return _uniform(_draw(_position_keys(seed, epoch, rows, length), draw))


def masked_as_given(tokens: NDArray[np.int64], shown: NDArray[np.int64]) -> MaskedBatch:
    """Mask tokens as their source did.

    Args:
        tokens: int64 (sequences, length), the original ids.
        shown: int64 (sequences, length), the ids at predicted positions, -1 elsewhere.
    """
    positions = np.flatnonzero(shown >= 0)
    masked = np.where(shown >= 0, shown, tokens)
    labels = tokens.reshape(-1)[positions]
    return MaskedBatch(torch.from_numpy(masked), torch.from_numpy(positions), torch.from_numpy(labels))


def mask_sequences(
    tokens: NDArray[np.int64],
    rows: NDArray[np.int64],
    epoch: int,
    seed: int,
    vocabulary: Vocabulary,
    probability: float,
) -> MaskedBatch:
    """Choose tokens with `probability`; of those 80 % become the mask, 10 % a random token and 10 % stay.

    Args:
        tokens: int64 (sequences, length), the packed rows.
        rows: int64 (sequences,), the rows' indices in the data set; they and the epoch seed the draws.
        epoch: pass over the data, or VALIDATION_EPOCH.
        seed: of the run.
        vocabulary: ids that may not be chosen, and the replacements.
        probability: share of the ordinary tokens that are predicted.
    """
    keys = _position_keys(seed, epoch, rows, tokens.shape[1])
    special = np.zeros(int(max(tokens.max(initial=0), vocabulary.special.max(initial=0))) + 1, dtype=bool)
    special[vocabulary.special] = True
    positions = np.flatnonzero((_uniform(_draw(keys, 0)) < probability) & ~special[tokens])
    labels = tokens.reshape(-1)[positions]
    keys = keys.reshape(-1)[positions]  # the other two draws matter at the chosen positions alone
    action = _uniform(_draw(keys, 1))
    drawn = vocabulary.ordinary[(_draw(keys, 2) % np.uint64(len(vocabulary.ordinary))).astype(np.int64)]
    masked = tokens.astype(np.int64)
    masked.reshape(-1)[positions] = np.where(
        action < _SHARE_MASK, vocabulary.mask_id, np.where(action < _SHARE_MASK + _SHARE_RANDOM, drawn, labels)
    )
    return MaskedBatch(torch.from_numpy(masked), torch.from_numpy(positions), torch.from_numpy(labels.astype(np.int64)))
