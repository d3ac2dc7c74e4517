"""The pictures of a run: curves, and a heat-map of trust ratios."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import MaxNLocator

from .history import RunHistory, Series, binned, bins, grows, short_name

_INK, _TRAIN, _VALIDATION, _UNIGRAM, _WAIT = "#333333", "#5b8fc0", "#c2410c", "#6b7280", "#c2410c"
_MOST_POINTS = 1500
_MOST_COLUMNS = 600
_NAMED_LAYERS = 60


def draw_curves(history: RunHistory, title: str, path: Path) -> None:
    """Draw losses against steps and samples, learning rate, throughput and memory into one PNG.

    Args:
        history: of the run.
        title: one line over the picture.
        path: file to write.
    """
    pieces = bins(len(history.train["step"]), _MOST_POINTS)
    last = {"step", "sequences"}
    train = {name: binned(v, pieces, np.max if name in last else np.mean) for name, v in history.train.items()}
    small = (_draw_rate, _draw_batch, _draw_speed, _draw_memory) if grows(history) else _SMALL
    figure = plt.figure(figsize=(4 * len(small), 8.4), layout="constrained")
    figure.suptitle(title, fontsize=11, color=_INK)
    grid = figure.add_gridspec(2, 2 * len(small), height_ratios=[2.2, 1])
    half = len(small)
    by_step, by_sample = figure.add_subplot(grid[0, :half]), figure.add_subplot(grid[0, half:])
    _draw_loss(by_step, train, history, "step")
    _draw_loss(by_sample, train, history, "sequences")
    for column, draw in enumerate(small):
        axes = figure.add_subplot(grid[1, 2 * column : 2 * column + 2])
        draw(axes, train)
        axes.set_xlabel("step")
        _tidy(axes)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_ratios(history: RunHistory, title: str, path: Path) -> None:
    """Draw the trust ratios, layers x steps, into one PNG; arguments as for `draw_curves`."""
    pieces = bins(len(history.ratio_steps), _MOST_COLUMNS)
    table = binned(history.ratios, pieces, np.median).T
    centres = binned(history.ratio_steps, pieces, np.mean)
    positive = table[np.isfinite(table) & (table > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (0.1, 10.0)
    # Cell edges half-way between the logged steps, so that columns stand at their steps.
    middles = (centres[1:] + centres[:-1]) / 2
    first = centres[0] - (middles[0] - centres[0] if len(middles) else 0.5)
    last = centres[-1] + (centres[-1] - middles[-1] if len(middles) else 0.5)
    count = len(history.layers)
    figure, axes = plt.subplots(figsize=(12, 1.4 + 0.21 * min(count, _NAMED_LAYERS)), layout="constrained")
    mesh = axes.pcolormesh(
        np.concatenate([[first], middles, [last]]),
        np.arange(count + 1),
        np.ma.masked_invalid(table),
        norm=LogNorm(low, max(high, low * 1.001)),
        cmap="viridis",
    )
    named = range(0, count, -(-count // _NAMED_LAYERS))
    axes.set_yticks([i + 0.5 for i in named], [short_name(history.layers[i]) for i in named], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("step")
    axes.set_title(f"{title}\ntrust ratio per layer; those fixed at 1 are not shown", fontsize=10, color=_INK)
    axes.tick_params(length=0)
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, fraction=0.03)
    bar.set_label("trust ratio (log scale)", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_loss(axes: Axes, train: Series, history: RunHistory, against: str) -> None:
    validation = history.validation
    axes.plot(train[against], train["loss"], color=_TRAIN, lw=1.2, label="training loss")
    if validation["step"].size:
        places = np.interp(validation["step"], history.train["step"], history.train[against])
        losses = validation["validation_loss"]
        label = f"validation loss, last {losses[-1]:.3f}, accuracy {validation['validation_accuracy'][-1]:.1%}"
        axes.plot(places, losses, color=_VALIDATION, lw=1.6, marker="o", ms=3.5, label=label)
    if np.isfinite(history.unigram_entropy):
        label = f"unigram entropy {history.unigram_entropy:.3f}"
        axes.axhline(history.unigram_entropy, color=_UNIGRAM, ls="--", lw=1.2, label=label)
    axes.set_ylabel("masked-LM loss, nats")
    axes.set_xlabel(against)
    axes.margins(y=0.2)  # room for the legend, however few steps there were
    axes.legend(frameon=False, fontsize=8.5, loc="best")
    _tidy(axes)


def _draw_rate(axes: Axes, train: Series) -> None:
    axes.plot(train["step"], train["lr"], color=_INK, lw=1.2)
    axes.set_title("learning rate", fontsize=10, color=_INK)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _draw_batch(axes: Axes, train: Series) -> None:
    axes.plot(train["step"], train["batch"], color=_INK, lw=1.2, drawstyle="steps-mid")
    scale = train.get("noise_scale", np.full_like(train["step"], np.nan))
    axes.plot(train["step"], np.where(scale > 0, scale, np.nan), color=_TRAIN, lw=1)
    axes.set_title("batch; blue: gradient noise scale", fontsize=10, color=_INK)
    axes.set_yscale("log", base=2)


def _draw_speed(axes: Axes, train: Series) -> None:
    axes.plot(train["step"], train["sequences_per_second"], color=_TRAIN, lw=1.2)
    axes.set_title("sequences/s; orange: share of time waiting for data", fontsize=10, color=_INK)
    axes.set_ylim(bottom=0)
    if {"data_wait_seconds", "seconds"} <= set(train):
        share = axes.twinx()
        share.plot(train["step"], train["data_wait_seconds"] / np.maximum(train["seconds"], 1e-9), color=_WAIT, lw=0.9)
        share.set_ylim(0, 1)
        share.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        share.spines[["top"]].set_visible(False)


def _draw_memory(axes: Axes, train: Series) -> None:
    for name, label, colour in (
        ("host_memory_bytes", "host", _TRAIN),
        ("device_peak_memory_bytes", "device, peak", _VALIDATION),
    ):
        if name in train:
            known = np.isfinite(train[name])
            axes.plot(train["step"][known], train[name][known] / 2**30, color=colour, lw=1.2, label=label)
    axes.set_title("memory of the first rank, GiB", fontsize=10, color=_INK)
    axes.set_ylim(bottom=0)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8.5, loc="lower right")


_SMALL = (_draw_rate, _draw_speed, _draw_memory)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
