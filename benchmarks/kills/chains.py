"""Runs that are killed several times, each in another life, and continued until they are finished."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.kills.ends import differences
from benchmarks.kills.moments import Kill, Timeline, end_all, wait_for_end
from benchmarks.kills.runs import Configuration, Life, Run

MOST_KILLS = 6
"""Of one run."""

PATIENCE = 240.0
"""Seconds on a busy machine within which what a kill left behind has to end by itself."""

_REFUSED = "is writing into output folder"
_MOST_REFUSED = 5
_BAD_INPUT = 2


@dataclass
class Struck:
    """A kill that was carried out.

    Attributes:
        configuration: whose run.
        run: number of the run among those of its configuration.
        life: which start of the run it ended.
        moment: that was waited for.
        killed: roles of the processes.
        seconds: since the life's start.
        after: the last line that was printed before.
        at_once: whether the run was started again while the kill's other processes may have lived.
        until_gone: seconds until nothing of the run lived; None if something still did, or nobody waited.
    """

    configuration: str
    run: int
    life: int
    moment: str
    killed: list[str]
    seconds: float
    after: str
    at_once: bool
    until_gone: float | None = None

    def line(self, number: int) -> str:
        """Return what is printed of it."""
        gone = "started again at once" if self.at_once else "NOT ALL GONE"
        if self.until_gone is not None:
            gone = f"all gone after {self.until_gone:.1f} s"
        return (
            f"{number:4} {self.configuration} run {self.run} life {self.life}: {' and '.join(self.killed)} killed "
            f"after {self.seconds:.1f} s ({self.moment}); {gone}; last line: {self.after[:110]}"
        )


@dataclass
class End:
    """How a run ended that had been killed.

    Attributes:
        configuration: whose run.
        run: its number.
        lives: how often it was started.
        refused: how many of the starts were refused since processes of an earlier life still held the folder.
        differences: from the undisturbed run; [] if there is none.
    """

    configuration: str
    run: int
    lives: int = 0
    refused: int = 0
    differences: list[str] = field(default_factory=list)


@dataclass
class Chain:
    """Kills a run of one configuration over and over.

    Attributes:
        configuration: of the run.
        undisturbed: the run whose end it must come to.
        timeline: of that run.
        told: called with every kill.
    """

    configuration: Configuration
    undisturbed: Run
    timeline: Timeline
    told: Callable[[Struck], None]

    def carry_out(self, folder: Path, number: int, kills: Callable[[int], Kill | None]) -> tuple[list[Struck], End]:
        """Start the run until it is finished.

        Args:
            folder: to make and, if the end is right, remove.
            number: of the run.
            kills: the kill for a life by its number, None to let it live.

        Returns:
            The kills that came about, and the end.
        """
        struck: list[Struck] = []
        run, end = Run(self.configuration, self.undisturbed.data, folder), End(self.configuration.name, number)
        try:
            self._live(run, end, kills, struck)
            if not end.differences:
                end.differences += differences(self.undisturbed, run)
            if not end.differences and wait_for_end(run, PATIENCE) is None:
                end.differences.append(f"processes still live after {PATIENCE:g} s")
        except TimeoutError as error:
            end.differences.append(str(error))
        finally:
            end_all(run)
        end.lives = run.lives
        end.differences += [f"left in shared memory: {name}" for name in run.left_in_shared_memory()]
        if not end.differences:
            shutil.rmtree(folder)
        return struck, end

    def _live(self, run: Run, end: End, kills: Callable[[int], Kill | None], struck: list[Struck]) -> None:
        """Start the run until it ends by itself with status 0, or as it must not."""
        while True:
            life = run.start()
            kill = kills(run.lives)
            done = self._strike(run, life, kill, end.run) if kill is not None else None
            if done is not None and kill is not None:
                struck.append(done)
                if not kill.at_once:
                    done.until_gone = wait_for_end(run, PATIENCE)
                self.told(done)
                if not kill.at_once and done.until_gone is None:
                    end.differences.append(f"life {run.lives}: processes still live {PATIENCE:g} s after the kill")
                    return
                life.wait(lambda: False)  # whoever starts it again has seen the command end
                continue
            life.wait(lambda: False)
            if life.process.returncode == 0:
                return
            if _refused(life) and end.refused < _MOST_REFUSED:
                end.refused += 1
                continue
            end.differences.append(f"life {run.lives} ended with status {life.process.returncode}: {_said(life)}")
            return

    def _strike(self, run: Run, life: Life, kill: Kill, number: int) -> Struck | None:
        if not kill.wait(run, life, self.timeline):
            return None
        seconds, after = life.seconds, life.last_line
        killed = kill.strike(run, life)
        if not killed:
            return None
        name, moment = self.configuration.name, kill.moment
        return Struck(name, number, run.lives, moment, killed, round(seconds, 2), after, kill.at_once)


def undisturbed(configuration: Configuration, data: Path, folder: Path) -> tuple[Run, Timeline]:
    """Let a run live to its end.

    Raises:
        RuntimeError: it did not end with status 0.
    """
    run = Run(configuration, data, folder)
    life = run.start()
    life.wait(lambda: False)
    if life.process.returncode != 0:
        raise RuntimeError(f"undisturbed, {configuration.name} ended with {life.process.returncode}: {_said(life)}")
    run.left_in_shared_memory()
    return run, Timeline.of(life)


def drawn_kills(seed: int, configuration: str, number: int, most: int) -> Callable[[int], Kill | None]:
    """Return the kills of a run by life: up to `most` of them, from a seed."""
    generator = random.Random(f"{seed}/{configuration}/{number}")
    planned = generator.randint(1, most)
    return lambda life: Kill.drawn(generator, life) if life <= planned else None


def given_kills(kills: Sequence[Kill]) -> Callable[[int], Kill | None]:
    """Return what kills the first lives of a run."""
    return lambda life: kills[life - 1] if life <= len(kills) else None


def _refused(life: Life) -> bool:
    return any(_REFUSED in line for _, line in life.lines)


def _said(life: Life) -> str:
    lines = [line for _, line in life.lines]
    errors = [line for line in lines if "Error" in line or line.startswith("error")]
    return " | ".join((errors or lines)[-3:])[:1200]
