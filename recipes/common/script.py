"""What the commands at the front of recipes/ have in common; imports nothing but the standard library until `run`."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any, NoReturn, TextIO

from .errors import BAD_INPUT


def run(module: str, opening: str | None = None, *, cluster: bool = False, launches: bool = False) -> NoReturn:
    """Import a command's body and exit with the status that its `main()` returns.

    Python puts a script's folder first on its search path, where a file of that folder would stand in for any package
    of the same name; so the folder leaves the path before anything else is imported.

    Args:
        module: the body's full name, e.g. "trustratio.recipes.planning.plan".
        opening: of a body that takes seconds to import, what is imported before it; the body is not if the `main()` of
            this returns a status.
        cluster: the command may be a rank, also one that srun started: SIGUSR1 asks it to stop, see `RestartRequests`,
            and its end is an `Ending`.
        launches: such a command becomes a launcher where it is no rank; signals are the launcher's then.

    Raises:
        SystemExit: always.
    """
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script and sys.path and os.path.realpath(sys.path[0] or ".") == os.path.dirname(os.path.realpath(script)):
        del sys.path[0]
    _open_what_is_closed()
    sys.stdout, sys.stderr = readers_may_leave(sys.stdout), readers_may_leave(sys.stderr)
    watch: Any = _imported(f"{__package__}.launcher_watch")
    restarts: Any = _imported(f"{__package__}.restart_requests")
    ending: Any = _imported(f"{__package__}.ending").Ending() if cluster else None
    if cluster:
        _join_cluster(launches)
    watch.watch_launcher()  # before the imports, which take seconds
    for name in filter(None, (opening, module)):
        status = _imported(name).main()
        if status is not None:
            break
    if cluster:
        status = ending.status = restarts.told(status)
    raise SystemExit(status)


def _join_cluster(launches: bool) -> None:
    from .errors import RecipeError
    from .restart_requests import RESTARTS, told
    from .slurm import adopt_slurm

    if not launches:
        RESTARTS.listen()
    try:
        adopt_slurm(os.environ)
    except RecipeError as error:  # which rank this is, is not known
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(told(BAD_INPUT)) from None
    if launches and "RANK" in os.environ:
        RESTARTS.listen()


def _imported(name: str) -> Any:
    """Import a module of this package; end with a sentence if packages that it needs are not installed."""
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or "trustratio").partition(".")[0]
        if missing == "trustratio":
            raise
        print(
            f"error: the package {missing} is not installed, which this command needs: pip install "
            "'trustratio[recipes]' has all that recipes need",
            file=sys.stderr,
        )
        raise SystemExit(BAD_INPUT) from None


def _open_what_is_closed() -> None:
    """Let what was closed, as by `command >&-`, be the null device: a file of the run may not get its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


class _Pipe(io.FileIO):
    """A file descriptor that takes and forgets what nobody reads any more, as in `command | head`.

    The command goes on: nobody's pipe may end a training. Another failure, as of a full disk, is raised once: what is
    printed last, by the interpreter too, would fail again.
    """

    _failed = False

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes
        except OSError:
            if not self._failed:
                self._failed = True
                raise
            return memoryview(data).nbytes


def readers_may_leave(stream: TextIO) -> TextIO:
    """Return the same stream on a `_Pipe`; as it is if it is no file."""
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError, ValueError):
        return stream
    stream.flush()
    buffer = io.BufferedWriter(_Pipe(descriptor, "w", closefd=False))
    return io.TextIOWrapper(
        buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=True, write_through=stream is sys.stderr
    )


def follow_accelerate_to_cpu() -> None:
    """Tell DeepSpeed, before it is imported, that `accelerate launch` was told to use the CPU."""
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def command_file(name: str) -> Path:
    """Where a command lies, e.g. `command_file("bert.py")`, for those that start others."""
    return Path(__file__).resolve().parents[1] / name
