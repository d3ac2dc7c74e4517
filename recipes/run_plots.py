"""The picture at the end of a run: loss against the unigram entropy, and a heat-map of trust ratios."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

_INK, _TRAIN, _VALIDATION, _UNIGRAM = "#333333", "#7fa8d1", "#c2410c", "#6b7280"


def draw_report(records: Sequence[dict[str, Any]], title: str, unigram_entropy: float, path: Path) -> None:
    """Draw one PNG from a run's metrics.

    Args:
        records: from `run_folder.read_metrics`.
        title: one line over the picture.
        unigram_entropy: of the training text in nats, drawn as the baseline.
        path: file to write.
    """
    train = [r for r in records if r["kind"] == "train"]
    layers, steps, ratios = trust_ratio_table(train)
    height = 0.21 * len(layers) + 1.2 if layers else 0.0
    figure, axes = plt.subplots(
        3 if layers else 2,
        1,
        figsize=(11, 6.2 + height),
        height_ratios=[3.4, 1.3, height] if layers else [3.4, 1.3],
        layout="constrained",
        squeeze=False,
    )
    figure.suptitle(title, fontsize=11, color=_INK)
    _draw_loss(axes[0, 0], train, [r for r in records if r["kind"] == "validation"], unigram_entropy)
    _draw_rate(axes[1, 0], train)
    if layers:
        _draw_ratios(axes[2, 0], layers, steps, ratios)
    for panel in axes[:, 0]:  # one step axis for all, so that events can be followed downwards
        panel.set_xlim(train[0]["step"] - 0.5, train[-1]["step"] + 0.5)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def trust_ratio_table(train: Sequence[dict[str, Any]]) -> tuple[list[str], list[int], NDArray[np.float64]]:
    """Return layer names, steps and the trust ratios (layers, steps) of the layers that ever had one other than 1."""
    logged = [r for r in train if r.get("trust_ratios")]
    if not logged:
        return [], [], np.empty((0, 0))
    names = list(logged[0]["trust_ratios"])
    table = np.array([[r["trust_ratios"].get(name, np.nan) for r in logged] for name in names])
    adapted = [i for i in range(len(names)) if not np.all(table[i] == 1.0)]
    return [names[i] for i in adapted], [r["step"] for r in logged], table[adapted]


def short_name(layer: str) -> str:
    """Shorten a BERT parameter name to what tells layers apart."""
    for long, short in (
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


def _draw_loss(
    axes: Axes, train: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]], unigram: float
) -> None:
    axes.plot([r["step"] for r in train], [r["loss"] for r in train], color=_TRAIN, lw=1.2, label="training loss")
    if validation:
        steps, losses = [r["step"] for r in validation], [r["validation_loss"] for r in validation]
        axes.plot(steps, losses, color=_VALIDATION, lw=1.6, marker="o", ms=4, label="validation loss")
        last = validation[-1]
        axes.annotate(
            f"{last['validation_loss']:.3f} nats, accuracy {last['validation_accuracy']:.1%}",
            (steps[-1], losses[-1]),
            xytext=(0, 10),
            textcoords="offset points",
            ha="right",
            color=_VALIDATION,
        )
    axes.axhline(unigram, color=_UNIGRAM, ls="--", lw=1.2, label=f"unigram entropy {unigram:.3f}")
    axes.set_ylabel("masked-LM loss (nats)")
    # Above the axes: a short run's curve has not left the upper right corner yet.
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, borderaxespad=0.2)
    _tidy(axes)


def _draw_rate(axes: Axes, train: Sequence[dict[str, Any]]) -> None:
    axes.plot([r["step"] for r in train], [r["lr"] for r in train], color=_INK, lw=1.2)
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.set_xlabel("step")
    _tidy(axes)


def _draw_ratios(axes: Axes, layers: Sequence[str], steps: Sequence[int], ratios: NDArray[np.float64]) -> None:
    positive = ratios[np.isfinite(ratios) & (ratios > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (0.1, 10.0)
    # Cell edges half-way between the logged steps, so that columns stand at their steps.
    centres = np.asarray(steps, dtype=float)
    middles = (centres[1:] + centres[:-1]) / 2
    first = centres[0] - (middles[0] - centres[0] if len(middles) else 0.5)
    last = centres[-1] + (centres[-1] - middles[-1] if len(middles) else 0.5)
    edges = np.concatenate([[first], middles, [last]])
    mesh = axes.pcolormesh(
        edges,
        np.arange(len(layers) + 1),
        np.ma.masked_invalid(ratios),
        norm=LogNorm(low, max(high, low * 1.001)),
        cmap="viridis",
    )
    axes.set_yticks(np.arange(len(layers)) + 0.5, [short_name(name) for name in layers], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("step")
    axes.set_title(
        "trust ratio per layer (biases and norm weights, fixed at 1, are not shown)", fontsize=10, color=_INK
    )
    axes.tick_params(length=0)
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.01, fraction=0.03)
    bar.set_label("trust ratio (log scale)", fontsize=9)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
