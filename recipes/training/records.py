"""Where the records of updates and validations go, whichever loop trains: the run's metrics, and the display."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import TrainingFailure
from ..common.reporter import Reporter, TrainingBar
from ..runs.loggers import MetricLogger, MetricLoggers
from .checks import CheckedRun


@dataclass
class Records:
    """Writes and shows records, in the order of their steps.

    Attributes:
        metrics: takes the records.
        display: progress on the first rank.
    """

    metrics: MetricLogger
    display: TrainingBar
    _first: int = 0
    _began: float = 0.0

    def begin(self, step: int) -> None:
        """Start the clock that the time left is estimated by; `step` updates are done."""
        self._first, self._began = step, time.perf_counter()

    def updates(self, records: Sequence[dict[str, Any]], last: int) -> None:
        """Write the records of the newest updates, and show the last one and the time left until update `last`.

        Raises:
            TrainingFailure: a loss is not finite; its record is written, too.
        """
        if not records:
            return
        for record in records:
            self.metrics.write(record)
        step = records[-1]["step"]
        seconds = (time.perf_counter() - self._began) / (step - self._first)
        self.display.update(records[-1], seconds * (last - step))
        for record in records:
            if not math.isfinite(record["loss"]):
                raise TrainingFailure(f"the loss became {record['loss']} at step {record['step']}")

    def validation(self, step: int, loss: float, accuracy: float, unigram_entropy: float) -> None:
        """Write and print the record of a validation after update `step`, beside the loss of guessing by frequency."""
        self.metrics.write(
            {
                "kind": "validation",
                "step": step,
                "validation_loss": loss,
                "validation_accuracy": accuracy,
                "unigram_entropy": unigram_entropy,
            }
        )
        self.line(
            f"step {step}: validation loss {loss:.4f} (unigram entropy {unigram_entropy:.4f}), "
            f"masked accuracy {accuracy:.2%}"
        )

    def line(self, text: str) -> None:
        """Print a line beside the display."""
        self.display.reporter.line(text)


@contextlib.contextmanager
def open_records(run: CheckedRun, folder: Path, reporter: Reporter) -> Iterator[Records]:
    """Open the loggers and the display of a run with this output folder; closed after the block."""
    config = run.config
    metrics = MetricLoggers(folder, config.run.loggers, config.to_dict(), active=reporter.active)
    with contextlib.closing(metrics):
        display = reporter.training_bar(run.first, run.last, config.run.print_every)
        with contextlib.closing(display):
            yield Records(metrics, display)
