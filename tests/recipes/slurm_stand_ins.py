"""Stand-ins for sbatch, srun and scontrol: two nodes that are both this machine, 127.0.0.1 and 127.0.0.2.

`install` writes the three commands into a folder for PATH. They know as much of SLURM as the batch files use: options
in `#SBATCH` lines, the variables of a batch file and of a step's tasks, signals that srun hands on, exit statuses, and
jobs that are queued again. Unlike SLURM's, this sbatch waits for the end of the job.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

STATE = "SLURM_STAND_IN"
"""Variable: the folder in which the stand-ins keep what they know of the job."""

EVERYTHING = "SLURM_STAND_IN_SIGNALS_EVERYTHING"
"""Variable: signals reach all processes of a step, as SLURM does without cgroups, not only those that srun started."""

HOSTS, NODES, JOB = "127.0.0.[1-2]", 2, 4711


def install(folder: Path) -> Path:
    """Write the commands into a folder; return it."""
    folder.mkdir(parents=True)
    for name in ("sbatch", "srun", "scontrol"):
        command = folder / name
        call = f"sys.exit(runpy.run_path({__file__!r})[{name!r}](sys.argv[1:]))"
        command.write_text(f"#!{sys.executable} -I\nimport runpy, sys\n{call}\n")
        command.chmod(0o755)
    return folder


def sbatch(arguments: list[str]) -> int:
    """Run a batch file until it is not queued again; its last status."""
    state = Path(os.environ[STATE])
    given, (script, *rest) = _split(arguments)
    lines = [line.split()[1] for line in Path(script).read_text().splitlines() if line.startswith("#SBATCH ")]
    options = {**_split(lines)[0], **given}
    assert options["signal"] == "B:USR1@300", options
    assert {"requeue", "open-mode"} <= set(options), options
    per_node = int(options["ntasks-per-node"])
    variables = {
        "SLURM_JOB_ID": JOB,
        "SLURM_JOB_NUM_NODES": NODES,
        "SLURM_JOB_NODELIST": HOSTS,
        "SLURM_NODELIST": HOSTS,
        "SLURM_NTASKS": NODES * per_node,
        "SLURM_NTASKS_PER_NODE": per_node,
        "SLURM_TASKS_PER_NODE": f"{per_node}(x{NODES})",
        "SLURM_CPUS_PER_TASK": options["cpus-per-task"],
        "SLURM_GPUS_ON_NODE": options["gpus-per-node"],
        **{f"SLURM_{name}": 0 for name in ("PROCID", "LOCALID", "NODEID")},  # of the batch file itself
    }
    spooled = state / "slurm_script"  # where `dirname $0` finds nothing
    spooled.write_text(Path(script).read_text())
    for restarts in range(99):
        own = {**variables, **({"SLURM_RESTART_COUNT": restarts} if restarts else {})}
        job = subprocess.Popen(["bash", spooled, *rest], env={**os.environ, **_texts(own)})
        (state / "batch.pid").write_text(str(job.pid))
        status = _status(job.wait())
        with (state / "statuses").open("a") as statuses:
            statuses.write(f"{status}\n")
        if not (state / "requeue").exists():
            return status
        (state / "requeue").unlink()
    return 1


def srun(arguments: list[str]) -> int:
    """Start the tasks of a step on both nodes; the highest status."""
    options, command = _split(arguments)
    assert options["kill-on-bad-exit"] == "0", options
    per_node = int(options.get("ntasks-per-node", os.environ["SLURM_NTASKS_PER_NODE"]))
    step = {
        "SLURM_STEP_ID": 0,
        "SLURM_STEP_NUM_TASKS": NODES * per_node,
        "SLURM_NTASKS": NODES * per_node,
        "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{NODES})",
        "SLURM_STEP_NODELIST": HOSTS,
        "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
    }
    tasks = []
    for number in range(NODES * per_node):
        node, local = number % NODES, number // NODES  # --distribution=cyclic, unlike the recipe's own numbers
        own = {"SLURM_PROCID": number, "SLURM_NODEID": node, "SLURM_LOCALID": local}
        tasks.append(subprocess.Popen(command, env={**os.environ, **_texts({**step, **own})}))

    def hand_on(number: int, frame: object) -> None:
        for pid in [pid for task in tasks if task.poll() is None for pid in (task.pid, *_below(task.pid))]:
            os.kill(pid, number)

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, hand_on)
    while any(task.poll() is None for task in tasks):
        time.sleep(0.05)
    return max(_status(task.returncode) for task in tasks)


def scontrol(arguments: list[str]) -> int:
    """`show hostnames LIST` and `requeue JOB`."""
    if arguments[:2] == ["show", "hostnames"]:
        assert arguments[2] == HOSTS, arguments
        print("127.0.0.1\n127.0.0.2")
    else:
        assert arguments == ["requeue", str(JOB)], arguments
        (Path(os.environ[STATE]) / "requeue").touch()
    return 0


def _split(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Return options `--name=value` by name, and what comes after them."""
    options = {}
    while arguments and arguments[0].startswith("--"):
        name, _, value = arguments[0][2:].partition("=")
        options[name], arguments = value, arguments[1:]
    return options, arguments


def _texts(values: dict[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def _status(code: int) -> int:
    return code if code >= 0 else 128 - code


def _below(pid: int) -> list[int]:
    if EVERYTHING not in os.environ:
        return []
    import psutil

    return [process.pid for process in psutil.Process(pid).children(recursive=True)]
