"""Worker processes that are started once per world size and run many cases each."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ANSWER_SECONDS = 600  # some cases compile models, on a machine that others may use
LAST_WORDS = 12_000
"""Characters of what a worker that died had written last."""


class CaseFailed(AssertionError):
    """A case raised on at least one rank; carries every rank's traceback."""


class WorkerDied(CaseFailed):
    """A worker ended while it should have answered; carries what it had written last."""


class WorkerPool:
    """`world_size` processes joined by gloo, with DeepSpeed's communication initialised.

    `run(function, *args)` calls a module-level function on all ranks and returns their results in rank order. After an
    exception on only some ranks the others may hang in a collective, so the pool is restarted. So it is if a worker
    dies, and the case is tried once more, with a warning: torch's threads end a process now and then.
    """

    def __init__(self, world_size: int):
        self.world_size = world_size
        self._processes: list[Any] = []
        self._start()

    def _start(self) -> None:
        self._errors = [tempfile.NamedTemporaryFile(prefix=f"rank{rank}-") for rank in range(self.world_size)]  # noqa: SIM115
        context = multiprocessing.get_context("spawn")
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self._port = port = listener.getsockname()[1]
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.world_size, port, theirs, self._errors[rank].name)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._collect()

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        try:
            return self._run(function, *args, **kwargs)
        except WorkerDied as died:
            warnings.warn(f"{function.__name__} is tried once more: {died}", stacklevel=2)
        return self._run(function, *args, **kwargs)

    def _run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        return self._collect()

    def _collect(self) -> list[Any]:
        answers: list[Any] = []
        failures: list[str] = []
        for rank, pipe in enumerate(self._pipes):
            # Once one rank failed, the others get little time: they may wait for it in a collective.
            if not pipe.poll(20 if failures else ANSWER_SECONDS):
                failures.append(f"rank {rank}: no answer")
                continue
            try:
                ok, answer = pipe.recv()
            except EOFError:
                failures.append(f"rank {rank}: died{self._last_words(rank)}")
                continue
            answers.append(answer)
            if not ok:
                failures.append(f"rank {rank}:\n{answer}")
        if failures:
            if len(failures) < self.world_size or any(": no answer" in f or ": died" in f for f in failures):
                self.close()
                self._start()
            kind = WorkerDied if any(": died" in failure for failure in failures) else CaseFailed
            raise kind("\n".join(failures))
        return answers

    def _last_words(self, rank: int) -> str:
        self._processes[rank].join(5)
        code = self._processes[rank].exitcode
        ended = signal.Signals(-code).name if code is not None and code < 0 else f"status {code}"
        return f" ({ended}); it had written:\n{Path(self._errors[rank].name).read_text(errors='replace')[-LAST_WORDS:]}"

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for errors in self._errors:
            errors.close()
        # DeepSpeed leaves 66 MB of shared memory per rank behind.
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_127.0.0.1_{self._port}_*"):
            buffer.unlink(missing_ok=True)


class Pools:
    """Pools by their number of ranks, each started when it is first asked for."""

    def __init__(self, at_once: int = 1) -> None:
        """Keep as many pools as `at_once`; the one that was asked for longest ago makes room."""
        self.at_once = at_once
        self._pools: dict[int, WorkerPool] = {}

    def get(self, world_size: int) -> WorkerPool:
        pool = self._pools.pop(world_size, None)
        while len(self._pools) >= self.at_once:
            self._pools.pop(next(iter(self._pools))).close()
        self._pools[world_size] = pool = pool or WorkerPool(world_size)
        return pool

    def close(self) -> None:
        while self._pools:
            self._pools.popitem()[1].close()


def _serve(rank: int, world_size: int, port: int, pipe: Connection, errors: str) -> None:
    with open(errors, "w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    faulthandler.enable()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    try:
        import deepspeed
        import torch
        from deepspeed.accelerator import get_accelerator
        from deepspeed.utils import logger

        from trustratio.recipes.training.quiet import quieten

        # DeepSpeed refuses fp16 on processors without fast fp16 kernels; slow ones do for tests.
        get_accelerator().is_fp16_supported = lambda: True

        logger.setLevel("ERROR")
        torch.set_num_threads(1)
        quieten()  # else DeepSpeed compiles an extension for minutes, which gloo does not need
        deepspeed.init_distributed("gloo", verbose=False)

        from ..fresh_libraries import fresh_libraries
        from ..young_objects import search_young_objects_alone
        from .collective_counter import CollectiveCounter
        from .reused_groups import reuse_groups

        reuse_groups()
        pipe.send((True, None))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        return
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            search_young_objects_alone()
            with fresh_libraries():
                answer = function(*args, **kwargs)
            left = CollectiveCounter.close_all()
            assert not left, f"{function.__name__} has left {left} CollectiveCounter open"
            pipe.send((True, answer))
        except BaseException:
            CollectiveCounter.close_all()
            pipe.send((False, traceback.format_exc()))
