"""What a checkpoint says of a batch that grows, and of the phase that it was written in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.errors import RecipeError
from ..configuration.phases import Phase
from ..runs.checkpoints import describe_checkpoint

GROWTH = "batch_growth.json"
"""The file of a checkpoint from which a batch that grows goes on."""


def growth_state(checkpoint: Path) -> dict[str, Any]:
    """Return what `GrowingBatches.save` wrote.

    Raises:
        RecipeError: there is no such file, or it cannot be read.
    """
    try:
        state = json.loads((checkpoint / GROWTH).read_text())
        counts = [state["phase"], state["read"], *_noise_counts(state)]
        if any(type(count) is not int or count < 0 for count in counts) or not state["phase"]:
            raise ValueError(f"it has the counts {counts}")
        return state
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"cannot go on with the batch of {checkpoint / GROWTH}: {error or 'it is broken'}") from error


def _noise_counts(state: dict[str, Any]) -> list[Any]:
    """Return the counts of the rule by which a batch follows the noise, whose averages become numbers here."""
    if "rule" not in state:
        return []
    rule, noise = state["rule"], state["rule"]["noise"]
    for name in ("signal", "noise", "weight"):
        noise[name] = float(noise[name])
    return [rule["doublings"], rule["updates"]]


def has_read_all(checkpoint: Path, phases: Sequence[Phase]) -> bool:
    """Tell whether the run of a checkpoint whose batches follow the noise has come to the end of its last phase."""
    state = growth_state(checkpoint)
    return state["phase"] >= len(phases) and state["read"] >= phases[-1].sequences


def trained_phase(checkpoint: Path, phases: Sequence[Phase]) -> Phase:
    """Return the phase of the last update before a checkpoint: at the border, the one that has just ended."""
    if (checkpoint / GROWTH).is_file():
        return phases[min(growth_state(checkpoint)["phase"], len(phases)) - 1]
    step = describe_checkpoint(checkpoint)["step"]
    return next((phase for phase in phases if step <= phase.last), phases[-1])
