"""The batch files of recipes/launch, run by stand-ins for SLURM as two nodes on loopback, stopped and queued again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.faulty_runs import SMALL, losses, prepare_data, train_records

from .slurm_stand_ins import EVERYTHING, STATE, install

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
LINE = (*SMALL, "--steps", str(STEPS), "model.dropout=0", "run.checkpoint_every=0")
ONE_RANK_PER_NODE = ("--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")


class Job:
    """A batch file that the stand-ins run."""

    def __init__(self, folder: Path, batch_file: str, *line: str, **variables: str) -> None:
        self.state, self.log = folder / "state", folder / "log"
        self.state.mkdir(parents=True)
        path = os.pathsep.join((str(install(folder / "bin")), str(Path(sys.executable).parent), os.environ["PATH"]))
        own = {STATE: str(self.state), "PATH": path, "PYTHONPATH": str(ROOT), **variables}
        command = ["sbatch", *ONE_RANK_PER_NODE, f"recipes/launch/{batch_file}.sbatch", *line]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **own}, stdout=log, stderr=subprocess.STDOUT
            )

    def wait_for(self, happened) -> None:
        deadline = time.monotonic() + 200
        while not happened():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def signal(self) -> None:
        """What `#SBATCH --signal=B:USR1@300` does five minutes before the time limit."""
        os.kill(int((self.state / "batch.pid").read_text()), signal.SIGUSR1)

    def statuses(self) -> list[int]:
        """Wait for the end; the status of every start."""
        self.process.wait(200)
        return [int(line) for line in (self.state / "statuses").read_text().split()]


@contextlib.contextmanager
def submitted(*arguments, **variables):
    job = Job(*arguments, **variables)
    try:
        yield job
    finally:
        with contextlib.suppress(psutil.Error):
            for process in [*psutil.Process(job.process.pid).children(recursive=True), job.process]:
                process.kill()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_data(tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def expected(data):
    """Losses of one process that nobody disturbs."""
    folder = data.with_name("alone")
    line = ["--data", str(data), *LINE, "--output", str(folder)]
    subprocess.run([sys.executable, str(ROOT / "recipes" / "bert.py"), *line], check=True, timeout=200)
    assert len(losses(folder)) == STEPS
    return losses(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_file", "variables"),
    [
        ("slurm_srun", {}),
        ("slurm_srun", {"RECIPE": "recipes/bert_accelerate.py"}),
        ("slurm_srun", {"RECIPE": "recipes/bert_trainer.py", EVERYTHING: "1"}),
        ("slurm_torchrun", {EVERYTHING: "1"}),
        ("slurm_deepspeed", {}),
        ("slurm_accelerate", {}),
    ],
)
def test_a_job_that_is_stopped_before_its_time_limit_is_queued_again(data, expected, batch_file, variables, tmp_path):
    run = tmp_path / "run"
    with submitted(tmp_path / "job", batch_file, "--data", str(data), *LINE, "--output", str(run), **variables) as job:
        job.wait_for(lambda: len(train_records(run)) >= 3)
        job.signal()
        assert job.statuses() == [138, 0], job.log.read_text()
    printed = job.log.read_text()
    assert printed.count("stopped on request after step") == 1, printed
    assert printed.count("going on from") == 1, printed
    assert losses(run) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_a_job_that_is_stopped_before_training_is_queued_again_and_bad_input_is_not(data, tmp_path):
    run = tmp_path / "run"
    line = ("--data", str(data), *LINE, "--steps", "2", "--output", str(run))
    with submitted(tmp_path / "early", "slurm_torchrun", *line) as job:
        job.wait_for(lambda: "importing torch" in job.log.read_text())
        job.signal()
        assert job.statuses() == [138, 0], job.log.read_text()
    assert len(losses(run)) == 2
    with submitted(tmp_path / "bad", "slurm_torchrun", *line, "--stepz", "3") as job:
        assert job.statuses() == [2], job.log.read_text()
