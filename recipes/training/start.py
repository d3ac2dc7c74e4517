"""Pretraining on one machine: start DeepSpeed's launcher with the recipe in it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from ..common.command import CommandParser, ends_with_message, within
from ..common.errors import RecipeError
from ..common.slurm import tasks_of_others
from ..configuration.command_line import parse_command_line
from ..configuration.presets import list_presets

CPU_PROCESSES = 2
"""How many there are without a GPU: enough to be sharded, and for two cores."""

_RECIPE = "trustratio.recipes.bert"


@ends_with_message("error")
def main(arguments: Sequence[str] | None = None) -> int:
    """Become DeepSpeed's launcher with all GPUs of this machine, or `--num_gpus N` processes; or pretrain in this
    process, where a launcher, or srun as one of several tasks, has started it.

    Args:
        arguments: `--num_gpus N` and those of the recipe; None: this process's.

    Returns:
        The exit status, unless this process became the launcher's. 2: a bad line, or one of several processes.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "RANK" in os.environ:
        from .bert import main as pretrain

        return pretrain(given)
    _refuse_to_launch_many()
    options, recipe = _parser().parse_known_args(given)
    within("--num_gpus", options.num_gpus, 1)
    invocation = parse_command_line(recipe)  # a bad line is refused before anything is started
    if invocation.list_presets:
        print("\n".join(list_presets()))
        return 0
    line = launcher(options.num_gpus, recipe)
    print(shlex.join(line), flush=True)
    os.execv(line[0], line)  # signals and the exit status are the launcher's then


def _refuse_to_launch_many() -> None:
    if others := tasks_of_others(os.environ):
        raise RecipeError(
            f"the environment has {others}: each of these processes would start a launcher, and a run, of its own; "
            "start one, or the ranks by deepspeed, torchrun or accelerate"
        )


def launcher(processes: int | None, recipe: Sequence[str]) -> list[str]:
    """Return the command that starts the recipe.

    Args:
        processes: how many; None: one per GPU, those of CUDA_VISIBLE_DEVICES if that is set, or `CPU_PROCESSES`.
        recipe: the recipe's arguments.
    """
    if processes is None and not _has_gpus():
        processes = CPU_PROCESSES
    ranks = [] if processes is None else ["--num_gpus", str(processes)]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *ranks, "--module", _RECIPE, *recipe]


def _has_gpus() -> bool:
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return False
    import torch

    return torch.accelerator.is_available()


def _parser() -> CommandParser:
    parser = CommandParser(add_help=False)  # --help is the recipe's
    parser.add_argument("--num_gpus", type=int)
    return parser
