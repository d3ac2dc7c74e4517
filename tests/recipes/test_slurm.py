"""SLURM's variables in place of a launcher's, and what SIGUSR1 does to a rank, alone and below a launcher."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from trustratio.recipes.common import slurm
from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.common.restart_requests import STATUS_FILE, told
from trustratio.recipes.common.slurm import adopt_slurm, first_host, tasks_per_node
from trustratio.recipes.training.ranks import LauncherError, require_own_device

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "recipes" / "launch"
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

BATCH = {  # of a batch file, and of `salloc`: tasks of the allocation, which nobody has started
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_JOB_NODELIST": "gpu[01-03]",
    "SLURM_TASKS_PER_NODE": "2(x3)",
}


def task(node: int, local: int, **changed: str | None) -> dict[str, str]:
    """What srun gives to one of five tasks on three nodes, numbered cyclically."""
    variables: dict[str, str | None] = {
        **BATCH,
        "SLURM_STEP_ID": "1",
        "SLURM_STEP_NUM_TASKS": "5",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
        "SLURM_STEP_NODELIST": "gpu[02-03,07]",
        "SLURM_PROCID": str(node + 3 * local),
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(local),
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
        **changed,
    }
    return {name: value for name, value in variables.items() if value is not None}


def adopted(variables: dict[str, str]) -> dict[str, str]:
    adopt_slurm(variables)
    return {name: variables[name] for name in RANKS if name in variables}


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node[01-03,07]", "node01"),
        ("node[07,09-11],gpu2", "node07"),
        ("gpu2,node[01-03]", "gpu2"),
        ("rack[1-2]node[05-06]-ib,x", "rack1node05-ib"),
        ("127.0.0.[1-2]", "127.0.0.1"),
        ("login.cluster.org", "login.cluster.org"),
    ],
)
def test_the_first_host_of_a_list_in_python_and_in_bash_without_scontrol(hosts, first):
    assert first_host(hosts) == first
    shell = f"source {LAUNCH}/slurm.sh; first_host '{hosts}'"
    variables = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "a", "PATH": "/usr/bin:/bin"}
    assert subprocess.check_output(["bash", "-c", shell], env=variables, text=True).strip() == first


@pytest.mark.parametrize("hosts", ["", ",a", "node[01-03", "node]", "a b", "node[]"])
def test_a_bad_list_of_hosts_is_named(hosts):
    with pytest.raises(RecipeError, match="no list of hosts such as"):
        first_host(hosts)


def test_tasks_per_node():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("8") == [8]
    with pytest.raises(RecipeError, match=r"'2\(3\)'"):
        tasks_per_node("2(3)")


def test_tasks_of_srun_are_ranks_numbered_node_by_node():
    places = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    of_all = [adopted(task(*place)) for place in places]
    assert [int(own["RANK"]) for own in of_all] == list(range(5))
    assert [int(own["LOCAL_RANK"]) for own in of_all] == [0, 1, 0, 1, 0]
    assert [int(own["LOCAL_WORLD_SIZE"]) for own in of_all] == [2, 2, 2, 2, 1]
    assert {own["WORLD_SIZE"] for own in of_all} == {"5"}
    assert {own["MASTER_ADDR"] for own in of_all} == {"gpu02"}
    assert {own["MASTER_PORT"] for own in of_all} == {str(10_000 + 4711 + 97)}


def test_one_node_meets_on_loopback_and_a_given_address_stays():
    one = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    assert adopted(task(0, 1, **one))["MASTER_ADDR"] == "127.0.0.1"
    given = {"MASTER_ADDR": "10.1.1.1", "MASTER_PORT": "29500"}
    assert adopted(task(2, 0, **given)).items() >= given.items()


def test_without_a_list_of_nodes_srun_s_own_address_is_taken():
    lists = dict.fromkeys(("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"))
    assert adopted(task(1, 0, **lists))["MASTER_ADDR"] == "10.0.0.1"


@pytest.mark.parametrize(
    "variables",
    [
        {},
        BATCH,
        task(0, 0, SLURM_STEP_NUM_TASKS="1", SLURM_STEP_TASKS_PER_NODE="1"),  # `srun -n 1 --pty bash` in an allocation
        task(0, 0, SLURM_STEP_NUM_TASKS="1", SLURM_STEP_TASKS_PER_NODE="1", SLURM_PTY_PORT="4242"),
        task(0, 0, SLURM_PTY_PORT="4242", SLURM_STEP_ID="4294967290"),  # salloc's interactive step
        task(0, 0, SLURM_STEP_ID="4294967291"),  # a batch file's, submitted in a step
        {**BATCH, "SLURM_HET_SIZE": "2"},
        task(0, 0, ACCELERATE_MIXED_PRECISION="no"),
    ],
)
@pytest.mark.parametrize("terminal", [True, False])
def test_a_process_that_is_alone_stays_alone(variables, terminal, monkeypatch):
    monkeypatch.setattr(slurm, "has_terminal", lambda: terminal)
    assert adopted(dict(variables)) == {}


def test_tasks_that_srun_starts_in_a_shell_of_srun_s_are_ranks(monkeypatch):
    """They inherit SLURM_PTY_PORT; of `srun -n 5 --pty COMMAND`, the first one has the terminal and is refused."""
    inherited = task(2, 0, SLURM_PTY_PORT="4242")
    monkeypatch.setattr(slurm, "has_terminal", lambda: False)
    assert adopted(dict(inherited)).items() >= {"RANK": "4", "WORLD_SIZE": "5"}.items()
    monkeypatch.setattr(slurm, "has_terminal", lambda: True)
    with pytest.raises(RecipeError, match="a terminal of `srun --pty` with 5 tasks"):
        adopt_slurm(dict(inherited))
    assert adopted({**inherited, "RANK": "0"}) == {"RANK": "0"}
    del inherited["SLURM_PTY_PORT"]  # srun may be typed at a terminal of its own
    assert adopted(inherited)["RANK"] == "4"


def test_a_terminal_is_one_that_the_process_belongs_to():
    code = "import os; os.setsid(); from trustratio.recipes.common.slurm import has_terminal as h; print(h(), end=' ');"
    code += "import fcntl, termios; a, b = os.openpty(); fcntl.ioctl(b, termios.TIOCSCTTY, 0); print(h())"
    with start(sys.executable, "-c", f"import os; os.fork() and (os.wait(), os._exit(0)); {code}") as process:
        assert process.communicate(timeout=20)[0] == "False True\n"


def test_an_empty_address_counts_as_none():
    empty = {"MASTER_ADDR": "", "MASTER_PORT": ""}
    assert adopted(task(1, 0, **empty)) == adopted(task(1, 0))


@pytest.mark.parametrize("name", ["SLURM_HET_SIZE", "SLURM_PACK_SIZE"])
@pytest.mark.parametrize("tasks", [{}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}])
def test_a_heterogeneous_job_is_refused(name, tasks):
    """Each component numbers its own tasks; one task of each would be two runs."""
    with pytest.raises(RecipeError, match=f"{name}=2: srun numbers the tasks of each component"):
        adopt_slurm(task(0, 0, **{name: "2"}, **tasks))
    assert adopted(task(0, 0, **{name: "1"}))["WORLD_SIZE"] == "5"


def test_a_launcher_s_own_variables_win():
    own = {"RANK": "7", "LOCAL_RANK": "1", "WORLD_SIZE": "40", "MASTER_ADDR": "there"}
    assert adopted(task(0, 0, **own)) == own


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"SLURM_NODEID": None}, "no SLURM_NODEID"),
        ({"SLURM_LOCALID": "x"}, "SLURM_LOCALID='x'"),
        ({"SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS='many'"),
        (
            {"SLURM_STEP_TASKS_PER_NODE": "2(x3)"},
            r"contradict each other: task 0 of node 0, 5 tasks, by node \[2, 2, 2\]",
        ),
        ({"SLURM_NODEID": "3"}, "task 0 of node 3"),
        ({"SLURM_LOCALID": "2"}, "task 2 of node 0"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8, but srun started 5 tasks"),
        ({"SLURM_STEP_NODELIST": "gpu[02"}, "no list of hosts"),
    ],
)
def test_bad_variables_are_named(changed, message):
    with pytest.raises(RecipeError, match=message):
        adopt_slurm(task(0, 0, **changed))


def test_a_rank_without_a_gpu_of_its_own_is_told():
    require_own_device(1, 2)
    with pytest.raises(LauncherError, match=r"sees 1 GPU: .*--gpu-bind=none"):
        require_own_device(1, 1)


RANK = r"""
import os, sys, time
from trustratio.recipes.common.restart_requests import RESTARTS, told
RESTARTS.listen()
if "training" in sys.argv:
    RESTARTS.answer_by(lambda: os.write(1, b"noted\n"))
os.write(1, b"listening\n")  # in one piece: two ranks share the pipe
if "training" in sys.argv:
    while not RESTARTS.heard:
        time.sleep(0.05)
    RESTARTS.over()
    time.sleep(1.5)  # others ask again meanwhile
    sys.exit(told(int(sys.argv[2])))
time.sleep(60)
"""


@contextlib.contextmanager
def start(*command: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Start a command for the block, whose end kills what is left of it."""
    own = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=own, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def rank_command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", RANK, *arguments]


@pytest.mark.parametrize(("arguments", "status"), [((), 138), (("training", "138"), 138), (("training", "3"), 3)])
def test_sigusr1_ends_a_rank_with_a_status_of_its_own(arguments, status):
    with start(*rank_command(*arguments)) as rank:
        assert rank.stdout is not None
        rank.stdout.readline()
        rank.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
        rank.send_signal(signal.SIGUSR1)
        assert rank.wait(60) == status


def test_a_status_is_left_in_a_file_where_somebody_asks_for_it(tmp_path, monkeypatch):
    assert [told(status) for status in (0, 2, 138)] == [0, 2, 138]
    monkeypatch.setenv(STATUS_FILE, str(tmp_path / "statuses"))
    assert [told(status) for status in (0, 2, 138)] == [0, 2, 0]
    assert (tmp_path / "statuses").read_text() == "2\n138\n"


LAUNCHER = """
import subprocess, sys
ranks = [subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]]) for _ in range(2)]
sys.exit(1 if any([rank.wait() for rank in ranks]) else 0)
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("arguments", "status"), [((), 138), (("training", "138"), 138), (("training", "3"), 3)])
def test_a_launcher_s_ranks_are_asked_and_their_status_is_kept(arguments, status, number):
    launcher = [sys.executable, "-c", LAUNCHER, RANK, *arguments]
    with start("bash", str(LAUNCH / "node.sh"), *launcher) as node:
        assert node.stdout is not None
        for line in itertools.islice(node.stdout, 2):
            assert line == "listening\n"
        node.send_signal(number)
        assert node.wait(60) == status
        assert node.stdout.read() == "noted\n" * 2 * bool(arguments)


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("exit 0", 0),
        ("exit 7", 7),
        ("kill -KILL $$", 137),
        ("echo 2 >> $TRUSTRATIO_STATUS_FILE; exit 1", 2),
        ("echo 138 >> $TRUSTRATIO_STATUS_FILE; echo 3 >> $TRUSTRATIO_STATUS_FILE; exit 1", 3),
        ("echo 138 >> $TRUSTRATIO_STATUS_FILE", 138),
        ("echo 3 >> $TRUSTRATIO_STATUS_FILE; exit 0", 0),  # started anew by the launcher, and finished
    ],
)
def test_the_status_of_a_node(command, status, tmp_path):
    with start("bash", str(LAUNCH / "node.sh"), "bash", "-c", command, TMPDIR=str(tmp_path)) as node:
        assert node.wait(60) == status
    assert not list(tmp_path.iterdir())
