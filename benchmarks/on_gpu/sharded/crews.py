"""The processes of a crew, seen from outside: what they found, and what became of those that hang or die."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

from ..children.limited import Child, python
from .settings import Crew

__all__ = ["RunningCrew"]

START_SECONDS, SETTING_SECONDS = 90.0, 25.0
REHEARSED = 7.0
"""How many times longer a rehearsal may take: its processes share cores with others'."""


class RunningCrew:
    """Trains the settings of a crew; a setting that hangs or ends a process takes nothing from the next ones.

    Attributes:
        found: What came out, by the setting's name.
        todo: Names of those that have not come out yet.
    """

    def __init__(self, crew: Crew, device: str, log: Path, folder: Path) -> None:
        """Start its ranks on the device; they write their lines into `folder` and all else to `log`."""
        self.crew, self.device, self.log, self.folder = crew, device, log, folder
        settings = crew.settings[: crew.rehearsed] if device == "cpu" else crew.settings
        self.todo = [setting.name for setting in settings]
        self.found: dict[str, Any] = {}
        self.patience = REHEARSED if device == "cpu" else 1.0
        self._starts = 0
        self._start()

    def poll(self) -> bool:
        """Look at what the ranks have written since; returns whether anything is new in `found`."""
        before = len(self.found)
        ends = [outcome for child in self.children if (outcome := child.outcome()) is not None]
        lines = [line for path in self._answers for line in _lines(path)]  # after the ends: so they are complete
        for line in lines:
            if line.get("setting") in self.todo:
                self._settle(line["setting"], line["found"])
        if self.todo:
            self._watch(lines, ends)
        return len(self.found) > before

    @property
    def done(self) -> bool:
        """Whether every setting has come out."""
        return not self.todo

    def end(self) -> None:
        """Stop the processes."""
        for child in self.children:
            child.end()

    def _start(self) -> None:
        self._starts += 1
        port = _free_port()
        self._answers = [self.folder / f"start{self._starts}-rank{rank}.jsonl" for rank in range(self.crew.ranks)]
        self.children = [self._start_rank(rank, port) for rank in range(self.crew.ranks)]
        self._at: tuple[str | None, bool] = (None, False)
        self._since = time.monotonic()

    def _start_rank(self, rank: int, port: int) -> Child:
        environment = {
            **{"RANK": str(rank), "WORLD_SIZE": str(self.crew.ranks), "MASTER_PORT": str(port)},
            # All on one device.
            **{"LOCAL_RANK": "0", "LOCAL_SIZE": str(self.crew.ranks), "MASTER_ADDR": "127.0.0.1"},
            **{"DS_ACCELERATOR": self.device, "TRITON_INTERPRET": "1" if self.device == "cpu" else "0"},
        }
        arguments = (self.crew.name, str(rank), self.device, str(self._answers[rank]), *self.todo)
        return Child.start(python("benchmarks.on_gpu.sharded.rank", *arguments), 3600.0, self.log, environment)

    def _watch(self, lines: list[dict[str, Any]], ends: list[str]) -> None:
        """Give up what hangs or has died, and go on with the next."""
        ready = sum("ready" in line for line in lines) == len(self.children)
        current = next((line["began"] for line in lines if line.get("began") in self.todo), None)
        if (current, ready) != self._at:
            self._at, self._since = (current, ready), time.monotonic()
        limit = self.patience * (SETTING_SECONDS if ready else START_SECONDS)
        in_trouble = any(ends) or len(ends) == len(self.children)
        if not in_trouble and time.monotonic() - self._since < limit:
            return
        why = next((end for end in ends if end), f"not finished after {limit:.0f} s")
        self.end()
        for name in [current] if current else list(self.todo):
            self._settle(name, {"missing": why if current else f"the ranks did not start: {why}"})
        if self.todo:
            self._start()

    def _settle(self, name: str, found: dict[str, Any]) -> None:
        self.found[name] = found
        self.todo.remove(name)


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may still be written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
