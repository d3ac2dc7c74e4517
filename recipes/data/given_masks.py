"""Tokens together with masks that the data came with, in one number each.

The low 16 bits hold the original id. The high ones hold 0 where nothing is predicted, else 1 + the id that the model is
shown there, so that masks go through shards and rows of any length as the tokens do.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

AS_GIVEN = "as_given"
"""What `data.masks` says for them."""

MOST_TOKENS = 2**16 - 1
"""Of a vocabulary whose ids can be held so."""

_BITS = 16
_LOW = 2**_BITS - 1


def pack(sample: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return a sample (2, tokens) of original ids, and of shown ones or -1, as uint32 (tokens,)."""
    return (sample[0] | (sample[1] + 1) << _BITS).astype(np.uint32)


def original(packed: NDArray[np.unsignedinteger]) -> NDArray[np.unsignedinteger]:
    """Return the original ids, in the same shape."""
    return packed & np.uint32(_LOW)


def shown(packed: NDArray[np.unsignedinteger]) -> NDArray[np.int64]:
    """Return the ids that the model is shown where something is predicted, -1 elsewhere, in the same shape."""
    return (packed >> np.uint32(_BITS)).astype(np.int64) - 1
