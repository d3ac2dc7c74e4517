"""Where measured steps go: a file, TensorBoard, Weights & Biases, or whoever takes numbers by name."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from ..checkpoints.ranks import raise_together
from .file import NormsFile
from .records import MeasuredNorms
from .scalars import Scalars

__all__ = ["Log", "Writer", "begin_file", "check_every", "check_file", "check_targets", "is_first_rank", "make_writer"]

Log = Callable[[dict[str, float], int], Any]
"""Takes numbers by name, and the step: ``accelerator.log``, a Lightning logger's ``log_metrics``, a function."""

Writer = Callable[[MeasuredNorms, int], Any]
"""Takes what was measured, and the step."""


def is_first_rank() -> bool:
    """Whether this process is the one that writes."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def check_every(every: Any) -> None:
    """Raise ValueError if it does not say every how many steps."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be an integer of at least 1, got {every!r}")


def check_file(file: Any) -> None:
    """Raise TypeError if it is no path; None is nothing."""
    if file is not None and not isinstance(file, (str, os.PathLike)):
        raise TypeError(f"file takes a path, and was given {file!r}")


def check_targets(file: Any, tensorboard: Any, wandb: Any, log: Any, steps_done: int) -> None:
    """Raise an error, on all ranks alike, for what `make_writer` cannot write to; None is nothing."""
    check_file(file)
    if tensorboard is not None and not (
        isinstance(tensorboard, (str, os.PathLike)) or hasattr(tensorboard, "add_scalar")
    ):
        raise TypeError(f"tensorboard takes a folder or a SummaryWriter, and was given {type(tensorboard).__name__}")
    if isinstance(tensorboard, (str, os.PathLike)) and importlib.util.find_spec("tensorboard") is None:
        raise ImportError('write_to(tensorboard=...) needs TensorBoard: pip install "trustratio[loggers]"')
    if wandb is not None and not (hasattr(wandb, "log") and hasattr(wandb, "define_metric")):
        raise TypeError(f"wandb takes a run, which wandb.init() returns, and was given {type(wandb).__name__}")
    if log is not None and not callable(log):
        raise TypeError(f"log takes a function of a dict of numbers and the step, and was given {type(log).__name__}")
    if isinstance(steps_done, bool) or not isinstance(steps_done, int) or steps_done < 0:
        raise ValueError(f"steps_done must be an integer of at least 0, got {steps_done!r}")


def make_writer(
    scalars: Scalars,
    steps_done: int,
    *,
    file: str | os.PathLike[str] | None = None,
    tensorboard: Any = None,
    wandb: Any = None,
    log: Log | None = None,
) -> Writer:
    """Return what writes to all of the targets that are given. See `LayerNorms.write_to`.

    A target that fails while training goes on is left out from then on, with a warning.

    Raises:
        ValueError: If none is given.
    """
    writers: dict[str, Writer] = {}
    if file is not None:
        writers[_name(file)] = NormsFile(file, steps_done).write
    logs = {
        "TensorBoard": None if tensorboard is None else _tensorboard(tensorboard, steps_done),
        "Weights & Biases": None if wandb is None else _wandb(wandb),
        f"log={log!r}": log,
    }
    writers |= {name: _by_name(scalars, one) for name, one in logs.items() if one is not None}
    if not writers:
        raise ValueError("layer norms were given nowhere to go: give file=, tensorboard=, wandb= or log=")
    return _lasting(writers)


def begin_file(file: str | os.PathLike[str], steps_done: int) -> Writer | None:
    """Return what writes to a file, on the first rank; all ranks call this, and fail together.

    Raises:
        ValueError: If the file cannot be written, or not be continued.
    """
    writer, problems = None, []
    if is_first_rank():
        try:
            writer = _lasting({_name(file): NormsFile(file, steps_done).write})
        except (OSError, ValueError) as error:
            problems.append(f"layer norms cannot go to {_name(file)}: {getattr(error, 'strerror', None) or error}")
    raise_together(problems, ValueError)
    return writer


def _name(file: str | os.PathLike[str]) -> str:
    return f"the file {os.fspath(file)!r}"


def _lasting(writers: dict[str, Writer]) -> Writer:
    """Return what writes to all of them, and leaves out those that have failed."""

    def write(measured: MeasuredNorms, step: int) -> None:
        for name, writer in list(writers.items()):
            try:
                writer(measured, step)
            except Exception as error:
                del writers[name]
                warnings.warn(f"layer norms no longer go to {name}: {type(error).__name__}: {error}", stacklevel=2)

    return write


def _by_name(scalars: Scalars, log: Log) -> Writer:
    return lambda measured, step: log(scalars.of(measured), step)


def _tensorboard(writer: Any, steps_done: int) -> Log:
    if isinstance(writer, (str, os.PathLike)):
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(os.fspath(writer), purge_step=steps_done + 1)

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def _wandb(run: Any) -> Log:
    # wandb's own count of steps goes up with every call of log, also with the program's own: ours is a number beside.
    run.define_metric("layer_norms/step")
    run.define_metric("layer_norms/*", step_metric="layer_norms/step")
    return lambda values, step: run.log({**values, "layer_norms/step": step})
