"""Sums over the groups since the last step, of all parameters in one table, so that few operations keep them.

A gradient is gone when the next hook runs: it is averaged, sharded, or added to others in place. So each is read when
it is seen, in as few operations as that takes: a copy in fp64, its norm, and its probes. What is then done with these
numbers is done for all parameters at once, when the backward pass is over.
"""

from __future__ import annotations

import torch

from .probes import PROBES, put_probes, widened

__all__ = ["GroupSums"]


class _Table:
    """The sums on one device, a row for each parameter.

    Attributes:
        seen: Of the groups since the totals were brought up to date, at most one of each parameter: its gradient's norm
            and probes, shape (rows, 1 + PROBES), fp64.
        waiting: The rows of `seen` that are in use.
        totals: Over the groups before: the norms, the probes, and the squares of the norms, (rows, 1 + PROBES + 1).
    """

    def __init__(self, rows: int, device: torch.device):
        self.seen = torch.zeros(rows, 1 + PROBES, dtype=torch.float64, device=device)
        self.totals = torch.zeros(rows, 1 + PROBES + 1, dtype=torch.float64, device=device)
        self.waiting: set[int] = set()

    def grown(self, rows: int) -> _Table:
        """The table itself, or one with more rows in its place."""
        if rows <= len(self.seen):
            return self
        larger = _Table(rows, self.seen.device)
        larger.seen[: len(self.seen)] = self.seen
        larger.totals[: len(self.totals)] = self.totals
        larger.waiting = self.waiting
        return larger

    def add_up(self) -> None:
        """Bring the totals up to date."""
        if self.waiting:
            norms = self.seen[:, 0]
            self.totals[:, :-1].add_(self.seen)
            self.totals[:, -1].addcmul_(norms, norms)
            self.seen.zero_()
            self.waiting.clear()

    def clear(self) -> None:
        self.seen.zero_()
        self.totals.zero_()
        self.waiting.clear()

    def forget(self, row: int) -> None:
        if row < len(self.seen):
            self.seen[row].zero_()
            self.totals[row].zero_()
            self.waiting.discard(row)


class GroupSums:
    """Of each parameter, by its row: its groups' norms, their squares, and their probes (see `probes`), added up."""

    def __init__(self) -> None:
        self._rows = 0
        self._tables: dict[torch.device, _Table] = {}  # parameters may be on several devices, and move

    def new_row(self) -> int:
        """The row of another parameter."""
        self._rows += 1
        return self._rows - 1

    def see(self, row: int, gradient: torch.Tensor) -> None:
        """Add the gradient of one group; reads it now and keeps nothing of it."""
        wide = widened(gradient.unsqueeze(0))
        table = self._table(wide.device)
        if row in table.waiting:
            table.add_up()
        table.waiting.add(row)
        numbers = table.seen[row : row + 1]
        torch.linalg.vector_norm(wide, out=numbers[0, 0])
        put_probes(wide, numbers[:, 1:])

    def add_up(self) -> None:
        """Add what was seen to the sums, e.g. when a backward pass is over; not needed before they are read."""
        for table in self._tables.values():
            table.add_up()

    def clear(self) -> None:
        """Forget all groups."""
        for table in self._tables.values():
            table.clear()

    def forget(self, row: int) -> None:
        """Forget the groups of one parameter."""
        for table in self._tables.values():
            table.forget(row)

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """The sums of these rows: norms, squares and probes, shape (1 + 1 + PROBES, rows), fp64, a copy.

        Args:
            rows: int64, on the device where they are wanted.
        """
        self.add_up()
        found = torch.zeros(len(rows), 1 + PROBES + 1, dtype=torch.float64, device=rows.device)
        for device in list(self._tables):
            totals = self._table(device).totals
            found += totals.index_select(0, rows.to(totals.device)).to(found.device)
        return torch.cat([found[:, :1], found[:, -1:], found[:, 1:-1]], dim=1).T

    def not_finite(self, device: torch.device) -> torch.Tensor:
        """0, or NaN if any gradient of any parameter was not finite; 0-d, fp64."""
        self.add_up()
        totals = [table.totals[:, -1].sum().to(device) for table in self._tables.values()]
        return 0 * torch.stack(totals).sum() if totals else torch.zeros((), dtype=torch.float64, device=device)

    def _table(self, device: torch.device) -> _Table:
        known = self._tables.get(device)
        table = self._tables[device] = _Table(self._rows, device) if known is None else known.grown(self._rows)
        return table
