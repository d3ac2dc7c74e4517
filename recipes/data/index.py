"""What is known of every document before any is tokenized: its hash, its length, and whether it is trained on."""

from __future__ import annotations

import hashlib
import struct
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..common.errors import RecipeError
from ..common.files import whole_file
from ..common.progress import PROGRESS
from ..sources.limit import UNLIMITED, Limit
from .documents import Document, length_of, read_records

REPEATED, TRAINING, VALIDATION = 0, 1, 2


@dataclass(frozen=True)
class DocumentIndex:
    """One entry per non-empty document in reading order; 13 bytes each.

    Attributes:
        sources: the files and data sets that were read, in order.
        ends: int64 (sources,), number of documents up to and including each source.
        digests: uint64 (documents,), content hashes.
        characters: uint32 (documents,), lengths.
        roles: uint8 (documents,), TRAINING, VALIDATION, or REPEATED for all but the first of equal documents.
        without_text: records that held nothing: null, empty, or white space.
    """

    sources: tuple[str, ...]
    ends: NDArray[np.int64]
    digests: NDArray[np.uint64]
    characters: NDArray[np.uint32]
    roles: NDArray[np.uint8]
    without_text: int = 0

    @property
    def fingerprint(self) -> str:
        """Hash of the documents and their roles: equal texts in equal order have equal fingerprints."""
        kept = self.roles != REPEATED
        return hashlib.sha256(self.digests[kept].tobytes() + self.roles[kept].tobytes()).hexdigest()

    def count(self, role: int) -> int:
        """Return the number of documents with a role."""
        return int(np.count_nonzero(self.roles == role))

    def kept_characters(self) -> int:
        """Return the length of all documents that are not repeats."""
        return int(self.characters[self.roles != REPEATED].sum(dtype=np.int64))

    def shards(self, size: int) -> NDArray[np.int64]:
        """Return the shard number of every document, ascending without gaps.

        Shards hold about `size` characters of kept text each; a longer document makes a longer shard.
        """
        kept = self.roles != REPEATED
        lengths = self.characters[kept].astype(np.int64)
        _, dense = np.unique((np.cumsum(lengths) - lengths) // size, return_inverse=True)
        return dense[np.maximum(np.cumsum(kept) - 1, 0)]

    def sample(self, characters: int) -> NDArray[np.bool_]:
        """Choose training documents of about `characters` in all, by their hashes; all if there are no more."""
        training = self.roles == TRAINING
        total = int(self.characters[training].sum(dtype=np.int64))
        if total <= characters:
            return training
        # The low half of the hash: the split has used the high one.
        return training & ((self.digests & np.uint64(0xFFFFFFFF)) < np.uint64(int(characters / total * 2**32)))

    def read(self, chosen: NDArray[np.bool_], text_column: str) -> Iterator[tuple[int, Document]]:
        """Yield (number, document) of the chosen documents in order; sources without any are not opened.

        Raises:
            RecipeError: a source has changed since it was indexed.
        """
        first = 0
        for source, end in zip(self.sources, self.ends.tolist(), strict=True):
            if chosen[first:end].any():
                yield from self._read_source(source, first, end, chosen, text_column)
            first = end

    def _read_source(
        self, source: str, first: int, end: int, chosen: NDArray[np.bool_], text_column: str
    ) -> Iterator[tuple[int, Document]]:
        last = first + int(np.flatnonzero(chosen[first:end])[-1])
        number = first
        for document in stripped_documents(source, text_column):
            if document is None:
                continue
            if chosen[number]:
                if length_of(document) != self.characters[number]:
                    break
                yield number, document
            number += 1
            if number > last:
                return
        if number <= last:
            raise RecipeError(f"{source} has changed while it was being prepared; start again with the new file")

    def save(self, path: Path) -> None:
        """Write to an .npz file that appears under its name only when it is complete."""
        with whole_file(path, "wb") as file:
            np.savez(
                file,
                sources=np.array(self.sources),
                ends=self.ends,
                digests=self.digests,
                characters=self.characters,
                roles=self.roles,
                without_text=self.without_text,
            )

    @classmethod
    def load(cls, path: Path) -> DocumentIndex:
        """Read what `save` wrote; nothing is unpickled.

        Raises:
            OSError: it cannot be read.
            ValueError: it is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in ("ends", "digests", "characters", "roles")}
                skipped = int(stored["without_text"]) if "without_text" in stored else 0  # earlier releases' have none
                return cls(sources=tuple(stored["sources"].tolist()), **arrays, without_text=skipped)
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, NotImplementedError, RuntimeError) as error:
            raise ValueError(f"is damaged ({error})") from error
        except (zipfile.BadZipFile, zlib.error, struct.error) as error:
            raise ValueError(f"is damaged ({error})") from error


def stripped_documents(source: str, text_column: str) -> Iterator[Document | None]:
    """Yield the documents of a source without surrounding white space, None for records that hold nothing else."""
    for record in read_records(source, text_column):
        PROGRESS.move()
        document = record.strip() if isinstance(record, str) else record
        yield document if document is not None and length_of(document) else None


class _Entries:
    """The index while it grows."""

    def __init__(self) -> None:
        self.digests, self.lengths = array("Q"), array("I")
        self.characters = self.without_text = 0

    def add(self, source: str, text_column: str, limit: Limit) -> None:
        """Add the documents of a source up to a limit, or none of them if it is broken."""
        before, characters, without_text = len(self.digests), self.characters, self.without_text
        try:
            for document in stripped_documents(source, text_column):
                if document is None:
                    self.without_text += 1
                    continue
                self.digests.append(_digest(document))
                self.lengths.append(length_of(document))
                self.characters += length_of(document)
                if limit.after(len(self.digests), self.characters).is_reached:
                    return
        except RecipeError:
            del self.digests[before:], self.lengths[before:]
            self.characters, self.without_text = characters, without_text
            raise


def index_documents(
    sources: Iterable[str],
    text_column: str,
    validation_fraction: float,
    skipped: Callable[[str, RecipeError], None] | None = None,
    limit: Limit = UNLIMITED,
    fetch: Callable[[str, Limit], None] | None = None,
) -> DocumentIndex:
    """Read all sources once and decide which documents are trained on and which are held out.

    All but the first of equal documents are dropped, so that no held-out text is trained on. Of the others, the
    fraction with the smallest content hashes is held out (at least one): the choice depends on the documents alone,
    not on their order or on a random state.

    Args:
        sources: expanded files and `hf:` names.
        text_column: of tables and data sets.
        validation_fraction: share of the documents to hold out.
        skipped: told of every broken source, which is then left out as a whole; None raises instead.
        limit: reading stops there; sources that were not reached have no documents.
        fetch: called before a source is read, with what is left of the limit; may make the file.

    Raises:
        RecipeError: a broken source; no text; a single document.
    """
    entries = _Entries()
    seen: list[str] = []
    read: list[str] = []
    ends: list[int] = []
    for source in sources:
        seen.append(source)
        left = limit.after(len(entries.digests), entries.characters)
        if not left.is_reached:
            if fetch is not None:
                fetch(source, left)
            try:
                entries.add(source, text_column, limit)
            except RecipeError as error:
                if skipped is None:
                    raise
                skipped(source, error)
                continue
        read.append(source)
        ends.append(len(entries.digests))
    hashes = np.frombuffer(entries.digests, dtype=np.uint64) if ends and ends[-1] else np.empty(0, dtype=np.uint64)
    lengths = np.frombuffer(entries.lengths, dtype=np.uint32) if ends and ends[-1] else np.empty(0, dtype=np.uint32)
    roles = split_roles(hashes, validation_fraction)
    if len(hashes) == 0:
        raise RecipeError(f"the data have no text: {', '.join(seen)} hold no non-empty document")
    if np.count_nonzero(roles != REPEATED) < 2:
        raise RecipeError(
            "the data are a single document, and whole documents are held out for validation; give more text "
            "(text files are cut into documents of about 4,000 characters)"
        )
    ends_of = np.asarray(ends, dtype=np.int64)
    return DocumentIndex(tuple(read), ends_of, hashes, lengths, roles, entries.without_text)


def split_roles(digests: NDArray[np.uint64], validation_fraction: float) -> NDArray[np.uint8]:
    """Return the role of each document from its content hash, see `index_documents`."""
    roles = np.full(len(digests), REPEATED, dtype=np.uint8)
    _, first = np.unique(digests, return_index=True)
    roles[first] = TRAINING
    roles[first[: max(1, round(len(first) * validation_fraction))]] = VALIDATION
    return roles


def _digest(document: Document) -> int:
    # Sixty-four bits: among a billion documents, one pair in 40 such corpora is taken for equal without being so.
    # Of a sample its original ids alone: other masks make no other text.
    content = document.encode("utf-8", "replace") if isinstance(document, str) else document[0].tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=16).digest()[:8], "big")
