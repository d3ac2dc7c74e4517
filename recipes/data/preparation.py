"""From documents to token shards on disk: harvest or read, index, train a vocabulary, tokenize, and describe."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import RecipeError
from ..common.files import require_writable, whole_file, write_sealed, write_text
from ..common.marks import Share
from ..common.progress import PROGRESS
from ..common.reporter import Reporter
from ..configuration.config import DataConfig
from ..sources.bert_shards import require_vocabulary
from ..sources.hub import fetch_hub
from ..sources.limit import Limit
from .choices import check_choices, check_prepared, check_tokenizer, check_vocabulary
from .docstrings import corpus_key, harvest, missing_packages, package_folders, require_text
from .documents import (
    HUB_PREFIX,
    TOKENS,
    check_format,
    expand_sources,
    kind_of_file,
    length_of,
)
from .encoding import Block, encode_blocks, stream_dtype
from .given_masks import AS_GIVEN
from .index import REPEATED, TRAINING, VALIDATION, DocumentIndex, index_documents
from .prepared import (
    COUNTED_IN,
    FILES,
    FORMAT,
    INDEX,
    TOKENIZER,
    PreparedData,
    check_sources,
    is_prepared,
    open_prepared,
    rows_of,
)
from .settings import claim, hash_of_parts, only_one, settings_of
from .shards import (
    MANIFEST,
    SPLITS,
    BrokenShard,
    Shard,
    finished_shards,
    remove_other_shards,
    unigram_entropy,
    write_shard,
)
from .verification import damaged_files, expected_hashes, hash_files
from .wordpiece import TextTokenizer, load_tokenizer, train_wordpiece

SHARD_CHARACTERS = 64_000_000
_BLOCK_CHARACTERS = 2_000_000  # handed to a worker at once
_ALONE = 16_000_000  # characters that are tokenized before worker processes would have started
_CHARACTERS_PER_TOKEN = 1024  # of the sample that a vocabulary is trained on; more change the text's length by 1 %
_ROLES = (TRAINING, VALIDATION)  # of the splits, in their order
_Array = NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Preparation:
    """How text becomes token shards, besides what `DataConfig` says.

    Attributes:
        workers: processes that tokenize; 0 takes one per core that this process may use.
        shard_characters: text per shard: what an interruption loses at most.
        skip_broken: leave a source that cannot be read out as a whole, and say so, instead of stopping.
    """

    workers: int = 0
    shard_characters: int = SHARD_CHARACTERS
    skip_broken: bool = False


def cache_folder() -> Path:
    """Return $TRUSTRATIO_CACHE, or ~/.cache/trustratio."""
    return Path(os.environ.get("TRUSTRATIO_CACHE") or Path("~/.cache/trustratio")).expanduser()


def prepare(config: DataConfig, reporter: Reporter) -> PreparedData:
    """Return the data of a run: a prepared folder, or text prepared in the cache where that has not been done.

    Raises:
        RecipeError: missing, empty or unreadable data, or too little of it for one training and one validation row.
    """
    if any(map(is_prepared, config.sources)):
        check_sources(config.sources)
        folder = Path(config.sources[0])
        check_prepared(config, folder)
        check_tokenizer(config, folder)
    else:
        folder = prepare_into(None, config, Preparation(), reporter)
        try:
            return open_prepared(folder, config.sequence_length)
        except BrokenShard as error:
            reporter.line(f"warning: {error}; doing so")
            prepare_into(folder, config, Preparation(), reporter)
    return open_prepared(folder, config.sequence_length)


def mended(config: DataConfig, data: PreparedData, damaged: Sequence[str], reporter: Reporter) -> PreparedData:
    """Return a run's data, written anew where files in the cache are damaged.

    Args:
        config: of the run.
        data: what `prepare` returned for it.
        damaged: names of the files of its folder that are not what was written.
        reporter: says what is done.

    Raises:
        BrokenShard: names the damaged files of a folder that the user prepared.
    """
    if not damaged:
        return data
    folder = Path(data.folder)
    what = f"{', '.join(damaged)} in {folder} was changed or cut short after it was written"
    if any(map(is_prepared, config.sources)):
        raise BrokenShard(f"{what}: copy the folder anew, or run `prepare` again with the same arguments")
    reporter.line(f"warning: {what}; writing it anew")
    prepare_into(folder, config, Preparation(), reporter)
    return open_prepared(folder, config.sequence_length)


def prepare_into(output: Path | None, config: DataConfig, how: Preparation, reporter: Reporter) -> Path:
    """Write the token shards of a configuration's text; shards that a former run finished are kept.

    Memory: 13 bytes per document, about 30 MB per worker process in flight and 50 MB for its table of words, and the
    word counts of the vocabulary's training sample; nothing grows with the length of the text.

    Args:
        output: folder to write, or None for one in the cache, named by a hash of everything that matters.
        config: sources, column, tokenizer or vocabulary size, and held-out fraction.
        how: processes, shard size, and what to do about broken sources.
        reporter: shows progress.

    Returns:
        The folder.

    Raises:
        RecipeError: bad data, a folder of other data, or a full disk; finished shards stay.
    """
    if output is not None:
        require_writable(output)
    sources, column = _text_sources(config, reporter)
    check_choices(config, sources)
    tokenizer = load_tokenizer(config.tokenizer, config.lowercase) if config.tokenizer is not None else None
    if tokenizer is not None:
        check_vocabulary(config, tokenizer.size)
    settings = settings_of(config, sources, column, tokenizer.fingerprint if tokenizer else None)
    settings |= {"shard_characters": how.shard_characters, "skip_broken": how.skip_broken}
    in_cache = cache_folder() / f"tokens-{hash_of_parts(settings)}"
    folder = output or in_cache
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with only_one(folder, reporter):
            claim(folder, settings, of_cache=folder == in_cache)
            _Preparer(folder, column, config, how, reporter).run(sources, tokenizer, verify=output is not None)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RecipeError(
                f"the disk of {folder} is full; the finished shards stay: free some space and run the same again"
            ) from error
        raise RecipeError(f"cannot write to {folder}: {error}") from error
    return folder


@dataclass
class _Preparer:
    """Writes one folder; every step is kept on disk and found again by the next run."""

    folder: Path
    column: str
    config: DataConfig
    how: Preparation
    reporter: Reporter
    hub: dict[str, str] = field(default_factory=dict)

    def run(self, sources: Sequence[str], ready: TextTokenizer | None, verify: bool) -> None:
        if (self.folder / MANIFEST).exists() and not verify:
            self._remove_streamed()
            return
        self._discard_damaged()
        # A data set of the hub is streamed once, into a file that every pass reads and an interrupted run goes on with.
        self.hub = {
            str(self.folder / f"hub-{hash_of_parts(source)}.jsonl"): source
            for source in sources
            if source.startswith(HUB_PREFIX)
        }
        files = {source: file for file, source in self.hub.items()}
        index = self._index([files.get(source, source) for source in sources], ready)
        tokenizer = self._tokenizer(index, ready)
        dtype = np.dtype(stream_dtype(tokenizer.size, self._given_masks))
        shard_of = index.shards(self.how.shard_characters)
        count = int(shard_of[-1]) + 1
        shards = finished_shards(self.folder, dtype)
        todo = np.asarray([number for number in range(count) if number not in shards], dtype=np.int64)
        if (self.folder / MANIFEST).exists() and len(todo) == 0:
            self.reporter.line(f"{self.folder} is complete: all {count} shards have the content that was written")
            return
        if 0 < len(todo) < count:
            self.reporter.line(f"{count - len(todo)} of {count} shards are there already")
        remove_other_shards(self.folder, count)
        with self.reporter.stages("tokenizing"):
            for shard in self._write(index, shard_of, todo, tokenizer):
                shards[shard.number] = shard
        skipped = [source for source in sources if files.get(source, source) not in index.sources]
        self._finish(index, tokenizer, dtype, [shards[number] for number in range(count)], skipped)

    def _discard_damaged(self) -> None:
        """Remove what a finished folder holds besides tokens, and is not what was written, so that it is made anew."""
        try:
            expected = expected_hashes(self.folder) if (self.folder / MANIFEST).exists() else {}
        except RecipeError as error:
            self.reporter.line(f"warning: {error}; writing it anew")
            (self.folder / MANIFEST).unlink()
            return
        others = {name: hash for name, hash in expected.items() if not name.endswith(".bin")}
        damaged = damaged_files(self.folder, others, Share())
        for name in damaged:
            self.reporter.line(f"warning: {self.folder / name} is not what was written; writing it anew")
            (self.folder / name).unlink(missing_ok=True)
        if damaged:
            (self.folder / MANIFEST).unlink()
        if TOKENIZER in damaged:  # the tokens are of a vocabulary that is not known any more
            remove_other_shards(self.folder, 0)

    @property
    def _given_masks(self) -> bool:
        return self.config.masks == AS_GIVEN

    def _index(self, sources: Sequence[str], tokenizer: TextTokenizer | None) -> DocumentIndex:
        path = self.folder / INDEX
        index = self._known_index(path) if path.exists() else None
        if index is not None:
            self._fetch_again(index)
            return index
        sources = [source for source in sources if self._fits(source, tokenizer)]
        visited = self.reporter.progress(sources, len(sources), "reading sources")
        skipped = self._skip if self.how.skip_broken else None
        limit = Limit(self.config.max_documents, self.config.max_characters)
        with self.reporter.stages("indexing"):
            index = index_documents(visited, self.column, self.config.validation_fraction, skipped, limit, self._fetch)
        if index.without_text:
            self.reporter.line(f"{index.without_text:,} records without text (null, empty, white space) were left out")
        if limit.after(len(index.roles), int(index.characters.sum(dtype=np.int64))).is_reached:
            self.reporter.line(f"stopped after {len(index.roles):,} documents, as max_documents or max_characters says")
        index.save(path)
        return index

    def _fits(self, source: str, tokenizer: TextTokenizer | None) -> bool:
        """Check a source as far as that is quick; tell whether it is read."""
        try:
            if source not in self.hub:
                check_format(source)
            if tokenizer is not None and kind_of_file(Path(source)) == TOKENS:
                ids = (tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
                require_vocabulary(Path(source), *ids, tokenizer.size)
        except RecipeError as error:
            if not self.how.skip_broken:
                raise
            self._skip(source, error)
            return False
        return True

    def _fetch(self, file: str, limit: Limit) -> None:
        if file in self.hub and not Path(file).exists():
            self.reporter.line(f"streaming {self.hub[file]}")
            name = self.hub[file].removeprefix(HUB_PREFIX)
            fetch_hub(name, self.column, Path(file), limit, self.reporter.line)

    def _fetch_again(self, index: DocumentIndex) -> None:
        """Stream what a known index was made of, and is gone, once more."""
        for file, documents in zip(index.sources, np.diff(index.ends, prepend=0).tolist(), strict=True):
            if documents:
                self._fetch(file, Limit(documents))

    def _known_index(self, path: Path) -> DocumentIndex | None:
        try:
            return DocumentIndex.load(path)
        except ValueError as error:
            self.reporter.line(f"warning: {path} {error}; reading the sources again")
            return None

    def _skip(self, source: str, error: RecipeError) -> None:
        self.reporter.line(f"warning: left out {self.hub.get(source, source)}: {error}")

    def _tokenizer(self, index: DocumentIndex, ready: TextTokenizer | None) -> TextTokenizer:
        path = self.folder / TOKENIZER
        if ready is not None:
            write_text(path, ready.tokenizer.to_str())
            return ready
        if not path.exists():
            chosen = index.sample(_CHARACTERS_PER_TOKEN * self.config.vocabulary)
            characters = int(index.characters[chosen].sum(dtype=np.int64))
            self.reporter.line(
                f"training a WordPiece vocabulary of {self.config.vocabulary:,} tokens on {characters / 1e6:.1f} "
                f"million of {index.kept_characters() / 1e6:.1f} million characters"
            )
            texts = (text for _, text in index.read(chosen, self.column) if isinstance(text, str))
            with self.reporter.stages("vocabulary"):
                write_text(path, train_wordpiece(texts, self.config.vocabulary).tokenizer.to_str())
        return load_tokenizer(str(path))

    def _write(
        self, index: DocumentIndex, shard_of: NDArray[np.int64], todo: NDArray[np.int64], tokenizer: TextTokenizer
    ) -> Iterator[Shard]:
        chosen = (index.roles != REPEATED) & np.isin(shard_of, todo)
        characters = int(index.characters[chosen].sum(dtype=np.int64))
        workers = 0 if characters < _ALONE else self.how.workers or len(os.sched_getaffinity(0))
        blocks = _blocks(index, shard_of, chosen, self.column)
        began, written = time.perf_counter(), 0
        encoded = encode_blocks(blocks, tokenizer, workers, self._given_masks)
        for shard in self.reporter.progress(self._shards(index, shard_of, encoded), len(todo), "tokenizing shards"):
            written += shard.characters
            if len(todo) > 1 and not self.reporter.terminal:
                rate = written / (time.perf_counter() - began)
                tokens = sum(file.tokens for file in shard.files.values())
                self.reporter.line(
                    f"shard {shard.number}: {tokens:,} tokens; {written / 1e6:.0f} of {characters / 1e6:.0f} million "
                    f"characters, {rate / 1e6:.1f} million per second"
                )
            yield shard

    def _shards(
        self, index: DocumentIndex, shard_of: NDArray[np.int64], encoded: Iterable[tuple[Block, dict[str, _Array]]]
    ) -> Iterator[Shard]:
        pieces: dict[str, list[_Array]] = {split: [] for split in SPLITS}
        previous: int | None = None

        def written(number: int) -> Shard:
            first, end = np.searchsorted(shard_of, [number, number + 1])
            roles, characters = index.roles[first:end], index.characters[first:end]
            documents = {split: int(np.sum(roles == role)) for split, role in zip(SPLITS, _ROLES, strict=True)}
            kept = int(characters[roles != REPEATED].sum(dtype=np.int64))
            return write_shard(self.folder, number, pieces, documents, kept)

        for block, ids in encoded:
            PROGRESS.move()
            if previous is not None and block.shard != previous:
                yield written(previous)
                pieces = {split: [] for split in SPLITS}
            previous = block.shard
            for split in SPLITS:
                pieces[split].append(ids[split])
        if previous is not None:
            yield written(previous)

    def _finish(
        self,
        index: DocumentIndex,
        tokenizer: TextTokenizer,
        dtype: np.dtype,
        shards: Sequence[Shard],
        skipped: list[str],
    ) -> None:
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "fingerprint": hash_of_parts(FORMAT, index.fingerprint, tokenizer.fingerprint),
            "documents": index.count(TRAINING) + index.count(VALIDATION),
            "validation_documents": index.count(VALIDATION),
            "repeated_documents": index.count(REPEATED),
            "characters": index.kept_characters(),
            "tokens": {split: sum(shard.files[split].tokens for shard in shards) for split in SPLITS},
            "dtype": dtype.name,
            "vocabulary_size": tokenizer.size,
            "cls_id": tokenizer.cls_id,
            "sep_id": tokenizer.sep_id,
            "mask_id": tokenizer.mask_id,
            "special_ids": list(tokenizer.special_ids),
            "tokenizer": tokenizer.fingerprint,
            "skipped_sources": skipped,
            "records_without_text": index.without_text,
            **({"masks": AS_GIVEN} if self._given_masks else {}),
            **({COUNTED_IN: "token ids"} if all(kind_of_file(Path(s)) == TOKENS for s in index.sources) else {}),
            "shards": [asdict(shard) for shard in shards],
            FILES: hash_files(self.folder),
        }
        counts = rows_of(self.folder, manifest, "train", 3).counts()
        counts[list(tokenizer.special_ids)] = 0
        manifest["unigram_entropy"] = unigram_entropy(counts) if counts.any() else 0.0
        write_sealed(self.folder / MANIFEST, manifest, indent=1)
        self._remove_streamed()

    def _remove_streamed(self) -> None:
        """Remove what was streamed from the hub, which nobody reads once the manifest is there."""
        for path in self.folder.glob("hub-*"):
            path.unlink()


def _blocks(
    index: DocumentIndex, shard_of: NDArray[np.int64], chosen: NDArray[np.bool_], column: str
) -> Iterator[Block]:
    block: Block | None = None
    for number, text in index.read(chosen, column):
        shard = int(shard_of[number])
        if block is not None and (block.shard != shard or block.characters >= _BLOCK_CHARACTERS):
            yield block
            block = None
        block = block or Block(shard, SPLITS)
        block.documents[SPLITS[_ROLES.index(int(index.roles[number]))]].append(text)
        block.characters += length_of(text)
    if block is not None:
        yield block


def _text_sources(config: DataConfig, reporter: Reporter) -> tuple[list[str], str]:
    """Return the files and data sets to read and the column of their text; harvest the default corpus if need be."""
    if config.sources:
        return expand_sources(config.sources), config.text_column
    folders = package_folders()
    if missing := missing_packages(folders):
        reporter.line(f"the text is smaller than usual: not installed and left out are {', '.join(missing)}")
    path = cache_folder() / f"documentation-{corpus_key(folders)}.jsonl"
    if not path.exists():
        reporter.line(f"harvesting the documentation of {', '.join(folders)} (once; cached in {path})")
        with reporter.stages("harvest"):
            documents = list(harvest(folders, reporter.progress))
        require_text(folders, sum(map(len, documents)))
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_json_lines(path, "text", documents)
    return [str(path)], "text"


def _write_json_lines(path: Path, column: str, texts: Iterable[str]) -> None:
    with whole_file(path) as file:
        file.writelines(json.dumps({column: text}) + "\n" for text in texts)
