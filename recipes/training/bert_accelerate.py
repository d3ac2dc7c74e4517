"""Pretrain BERT with the recipe's own loop, wrapped by `Accelerator.prepare`."""

from __future__ import annotations

from collections.abc import Sequence

from . import bert
from .launchers import AccelerateLauncher


def main(arguments: Sequence[str] | None = None) -> int:
    """Pretrain; return the process's exit status as `bert.main` does."""
    return bert.main(arguments, AccelerateLauncher())
