"""Where the records of updates and validations go, whichever loop trains: the run's metrics, and the display."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import RecipeError, TrainingFailure
from ..common.reporter import Reporter, TrainingBar
from ..runs.loggers import MetricLogger, MetricLoggers
from .checks import CheckedRun
from .ranks import collect_failures

WHAT_TO_TRY = (
    "start anew with a lower --lr (a third of it), a longer schedule.warmup or a lower training.gradient_clipping"
)
"""The end of the message for a run that diverged."""


@dataclass
class Records:
    """Writes and shows records, in the order of their steps.

    Attributes:
        metrics: takes the records.
        display: progress on the first rank.
        failure: why a record could not be written; None if all were. The loop stops all ranks for it.
    """

    metrics: MetricLogger
    display: TrainingBar
    failure: Exception | None = None
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
            self._write(record)
        self.display.total = last
        step = records[-1]["step"]
        seconds = (time.perf_counter() - self._began) / (step - self._first)
        self.display.update(records[-1], seconds * (last - step))
        for record in records:
            if not math.isfinite(record["loss"]):
                raise TrainingFailure(
                    f"the loss became {record['loss']} at step {record['step']}, at learning rate {record['lr']:.3g}; "
                    f"{WHAT_TO_TRY}"
                )

    def validation(self, step: int, loss: float, accuracy: float, unigram_entropy: float) -> None:
        """Write and print the record of a validation after update `step`, beside the loss of guessing by frequency."""
        self._write(
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

    def _write(self, record: dict[str, Any]) -> None:
        """Hand a record on, on one rank alone: a disk that is full must not end it while the others wait for it."""
        if self.failure is None:
            try:
                self.metrics.write(record)
            except Exception as error:  # of whatever class a logger raises
                self.failure = error

    def require_written(self) -> None:
        """Raise on all ranks if a record could not be written (collective).

        Raises:
            TrainingFailure: so.
        """
        failures = collect_failures(self.failure)
        if failures:
            raise TrainingFailure(f"the metrics could not be written ({'; '.join(failures)})")

    def stage(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Count the time of a block as a stage of the run, see `Stages`."""
        return self.display.reporter.stages(name)

    def line(self, text: str) -> None:
        """Print a line beside the display."""
        self.display.reporter.line(text)

    def say(self, text: str) -> None:
        """Print a line if there is anything to say."""
        if text:
            self.line(text)


@contextlib.contextmanager
def open_records(run: CheckedRun, folder: Path, reporter: Reporter) -> Iterator[Records]:
    """Open the loggers and the display of a run with this output folder (collective); closed after the block.

    Raises:
        RecipeError: the first rank cannot write the run's folder.
    """
    config = run.config
    metrics: MetricLoggers | None = None
    failure: Exception | None = None
    try:
        metrics = MetricLoggers(folder, config.run.loggers, config.to_dict(), reporter.active, run.first)
    except Exception as error:  # a logger may raise anything, here alone, while the other ranks wait
        failure = error
    failures = collect_failures(failure)
    if metrics is None or failures:
        raise RecipeError(f"the metrics cannot be written ({'; '.join(failures)})")
    display = reporter.training_bar(run.first, run.last, config.run.print_every)
    try:
        with contextlib.closing(display):
            yield Records(metrics, display)
    except BaseException:
        with contextlib.suppress(Exception):  # what ended the training is to be told, not what a logger makes of it
            metrics.close()
        raise
    with contextlib.suppress(OSError):  # what a full disk did not take has been told
        metrics.close()
