"""Processes joined by gloo, or NCCL on GPUs, that are started once and asked to run functions."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from .errors import CannotAudit, Failure

__all__ = ["Ranks", "check_timeout", "end_started_ranks", "started_ranks"]

AFTER_THE_FIRST = 60.0
"""Seconds that the other ranks get once one has answered: they work in step, or wait for one that gave up."""

AFTER_A_FAILURE = 5.0
"""The same, once one has failed: by then the others have failed too, or wait for it."""


MOST_SECONDS = 1e6  # more, and what waits overflows


def check_timeout(timeout: Any) -> None:
    """Raise CannotAudit if these are no seconds that somebody can wait."""
    is_number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not is_number or not 0 < timeout <= MOST_SECONDS:
        raise CannotAudit(f"timeout must be seconds above 0, and at most a million, not {timeout!r}")


class Ranks:
    """`world_size` processes, one thread each, that start when they are first asked for something.

    Args:
        world_size: How many.
        device: "cpu" or "cuda", of which each gets one.
        timeout: Seconds after which an answer that has not come is none.
    """

    def __init__(self, world_size: int, device: str = "cpu", timeout: float = 600.0):
        self.world_size, self.device, self.timeout = world_size, device, timeout
        self._port = 0
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        # DeepSpeed prints much, which nobody wants to read before something breaks.
        self._log = tempfile.NamedTemporaryFile(prefix="audit-", suffix=".log")  # noqa: SIM115  # until it is collected

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call a module-level function on all ranks.

        Returns:
            What they returned, in the order of ranks. Once one has returned a `Failure`, those that do not answer
            soon are ended, and None stands for their answers.

        Raises:
            CannotAudit: If one did not start, died, raised or did not answer in time. Then no process is left.
        """
        try:
            task = ForkingPickler.dumps((function, arguments))
        except Exception as error:
            raise CannotAudit(
                f"model and optimizer have to be made in other processes, which cannot be told how: {error}. Give "
                "functions at the top of a module, not lambdas or functions within functions"
            ) from error
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # of a rank that has died since: collecting says so
                pipe.send_bytes(task)
        return self._collect()

    def close(self) -> None:
        """End the processes, and remove what DeepSpeed leaves behind: 66 MB of shared memory per rank."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_127.0.0.1_{self._port}_*"):
            buffer.unlink(missing_ok=True)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self._port = listener.getsockname()[1]
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.world_size, self._port, self.device, self.timeout, self._log.name, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._collect()

    def _collect(self) -> list[Any]:
        answers: dict[int, Any] = {}
        begun = time.monotonic()
        ends = begun + self.timeout
        while len(answers) < self.world_size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = wait(waiting, max(0.0, ends - time.monotonic()))
            taken = [self._take(rank, answers) for rank, pipe in enumerate(self._pipes) if pipe in ready]
            lost = list(filter(None, taken))
            if not ready:
                silent, waited = self._pipes.index(waiting[0]), time.monotonic() - begun
                lost.append(
                    f"no answer from rank {silent} in {waited:.3g} seconds: it needs more (timeout), or waits for "
                    "another rank, as an optimizer may with a collective of its own per layer, of which ranks have "
                    "others"
                )
            has_failed = any(isinstance(answer, Failure) for answer in answers.values())
            if lost:
                self.close()
                if has_failed:
                    break
                raise CannotAudit("; ".join(lost))
            ends = min(ends, time.monotonic() + (AFTER_A_FAILURE if has_failed else AFTER_THE_FIRST))
        return [answers.get(rank) for rank in range(self.world_size)]

    def _take(self, rank: int, answers: dict[int, Any]) -> str | None:
        """Read one rank's answer; returns what is wrong with it."""
        try:
            succeeded, answer = self._pipes[rank].recv()
        except (EOFError, OSError):
            self._processes[rank].join(AFTER_THE_FIRST)
            lines = Path(self._log.name).read_text(errors="replace").strip().splitlines()
            last = f", and the last that was printed is: {lines[-1].strip()}" if lines else ""
            return f"rank {rank} died (exit status {self._processes[rank].exitcode}){last}"
        answers[rank] = answer
        return None if succeeded else f"rank {rank} failed: {answer}"


_started: dict[tuple[int, str], Ranks] = {}


def end_started_ranks() -> None:
    """End those that `started_ranks` has started."""
    while _started:
        _started.popitem()[1].close()


atexit.register(end_started_ranks)


def started_ranks(world_size: int, device: str, timeout: float) -> Ranks:
    """As many ranks, which stay for the next audit of this process, until it ends; no others."""
    key = world_size, device
    if key not in _started:
        end_started_ranks()
        _started[key] = Ranks(world_size, device, timeout)
    _started[key].timeout = timeout
    return _started[key]


def _serve(rank: int, ranks: int, port: int, device: str, timeout: float, log: str, pipe: Connection) -> None:
    with open(log, "ab", buffering=0) as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        LOCAL_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _join(rank, device, timeout)
        pipe.send((True, None))
    except BaseException as error:
        pipe.send((False, f"{type(error).__name__}: {error}"))
        return
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        except Exception as error:  # what was sent cannot be imported here
            pipe.send((False, f"{type(error).__name__}: {error}"))
            continue
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc(limit=-3)))


def _join(rank: int, device: str, timeout: float) -> None:
    import logging
    import warnings

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=timeout))


def _end_with_parent() -> None:
    """Whatever this rank waits for: nobody wants its answer any more."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
