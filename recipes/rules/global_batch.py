"""Split a global batch, given in sequences, into micro-batches, accumulation steps and ranks."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.errors import RecipeError


@dataclass(frozen=True)
class BatchPlan:
    """One optimizer step: `ranks` ranks each run `accumulation` micro-batches of `micro` sequences."""

    micro: int
    accumulation: int
    ranks: int

    @property
    def sequences(self) -> int:
        """Sequences in one optimizer step over all ranks."""
        return self.micro * self.accumulation * self.ranks

    def describe(self, sequence_length: int) -> str:
        """Return the one line that says how the global batch is made."""
        tokens = self.sequences * sequence_length
        return (
            f"global = micro x accum x ranks = {self.micro} x {self.accumulation} x {self.ranks} = "
            f"{self.sequences:,} sequences ({tokens:,} tokens)"
        )


def plan_batch(global_batch: int, micro_batch: int, ranks: int, option: str = "--micro_batch ") -> BatchPlan:
    """Derive the accumulation steps of a global batch.

    Args:
        global_batch: sequences per optimizer step over all ranks.
        micro_batch: sequences per rank in one forward and backward pass.
        ranks: data-parallel processes.
        option: how the micro-batch is set, for the error message; its value follows directly.

    Raises:
        RecipeError: the global batch is no multiple of micro_batch x ranks; the nearest possible ones are named.
    """
    unit = micro_batch * ranks
    if global_batch % unit == 0:
        return BatchPlan(micro_batch, global_batch // unit, ranks)
    below = global_batch // unit * unit
    nearest = [str(size) for size in (below, below + unit) if size > 0]
    hint = f"nearest possible global batches: {' and '.join(nearest)}"
    if global_batch % ranks == 0:
        share = global_batch // ranks
        fitting = max(size for size in range(1, min(micro_batch, share) + 1) if share % size == 0)
        hint += f"; or keep {global_batch} with {option}{fitting}"
    if fewer := _fewer_ranks(global_batch, micro_batch, ranks):
        hint += f"; or start {fewer} of {ranks} ranks: the launcher's --num_gpus, --nproc_per_node or --num_processes"
    raise RecipeError(
        f"global batch {global_batch} is not divisible by micro-batch x ranks = {micro_batch} x {ranks} = {unit}; "
        f"{hint}"
    )


def _fewer_ranks(global_batch: int, micro_batch: int, ranks: int) -> int:
    """Return the largest number below `ranks` that divides the batch together with the micro-batch, else 0."""
    counts = range(min(ranks - 1, global_batch // micro_batch), 0, -1)
    return next((count for count in counts if global_batch % (micro_batch * count) == 0), 0)
