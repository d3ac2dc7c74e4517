"""Where a run's records go: metrics.jsonl always, TensorBoard and Weights & Biases when asked for."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..common.errors import RecipeError, unknown_name
from ..common.files import write_text
from .folder import TENSORBOARD, WANDB_ID
from .metrics import MetricsLog

PROJECT = "trustratio"


class MetricLogger(Protocol):
    """Takes a run's records, in the order of their steps."""

    def write(self, record: dict[str, Any]) -> None:
        """Take one record: `kind`, `step`, numbers, and numbers by layer."""

    def close(self) -> None:
        """Write out what is left."""


class TensorBoardLogger:
    """Event files in the run's folder `tensorboard`: `tensorboard --logdir runs`."""

    def __init__(self, folder: Path, config: dict[str, Any], done: int) -> None:
        """Write to a run's folder, in which what is there of updates after the first `done` is no longer shown."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=done + 1)
        sections = {name: fields for name, fields in config.items() if isinstance(fields, dict)}
        lines = [
            f"    {section}.{name}={value}" for section, fields in sections.items() for name, value in fields.items()
        ]
        self._writer.add_text("configuration", "\n".join(lines))

    def write(self, record: dict[str, Any]) -> None:
        """Take one record."""
        for name, value in scalars(record):
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Write out what is left."""
        self._writer.close()


class WandbLogger:
    """A Weights & Biases run; the environment (WANDB_MODE=offline, WANDB_PROJECT, ...) has its usual say."""

    def __init__(self, folder: Path, config: dict[str, Any], done: int) -> None:
        """Start a run named like the folder, or go on with the one that a resumed run began."""
        import wandb

        known = folder / WANDB_ID
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            dir=str(folder),
            config=config,
            id=known.read_text().strip() if known.exists() else None,
            resume="allow",
        )
        write_text(known, self._run.id + "\n")

    def write(self, record: dict[str, Any]) -> None:
        """Take one record."""
        # Training and validation records of one step are two calls; wandb's own step counter allows one.
        self._run.log({"step": record["step"], **dict(scalars(record))})

    def close(self) -> None:
        """Write out what is left."""
        self._run.finish()


LOGGERS: dict[str, tuple[str, Callable[[Path, dict[str, Any], int], MetricLogger]]] = {
    "tensorboard": ("tensorboard", TensorBoardLogger),
    "wandb": ("wandb", WandbLogger),
}
"""Package and class by name."""


def check_loggers(names: Sequence[str]) -> None:
    """Check, before any work is done, that the loggers exist and their packages are installed.

    Raises:
        RecipeError: unknown name, or a package is missing.
    """
    for name in names:
        if name not in LOGGERS:
            raise unknown_name("logger", name, LOGGERS)
        package = LOGGERS[name][0]
        if importlib.util.find_spec(package) is None:
            raise RecipeError(
                f"run.loggers has {name!r}, but the package {package} is not installed: pip install {package}, or "
                "leave it out (metrics.jsonl and the report are always written)"
            )


class MetricLoggers:
    """Hands every record to all loggers; on ranks other than the first there are none."""

    def __init__(self, folder: Path, names: Sequence[str], config: dict[str, Any], active: bool, done: int = 0) -> None:
        """Open metrics.jsonl and the loggers `names`.

        Args:
            folder: of the run.
            names: checked by `check_loggers`.
            config: resolved configuration, for loggers that show it.
            active: whether this is the first rank.
            done: updates of the run that are done.
        """
        self._loggers: list[MetricLogger] = [MetricsLog(folder, active)]
        if active:
            self._loggers += [LOGGERS[name][1](folder, config, done) for name in names]

    def write(self, record: dict[str, Any]) -> None:
        """Hand on one record."""
        for logger in self._loggers:
            logger.write(record)

    def close(self) -> None:
        """Close all."""
        for logger in self._loggers:
            logger.close()


def scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield a record's numbers by name: "train/loss", and by layer "trust_ratios/NAME"."""
    for key, value in record.items():
        if key in ("kind", "step"):
            continue
        if isinstance(value, dict):
            yield from ((f"{key}/{layer}", of_layer) for layer, of_layer in value.items())
        elif isinstance(value, int | float):
            yield f"{record['kind']}/{key}", value
