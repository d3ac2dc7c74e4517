"""How far the work of this process is, noted where it is done, for those who watch it from another thread."""

from __future__ import annotations

import time
from collections.abc import Callable


class Progress:
    """What is being done, and when something was last done; noting it costs an assignment or two.

    Attributes:
        doing: in words that follow "rank 1 failed ".
        update: the newest update that was begun; 0 before the first.
        moved: when something was last done, by `time.monotonic`.
        alone: whether it needs no other rank: it ends by itself, whatever befalls them.
        where_to_go_on: says which checkpoint a run that ends now is continued from; None before training.
    """

    def __init__(self) -> None:
        """Begin with nothing done."""
        self.doing = "while starting"
        self.update = 0
        self.alone = False
        self.moved = time.monotonic()
        self.where_to_go_on: Callable[[], str] | None = None

    def begin(self, doing: str, update: int | None = None) -> None:
        """Note what is being done from now on, and the update that it belongs to."""
        self.doing, self.alone = doing, False
        if update is not None:
            self.update = update
        self.move()

    def move(self) -> None:
        """Note that a piece of it was done: a micro-batch, a document, a block of a file."""
        self.moved = time.monotonic()


PROGRESS = Progress()
"""Of this process's main thread."""
