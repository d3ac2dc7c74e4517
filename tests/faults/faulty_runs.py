"""Small runs of the recipe, two ranks: started with or without a fault, watched, signalled, and what they leave behind.

`start` takes one of the real launchers, or "forked": ranks that are forked from a process with everything imported, in
a second instead of ten, and without anybody who ends the others when one has ended. What a test shows with them, the
ranks do by themselves.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from tests.recipes.conftest import sentences
from trustratio.recipes.common.files import WRITING
from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.configuration.config import DataConfig
from trustratio.recipes.data.preparation import Preparation, prepare_into
from trustratio.recipes.runs.metrics import read_metrics

from . import faulty_command

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 12, 4
"""Updates of a whole run, and after how many it writes a checkpoint."""

SMALL = (
    *("--sequence_length", "16", "--global_batch", "16", "--micro_batch", "4", "--steps", str(STEPS)),
    *("model.hidden=32", "model.intermediate=64", "model.max_positions=16", "model.dropout=0.1"),
    *("data.validation_sequences=10", "run.validate_every=0", "run.log_every=1", f"run.checkpoint_every={EVERY}"),
)
"""Updates of 2 ranks x 2 x 4 sequences of 16 tokens, 20 milliseconds each, with dropout."""

LAUNCHERS: dict[str, tuple[str, ...]] = {
    "deepspeed": ("deepspeed", "--num_gpus", "{ranks}", "--master_port", "{port}"),
    "torchrun": ("torchrun", "--nproc_per_node", "{ranks}", "--master_port", "{port}"),
    "accelerate": (
        *(
            "python",
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(ROOT / "recipes" / "configs" / "ddp.yaml"),
        ),
        *("--num_processes", "{ranks}", "--main_process_port", "{port}"),
    ),
}
FORKED = "forked"
_MARK = "TRUSTRATIO_TEST_RUN"  # in the environment of every process of a run
_LOCK = WRITING + "lock"  # stays in a run's folder


def prepare_data(folder: Path) -> Path:
    """Write a text and the token shards that all runs read; return the shards' folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(sentences(0, 1500))
    config = DataConfig(sources=(str(folder / "text.txt"),), vocabulary=200, validation_fraction=0.2)
    return prepare_into(folder / "tokens", config, Preparation(shard_characters=20_000), Reporter(active=False))


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    Attributes:
        status: the launcher's; of forked ranks, that of the first rank.
        statuses: of each rank, by rank, where they were forked; negative: ended by this signal.
        printed: by the launcher and all ranks.
        seconds: from the start to the end of the last process.
    """

    status: int
    statuses: tuple[int | None, ...]
    printed: str
    seconds: float


@dataclass
class Job:
    """A run that was started: its processes, and its folder."""

    folder: Path
    log: Path
    mark: str
    port: int
    ranks: int
    launcher: Any
    forked: list[Any] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    _shared_before: frozenset[str] = field(default_factory=lambda: frozenset(_shared_memory()))

    def processes(self) -> dict[int, psutil.Process]:
        """Return the processes of the ranks that live, by rank; neither the launcher's nor data workers."""
        if self.forked:
            return {rank: psutil.Process(p.pid) for rank, p in enumerate(self.forked) if p.is_alive()}
        found = {}
        for process in self.everything():
            with contextlib.suppress(psutil.Error):
                line, environment = " ".join(process.cmdline()), process.environ()
                is_rank = "RANK" in environment and "multiprocessing" not in line
                if is_rank and process.status() != psutil.STATUS_ZOMBIE:
                    found[int(environment["RANK"])] = process
        return found

    def everything(self) -> list[psutil.Process]:
        """Return every living process that this run has started, however deep."""
        own = {p.pid for p in self.forked}
        marked = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                    continue
                # A forked rank's environment is that of the process that it was forked from.
                if process.pid in own or process.ppid() in own or process.environ().get(_MARK) == self.mark:
                    marked.append(process)
        return marked

    def printed(self) -> str:
        """Return what the launcher and all ranks have printed so far."""
        return self.log.read_text(errors="replace")

    def steps(self) -> int:
        """Return the newest update whose record is in the metrics; 0 if there is none."""
        return max(map(int, (record["step"] for record in train_records(self.folder))), default=0)

    def wait_for(self, happened: Callable[[], Any], what: str, seconds: float = 300) -> None:
        """Wait until something has happened; fail if the run ends or the time is over before."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert self._runs(), f"the run ended before {what}:\n{self.printed()}"
            assert time.monotonic() < deadline, f"{seconds} seconds without {what}:\n{self.printed()}"
            time.sleep(0.02)

    def wait_for_step(self, step: int, seconds: float = 300) -> None:
        """Wait until the record of this update is written."""
        self.wait_for(lambda: self.steps() >= step, f"step {step}", seconds)

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to one rank."""
        self.processes()[rank].send_signal(number)

    def end(self, seconds: float = 300, but: tuple[int, ...] = ()) -> Ending:
        """Wait for the end of all ranks and the launcher; kill what does not end in time, and fail.

        Args:
            seconds: to wait.
            but: ranks that cannot end by themselves, being stopped: killed when the others have ended.
        """
        deadline = time.monotonic() + seconds
        waited = [p for rank, p in enumerate(self.forked) if rank not in but] or [self.launcher]
        for process in waited:
            with contextlib.suppress(subprocess.TimeoutExpired):
                _wait(process, max(0.0, deadline - time.monotonic()))
        late = [process.pid for process in waited if _status(process) is None]
        took, rest = time.monotonic() - self.began, [p for rank, p in enumerate(self.forked) if rank in but]
        for process in rest:
            process.kill()
            _wait(process, 10)
        if late:
            self.kill()
        assert not late, f"the run did not end within {seconds} seconds:\n{self.printed()}"
        statuses = tuple(_status(process) for process in self.forked)
        status = statuses[0] if self.forked else _status(self.launcher)
        return Ending(-1 if status is None else status, statuses, self.printed(), took)

    def kill(self) -> None:
        """Kill every process of the run."""
        for process in self.everything():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for process in self.forked or [self.launcher]:
            _wait(process, 30)

    def left_behind(self, patience: float = 10) -> list[str]:
        """Return the processes, shared memory and unfinished files that the run has left behind; kills the processes.

        Args:
            patience: seconds in which data workers may notice that their rank is gone.
        """
        deadline = time.monotonic() + patience
        while (processes := self.everything()) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = [f"process {process}" for process in processes]
        for process in processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        shared = {name for name in _shared_memory() - self._shared_before if f"_{self.port}_" in name}
        return left + [f"/dev/shm/{name}" for name in sorted(shared)] + unfinished(self.folder)

    def _runs(self) -> bool:
        return any(p.is_alive() for p in self.forked) if self.forked else self.launcher.poll() is None


def start(
    data: Path,
    folder: Path,
    *arguments: str,
    fault: str = "",
    launcher: str = FORKED,
    script: str = "bert.py",
    ranks: int = 2,
    environment: Mapping[str, str] | None = None,
) -> Job:
    """Start a small run and return at once.

    Args:
        data: what `prepare_data` returned.
        folder: of the run; what is printed goes into a file beside the data.
        arguments: of the command line, besides SMALL; a later one wins.
        fault: see `faulty_command.FAULTS`.
        launcher: one of LAUNCHERS, or FORKED.
        script: the command at the front of recipes/.
        ranks: how many.
        environment: of all processes, besides this one's.
    """
    mark, port = uuid.uuid4().hex, free_port()
    line = ["--data", str(data), *SMALL, "--output", str(folder), *arguments]
    log = data.with_name(f"{mark}.log")
    log.touch()
    variables = {_MARK: mark, faulty_command.FAULT: fault, faulty_command.SCRIPT: script, **(environment or {})}
    if launcher == FORKED:
        job = Job(folder, log, mark, port, ranks, None)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.faults.faulty_command", *faulty_command.BODIES.values()])
        for rank in range(ranks):
            own = {**variables, **_rank_variables(rank, ranks, port)}
            process = context.Process(target=faulty_command.forked, args=(log, own, line))
            process.start()
            job.forked.append(process)
        return job
    command = [word.format(ranks=ranks, port=port) for word in LAUNCHERS[launcher]]
    command[0] = str(Path(sys.executable).parent / command[0])
    program = faulty_command.__file__ if fault else str(ROOT / "recipes" / script)
    with log.open("a") as output:
        process = subprocess.Popen(
            [*command, program, *line],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **variables, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )
    return Job(folder, log, mark, port, ranks, process)


@contextlib.contextmanager
def started(*arguments: Any, **options: Any) -> Iterator[Job]:
    """Start a small run for the block, whose end kills what is left of it; see `start`."""
    job = start(*arguments, **options)
    try:
        yield job
    finally:
        job.kill()


def finished(*arguments: Any, **options: Any) -> Path:
    """Run to the end, which has to be a good one; return the run's folder."""
    with started(*arguments, **options) as job:
        ending = job.end()
    assert ending.status == 0, ending.printed
    return job.folder


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def train_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run's updates, in order; none if there are no metrics yet."""
    if not (folder / "metrics.jsonl").exists():
        return []
    return [record for record in read_metrics(folder) if record["kind"] == "train"]


def losses(folder: Path) -> list[float]:
    """Return a run's training losses, one per update."""
    return [record["loss"] for record in train_records(folder)]


def checkpoints(folder: Path) -> list[str]:
    """Return the names of a run's complete checkpoints, in order."""
    return sorted(path.parent.name for path in (folder / "checkpoints").glob("step-*/checkpoint.json"))


def unfinished(folder: Path) -> list[str]:
    """Return the files and folders of a run that are not whole."""
    found = [path for path in folder.rglob("*") if path.name.startswith(WRITING) or path.name.endswith(".partial")]
    return [str(path) for path in sorted(found) if path.name != _LOCK]


def trained_state(folder: Path, step: int = STEPS) -> dict[str, Any]:
    """Return everything that the files of a checkpoint hold, by file; `same` compares two of them."""
    files = sorted((folder / "checkpoints" / f"step-{step:08d}").rglob("*.pt"))
    assert files, f"{folder} has no checkpoint of step {step}"
    return {file.name: torch.load(file, weights_only=False, map_location="cpu") for file in files}


def same(one: object, other: object) -> bool:
    """Compare the tensors and numbers of two nested states bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(same, one, other))
    return not isinstance(one, int | float | str) or one == other


def show(ending: Ending) -> str:
    """Return an ending as the message of a failed assertion."""
    return json.dumps({"status": ending.status, "statuses": ending.statuses}) + "\n" + ending.printed


def _rank_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    counts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in counts.items()}}


def _shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def _wait(process: Any, seconds: float) -> None:
    process.join(seconds) if isinstance(process, multiprocessing.process.BaseProcess) else process.wait(seconds)


def _status(process: Any) -> int | None:
    return process.exitcode if isinstance(process, multiprocessing.process.BaseProcess) else process.poll()
