"""From documents to packed rows on disk: harvest or read, split, tokenize, pack, and cache under a content hash."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trustratio.recipes import docstring_corpus
from trustratio.recipes.packed_sequences import hold_out, pack, unigram_counts, unigram_entropy, unique_documents
from trustratio.recipes.progress_display import Reporter
from trustratio.recipes.recipe_config import DataConfig
from trustratio.recipes.recipe_errors import RecipeError
from trustratio.recipes.text_documents import expand_sources, read_documents
from trustratio.recipes.token_masking import Vocabulary
from trustratio.recipes.wordpiece_vocabulary import TextTokenizer, load_tokenizer, train_wordpiece

_FORMAT = 1  # part of every cache key: raise it when packing or splitting changes
_ENCODE_CHUNK = 256  # documents


@dataclass(frozen=True)
class PreparedData:
    """Packed data on disk and its summary.

    Attributes:
        folder: holds train.npy and validation.npy, (rows, sequence length) of unsigned ids, and tokenizer.json.
        fingerprint: hash of the documents, the tokenizer and the packing; equal data have equal fingerprints.
        vocabulary_size: tokens, special ones included.
        unigram_entropy: of the training tokens, in nats; special tokens are left out, as they are never predicted.
    """

    folder: str
    fingerprint: str
    documents: int
    validation_documents: int
    characters: int
    sequence_length: int
    train_rows: int
    validation_rows: int
    vocabulary_size: int
    mask_id: int
    special_ids: list[int]
    unigram_entropy: float

    def rows(self, split: str) -> NDArray[np.unsignedinteger]:
        """Return the packed rows of "train" or "validation", memory-mapped."""
        return np.load(Path(self.folder, f"{split}.npy"), mmap_mode="r")

    def vocabulary(self) -> Vocabulary:
        """Return the ids that masking needs."""
        special = np.asarray(self.special_ids, dtype=np.int64)
        ordinary = np.setdiff1d(np.arange(self.vocabulary_size, dtype=np.int64), special)
        return Vocabulary(self.mask_id, special, ordinary)

    def describe(self, global_batch: int) -> list[str]:
        """Return the lines that are printed before training, with a warning if one batch is more than the corpus."""
        tokens = self.train_rows * self.sequence_length
        steps = self.train_rows / global_batch
        lines = [
            f"data: {self.documents:,} documents, {self.characters / 1e6:.1f} million characters; "
            f"{self.validation_documents:,} documents held out for validation ({self.validation_rows:,} sequences)",
            f"training: {tokens:,} tokens in {self.train_rows:,} sequences of {self.sequence_length}; "
            f"{steps:.1f} steps per epoch; vocabulary {self.vocabulary_size:,}; "
            f"unigram entropy {self.unigram_entropy:.3f} nats",
        ]
        if steps < 1:
            lines.append(
                f"warning: the corpus has {self.train_rows:,} training sequences, fewer than one global batch of "
                f"{global_batch:,}: every update repeats each sequence {1 / steps:.1f} times (with other masks)"
            )
        return lines


def cache_folder() -> Path:
    """Return $TRUSTRATIO_CACHE, or ~/.cache/trustratio."""
    return Path(os.environ.get("TRUSTRATIO_CACHE") or Path("~/.cache/trustratio")).expanduser()


def prepare(config: DataConfig, reporter: Reporter) -> PreparedData:
    """Read or harvest the documents and return their packed rows, from the cache where it has them.

    Raises:
        RecipeError: missing, empty or unreadable data, or too little of it for one training and one validation row.
    """
    documents = unique_documents(_documents(config, reporter))
    if not documents:
        raise RecipeError(f"the data have no text: {', '.join(config.sources)} hold no non-empty document")
    if len(documents) < 2:
        raise RecipeError(
            "the data are a single document, and whole documents are held out for validation; give more text "
            "(text files are cut into documents of about 4,000 characters at blank lines)"
        )
    training, validation = hold_out(documents, config.validation_fraction)
    content = _content_hash(training, validation)
    tokenizer = _tokenizer(config, training, content, reporter)
    key = _hash(_FORMAT, content, tokenizer.fingerprint, config.sequence_length)
    folder = cache_folder() / f"packed-{key}"
    if not (folder / "summary.json").exists():
        with _appearing_folder(folder) as temporary:
            _pack_into(temporary, key, config, training, validation, tokenizer, reporter)
    summary = json.loads((folder / "summary.json").read_text())
    return PreparedData(folder=str(folder), **summary)


def _documents(config: DataConfig, reporter: Reporter) -> list[str]:
    if config.sources:
        return list(read_documents(expand_sources(config.sources), config.text_column))
    folders = docstring_corpus.package_folders()
    path = cache_folder() / f"docstrings-{docstring_corpus.corpus_key(folders)}.jsonl"
    if not path.exists():
        reporter.line(f"harvesting the documentation of {', '.join(folders)} (once; cached in {path})")
        documents = list(docstring_corpus.harvest(folders, reporter.progress))
        docstring_corpus.require_text(folders, sum(map(len, documents)))
        _write_whole(path, "".join(json.dumps(text) + "\n" for text in documents))
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _tokenizer(config: DataConfig, training: Sequence[str], content: str, reporter: Reporter) -> TextTokenizer:
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    path = cache_folder() / f"wordpiece-{_hash(_FORMAT, content, config.vocabulary)}.json"
    if not path.exists():
        reporter.line(f"training a WordPiece vocabulary of {config.vocabulary:,} tokens")
        _write_whole(path, train_wordpiece(training, config.vocabulary).tokenizer.to_str())
    return load_tokenizer(str(path))


def _pack_into(
    folder: Path,
    key: str,
    config: DataConfig,
    training: Sequence[str],
    validation: Sequence[str],
    tokenizer: TextTokenizer,
    reporter: Reporter,
) -> None:
    dtype = np.uint16 if tokenizer.size <= 2**16 else np.uint32
    rows = {}
    for split, documents in (("train", training), ("validation", validation)):
        ids = _encode(documents, tokenizer, split, reporter)
        rows[split] = pack(ids, config.sequence_length, tokenizer.cls_id, tokenizer.sep_id, dtype)
        if len(rows[split]) == 0:
            raise RecipeError(
                f"the {split} documents fill no sequence of {config.sequence_length} tokens; give more text or "
                f"a shorter --sequence_length"
            )
        np.save(folder / f"{split}.npy", rows[split])
    counts = unigram_counts(rows["train"], tokenizer.vocabulary(), tokenizer.size)
    summary = PreparedData(
        folder="",
        fingerprint=key,
        documents=len(training) + len(validation),
        validation_documents=len(validation),
        characters=sum(map(len, training)) + sum(map(len, validation)),
        sequence_length=config.sequence_length,
        train_rows=len(rows["train"]),
        validation_rows=len(rows["validation"]),
        vocabulary_size=tokenizer.size,
        mask_id=tokenizer.mask_id,
        special_ids=list(tokenizer.special_ids),
        unigram_entropy=unigram_entropy(counts),
    )
    values = asdict(summary)
    del values["folder"]
    tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "summary.json").write_text(json.dumps(values, indent=1))


def _encode(documents: Sequence[str], tokenizer: TextTokenizer, split: str, reporter: Reporter) -> list[list[int]]:
    chunks = [documents[i : i + _ENCODE_CHUNK] for i in range(0, len(documents), _ENCODE_CHUNK)]
    ids: list[list[int]] = []
    for chunk in reporter.progress(chunks, len(chunks), f"tokenizing {split} documents"):
        ids.extend(tokenizer.encode(chunk))
    return ids


def _content_hash(training: Sequence[str], validation: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in (*training, "\0validation\0", *validation):
        digest.update(text.encode("utf-8", "replace"))
        digest.update(b"\0")
    return digest.hexdigest()


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _write_whole(path: Path, text: str) -> None:
    """Write a file that appears under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


@contextlib.contextmanager
def _appearing_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes its final name when the block succeeds, and vanishes if it does not."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=".preparing-"))
    try:
        yield temporary
        # Another process may have prepared the same data meanwhile; its folder has the same content.
        if not final.exists():
            os.rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
