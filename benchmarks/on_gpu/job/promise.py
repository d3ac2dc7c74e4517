"""What the plan says that a run needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trustratio.recipes.configuration.command_line import parse_command_line
from trustratio.recipes.configuration.phases import phases_of
from trustratio.recipes.planning.memory import model_size
from trustratio.recipes.planning.phase_plan import Machine, plan_phase

__all__ = ["promised_memory"]


def promised_memory(arguments: Sequence[str]) -> dict[str, Any]:
    """Bytes of one GPU by part, as `recipes/plan.py` promises them for these arguments of `recipes/bert.py`.

    "bytes" is what tensors take, which torch can tell; "with_reserve" what the plan sets aside besides.
    """
    config = parse_command_line(arguments).config
    (phase,) = phases_of(config)
    machine = Machine()
    plan = plan_phase(model_size(config), config, phase, 1, machine, phase.micro_batch)
    parts = {part.name: int(part.bytes) for part in plan.memory}
    return {"parts": parts, "bytes": int(plan.total - machine.reserve), "with_reserve": int(plan.total)}
