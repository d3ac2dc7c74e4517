"""Prepared data: the folder of token shards, its manifest, and the rows that training reads from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..common.errors import RecipeError
from ..common.files import read_sealed
from ..common.marks import hash_of
from .documents import check_format, expand_sources
from .given_masks import AS_GIVEN
from .shards import MANIFEST, SPLITS, BrokenShard, TokenFile, TokenRows
from .wordpiece import Vocabulary

FORMAT = 3
"""Part of every key: raise it when indexing, tokenizing or the files change."""

_IN_MANIFEST: dict[str, type | UnionType] = {
    **dict.fromkeys(("fingerprint", "dtype"), str),
    **dict.fromkeys(("documents", "validation_documents", "characters"), int),
    **dict.fromkeys(("vocabulary_size", "cls_id", "sep_id", "mask_id"), int),
    "special_ids": list,
    "shards": list,
    "unigram_entropy": int | float,
}

SETTINGS, INDEX, TOKENIZER = "settings.json", "index.npz", "tokenizer.json"
"""Files of a prepared folder besides the shards and their manifest: what it was made with, and on the way."""

COUNTED_IN = "counted_in"
"""In the manifest: what `characters` counts, if it is not characters: of data that came as token ids."""

FILES = "files"
"""In the manifest: the hashes of all files but the tokens'; earlier releases wrote none."""


@dataclass(frozen=True)
class PreparedData:
    """Token shards on disk, seen as rows of one sequence length, and their summary.

    Attributes:
        folder: holds the token files, manifest.json and tokenizer.json.
        fingerprint: hash of the documents, the split and the tokenizer; the same for every sequence length.
        documents: without repeated ones; `validation_documents` of them are held out.
        characters: of all these documents; of samples that came as token ids, these.
        train_rows, validation_rows: full rows of `sequence_length` tokens.
        vocabulary_size: tokens, special ones included.
        unigram_entropy: of the training tokens, in nats; special tokens are left out, as they are never predicted.
        given_masks: whether the masks that came with the data are there besides the tokens.
        counted_in: what `characters` counts.
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
    given_masks: bool = False
    counted_in: str = "characters"

    def rows(self, split: str) -> TokenRows:
        """Return the rows of "train" or "validation"; the token files are mapped into memory."""
        return rows_of(Path(self.folder), read_manifest(Path(self.folder)), split, self.sequence_length)

    def at_length(self, sequence_length: int) -> PreparedData:
        """Return the same data in rows of another length; nothing is computed or written for it."""
        return open_prepared(Path(self.folder), sequence_length)

    def vocabulary(self) -> Vocabulary:
        """Return the ids that masking needs."""
        special = np.asarray(self.special_ids, dtype=np.int64)
        ordinary = np.setdiff1d(np.arange(self.vocabulary_size, dtype=np.int64), special)
        return Vocabulary(self.mask_id, special, ordinary)

    def special_tokens(self) -> dict[str, int | None]:
        """Return the ids of "cls", "sep", "mask", "pad", "unk"; None where there is no such token."""
        folder = Path(self.folder)
        manifest, tokenizer = read_manifest(folder), Tokenizer.from_file(str(folder / TOKENIZER))
        packed = {kind: manifest[f"{kind}_id"] for kind in ("cls", "sep", "mask")}
        return {**packed, **{kind: _named(tokenizer, kind) for kind in ("pad", "unk")}}

    def describe(self, global_batch: int) -> list[str]:
        """Return the lines that are printed before training, with a warning if one batch is more than the corpus."""
        tokens = self.train_rows * self.sequence_length
        steps = self.train_rows / global_batch
        lines = [
            f"data: {self.documents:,} documents, {self.characters / 1e6:.1f} million {self.counted_in}; "
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


def is_prepared(source: str) -> bool:
    """Tell whether a source is a folder that holds token shards."""
    return (Path(source) / MANIFEST).is_file() or (Path(source) / SETTINGS).is_file()


def check_sources(sources: Sequence[str]) -> None:
    """Check that the sources exist and are of formats that are read; a prepared folder stands alone.

    Raises:
        RecipeError: a source is missing, unreadable or of another format, or a prepared folder is unfinished or mixed
            with others.
    """
    prepared = [source for source in sources if is_prepared(source)]
    if not prepared:
        for source in expand_sources(sources):
            check_format(source)
    elif len(sources) > 1:
        raise RecipeError(f"--data {prepared[0]!r} is a prepared folder and has to be the only source")
    else:
        read_manifest(Path(prepared[0]))


def open_prepared(folder: Path, sequence_length: int) -> PreparedData:
    """Return the data of a prepared folder in rows of `sequence_length` tokens.

    Raises:
        RecipeError: the folder is unfinished, or has too little text for one row of each split.
        BrokenShard: a token file is missing or has the wrong size, or the tokenizer is not the one that was written.
    """
    manifest = read_manifest(folder)
    _require_tokenizer(folder / TOKENIZER, manifest)
    rows = {split: rows_of(folder, manifest, split, sequence_length) for split in SPLITS}
    for split in SPLITS:
        rows[split].check()
        if len(rows[split]) == 0:
            raise RecipeError(
                f"the {split} documents fill no sequence of {sequence_length} tokens; give more text or "
                f"a shorter --sequence_length"
            )
    names = ("documents", "validation_documents", "characters", "vocabulary_size", "mask_id", "special_ids")
    return PreparedData(
        folder=str(folder),
        fingerprint=manifest["fingerprint"],
        sequence_length=sequence_length,
        train_rows=len(rows["train"]),
        validation_rows=len(rows["validation"]),
        unigram_entropy=manifest["unigram_entropy"],
        given_masks=manifest.get("masks") == AS_GIVEN,
        counted_in=manifest.get(COUNTED_IN, "characters"),
        **{name: manifest[name] for name in names},
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return what `manifest.json` says of a prepared folder.

    Raises:
        RecipeError: there is none yet, it cannot be read, or it is of another format.
    """
    path = folder / MANIFEST
    try:
        manifest = read_sealed(path)
    except FileNotFoundError as error:
        raise RecipeError(
            f"{folder} is not prepared to its end ({MANIFEST} is missing); run `prepare` again, it continues"
        ) from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read {path}: {error}") from error
    if manifest.get("format") != FORMAT:
        raise RecipeError(
            f"{folder} was prepared in format {manifest.get('format')}, this version reads {FORMAT}; prepare it again"
        )
    wrong = [name for name, kind in _IN_MANIFEST.items() if not isinstance(manifest.get(name), kind)]
    wrong += [FILES] if not isinstance(manifest.get(FILES, {}), dict) else []
    try:
        for split in () if wrong else SPLITS:
            rows_of(folder, manifest, split, 3)
    except (KeyError, TypeError, ValueError, AttributeError):
        wrong = ["shards"]
    if wrong:
        raise RecipeError(
            f"{path} is damaged, see {', '.join(wrong)}: copy the folder anew, or remove it and run `prepare` again"
        )
    return manifest


def _named(tokenizer: Tokenizer, kind: str) -> int | None:
    """Return the id of the token that is named like this, as BERT or as other models spell it."""
    spellings = (f"[{kind.upper()}]", f"<{kind}>")
    return next((token for token in map(tokenizer.token_to_id, spellings) if token is not None), None)


def _require_tokenizer(path: Path, manifest: dict[str, Any]) -> None:
    """Check the file that training copies beside the model, where its loss would show only when the model is used."""
    size, written = manifest["vocabulary_size"], manifest.get(FILES, {}).get(TOKENIZER)
    try:
        tokens = Tokenizer.from_file(str(path)).get_vocab_size()
        if tokens == size and written in (None, hash_of(path)):
            return
        found = f"has {tokens:,} tokens instead of {size:,}" if tokens != size else "is not what was written"
    except Exception as error:  # tokenizers raises bare Exception
        found = f"cannot be read ({error})"
    raise BrokenShard(
        f"{path} {found}: the folder was prepared with another tokenizer, or the file was damaged; copy the folder "
        "anew, or run `prepare` again with the same arguments"
    )


def rows_of(folder: Path, manifest: dict[str, Any], split: str, length: int) -> TokenRows:
    """Return the rows of one split of a folder with this manifest; their files are not looked at yet."""
    files = [TokenFile(**shard["files"][split]) for shard in manifest["shards"]]
    ids = (manifest["cls_id"], manifest["sep_id"], manifest["vocabulary_size"])
    given = manifest.get("masks") == AS_GIVEN  # which older folders and those without such masks do not say
    return TokenRows(folder, files, np.dtype(manifest["dtype"]), length, *ids, given_masks=given)
