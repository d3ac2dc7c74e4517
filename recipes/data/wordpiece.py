"""WordPiece: train a vocabulary with `tokenizers`, or load a tokenizer from a folder, a file or the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer

from ..common.errors import RecipeError
from .saved_tokenizer import as_its_file_says
from .vocabulary_file import read_vocabulary, vocabulary_of

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_NEEDED = ("cls", "sep", "mask")


@dataclass(frozen=True)
class Vocabulary:
    """What masking needs to know of a tokenizer.

    `ordinary` holds the ids that are not special: only they are masked, and random replacements are drawn from them.
    """

    mask_id: int
    special: NDArray[np.int64]
    ordinary: NDArray[np.int64]


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer with the ids that packing and masking need.

    Attributes:
        tokenizer: the `tokenizers` object; it adds no special tokens when encoding.
        cls_id, sep_id, mask_id: ids put at the start of a row, between documents, and in place of chosen tokens.
        special_ids: all special ids; they are never masked.
    """

    tokenizer: Tokenizer
    cls_id: int
    sep_id: int
    mask_id: int
    special_ids: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of tokens, special ones included."""
        return self.tokenizer.get_vocab_size()

    @property
    def fingerprint(self) -> str:
        """Hash of the whole tokenizer: model, vocabulary and normalisation."""
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()[:16]

    def encode(self, documents: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each document, without special tokens."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(documents, add_special_tokens=False)]


def train_wordpiece(documents: Iterable[str], size: int) -> TextTokenizer:
    """Train an uncased WordPiece vocabulary of at most `size` tokens, as BERT's: lower case, accents removed.

    Args:
        documents: training text; held-out documents should not be among them.
        size: tokens, the five special ones included; small texts give fewer.
    """
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = WordPieceTrainer(
        vocab_size=size,
        special_tokens=SPECIAL_TOKENS,
        # Text of the web holds thousands of rare characters; without a limit they would fill the vocabulary.
        limit_alphabet=512,
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return from_tokenizer(tokenizer, "the trained vocabulary")


def load_tokenizer(name: str, lowercase: bool | None = None) -> TextTokenizer:
    """Load a tokenizer.

    Args:
        name: a `vocab.txt` or a folder with one, a `tokenizer.json`, a folder that `transformers` can read, or a name
            on the hub, which is looked for in the local cache where there is no network. What it says of truncation
            and padding is left out.
        lowercase: of a `vocab.txt` alone, see `read_vocabulary`; all others say themselves.

    Raises:
        RecipeError: it cannot be loaded, or lacks a mask, separator or classification token.
    """
    path = Path(name)
    file = vocabulary_of(path)
    if file is not None:
        return from_tokenizer(read_vocabulary(file, lowercase, SPECIAL_TOKENS), name)
    if lowercase is not None:
        raise RecipeError(
            f"data.lowercase={str(lowercase).lower()} is for a vocab.txt, and the tokenizer {name!r} says itself "
            "whether it lower-cases; leave it out"
        )
    try:
        if path.is_file() and path.suffix == ".json":
            return from_tokenizer(Tokenizer.from_file(str(path)), name)
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(name, use_fast=True)
        tokenizer = as_its_file_says(loaded.backend_tokenizer, name)
    except RecipeError:
        raise
    except Exception as error:  # tokenizers raises bare Exception, the hub client many classes
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise RecipeError(
            f"cannot load tokenizer {name!r}: {reason[0]}; give a vocab.txt, a tokenizer.json, a folder or a hub name, "
            "or leave --tokenizer out to train a vocabulary on the text"
        ) from error
    _require_dense(name, tokenizer)
    ids = _require_tokens(name, {kind: getattr(loaded, f"{kind}_token_id") for kind in _NEEDED})
    return TextTokenizer(
        without_lengths(tokenizer), ids["cls"], ids["sep"], ids["mask"], tuple(sorted(set(loaded.all_special_ids)))
    )


def from_tokenizer(tokenizer: Tokenizer, name: str) -> TextTokenizer:
    """Wrap a `tokenizers` object that has BERT's special tokens.

    Raises:
        RecipeError: one of [CLS], [SEP], [MASK] is missing.
    """
    _require_dense(name, tokenizer)
    ids = _require_tokens(name, {kind: tokenizer.token_to_id(f"[{kind.upper()}]") for kind in _NEEDED})
    special = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
    return TextTokenizer(
        without_lengths(tokenizer),
        *(ids["cls"], ids["sep"], ids["mask"]),
        tuple(sorted(i for i in special if i is not None)),
    )


def without_lengths(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer without its own truncation and padding, which would cut and fill documents silently."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _require_dense(name: str, tokenizer: Tokenizer) -> None:
    """Refuse ids beyond the number of tokens: the model has one row for each."""
    largest, size = max(tokenizer.get_vocab().values(), default=0), tokenizer.get_vocab_size()
    if largest >= size:
        raise RecipeError(
            f"tokenizer {name!r} numbers its {size:,} tokens up to {largest:,}: ids with gaps are not supported"
        )


def _require_tokens(name: str, ids: dict[str, int | None]) -> dict[str, int]:
    missing = [kind for kind, token_id in ids.items() if token_id is None]
    if missing:
        raise RecipeError(
            f"tokenizer {name!r} has no {', '.join(missing)} token; masked language modelling needs cls, sep and mask"
        )
    return {kind: token_id for kind, token_id in ids.items() if token_id is not None}
