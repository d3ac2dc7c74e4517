"""A run's folder read into arrays: what the report is drawn from, whether the run came to its end or not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import RecipeError
from ..common.files import read_sealed
from .folder import CONFIG, ENVIRONMENT, METRICS
from .metrics import NAMES, metric_lines

Series = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class RunHistory:
    """Everything that a run logged.

    Attributes:
        name: of the folder.
        config: resolved configuration by section; {} if it cannot be read.
        environment: machine, versions, ranks, first and last step; {} if it cannot be read.
        train: one value per logged step by name, NaN where there is none; `step` ascends.
        validation: the same for validations.
        layers: names of the layers whose trust ratio was ever other than 1.
        ratios: their ratios, shape (steps of `ratio_steps`, layers).
        ratio_steps: the steps at which ratios were logged.
    """

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    train: Series
    validation: Series
    layers: list[str]
    ratios: NDArray[np.float32]
    ratio_steps: NDArray[np.float64]

    @property
    def unigram_entropy(self) -> float:
        """The baseline that the run logged with its validations; NaN without one."""
        known = self.validation.get("unigram_entropy", np.empty(0))
        return float(known[-1]) if known.size else math.nan


def load_history(folder: Path) -> RunHistory:
    """Read a run's folder.

    Raises:
        RecipeError: it is no run's folder, or no step was logged in it.
    """
    if not (folder / METRICS).is_file():
        raise RecipeError(f"{str(folder)!r} is no run's folder: it has no {METRICS}")
    # Later lines replace earlier ones of the same step, which a resumed run computed again.
    scalars: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "validation": {}}
    rows: dict[int, NDArray[np.float32]] = {}
    layers: list[str] = []
    for line in metric_lines(folder):
        if line["kind"] == NAMES:
            layers = line.get("trust_ratios", layers)
        elif line["kind"] in scalars:
            ratios = line.pop("trust_ratios", None)
            if ratios:
                rows[line["step"]] = np.asarray(ratios, dtype=np.float32)
            scalars[line["kind"]][line["step"]] = line
    if not scalars["train"]:
        raise RecipeError(f"{str(folder)!r} has no logged step yet")
    steps = sorted(step for step, row in rows.items() if len(row) == len(layers))
    table = np.stack([rows[step] for step in steps]) if steps else np.empty((0, len(layers)), dtype=np.float32)
    adapted = [i for i in range(table.shape[1]) if np.any(table[:, i] != 1.0)]
    return RunHistory(
        name=folder.resolve().name,
        config=_read_json(folder / CONFIG),
        environment=_read_json(folder / ENVIRONMENT),
        train=_series(scalars["train"], "loss", "sequences"),
        validation=_series(scalars["validation"], "validation_loss", "validation_accuracy"),
        layers=[layers[i] for i in adapted],
        ratios=table[:, adapted],
        ratio_steps=np.asarray(steps, dtype=np.float64),
    )


def grows(history: RunHistory) -> bool:
    """Tell whether the run's batch grows, by the gradient noise scale or in a warm-up."""
    run = history.config.get("run", {})
    return bool(run.get("batch_from_noise") or run.get("batch_warmup")) and "batch" in history.train


def bins(count: int, most: int) -> list[slice]:
    """Cut `count` points into at most `most` runs of nearly equal length."""
    pieces = min(count, most)
    edges = np.linspace(0, count, pieces + 1).round().astype(int)
    return [slice(int(a), int(b)) for a, b in pairwise(edges)]


def binned(values: NDArray[Any], pieces: Sequence[slice], how: Any) -> NDArray[np.float64]:
    """Apply `how` (a NumPy reduction over axis 0) to the finite values of each piece; NaN where there are none."""
    if len(pieces) == len(values):  # nothing to sum up
        return np.where(np.isfinite(values), values, np.nan).astype(np.float64)
    reduced = np.full((len(pieces), *values.shape[1:]), np.nan)
    for i, piece in enumerate(pieces):
        part = values[piece]
        kept = part[np.isfinite(part)] if part.ndim == 1 else part[np.isfinite(part).all(axis=1)]
        if len(kept):
            reduced[i] = how(kept, axis=0)
    return reduced


def short_name(layer: str) -> str:
    """Shorten a parameter name of BERT or ModernBERT to what tells layers apart."""
    for long, short in (
        ("model.layers.", "layer "),
        ("model.embeddings.tok_embeddings", "embeddings word"),
        ("model.embeddings.", "embeddings "),
        ("model.final_norm", "final norm"),
        ("attn.Wqkv", "attention query, key, value"),
        ("attn.Wo", "attention output"),
        ("mlp.Wi", "feed-forward in"),
        ("mlp.Wo", "feed-forward out"),
        ("bert.encoder.layer.", "layer "),
        ("bert.embeddings.", "embeddings "),
        ("cls.predictions.", "head "),
        ("attention.self.", "attention "),
        ("attention.output.dense", "attention output"),
        ("intermediate.dense", "feed-forward in"),
        ("output.dense", "feed-forward out"),
        ("transform.dense", "transform"),
        ("_embeddings", ""),
    ):
        layer = layer.replace(long, short)
    return layer.removesuffix(".weight").replace(".", " ")


def _series(records: dict[int, dict[str, Any]], *needed: str) -> Series:
    """Return the numbers of records by name; those that are `needed` are there, if only as NaN."""
    steps = sorted(records)
    names = {name for record in records.values() for name, value in record.items() if isinstance(value, int | float)}
    columns = sorted({*names, *needed, "step"})
    return {name: np.array([_number(records[step].get(name)) for step in steps]) for name in columns}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_sealed(path)
    except (OSError, ValueError):
        return {}
