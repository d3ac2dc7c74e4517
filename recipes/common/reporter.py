"""What a run shows: lines, progress bars on a terminal, and nothing on ranks other than the first."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from .progress import PROGRESS
from .stages import Stages

T = TypeVar("T")


class Reporter:
    """Prints for one rank; a reporter that is not `active` swallows everything.

    Attributes:
        active: whether it prints.
        terminal: whether it shows bars.
        stages: how long each stage of the work took that it reports on.
    """

    def __init__(self, active: bool = True) -> None:
        """Print if `active`."""
        self.active = active
        self.stages = Stages()
        self.terminal = active and _has_width(sys.stderr)

    def line(self, text: str) -> None:
        """Print a line without breaking a progress bar."""
        if self.active:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def error(self, text: str) -> None:
        """Print a line to the error stream."""
        if self.active:
            print(text, file=sys.stderr, flush=True)

    def progress(self, items: Iterable[T], total: int, label: str) -> Iterator[T]:
        """Yield `items` with a progress bar on a terminal, else after one line."""
        if self.terminal:
            items = tqdm(items, total=total, desc=label, leave=False, file=sys.stderr)
        else:
            self.line(f"  {label}: {total:,}")
        for item in items:
            PROGRESS.move()
            yield item

    def training_bar(self, first: int, total: int, print_every: int) -> TrainingBar:
        """Return the display of a training run that starts after step `first` of `total`."""
        return TrainingBar(self, first, total, print_every)


class TrainingBar:
    """Loss, learning rate, throughput and time left: a bar on a terminal, else a line every few steps."""

    def __init__(self, reporter: Reporter, first: int, total: int, print_every: int) -> None:
        """Show the steps first + 1 .. total."""
        self.reporter = reporter
        self.total = total
        self.print_every = print_every
        self.last_printed = first
        self.bar = None
        if reporter.terminal:
            self.bar = tqdm(total=total, initial=first, desc="training", unit="step", file=sys.stderr)

    def update(self, record: dict[str, Any], seconds_left: float) -> None:
        """Show one logged step; `record` has the keys of a training line in metrics.jsonl."""
        step = record["step"]
        rates = f"{record['sequences_per_second']:.0f} seq/s, {record['tokens_per_second']:,.0f} tok/s"
        if self.bar is not None:
            self.bar.total = self.total  # which is an estimate where batches grow
            self.bar.set_postfix_str(f"loss {record['loss']:.4f}, lr {record['lr']:.2e}, {rates}", refresh=False)
            self.bar.update(step - self.bar.n)
        elif step // self.print_every > self.last_printed // self.print_every or step == self.total:
            self.last_printed = step
            self.reporter.line(
                f"step {step}/{self.total}: loss {record['loss']:.4f}, lr {record['lr']:.2e}, {rates}, "
                f"{clock(seconds_left)} left"
            )

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()


def _has_width(stream: TextIO) -> bool:
    """Tell a terminal that can show a bar; one without a size, as in some containers, would show nothing at all."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def folded(text: str, width: int = 120) -> str:
    """Return a line broken at spaces into lines of at most `width`, the later ones indented; words stay whole."""
    return textwrap.fill(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def clock(seconds: float) -> str:
    """Format a duration as m:ss or h:mm:ss."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
