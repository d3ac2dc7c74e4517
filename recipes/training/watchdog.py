"""A run ends as a whole: whatever befalls one rank, a fault or a standstill, is told once, and ends the others.

Every rank has a thread that leaves a beat in the launcher's store every second or so, and looks there for what another
rank has to say. It takes no part in collectives, and the training loop only notes what it does (`Progress`). The beats
of others are read by a rank that stands still itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import psutil
import torch
from torch.distributed import DistError, PrefixStore, Store, TCPStore

from ..common.errors import FAILED, STOPPED, RecipeError, TrainingFailure, sentence
from ..common.progress import PROGRESS
from ..common.restart_requests import BEFORE_TRAINING, RESTARTS, told

T = TypeVar("T")

_BEATS_PER_SECOND = 250  # of all ranks together, at most
_SURE = 5  # beats without a new one, after which a process does not run
_ANSWER = 5.0  # seconds in which a store that is there answers
_GRACE = 20.0  # seconds in which a rank that hears of a failure may end by itself, with a report; launchers give 30
_MOST_NAMED = 8
_FAILURE = "failure"
_COLLECTIVE = ("torch/distributed/", "deepspeed/comm/")
_BACKWARD = "_engine_run_backward"  # in which gradients are reduced


class RankFailure(RuntimeError):
    """One rank failed, or was asked to stop before training, and this one ends with it. The message is for the user.

    Attributes:
        unsaid: nobody else says it.
        status: what the process ends with: FAILED or STOPPED.
    """

    def __init__(self, message: str, unsaid: bool, status: int = FAILED) -> None:
        """Carry a message, which this rank has to say if it is `unsaid`."""
        super().__init__(message)
        self.unsaid, self.status = unsaid, status

    def say(self) -> None:
        """Print the message, unless somebody else does."""
        if self.unsaid:
            print(f"{'error: ' if self.status == FAILED else ''}{self}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself, every second or so.

    Attributes:
        number: of the beat.
        idle: seconds since the rank did something.
        doing: what, in words.
        update: the newest update that it began.
        place: where its main thread is, if it has been there for long.
        waits: whether it waits for other ranks there.
    """

    number: int = 0
    idle: float = 0.0
    doing: str = "while starting"
    update: int = 0
    place: str = ""
    waits: bool = False


class Watchdog:
    """Context manager around all that the ranks do together, which no rank leaves later than the others.

    Inside, an exception that other ranks cannot know of becomes a `RankFailure`; errors that all ranks have alike
    (`RecipeError`, `TrainingFailure`) pass through. A standstill ends the process with status 3, from the thread.
    """

    def __init__(self, rank: int, ranks: int, hang_seconds: float | None) -> None:
        """Watch one of `ranks`; `hang_seconds` is how long none of them may stand still; 0 or None: for ever."""
        self.rank, self.ranks, self.hang_seconds = rank, ranks, hang_seconds or None
        self.period = max(1.0, ranks / _BEATS_PER_SECOND)
        self.heard: RankFailure | None = None
        self._beats = 0
        self._over = threading.Event()
        self._line: _Line | None = None
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        """Start watching this rank's own progress."""
        PROGRESS.begin("while waiting for the other ranks to start", update=0)
        PROGRESS.where_to_go_on = None
        self._thread.start()
        return self

    def meet(self) -> None:
        """Exchange beats from now on, through the store at which the process group has met."""
        if self.ranks > 1:
            # torchrun's store outlives ranks that it starts anew.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            prefix = f"trustratio/{attempt}"
            self._line = _Line(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), prefix)
            RESTARTS.tell_by(self._tell_of_request)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop watching.

        Raises:
            RankFailure: the block raised what the other ranks cannot know of, or what the failure of one led to.
        """
        RESTARTS.tell_by(None)
        self._over.set()
        self._thread.join(_ANSWER)
        try:
            if isinstance(error, RecipeError | TrainingFailure):
                self._post(str(error), said=self.rank == 0)  # in case that it is this rank's alone
            elif isinstance(error, Exception):
                raise self._failure(error) from error
        finally:
            if self._line is not None:
                self._line.close()

    # What befalls this rank ------------------------------------------------------------------------------------------

    def _failure(self, error: Exception) -> RankFailure:
        """Return what the run ends with: an earlier failure on another rank, or the loss of one, or this error."""
        if self._listen() is None and _is_of_a_connection(error):
            lost = self._lost()
            if lost and self.heard is None:
                return self._told(f"{_ranks(lost)} ended without a word: killed, or on a machine that is gone")
        if self.heard is not None:
            return self.heard
        where = f"rank {self.rank} failed {PROGRESS.doing}"
        if _is_out_of_memory(error):
            return self._told(f"{where}: out of memory ({_first_line(error)}); use a smaller --micro_batch")
        if isinstance(error, OSError):
            return self._told(f"{where}: {sentence(error)}")
        traceback.print_exception(error)
        return self._told(f"{where}, with the exception above: {type(error).__name__}: {_first_line(error)}")

    def _told(self, text: str) -> RankFailure:
        """Tell all ranks; return what this one ends with."""
        text = f"{text}; {PROGRESS.where_to_go_on()}" if PROGRESS.where_to_go_on else text
        first = self._post(text, said=True)
        return RankFailure(text, unsaid=first or (first is None and self.rank <= 1))

    def _tell_of_request(self) -> None:
        """Tell the others, before this rank ends, that it was asked to stop; called by the thread that hears it."""
        self._over.set()
        self._thread.join(_ANSWER)  # which may be asking the store
        self._post(f"rank {self.rank} was {BEFORE_TRAINING}", said=self.rank == 0, status=STOPPED)
        self.let_hear()

    def _lost(self) -> list[int]:
        """Return the ranks whose processes have ended or do not run; rank 0 if the store has gone with it."""
        try:
            beats = self._two_looks()
        except _NO_STORE:
            return [0] if self.rank else []
        return [rank for rank, (before, after) in beats.items() if before.number == after.number]

    # The thread ------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._over.wait(self.period):
            if PROGRESS.alone:
                continue
            if (heard := self._listen()) is not None:
                # Who waits for a rank that is gone hears of it from gloo; on a GPU, nobody does.
                if not self._over.wait(_GRACE if heard.status == FAILED else 0) and not PROGRESS.alone:
                    self._leave(heard)
            elif self.hang_seconds is not None and _idle() > self.hang_seconds + self._deference():
                self._judge(self.hang_seconds)

    def _deference(self) -> float:
        """Return the seconds by which this rank lets the first two judge before; a thousand at once would be many."""
        return 0.0 if self.rank <= 1 else 10 * self.period

    def _leave(self, failure: RankFailure) -> NoReturn:
        failure.say()
        self.let_hear()
        leave(failure.status)

    def let_hear(self) -> None:
        """Wait until the others have heard of a failure, if the store may end with this process."""
        if self.rank == 0 and self.ranks > 1:
            time.sleep(_SURE * self.period)

    def _listen(self) -> RankFailure | None:
        """Leave a beat; return what another rank has told, after which nobody looks at beats and the store may end."""
        if self.heard is not None:
            return self.heard
        self._beats += 1
        beat = json.dumps(vars(self._own()))
        with contextlib.suppress(*_NO_STORE):
            told = self._ask(lambda store: _exchanged(store, self.rank, beat))
            if told is not None:
                said = told["said"] or (told["status"] == STOPPED and RESTARTS.heard)
                self.heard = RankFailure(told["text"], self.rank == 0 and not said, told["status"])
        return self.heard

    def _own(self) -> Beat:
        place, waits = ("", False) if _idle() < 2 * self.period else _place(self._main)
        return Beat(self._beats, round(_idle(), 1), PROGRESS.doing, PROGRESS.update, place, waits)

    def _judge(self, limit: float) -> None:
        """End this process, and with it the run, if no rank moves; called by one that does not."""
        try:
            beats = self._two_looks()
        except _NO_STORE:
            beats = {}
        if self._over.is_set() or self.heard is not None or _idle() <= limit:
            return
        latest = {rank: after for rank, (_, after) in beats.items()}
        silent = [rank for rank, (before, after) in beats.items() if before.number == after.number]
        if any(beat.idle <= limit for rank, beat in latest.items() if rank not in silent):
            return
        failure = self._told(f"the run stands still: {self._who(latest, silent)} (run.hang_seconds={limit:g})")
        self._leave(failure)

    def _who(self, beats: dict[int, Beat], silent: Sequence[int]) -> str:
        """Say who holds the run up: processes that do not run, or else the ranks that have come least far."""
        own = self._own()
        if silent:
            last = beats[silent[0]]
            return f"{_ranks(silent)} gave the last sign of life {last.doing}: stopped, or cut off"
        if not beats and self.ranks > 1:
            what = "the ranks have not met" if self._line is None else "rank 0, or the store of its launcher, is silent"
            return f"{what}; rank {self.rank} has done nothing {_since(own)}"
        least = min(beat.update for beat in [own, *beats.values()])
        behind = {rank: beat for rank, beat in {self.rank: own, **beats}.items() if beat.update == least}
        busy = sorted(rank for rank, beat in behind.items() if not beat.waits) or sorted(behind)
        first = behind[busy[0]]
        others = "; the others wait" if len(busy) < self.ranks else ""
        have = "has" if len(busy) == 1 else "have"
        return f"{_ranks(busy)} {have} done nothing {_since(first)}{others}"

    def _two_looks(self) -> dict[int, tuple[Beat, Beat]]:
        """Return the beats of the other ranks, and those that they left some beats later."""
        looks = []
        for last in (False, True):
            looks.append(self._ask(self._read, seconds=_ANSWER + self.ranks / 100))
            if not last:
                for _ in range(_SURE):
                    time.sleep(self.period)
                    self._listen()  # the others look at this rank's, too
        return {rank: (before, looks[1][rank]) for rank, before in looks[0].items()}

    def _read(self, store: Store) -> dict[int, Beat]:
        others = [rank for rank in range(self.ranks) if rank != self.rank]
        # Unlike `get`, this does not wait for a rank that has never left one.
        read = {rank: store.compare_set(_key(rank), "", "").decode() for rank in others}
        return {rank: Beat(**json.loads(text or "{}")) for rank, text in read.items()}

    def _post(self, text: str, said: bool, status: int = FAILED) -> bool | None:
        """Tell the other ranks why the run ends; return whether nobody did before, None if there is no store."""
        if self.ranks == 1:
            return True
        own = json.dumps({"rank": self.rank, "said": said, "text": text, "status": status})
        try:
            return self._ask(lambda store: store.compare_set(_FAILURE, "", own).decode()) == own
        except _NO_STORE:
            return None

    def _ask(self, question: Callable[[Store], T], seconds: float = _ANSWER) -> T:
        if self._line is None:
            raise NoAnswer
        return self._line.ask(question, seconds)


class _Line:
    """A connection of its own to the store, and a thread that uses it: a store that was stopped never answers."""

    def __init__(self, address: str, port: int, prefix: str) -> None:
        self.address, self.port, self.prefix = address, port, prefix
        self._questions: queue.SimpleQueue[tuple[Callable[[Store], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._open: Future[Any] | None = None
        threading.Thread(target=self._serve, name="watchdog's store", daemon=True).start()

    def ask(self, question: Callable[[Store], T], seconds: float) -> T:
        """Return the answer; raises one of _NO_STORE if there is none in time."""
        if self._open is not None and not self._open.done():
            raise NoAnswer
        answer: Future[T] = Future()
        self._open = answer
        self._questions.put((question, answer))
        return answer.result(seconds)

    def close(self) -> None:
        self._questions.put(None)

    def _serve(self) -> None:
        store: Store | None = None
        while (asked := self._questions.get()) is not None:
            question, answer = asked
            try:
                store = store or self._connected()
                answer.set_result(question(store))
            except Exception as error:
                store = None
                answer.set_exception(error)

    def _connected(self) -> Store:
        limit = timedelta(seconds=_ANSWER)
        store = TCPStore(self.address, self.port, is_master=False, wait_for_workers=False, timeout=limit)
        return PrefixStore(self.prefix, store)


_NO_STORE = (NoAnswer, RuntimeError, ValueError)  # torch's own are RuntimeErrors


def _exchanged(store: Store, rank: int, beat: str) -> dict[str, Any] | None:
    """Leave a beat, and return the failure that was told, if any."""
    store.set(_key(rank), beat)
    return dict(json.loads(store.get(_FAILURE))) if store.check([_FAILURE]) else None


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _idle() -> float:
    return time.monotonic() - PROGRESS.moved


def _since(beat: Beat) -> str:
    return f"for {beat.idle:.0f} seconds {beat.doing}" + (f", {beat.place}" if beat.place else "")


def _ranks(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_MOST_NAMED]))
    more = len(numbers) - _MOST_NAMED
    return f"rank{'s' * (len(numbers) > 1)} {shown}" + (f" and {more} more" if more > 0 else "")


def _place(thread: int | None) -> tuple[str, bool]:
    """Return where a thread is, this package's innermost line, and whether it waits for other ranks there."""
    frames = [frame for frame, _ in traceback.walk_stack(sys._current_frames().get(thread or 0))]
    if not frames:
        return "nowhere", False
    own = next((f for f in frames if str(f.f_globals.get("__name__", "")).startswith("trustratio.")), frames[-1])
    inside = frames[: frames.index(own)]
    waits = any(any(part in f.f_code.co_filename for part in _COLLECTIVE) for f in inside)
    waits = waits or any(f.f_code.co_name == _BACKWARD for f in inside)
    line = f"in {os.path.basename(own.f_code.co_filename)}, line {own.f_lineno} ({own.f_code.co_name})"
    return line, waits


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _is_of_a_connection(error: BaseException) -> bool:
    """Tell whether torch may speak of a rank that is gone."""
    text = str(error).lower()
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def leave(status: int) -> NoReturn:
    """End this process and its workers at once: what waits for another rank cannot be ended in order."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(told(status))
