"""What a data worker does that sleeps; apart from the other faults, so that it starts with few imports."""

from __future__ import annotations

import time
from typing import Any

from trustratio.recipes.data import feed


class SleepySteps(feed._Steps):
    """Micro-batches, of which one step's never come."""

    asleep = -1

    def __getitem__(self, step: int) -> Any:
        """Return a step's micro-batches."""
        if step == self.asleep:
            time.sleep(10_000)
        return super().__getitem__(step)
