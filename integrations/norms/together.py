"""Says what may be wrong where a measured step waits for other ranks: while it waits, and when that was in vain."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trustratio.optimizers.sharding.data_parallel import processes
from trustratio.optimizers.sharding.layout import LayoutError

__all__ = ["together"]

SECONDS = 60.0
"""After which a collective of a few numbers is taken to wait for ranks that may never come."""
ALIKE = "all ranks make LayerNorms, with the same `every`, and count the same steps; is it made on one rank alone?"


@contextmanager
def together(step: int) -> Iterator[None]:
    """Within it there are collectives of a measured step, by its number.

    Raises:
        LayoutError: If one fails.
    """
    if processes() == 1:
        yield
        return
    waits = f"LayerNorms has waited for other ranks for {SECONDS:g} seconds, in its step {step}: {ALIKE}"
    timer = threading.Timer(SECONDS, warnings.warn, (waits,), {"stacklevel": 2})
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LayoutError | torch.OutOfMemoryError):
            raise
        raise LayoutError(
            f"LayerNorms could not measure its step {step} with other ranks: {ALIKE} ({error})"
        ) from error
    finally:
        timer.cancel()
