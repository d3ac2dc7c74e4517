"""Packing of documents into full rows, the held-out split, and the order in which rows are visited."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from trustratio.recipes.global_batch import BatchPlan
from trustratio.recipes.token_masking import VALIDATION_EPOCH, MaskedBatch, Vocabulary, mask_sequences


def unique_documents(documents: Iterable[str]) -> list[str]:
    """Drop empty documents and all but the first of equal ones, so that no held-out text is trained on."""
    seen: dict[bytes, str] = {}
    for document in documents:
        text = document.strip()
        if text:
            seen.setdefault(_digest(text), text)
    return list(seen.values())


def hold_out(documents: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    """Split into training and validation documents, both in the given order.

    The documents with the smallest content hashes are held out (at least one): the choice depends on the documents
    alone, not on their order or on a random state.
    """
    by_hash = sorted(range(len(documents)), key=lambda i: _digest(documents[i]))
    held_out = set(by_hash[: max(1, round(len(documents) * fraction))])
    training = [text for i, text in enumerate(documents) if i not in held_out]
    return training, [text for i, text in enumerate(documents) if i in held_out]


def pack(
    documents: Iterable[Sequence[int]], length: int, cls_id: int, sep_id: int, dtype: type[np.unsignedinteger]
) -> NDArray[np.unsignedinteger]:
    """Pack token ids into rows without padding.

    The documents are joined with a separator after each and cut into rows of `length`: the classification token,
    length - 2 tokens of text, a separator. The last, incomplete row is dropped.

    Args:
        documents: token ids per document, without special tokens.
        length: tokens per row.
        cls_id: id of the first token of every row.
        sep_id: id between documents and at the end of every row.
        dtype: unsigned type that holds every id.

    Returns:
        (rows, length) of `dtype`.
    """
    chunks = []
    for ids in documents:
        chunks.append(np.asarray(ids, dtype=dtype))
        chunks.append(np.asarray([sep_id], dtype=dtype))
    stream = np.concatenate(chunks) if chunks else np.empty(0, dtype=dtype)
    body = length - 2
    rows = len(stream) // body
    packed = np.empty((rows, length), dtype=dtype)
    packed[:, 0] = cls_id
    packed[:, 1:-1] = stream[: rows * body].reshape(rows, body)
    packed[:, -1] = sep_id
    return packed


def unigram_counts(rows: NDArray[np.unsignedinteger], vocabulary: Vocabulary, size: int) -> NDArray[np.int64]:
    """Count the ordinary tokens of packed rows; special tokens are never predicted and count as zero."""
    counts = np.bincount(rows.reshape(-1), minlength=size)
    counts[vocabulary.special] = 0
    return counts


def unigram_entropy(counts: NDArray[np.int64]) -> float:
    """Return the entropy in nats of the token distribution: the loss of the best model that ignores context."""
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


class RowOrder:
    """Endless, seeded order of rows: a new permutation every epoch, addressed by position.

    Position p is row permutation(seed, epoch)[p mod rows] of epoch p // rows, whatever the number of ranks, and any
    position can be asked for, so a resumed run continues in the middle of an epoch.
    """

    def __init__(self, rows: int, seed: int) -> None:
        """Order `rows` rows by `seed`."""
        self.rows = rows
        self.seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def epoch_rows(self, start: int, count: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield (epoch, row indices) pieces that cover the positions start .. start + count - 1 in order."""
        while count > 0:
            epoch, offset = divmod(start, self.rows)
            taken = min(count, self.rows - offset)
            yield epoch, self._permuted(epoch)[offset : offset + taken]
            start += taken
            count -= taken

    def _permuted(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:
            self._permutation = np.random.Generator(np.random.Philox([self.seed, epoch])).permutation(self.rows)
            self._epoch = epoch
        return self._permutation


class MaskedRows:
    """Packed rows with their masking; makes the micro-batches of a step and of a validation."""

    def __init__(
        self, rows: NDArray[np.unsignedinteger], vocabulary: Vocabulary, probability: float, seed: int
    ) -> None:
        """Mask `rows` (rows, length) with `probability`, seeded by `seed`."""
        self.rows = rows
        self.vocabulary = vocabulary
        self.probability = probability
        self.seed = seed
        self.order = RowOrder(len(rows), seed)

    def step_batches(self, step: int, plan: BatchPlan, rank: int) -> list[MaskedBatch]:
        """Return this rank's micro-batches of the optimizer step `step` (counted from 0).

        The global batch is the positions step * sequences onwards. Each accumulation round takes the next
        micro * ranks of them, rank by rank.
        """
        stride = plan.micro * plan.ranks
        starts = (step * plan.sequences + i * stride + rank * plan.micro for i in range(plan.accumulation))
        return [self._batch(self.order.epoch_rows(start, plan.micro)) for start in starts]

    def validation_batches(self, micro: int, rank: int, ranks: int, limit: int) -> list[MaskedBatch]:
        """Return this rank's share of the first `limit` rows, masked the same way every time.

        Every rank gets the same number of batches: under ZeRO-3 each forward pass is a collective. A rank that runs
        out of rows reads row 0 again with nothing to predict.
        """
        count = min(limit, len(self.rows))
        rows = np.arange(rank, count, ranks)
        batches = [self._batch([(VALIDATION_EPOCH, rows[i : i + micro])]) for i in range(0, len(rows), micro)]
        most_rows = -(-count // ranks)
        while len(batches) < -(-most_rows // micro):
            spare = self._batch([(VALIDATION_EPOCH, np.zeros(1, dtype=np.int64))])
            batches.append(MaskedBatch(spare.input_ids, spare.positions[:0], spare.labels[:0]))
        return batches

    def _batch(self, pieces: Iterable[tuple[int, NDArray[np.int64]]]) -> MaskedBatch:
        batches = [self._masked(epoch, rows) for epoch, rows in pieces]
        return batches[0] if len(batches) == 1 else join_batches(batches)

    def _masked(self, epoch: int, rows: NDArray[np.int64]) -> MaskedBatch:
        tokens = self.rows[rows].astype(np.int64)
        return mask_sequences(tokens, rows, epoch, self.seed, self.vocabulary, self.probability)


def join_batches(batches: Sequence[MaskedBatch]) -> MaskedBatch:
    """Concatenate batches of rows of one length; masked positions are shifted accordingly."""
    offset = 0
    positions = []
    for batch in batches:
        positions.append(batch.positions + offset)
        offset += batch.input_ids.numel()
    return MaskedBatch(
        torch.cat([batch.input_ids for batch in batches]),
        torch.cat(positions),
        torch.cat([batch.labels for batch in batches]),
    )


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
