"""What the commands at the front of recipes/ have in common; imports nothing but the standard library."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn


def run(module: str, *, ends_with_reader: bool = False) -> NoReturn:
    """Import a command's body and exit with the status that its `main()` returns.

    Python puts a script's folder first on its search path, where a file of that folder would stand in for any package
    of the same name; so the folder leaves the path before anything else is imported.

    Args:
        module: the body's full name, e.g. "trustratio.recipes.planning.plan".
        ends_with_reader: let `command | head` end without a traceback. Not for training, which nobody's pipe may kill.

    Raises:
        SystemExit: always.
    """
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script and sys.path and os.path.realpath(sys.path[0] or ".") == os.path.dirname(os.path.realpath(script)):
        del sys.path[0]
    import importlib
    import signal

    if ends_with_reader and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    raise SystemExit(importlib.import_module(module).main())


def follow_accelerate_to_cpu() -> None:
    """Tell DeepSpeed, before it is imported, that `accelerate launch` was told to use the CPU."""
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def command_file(name: str) -> Path:
    """Where a command lies, e.g. `command_file("bert.py")`, for those that start others."""
    return Path(__file__).resolve().parents[1] / name
