"""The recipe through Accelerate: `bert`, wrapped by `Accelerator.prepare`."""

from __future__ import annotations

from collections.abc import Sequence

from . import bert
from .launchers import AccelerateFrontEnd


def main(arguments: Sequence[str] | None = None) -> int:
    """Pretrain; return the exit status of `bert.main`."""
    return bert.main(arguments, front_end=AccelerateFrontEnd())
