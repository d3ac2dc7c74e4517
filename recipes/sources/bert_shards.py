"""NVIDIA's HDF5 shards of BERT pretraining: samples that are tokenized and masked already.

Their data sets, as PyTorch/LanguageModeling/BERT/create_pretraining_data.py of NVIDIA's DeepLearningExamples (commit
0053b4b) writes them: `input_ids` and `segment_ids` (samples, length), filled up with 0, and `input_mask` of the same
shape, 1 where a token is; `masked_lm_positions` and `masked_lm_ids` (samples, predictions), filled up with 0;
`next_sentence_labels` (samples,). MLPerf's shards of variable length have rows of different lengths and no
`input_mask`; unverified.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import RecipeError

SUFFIXES = (".hdf5", ".h5")
_NEEDED = ("input_ids", "masked_lm_positions", "masked_lm_ids")
_ROWS_AT_ONCE = 1024
_UNKNOWN = 2**24  # more than any vocabulary has
_LOOKED_AT = 64  # samples whose ids are compared with a tokenizer's


def read_bert_shard(path: Path) -> Iterator[NDArray[np.int64]]:
    """Yield each sample as int64 (2, tokens): its original ids, and what stands at the predicted ones, -1 at others.

    The classification token at the start, the separator at the end and padding are left out; a separator between two
    segments stays. Segments and next-sentence labels are not read.

    Raises:
        RecipeError: h5py is missing, the file is damaged or no such shard, or its numbers contradict each other.
    """
    with _open(path) as file:
        for ids, positions, labels in _samples(path, file):
            sample = np.stack([ids, np.full(len(ids), -1)])
            sample[1, positions] = ids[positions]
            sample[0, positions] = labels
            yield sample[:, 1:-1]


def require_vocabulary(path: Path, cls_id: int, sep_id: int, mask_id: int, size: int) -> None:
    """Check that a shard was made with a tokenizer, by its first samples.

    Raises:
        RecipeError: they do not begin with its classification token, end with its separator, have its mask where one
            is, or have ids beyond its `size`.
    """
    with _open(path) as file:
        for number, (ids, positions, labels) in enumerate(_samples(path, file)):
            if number == _LOOKED_AT:
                return
            wrong = _differences(ids, positions, labels, cls_id, sep_id, mask_id, size)
            if wrong:
                raise RecipeError(
                    f"{path} was made with another vocabulary than --tokenizer: {wrong}; give the vocab.txt that it "
                    "was made with"
                )


def _differences(
    ids: NDArray[np.int64],
    positions: NDArray[np.int64],
    labels: NDArray[np.int64],
    cls_id: int,
    sep_id: int,
    mask_id: int,
    size: int,
) -> str | None:
    largest = int(max(ids.max(), labels.max(initial=0)))
    shown = ids[positions]
    drawn = shown[shown != labels]
    if ids[0] != cls_id:
        return f"its samples begin with {ids[0]}, and [CLS] is {cls_id}"
    if ids[-1] != sep_id:
        return f"its samples end with {ids[-1]}, and [SEP] is {sep_id}"
    if largest >= size:
        return f"it holds the id {largest}, and there are {size:,} tokens"
    if len(drawn) >= 8 and not (drawn == mask_id).any():  # of which nine in ten are masks
        return f"none of a sample's {len(drawn)} masked tokens is {mask_id}, which is [MASK]"
    return None


def _samples(path: Path, file: Any) -> Iterator[tuple[NDArray[np.int64], ...]]:
    """Yield (ids, positions, labels) of each sample without what they are filled up with."""
    rows = len(file["input_ids"])
    names = [name for name in (*_NEEDED, "input_mask") if name in file]
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = {name: file[name][start : start + _ROWS_AT_ONCE] for name in names}
        for row in range(len(part["input_ids"])):
            ids = _whole(part["input_ids"][row])
            if "input_mask" in part:
                mask = _whole(part["input_mask"][row])
                real = int(mask.sum())
                if len(mask) != len(ids) or not (mask[:real] == 1).all() or mask[real:].any():
                    raise RecipeError(f"{path}, sample {start + row}: its input_mask is not ones and then zeros")
                ids = ids[:real]
            positions, labels = (_whole(part[name][row]) for name in _NEEDED[1:])
            if len(positions) != len(labels):
                counts = f"{len(positions)} masked_lm_positions for {len(labels)} masked_lm_ids"
                raise RecipeError(f"{path}, sample {start + row}: {counts}")
            end = int(np.argmax(np.append(positions, 0) == 0))  # position 0, of [CLS], is never predicted
            positions, labels = positions[:end], labels[:end]
            _check(ids, positions, labels, f"{path}, sample {start + row}")
            yield ids, positions, labels


def _whole(row: Any) -> NDArray[np.int64]:
    return np.asarray(row).astype(np.int64, casting="safe" if np.asarray(row).dtype != np.uint64 else "unsafe")


def _check(ids: NDArray[np.int64], positions: NDArray[np.int64], labels: NDArray[np.int64], where: str) -> None:
    last = len(ids) - 1
    if last < 1 or ids[0] == ids[last]:
        raise RecipeError(f"{where}: it has no [CLS] at its start and [SEP] at its end")
    if len(positions) and not (positions.min() > 0 and positions.max() < last):
        raise RecipeError(f"{where}: a masked_lm_position lies outside of its {len(ids)} tokens")
    if len(np.unique(positions)) != len(positions):
        raise RecipeError(f"{where}: a position is masked twice")
    if ids.min() < 0 or max(ids.max(), labels.max(initial=0)) >= _UNKNOWN or labels.min(initial=0) < 0:
        raise RecipeError(f"{where}: it holds numbers that are no token ids")


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        import h5py
    except ImportError as error:
        raise RecipeError(
            f"{path} is HDF5, which h5py reads: pip install 'trustratio[hdf5]', or pip install h5py"
        ) from error
    try:
        with h5py.File(path, "r") as file:
            _require_layout(path, file, h5py)
            yield file
    except RecipeError:
        raise
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise RecipeError(f"cannot read {path} as HDF5: {error}") from error


def _require_layout(path: Path, file: Any, h5py: Any) -> None:
    missing = [name for name in _NEEDED if not isinstance(file.get(name), h5py.Dataset)]
    if missing:
        raise RecipeError(
            f"{path} is no shard of NVIDIA's BERT pretraining: it has no {', '.join(missing)} but "
            f"{', '.join(file) or 'nothing'}; write text as .jsonl or .parquet instead"
        )
    rows = {name: len(file[name]) for name in (*_NEEDED, "input_mask") if name in file}
    if len(set(rows.values())) > 1:
        raise RecipeError(f"{path} is damaged: its data sets have different lengths ({rows})")
    if "input_mask" not in file and file["input_ids"].ndim != 1:
        raise RecipeError(f"{path} has no input_mask, which tells its padding from its tokens; make the shard anew")
