"""What a checkpoint says of a batch that grows: what was read, and how far it has grown where the noise decides."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.errors import RecipeError
from ..configuration.phases import Phase

GROWTH = "batch_growth.json"
"""The file of a checkpoint from which a batch that grows goes on."""


def growth_state(checkpoint: Path, by_noise: bool = True) -> dict[str, Any]:
    """Return what `GrowingBatches.save` wrote.

    Args:
        checkpoint: to read.
        by_noise: its batch follows the gradient noise, whose averages must be there, too.

    Raises:
        RecipeError: there is no such file, or it cannot be read.
    """
    try:
        state = json.loads((checkpoint / GROWTH).read_text())
        counts = [state["phase"], state["read"]]
        if by_noise:
            rule, noise = state["rule"], state["rule"]["noise"]
            counts += [rule["doublings"], rule["updates"]]
            for name in ("signal", "noise", "weight"):
                noise[name] = float(noise[name])
        if any(type(count) is not int or count < 0 for count in counts) or not state["phase"]:
            raise ValueError(f"it has the counts {counts}")
        return state
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"cannot go on with the batch of {checkpoint / GROWTH}: {error or 'it is broken'}") from error


def has_read_all(checkpoint: Path, phases: Sequence[Phase]) -> bool:
    """Tell whether the run of a checkpoint whose batches follow the noise has come to the end of its last phase."""
    state = growth_state(checkpoint)
    return state["phase"] >= len(phases) and state["read"] >= phases[-1].sequences
