"""The console command `trustratio`: finds the command that a word means, and lets it go on with the rest of the line.

Only the standard library is imported here, so that the list of commands is there at once.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from .called import CONSOLE
from .command import ends_with_message
from .errors import BAD_INPUT, RecipeError, unknown_name
from .script import readers_may_leave

_RECIPES = Path(__file__).resolve().parents[1]

CONFIGS, LAUNCH = _RECIPES / "configs", _RECIPES / "launch"
"""Folders of the configurations for `accelerate launch`, and of what is submitted to a cluster."""


@dataclass(frozen=True)
class Command:
    """One word of the console command.

    Attributes:
        line: what it does, for the list.
        module: what runs as with `python -m`; None: `answer` does it here.
        given: arguments that go before those of the line.
        answer: takes the arguments and returns the lines to print.
    """

    line: str
    module: str | None = None
    given: tuple[str, ...] = ()
    answer: Callable[[Sequence[str]], list[str]] | None = None


def configurations(names: Sequence[str]) -> list[str]:
    """Return the paths of the named configurations for `accelerate launch`; without names, of all, with what they are.

    Raises:
        RecipeError: there is none of that name.
    """
    return _paths("configuration", names, CONFIGS)


def launch_files(names: Sequence[str]) -> list[str]:
    """Return the same of the files for clusters: SLURM's batch files, Kubernetes' manifests, a sweep.

    Raises:
        RecipeError: there is none of that name.
    """
    return _paths("launch file", names, LAUNCH)


def _paths(what: str, names: Sequence[str], folder: Path) -> list[str]:
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".yaml", ".sbatch", ".sh")]
    by_name = {path.name: path for path in files}
    # slurm.sh and node.sh serve the others, and are named in full.
    known = {path.stem: path for path in files if path.suffix != ".sh"}
    for name in names:
        if name not in (by_name | known):
            raise unknown_name(what, name, known)
    width = max(map(len, known))
    return [str((by_name | known)[name]) for name in names] or [
        f"{name:{width}}  {path}" for name, path in known.items()
    ]


def _help_of_configurations() -> list[str]:
    return [
        f"usage: {CONSOLE} configs [NAME ...]",
        "",
        "Prints the paths of the named configurations for accelerate launch; without names, of all:",
        *(f"  {line}" for line in configurations(())),
    ]


COMMANDS = {
    "train": Command("pretrain BERT on this machine: on its GPUs, or in two CPU processes", "trustratio.recipes.train"),
    "plan": Command("what a preset needs on given GPUs: batch, memory, traffic, time", "trustratio.recipes.plan"),
    "prepare": Command("write text as token shards that training reads", "trustratio.recipes.prepare"),
    "compare": Command("compare optimizers: same data, several learning rates each", "trustratio.recipes.compare"),
    "report": Command("make the report of a run, finished or not", "trustratio.recipes.report"),
    "export": Command("write a checkpoint as a folder that transformers loads", "trustratio.recipes.export"),
    "fine-tune": Command("fine-tune a checkpoint on labelled text", "trustratio.recipes.fine_tune"),
    "presets": Command("print all presets with their sources", "trustratio.recipes.bert", ("--list_presets",)),
    "configs": Command("print where the configurations for accelerate launch are", answer=configurations),
    "launch": Command("print where the files for SLURM, Kubernetes and sweeps are", answer=launch_files),
    "audit": Command("does an optimizer survive your sharding?", "trustratio.integrations.audit"),
    "layer-norms": Command("make a page of logged layer norms", "trustratio.integrations.layer_norms"),
    "click-through": Command("CowClip and Adam at up to 128 times the batch", "trustratio.recipes.click_through"),
    "tabular": Command("optimizers at up to 131,072 rows per update", "trustratio.recipes.tabular"),
    "gpu-evidence": Command("64K and 128K sequences per update on one GPU", "trustratio.recipes.gpu_evidence"),
}
"""The commands by their words, in the order of the list."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the console command, or become the command that its first word means.

    Args:
        arguments: without the program's name; None: this process's.

    Returns:
        0 for the list and the version, 2 for an unknown word, which is answered with the nearest; 3 where they cannot
        be printed.

    Raises:
        SystemExit: the status of the command that ran.
    """
    word, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        lines = _lines(word, rest)
    except RecipeError as error:
        print(f"{CONSOLE}: {error}", file=sys.stderr)
        return BAD_INPUT
    return _printed(lines)


@ends_with_message(CONSOLE)
def _printed(lines: Sequence[str]) -> int:
    print("\n".join(lines), file=readers_may_leave(sys.stdout))
    return 0


def _lines(word: str, rest: Sequence[str]) -> list[str]:
    if word == "help" and rest:  # trustratio help plan
        word, rest = rest[0], ["--help"]
    if word in ("--help", "-h", "help"):
        return overview()
    if word in ("--version", "-V", "version"):
        return [f"{CONSOLE} {version(CONSOLE)}"]
    word = word.replace("_", "-")
    command = COMMANDS.get(word)
    if command is None:
        raise unknown_name("command", word, COMMANDS)
    if command.answer is not None:
        return _help_of_configurations() if rest and rest[0] in ("--help", "-h") else command.answer(rest)
    assert command.module is not None
    sys.argv = [f"{CONSOLE} {word}", *command.given, *rest]
    runpy.run_module(command.module, run_name="__main__")  # which raises SystemExit
    return []


def overview() -> list[str]:
    """Return the lines that `trustratio` alone prints."""
    width = max(map(len, COMMANDS))
    return [
        f"usage: {CONSOLE} COMMAND [OPTIONS]",
        "",
        *(f"  {word:{width}}  {command.line}" for word, command in COMMANDS.items()),
        "",
        f"`{CONSOLE} COMMAND --help` lists a command's options, `{CONSOLE} --version` prints the version.",
        "Launchers start modules:",
        "  deepspeed --num_gpus 8 --module trustratio.recipes.bert",
        "  torchrun --nproc_per_node 8 -m trustratio.recipes.bert",
        "  accelerate launch --num_processes 2 --config_file $(trustratio configs zero2) "
        "-m trustratio.recipes.bert_accelerate",
    ]
