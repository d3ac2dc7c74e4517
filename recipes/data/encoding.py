"""Documents to one stream of token ids, each distinct word tokenized once."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import RecipeError
from ..common.workers import end_with_parent
from .given_masks import pack
from .wordpiece import TextTokenizer

_WORDS = re.compile(r"[^ \t\n\r]+")
_SEPARATOR = " "  # no word: what stands for the separator token in a list of words
_MOST_WORDS = 2**18  # distinct words kept, about 50 MB; more are forgotten together


def tokenizes_words_alone(tokenizer: TextTokenizer) -> bool:
    r"""Tell whether a text's tokens are those of its words, one after the other.

    True of BERT's own pipeline: the normaliser works on single characters, and no token crosses a space, tab or line
    end. (Other white space is not safe: the normaliser deletes \f, for one, and joins what it separates.)
    """
    parts = json.loads(tokenizer.tokenizer.to_str())
    return (
        (parts["normalizer"] or {}).get("type") == "BertNormalizer"
        and (parts["pre_tokenizer"] or {}).get("type") == "BertPreTokenizer"
        and parts["model"].get("type") == "WordPiece"
        and not any(token[flag] for token in parts["added_tokens"] for flag in ("lstrip", "rstrip", "single_word"))
        and all(_WORDS.fullmatch(token["content"]) for token in parts["added_tokens"])
        and not parts["truncation"]
        and not parts["padding"]
    )


class StreamEncoder:
    """Turns documents into one array of ids with a separator after each document.

    Text repeats its words: a table from word to ids does the work of the tokenizer many times faster, with the same
    result. Where a tokenizer does not treat words alone, whole documents go through it. Samples of token ids need none.
    """

    def __init__(self, tokenizer: TextTokenizer, most_words: int = _MOST_WORDS, given_masks: bool = False) -> None:
        """Encode with `tokenizer`; `most_words` bounds the table; `given_masks` keeps those of samples."""
        self.tokenizer = tokenizer
        self.by_word = tokenizes_words_alone(tokenizer)
        self.dtype = stream_dtype(tokenizer.size, given_masks)
        self.given_masks = given_masks
        self.most_words = most_words
        self._numbers: dict[str, int]
        self._ids: NDArray[np.unsignedinteger]
        self._starts: NDArray[np.int64]
        self._forget()

    def encode(self, documents: Sequence[str | NDArray[np.int64]]) -> NDArray[np.unsignedinteger]:
        """Return the ids of the documents, texts or samples (2, tokens), in order, each followed by the separator's.

        Raises:
            RecipeError: a sample holds an id that the tokenizer does not have.
        """
        pieces = []
        for is_text, group in itertools.groupby(documents, lambda document: isinstance(document, str)):
            alike: list[Any] = list(group)
            pieces.append(self._encode_texts(alike) if is_text else self._join(alike))
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def _join(self, samples: Sequence[NDArray[np.int64]]) -> NDArray[np.unsignedinteger]:
        separator = np.asarray([[self.tokenizer.sep_id], [-1]])
        joined = np.concatenate([part for sample in samples for part in (sample, separator)], axis=1)
        if (largest := int(joined.max())) >= self.tokenizer.size:
            raise RecipeError(
                f"the shards of token ids hold the id {largest}, and --tokenizer has {self.tokenizer.size:,} tokens; "
                "give the vocab.txt that they were made with"
            )
        return pack(joined) if self.given_masks else joined[0].astype(self.dtype)

    def _encode_texts(self, documents: Sequence[str]) -> NDArray[np.unsignedinteger]:
        if not self.by_word:
            separator = [self.tokenizer.sep_id]
            pieces = [np.asarray(ids + separator, self.dtype) for ids in self.tokenizer.encode(documents)]
            return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)
        words: list[str] = []
        for document in documents:
            words += _WORDS.findall(document)
            words.append(_SEPARATOR)
        self._learn(words)
        numbers = np.fromiter(map(self._numbers.__getitem__, words), dtype=np.int64, count=len(words))
        return _gather(self._ids, self._starts, numbers)

    def _learn(self, words: Sequence[str]) -> None:
        distinct = dict.fromkeys(words)
        unknown = [word for word in distinct if word not in self._numbers]
        if len(self._numbers) + len(unknown) > self.most_words:
            self._forget()
            unknown = [word for word in distinct if word != _SEPARATOR]
        if not unknown:
            return
        encoded = [np.asarray(ids, self.dtype) for ids in self.tokenizer.encode(unknown)]
        ends = self._starts[-1] + np.cumsum([len(ids) for ids in encoded])
        self._numbers.update(zip(unknown, range(len(self._numbers), len(self._numbers) + len(unknown)), strict=True))
        self._ids = np.concatenate([self._ids, *encoded])
        self._starts = np.concatenate([self._starts, ends])

    def _forget(self) -> None:
        self._numbers = {_SEPARATOR: 0}
        self._ids = np.asarray([self.tokenizer.sep_id], self.dtype)
        self._starts = np.asarray([0, 1], dtype=np.int64)


def stream_dtype(vocabulary_size: int, given_masks: bool = False) -> type[np.unsignedinteger]:
    """Return the smallest unsigned type that holds every id, and with it a mask that was given."""
    return np.uint16 if vocabulary_size <= 2**16 and not given_masks else np.uint32


def _gather(
    ids: NDArray[np.unsignedinteger], starts: NDArray[np.int64], numbers: NDArray[np.int64]
) -> NDArray[np.unsignedinteger]:
    """Concatenate ids[starts[n] : starts[n + 1]] over the numbers n."""
    begin = starts[numbers]
    lengths = starts[numbers + 1] - begin
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return ids[np.arange(total) + np.repeat(begin - ends + lengths, lengths)]


@dataclass
class Block:
    """Documents of one shard that are tokenized together, by split."""

    shard: int
    splits: tuple[str, ...]
    documents: dict[str, list[str | NDArray[np.int64]]] = field(init=False)
    characters: int = 0

    def __post_init__(self) -> None:
        self.documents = {split: [] for split in self.splits}


_Streams = dict[str, NDArray[np.unsignedinteger]]


def encode_blocks(
    blocks: Iterable[Block], tokenizer: TextTokenizer, workers: int, given_masks: bool = False
) -> Iterator[tuple[Block, _Streams]]:
    """Yield the blocks with their splits' token streams, in order.

    Args:
        blocks: read as they are needed; a few per worker are in flight at a time.
        tokenizer: the workers get a copy.
        workers: processes; 0 tokenizes in this one.
        given_masks: keep the masks of samples.
    """
    if workers == 0:
        encoder = StreamEncoder(tokenizer, given_masks=given_masks)
        for block in blocks:
            yield block, {split: encoder.encode(texts) for split, texts in block.documents.items()}
        return
    # Spawned workers import this module alone, and no state of a rank is forked.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer, given_masks)) as pool:
        waiting: deque[tuple[Block, Future[_Streams]]] = deque()
        try:
            for block in blocks:
                waiting.append((block, pool.submit(_encode_in_worker, block.documents)))
                block.documents = {}
                if len(waiting) > 3 * workers:
                    yield _first(waiting)
            while waiting:
                yield _first(waiting)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _first(waiting: deque[tuple[Block, Future[_Streams]]]) -> tuple[Block, _Streams]:
    block, future = waiting.popleft()
    return block, future.result()


_encoder: StreamEncoder


def _start_worker(tokenizer: TextTokenizer, given_masks: bool) -> None:
    global _encoder
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    _encoder = StreamEncoder(tokenizer, given_masks=given_masks)


def _encode_in_worker(documents: dict[str, list[str | NDArray[np.int64]]]) -> _Streams:
    return {split: _encoder.encode(texts) for split, texts in documents.items()}
