"""Writes the table in optimizers.md from the registry: python docs/optimizer_table.py."""

from __future__ import annotations

from pathlib import Path

import torch

from trustratio.optimizers import OPTIMIZERS, create_optimizer
from trustratio.optimizers.registry import OptimizerEntry

PAGE = Path(__file__).with_name("optimizers.md")
BEGIN, END = "<!-- table: written by optimizer_table.py -->\n", "<!-- end of table -->"
HEADER = (
    "| name | class | state per element | state per layer | all-reduces per step() | all-reduces if whole | extra wire "
    "| paper |\n|---|---|---|---|---|---|---|---|\n"
)


def row(name: str, entry: OptimizerEntry) -> str:
    optimizer = create_optimizer(name, [torch.nn.Parameter(torch.ones(1))], lr=1.0)
    cells = (
        f"`{name}`",
        entry.optimizer_class.__name__,
        ", ".join(f"`{key}`" for key in optimizer.element_state) or "none",
        ", ".join(f"`{key}`" for key in optimizer.layer_state),
        str(entry.collectives),
        str(entry.unsharded_collectives),
        entry.extra_wire,
        entry.paper,
    )
    return f"| {' | '.join(cells)} |\n"


def table() -> str:
    return HEADER + "".join(row(name, entry) for name, entry in OPTIMIZERS.items())


def written(page: str) -> str:
    """Return the page with its table replaced by the registry's."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
