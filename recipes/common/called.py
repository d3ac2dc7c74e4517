"""How the command that runs was called, for its help and for the commands that it advises."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

CONSOLE = "trustratio"
"""The console command, which puts itself and a word into `sys.argv[0]`: "trustratio plan"."""

_PACKAGE = "trustratio.recipes"

_PRETRAINING = (
    "--preset lamb-64k-32k --data 'text/*.jsonl.zst' --output runs/lamb",
    "--preset lamb-64k-32k --output runs/lamb --resume auto",
)


def from_console() -> bool:
    """Return whether this process is `trustratio WORD`."""
    return sys.argv[0].startswith(f"{CONSOLE} ")


def as_module() -> bool:
    """Return whether this process is `python -m trustratio.recipes.NAME`, however it was started."""
    return _module().startswith(f"{_PACKAGE}.")


def called(name: str) -> str:
    """Return the command line without arguments of a command at the front of recipes/, in the form that was used.

    Args:
        name: its file's without suffix, e.g. "fine_tune", which the console command spells with hyphens.
    """
    if from_console():
        return f"{CONSOLE} {name.replace('_', '-')}"
    return f"python -m {_PACKAGE}.{name}" if as_module() else f"python recipes/{name}.py"


def launched(launcher: str, name: str) -> str:
    """Return the same of a command that a launcher starts.

    Args:
        launcher: with its options, e.g. "torchrun --nproc_per_node 2"; it starts a module by `-m`, DeepSpeed's by
            `--module`.
        name: as for `called`; of the console command it is a module too.
    """
    if not (from_console() or as_module()):
        return f"{launcher} recipes/{name}.py"
    return f"{launcher} {'--module' if launcher.startswith('deepspeed') else '-m'} {_PACKAGE}.{name}"


def pretraining() -> tuple[str, Sequence[str]]:
    """Return the command line of the command that pretrains, and examples of it, in the form that was used."""
    if from_console() or _front() == "train":
        train = called("train")
        return f"{train} [--num_gpus N]", examples(train, "", *_PRETRAINING)
    name = _front() if _front().startswith("bert") else "bert"
    if name == "bert_accelerate":
        config = "$(trustratio configs zero2)" if as_module() else "recipes/configs/zero2.yaml"
        start = launched(f"accelerate launch --num_processes 2 --config_file {config}", name)
        return launched("accelerate launch --config_file CONFIG", name), examples(start, *_PRETRAINING)
    two, eight = (launched(f"deepspeed --num_gpus {ranks}", name) for ranks in (2, 8))
    other = launched("torchrun --nproc_per_node 2", name)
    return launched("deepspeed [--num_gpus N]", name), [
        *(two, *examples(eight, *_PRETRAINING)),
        *examples(other, "--optimizer lans --lr 0.01 model.layers=4 schedule.warmup=50"),
    ]


def _front() -> str:
    """Return the name of the command at the front of recipes/ that this process is, if it is one."""
    return _module().rpartition(".")[2] if as_module() else Path(sys.argv[0]).stem


def _module() -> str:
    """Return the name of the module that this process runs, "" if it is a file."""
    return getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", None) or ""


def examples(command: str, *arguments: str) -> Sequence[str]:
    """Return whole command lines, for --help."""
    return [f"{command} {text}".rstrip() for text in arguments]
