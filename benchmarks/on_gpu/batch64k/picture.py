"""The loss curves of the part `batch64k`, as a picture."""

from __future__ import annotations

from pathlib import Path

from benchmarks.on_gpu.table import Found

from .page import best_runs

__all__ = ["draw"]

COLOURS = {"lamb": "#1f77b4", "lans": "#d62728", "adamw": "#2ca02c"}


def draw(found: Found, path: Path) -> bool:
    """Draw training loss against sequences, a panel for each batch; the best of each optimizer thick.

    Returns:
        Whether there was anything to draw.
    """
    runs = [run for run in found.get("runs", []) if run["losses"]]
    if not runs:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    batches = sorted({run["batch"] for run in runs})
    best = [id(run) for run in best_runs(runs)]
    figure, panels = pyplot.subplots(1, len(batches), figsize=(5 * len(batches), 4), sharey=True, squeeze=False)
    for batch, panel in zip(batches, panels[0], strict=True):
        for run in (one for one in runs if one["batch"] == batch):
            thick = id(run) in best
            read = [batch * (number + 1) / 1e6 for number in range(len(run["losses"]))]
            name = f"{run['optimizer']} {run['lr']:g}" if thick else None
            width = 1.8 if thick else 0.7
            panel.plot(read, run["losses"], color=COLOURS.get(run["optimizer"]), linewidth=width, label=name)
        if "unigram_entropy" in found:
            panel.axhline(found["unigram_entropy"], color="grey", linewidth=0.7, linestyle="--")
        panel.set(title=f"{batch:,} sequences per update", xlabel="million sequences")
        panel.legend(frameon=False)
    panels[0][0].set_ylabel("training loss, nats")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
