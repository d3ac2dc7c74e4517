"""SLURM's variables in place of a launcher's: `srun` starts one task per GPU, which is a rank each.

A process is a rank of its step only. Inside `sbatch` and `salloc`, SLURM_NTASKS counts the tasks of the allocation,
which nobody has started: it is not read. Names and meanings are those of srun's manual (slurm.schedmd.com).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping

from .errors import RecipeError

_LAUNCHED = ("RANK", "ACCELERATE_MIXED_PRECISION")  # the second is always set by `accelerate launch`
_OF_OTHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
_HETEROGENEOUS = ("SLURM_HET_SIZE", "SLURM_PACK_SIZE")  # the second before SLURM 20.02
_MOST_STEP = 4_294_967_280  # above it are SLURM's own steps: 4294967290 is salloc's interactive one, the next a batch's
_ONE = ("", "0", "1")  # of what there is no more than one, as far as a variable says
_PORTS = range(10_000, 30_000)  # below those that Linux gives to outgoing connections

Environment = MutableMapping[str, str]


def adopt_slurm(environment: Environment) -> None:
    """Set a launcher's variables if srun started this process as one of several tasks, and no launcher did.

    Ranks are numbered node by node, whatever `--distribution` says, as the recipe needs it. MASTER_ADDR and MASTER_PORT
    that are given, and not empty, stay.

    Args:
        environment: of this process; gets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT.

    Raises:
        RecipeError: a variable is missing, or contradicts another; the job is heterogeneous; whether the step's other
            tasks run this command, too, cannot be known.
    """
    if is_in_a_shell(environment) or any(name in environment for name in _LAUNCHED):
        return
    _refuse_heterogeneous(environment)
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS") if "SLURM_STEP_NUM_TASKS" in environment else 1
    if tasks == 1:
        return
    if environment.get("SLURM_PTY_PORT") and has_terminal():
        raise RecipeError(
            f"this is a terminal of `srun --pty` with {tasks} tasks, and whether the others run this command cannot be "
            "known; start with deepspeed, torchrun or accelerate, with srun without --pty, or unset "
            "SLURM_STEP_NUM_TASKS for one process"
        )
    node, local = _number(environment, "SLURM_NODEID"), _number(environment, "SLURM_LOCALID")
    here = tasks_per_node(_text(environment, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    if sum(here) != tasks or node >= len(here) or local >= here[node]:
        raise RecipeError(
            f"srun's variables contradict each other: task {local} of node {node}, {tasks} tasks, by node {here}; "
            "start with deepspeed, torchrun or accelerate"
        )
    if environment.get("WORLD_SIZE", str(tasks)) != str(tasks):
        raise RecipeError(
            f"the environment has WORLD_SIZE={environment['WORLD_SIZE']}, but srun started {tasks} tasks; unset it"
        )
    ranks = {"RANK": sum(here[:node]) + local, "LOCAL_RANK": local, "WORLD_SIZE": tasks, "LOCAL_WORLD_SIZE": here[node]}
    environment.update({name: str(number) for name, number in ranks.items()})
    if not environment.get("MASTER_ADDR"):
        environment["MASTER_ADDR"] = _first_node(environment) if len(here) > 1 else "127.0.0.1"
    if not environment.get("MASTER_PORT"):
        environment["MASTER_PORT"] = str(_port(environment))


def is_in_a_shell(environment: Mapping[str, str]) -> bool:
    """Tell whether SLURM itself began this step, for a shell of salloc's or a batch file: what srun starts has another.

    SLURM_PTY_PORT is no such sign: srun hands on what it finds in the shell of `srun --pty bash`.
    """
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) > _MOST_STEP


def has_terminal() -> bool:
    """Tell whether this process belongs to a terminal, as of srun's tasks only the first one under --pty does."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def tasks_of_others(environment: Mapping[str, str]) -> str | None:
    """Return the variable, as NAME=8, by which mpirun or srun says that this is one of several processes; None: none.

    Each of them would do the whole work by itself.
    """
    if environment.get("WORLD_SIZE") or is_in_a_shell(environment):
        return None
    for name in _OF_OTHERS:
        if environment.get(name, "1") not in _ONE:
            return f"{name}={environment[name]}"
    return None


def first_host(hosts: str) -> str:
    """Return the first host of a list in SLURM's form: node01 of `node[01-03,07],login`.

    Raises:
        RecipeError: it has another form.
    """
    first = re.match(r"(?:[^\s,\[\]]|\[[^\s\[\]]+\])+(?=,|$)", hosts)
    if first is None:
        raise RecipeError(f"{hosts!r} is no list of hosts such as node[01-03,07]; set MASTER_ADDR to the first host")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first[0])


def tasks_per_node(text: str) -> list[int]:
    """Return how many tasks each node has: [2, 2, 1] of `2(x2),1`.

    Raises:
        RecipeError: it has another form.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise RecipeError(f"srun says {text!r} of the tasks per node: understood is a list such as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _refuse_heterogeneous(environment: Environment) -> None:
    for name in _HETEROGENEOUS:
        if "SLURM_STEP_NUM_TASKS" in environment and environment.get(name, "1") not in _ONE:
            raise RecipeError(
                f"the environment has {name}={environment[name]}: srun numbers the tasks of each component of a "
                f"heterogeneous job by itself; start with torchrun, or unset {name} if the step has one component"
            )


def _first_node(environment: Environment) -> str:
    lists = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    if any(environment.get(name) for name in lists):
        return first_host(_text(environment, *lists))
    return _text(environment, "SLURM_LAUNCH_NODE_IPADDR")  # of srun itself, which sbatch runs on the first node


def _port(environment: Environment) -> int:
    """Return a port that all ranks find, and that other steps on the same machines hardly do."""
    job, step = (_number(environment, name) if name in environment else 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return _PORTS[(job + 97 * step) % len(_PORTS)]


def _text(environment: Environment, *names: str) -> str:
    for name in names:
        if environment.get(name):
            return environment[name]
    raise RecipeError(
        f"srun started several tasks, but the environment has no {names[0]}; start with deepspeed, torchrun or "
        "accelerate"
    )


def _number(environment: Environment, name: str) -> int:
    text = _text(environment, name)
    if not text.isdecimal():
        raise RecipeError(
            f"the environment has {name}={text!r}: srun sets a whole number from 0; unset it for one process"
        )
    return int(text)
