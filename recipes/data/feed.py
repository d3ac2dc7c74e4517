"""The micro-batches of consecutive steps, made ahead of time by worker processes."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from ..common.errors import RecipeError
from ..rules.global_batch import BatchPlan
from .masking import MaskedBatch
from .rows import MaskedRows
from .shards import TokenRows

_STEPS_AHEAD = 2  # per worker
_MOST_WORKERS = 2  # that `default_workers` gives a rank

_Arrays = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


def default_workers(device: torch.device, ranks_on_machine: int) -> int:
    """Return how many workers a rank gets: none on a CPU, which they would take from the training itself."""
    if device.type == "cpu":
        return 0
    return max(1, min(_MOST_WORKERS, len(os.sched_getaffinity(0)) // max(1, ranks_on_machine) - 1))


class BatchFeed:
    """Hands out one rank's micro-batches, step after step.

    What a step gets depends on the rows, the seed and the step's number alone: not on the number of workers, nor on
    where a run was resumed. The feed always knows the outcome of one step more than it has handed out, so that a
    broken token file stops a run after a whole step, with a checkpoint, instead of in the middle of one. Where batches
    grow, the steps here are rounds of one micro-batch per rank, of which an update takes several.

    Attributes:
        wait_seconds: how long the last `take` waited for data.
        failure: why the next step cannot be made; None if it can. Known before anything of that step is done.
    """

    def __init__(
        self,
        rows: MaskedRows,
        plan: BatchPlan,
        rank: int,
        first: int,
        last: int,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Make the batches of the steps first .. last - 1 (counted from 0).

        Args:
            rows: what each step takes the next global batch of.
            plan: global batch.
            rank: whose share to make.
            first: first step to make.
            last: step to end before.
            workers: processes that read and mask ahead; 0 does it in this process when asked.
            pin_memory: hand out page-locked tensors, which a GPU fetches while it computes.
        """
        self.wait_seconds = 0.0
        self.failure: RecipeError | None = None
        self._folder = rows.rows.folder if isinstance(rows.rows, TokenRows) else None
        self._pin = pin_memory
        loader = DataLoader(
            _Steps(rows, plan, rank, last),
            batch_size=None,
            sampler=range(first, last),
            num_workers=workers,
            prefetch_factor=_STEPS_AHEAD if workers else None,
            collate_fn=_as_is,
            worker_init_fn=_ignore_signals,
            # Neither NCCL nor gloo survives a fork, and a fork server would end with the group's SIGTERM.
            multiprocessing_context="spawn" if workers else None,
            generator=torch.Generator("cpu"),  # the global one belongs to dropout
        )
        with _signals_held():
            self._steps = iter(loader)
        self._upcoming: deque[list[_Arrays]] = deque()
        self._left = last - first
        self.look_ahead(1)

    def take(self, steps: int = 1, ahead: int = 1) -> list[MaskedBatch]:
        """Return the micro-batches of the next steps.

        Args:
            steps: how many to take.
            ahead: of how many more the outcome is to be known then: as many as the next call may take.

        Raises:
            RecipeError: they cannot be read; `failure` said so at the call before.
            StopIteration: the range is used up.
        """
        began = time.perf_counter()
        if self._left < steps:
            raise StopIteration
        self.look_ahead(steps)
        if self.failure is not None:
            raise self.failure
        taken = [self._upcoming.popleft() for _ in range(steps)]
        self._left -= steps
        self.look_ahead(ahead)
        batches = [self._batch(*micro) for arrays in taken for micro in arrays]
        self.wait_seconds = time.perf_counter() - began
        return batches

    def look_ahead(self, steps: int) -> None:
        """Make the next steps, as far as there are so many; `failure` then says whether one of them cannot be made."""
        while self.failure is None and len(self._upcoming) < min(steps, self._left):
            self._fetch()

    def close(self) -> None:
        """Stop the workers, also one that is stuck: it takes no SIGTERM, and this process would wait for it."""
        shutdown = getattr(self._steps, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()
            for worker in getattr(self._steps, "_workers", ()):
                worker.kill()

    def _fetch(self) -> None:
        try:
            made = next(self._steps)
        except RuntimeError as error:
            made = RecipeError(
                f"a data worker ended unexpectedly ({str(error).splitlines()[0]}); the token files in {self._folder} "
                "may have been changed or removed: check them by running `prepare` again"
            )
        if isinstance(made, RecipeError):
            self.failure = made
        else:
            self._upcoming.append(made)

    def _batch(self, *arrays: NDArray[Any]) -> MaskedBatch:
        tensors = (torch.from_numpy(array.astype(np.int64)) for array in arrays)
        return MaskedBatch(*(tensor.pin_memory() if self._pin else tensor for tensor in tensors))


class _Steps(Dataset):
    """Step number -> micro-batches as small arrays, or the reason why there are none."""

    def __init__(self, rows: MaskedRows, plan: BatchPlan, rank: int, steps: int) -> None:
        self.rows, self.plan, self.rank, self.steps = rows, plan, rank, steps
        self.dtype = np.uint16 if rows.vocabulary.ordinary.max(initial=0) < 2**16 else np.uint32

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[_Arrays] | RecipeError:
        try:
            batches = self.rows.step_batches(step, self.plan, self.rank)
        except RecipeError as error:
            return RecipeError(str(error))
        # Arrays travel through a pipe. Tensors would go through shared memory, of which containers have 64 MB, and
        # take three file handles per micro-batch.
        return [
            (
                batch.input_ids.numpy().astype(self.dtype),
                batch.positions.numpy().astype(np.uint32),
                batch.labels.numpy().astype(self.dtype),
            )
            for batch in batches
        ]


def _as_is(sample: Any) -> Any:
    return sample


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Start workers that no signal ends before `_ignore_signals`, which comes after seconds of imports, is called."""
    resource_tracker.ensure_running()  # its start would let them pass again
    held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _ignore_signals(worker: int) -> None:
    # Ctrl-C reaches the whole group; the rank finishes its step and then ends its workers itself.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
