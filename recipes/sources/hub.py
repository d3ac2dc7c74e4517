"""Data sets of Hugging Face, streamed: into a local file that grows from run to run until it holds all of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from ..common.errors import RecipeError, cut
from ..common.files import read_sealed, write_sealed
from ..common.progress import PROGRESS
from .columns import text_of
from .limit import Limit

_WAITS = (1.0, 2.0, 5.0, 15.0, 30.0)  # seconds before each attempt after the connection was lost
_RECORDS_BETWEEN_STATES = 100  # of the data set, which are some microseconds of copying each
_CHARACTERS_BETWEEN_SAVES = 16_000_000  # what a kill loses at most; Ctrl-C and lost connections lose nothing
_RECORDS_BETWEEN_LINES = 100_000
_SHOWN = 400  # characters of an error
_NETWORK = ("aiohttp", "fsspec", "httpcore", "httpcore2", "httpx", "httpx2", "huggingface_hub", "requests", "urllib3")

Say = Callable[[str], None]


@dataclass(frozen=True)
class HubName:
    """`NAME`, `NAME:CONFIGURATION`, either with `@SPLIT` (default: train)."""

    path: str
    configuration: str | None
    split: str

    @classmethod
    def parse(cls, name: str) -> HubName:
        """Read a name without its `hf:`."""
        path = _folder_of(name) or re.split("[:@]", name, maxsplit=1)[0]
        configuration, _, split = name[len(path) :].partition("@")
        return cls(path, configuration.removeprefix(":") or None, split or "train")

    @property
    def is_local(self) -> bool:
        """Whether it is a folder on this machine."""
        return bool(self.path) and Path(self.path).is_dir()

    def check(self) -> None:
        """Check what can be told of the name without a network.

        Raises:
            RecipeError: a folder that does not exist, a file, or a split that is none.
        """
        if not self.is_local and (self.path.startswith((".", "/", "~")) or self.path.count("/") > 1):
            raise RecipeError(
                f"hf:{self.path} is a file: give it without hf:"
                if Path(self.path).is_file()
                else f"hf:{self.path} is no folder that exists, and no name on the hub, which is NAME or OWNER/NAME"
            )
        if "[" in self.split:
            raise RecipeError(
                f"hf:{self.path}@{self.split}: splits are streamed, and parts of them are not known; take the first "
                "documents with --max_documents or --max_characters (data.max_documents in the recipe)"
            )
        if "+" in self.split:
            several = " ".join(f"hf:{self.path}@{split}" for split in self.split.split("+"))
            raise RecipeError(f"hf:{self.path}@{self.split} names several splits; give each of its own: {several}")

    def open(self, revision: str | None) -> Any:
        """Return the data set as something to iterate over."""
        import datasets

        path = os.path.abspath(self.path) if self.is_local else self.path
        options = {"revision": revision} if revision and not self.is_local else {}
        return datasets.load_dataset(path, self.configuration, split=self.split, streaming=True, **options)

    def revision(self) -> str | None:
        """Return the commit that is the newest now, so that a later run goes on with the same; None if not known.

        Of a folder on this machine a hash of the names, sizes and times of its files.
        """
        if self.is_local:
            return _state_of(self.path)
        if Path(self.path).exists():
            return None
        with contextlib.suppress(Exception):  # it is told without, too, and the hub client raises many classes
            from huggingface_hub import HfApi

            return HfApi().dataset_info(self.path, timeout=10).sha
        return None


def _folder_of(name: str) -> str | None:
    """Return the longest beginning of a name that is a folder, whose own name may hold what parts the rest."""
    ends = [len(name), *(at for at in range(len(name) - 1, 0, -1) if name[at] in ":@")]
    return next((name[:end] for end in ends if end and Path(name[:end]).is_dir()), None)


def _state_of(folder: str) -> str:
    """Return what tells a folder's files from changed ones without reading them; hidden ones are no data."""
    files, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(parent))
        folders[:] = [n for n in folders if n[0] != "." and os.path.realpath(os.path.join(parent, n)) not in seen]
        for name in names:
            path = os.path.join(parent, name)
            if name[0] != "." and os.path.isfile(path):
                status = os.stat(path)
                files.append([os.path.relpath(path, folder), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(sorted(files)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Position:
    """Where a stream is.

    Attributes:
        records: how many were read.
        state: of the data set, `since` records earlier; None: at its beginning, or where it has none to give.
        since: records read after `state` was taken.
        revision: of the data set, see `HubName.revision`.
    """

    records: int = 0
    state: dict[str, Any] | None = None
    since: int = 0
    revision: str | None = None


class HubStream:
    """The records of a data set from a position on, whatever befalls the connection.

    Attributes:
        position: behind the record that was yielded last.
    """

    def __init__(self, name: str, position: Position, say: Say) -> None:
        """Read the data set `name` (without `hf:`) from `position` on."""
        self.name = name
        self.position = position
        self.say = say
        self._data: Any = None

    def __iter__(self) -> Iterator[Any]:
        """Yield the records.

        Raises:
            RecipeError: the data set cannot be loaded, or the connection was lost and did not come back.
        """
        records: Iterator[Any] | None = None
        failures = 0
        while True:
            try:
                if records is None:
                    records = self._open()
                record = next(records, None)
            except Exception as error:  # the hub client raises many unrelated classes
                if self._data is None or not _is_lost(error) or failures == len(_WAITS):
                    raise self._failure(error, failures) from error
                self.say(f"the connection to {self.name} was lost ({_reason(error)}); trying again")
                _wait(_WAITS[failures])
                failures, records = failures + 1, None
                continue
            if record is None:
                return
            failures = 0
            self._count()
            yield record

    def _open(self) -> Iterator[Any]:
        data = HubName.parse(self.name).open(self.position.revision)
        self._data = data
        if self.position.state is not None:
            data.load_state_dict(self.position.state)
        records = iter(data)
        for _ in range(self.position.since):
            next(records, None)
            PROGRESS.move()
        return records

    def _count(self) -> None:
        state, since = self.position.state, self.position.since + 1
        if since >= _RECORDS_BETWEEN_STATES and hasattr(self._data, "state_dict"):
            state, since = self._data.state_dict(), 0
        self.position = Position(self.position.records + 1, state, since, self.position.revision)

    def _failure(self, error: Exception, failures: int) -> RecipeError:
        read = self.position.records
        if read and _is_lost(error):
            return RecipeError(
                f"the connection to the data set {self.name!r} was lost after {read:,} records and {failures} more "
                f"attempts failed: {_reason(error)}"
            )
        return RecipeError(
            f"cannot load the Hugging Face data set {self.name!r}: {_reason(error)} (without a network, give files "
            "with --data)"
        )


def read_hub(name: str, column: str) -> Iterator[str | None]:
    """Yield the text of each record of a data set, None where it is null."""
    for record in HubStream(name, Position(), lambda line: None):
        yield text_of(record, column, f"data set {name!r}")


def fetch_hub(name: str, column: str, path: Path, limit: Limit, say: Say) -> None:
    """Write a data set as JSON Lines to `path`, which appears when it is whole; go on where a former call stopped.

    Args:
        name: of the data set, without `hf:`.
        column: of its text, and of the file's.
        path: of the file; what there is of it lies beside it, with the position in the data set.
        limit: how much is wanted.
        say: is told of lost connections and of progress.

    Raises:
        RecipeError: the data set cannot be loaded or lacks the column, or the connection did not come back; what was
            read stays.
    """
    growing = _GrowingFile(path, name)
    if growing.mark.documents:
        say(f"going on with {name} behind the {growing.mark.documents:,} documents that are there already")
    with growing:
        try:
            _copy(HubStream(name, growing.mark.position, say), growing, column, limit)
        except RecipeError as error:
            documents = growing.mark.documents
            kept = f"; the {documents:,} documents that were read stay, and the same command goes on"
            raise RecipeError(f"{error}{kept if documents else ''}") from error
        growing.finish()


def _copy(stream: HubStream, growing: _GrowingFile, column: str, limit: Limit) -> None:
    if growing.has(limit):
        return
    for record in stream:
        PROGRESS.move()
        growing.add(text_of(record, column, f"data set {stream.name!r}"), column, stream.position)
        if growing.has(limit):
            return
        if stream.position.records % _RECORDS_BETWEEN_LINES == 0:
            mark = growing.mark
            stream.say(f"  {mark.documents:,} documents, {mark.characters / 1e6:,.0f} million characters")


@dataclass(frozen=True)
class _Mark:
    """How much of a growing file is whole, and the position in the data set behind it: one value, never half new."""

    position: Position
    size: int = 0
    documents: int = 0
    characters: int = 0


class _GrowingFile:
    """A file of JSON Lines that is written in several runs.

    What its records are is known from a second file, which is written after them; what the first has beyond that is
    cut off when it is opened again.

    Attributes:
        mark: how far it is.
    """

    def __init__(self, path: Path, name: str) -> None:
        """Find what a former run left of the data set `name`, or begin."""
        self.path = path
        self._part, self._state = path.with_suffix(".part"), path.with_suffix(".position")
        self.mark = self._stored(HubName.parse(name)) or _Mark(Position(revision=HubName.parse(name).revision()))

    def _stored(self, name: HubName) -> _Mark | None:
        try:
            values = read_sealed(self._state)
            mark = _Mark(Position(**values.pop("position")), **values)
            if name.is_local and mark.position.revision != name.revision():  # its files were changed since
                return None
            return mark if self._part.stat().st_size >= mark.size else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def __enter__(self) -> None:
        self._file: IO[bytes] = self._part.open("ab")
        self._file.truncate(self.mark.size)
        self._saved = self.mark

    def __exit__(self, *error: object) -> None:
        if self._file.closed:
            return
        with contextlib.suppress(OSError):  # of a full disk: what was saved before is whole
            self._save()
        with contextlib.suppress(OSError):
            self._file.close()

    def has(self, limit: Limit) -> bool:
        """Tell whether there is as much as wanted."""
        return limit.after(self.mark.documents, self.mark.characters).is_reached

    def add(self, text: str | None, column: str, position: Position) -> None:
        """Write a record and note the position behind it."""
        line = (json.dumps({column: text}) + "\n").encode()
        self._file.write(line)
        mark, characters = self.mark, len((text or "").strip())
        self.mark = _Mark(
            position, mark.size + len(line), mark.documents + (characters > 0), mark.characters + characters
        )
        if self.mark.characters >= self._saved.characters + _CHARACTERS_BETWEEN_SAVES:
            self._save()

    def finish(self) -> None:
        """Give the file its name."""
        self._sync()
        self._file.close()
        os.replace(self._part, self.path)
        self._state.unlink(missing_ok=True)

    def _save(self) -> None:
        mark = self.mark
        self._sync()
        write_sealed(self._state, asdict(mark))
        self._saved = mark

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def _wait(seconds: float) -> None:
    time.sleep(seconds)


def _is_lost(error: BaseException) -> bool:
    """Tell a lost connection from an error that comes again; `datasets` may have wrapped it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConnectionError | TimeoutError):
            return True
        if type(seen).__module__.partition(".")[0] in _NETWORK and not isinstance(seen, FileNotFoundError):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _reason(error: Exception) -> str:
    """Return what an error says as one line: of several, the later ones list the configurations or splits there are."""
    return cut(" ".join(str(error).split()), _SHOWN) or type(error).__name__
