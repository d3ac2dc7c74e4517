"""What every optimizer does to each layer over a real run of the BERT recipe.

    python -m benchmarks.ratio_pictures

trains the recipe's tiny BERT on its default corpus with every registered optimizer, one process, 100 steps of 64
sequences in 8 micro-batches, and draws layers x steps: the trust ratio, or for optimizers without one (NovoGrad, SNGM,
VRSGD, VRAdam, CowClip) the relative length of the step, |change of w| / (lr |w|). Writes docs/results/ratios.png and
docs/results/ratios.json. The learning rates are the registry's guesses: the pictures compare patterns, not optimizers.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trustratio.optimizers import OPTIMIZERS
from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.configuration.config import DataConfig, OptimizerConfig
from trustratio.recipes.configuration.presets import get_preset
from trustratio.recipes.data.preparation import prepare
from trustratio.recipes.data.prepared import PreparedData
from trustratio.recipes.data.rows import MaskedRows
from trustratio.recipes.model.masked_language_model import build_model, padded_vocabulary
from trustratio.recipes.model.optimizer import build_optimizer
from trustratio.recipes.rules.global_batch import plan_batch

OUTPUT = Path(__file__).parent.parent / "docs" / "results"
BATCH, MICRO = 64, 8


def train(name: str, data: PreparedData, steps: int) -> dict[str, Any]:
    """Train from scratch with one optimizer.

    Returns:
        loss: Per step, nats per masked token.
        layers: Names of the layers of two or more dimensions.
        ratios: Trust ratios, steps x layers; None if the optimizer has none.
        relative_steps: |change of w| / (lr |w|), steps x layers.
    """
    torch.manual_seed(0)
    config = get_preset("lamb-tiny")
    model = build_model(config.model, padded_vocabulary(data.vocabulary_size))
    lr = OPTIMIZERS[name].starting_rate
    optimizer = build_optimizer(OptimizerConfig(name=name, lr=lr), model)
    rows = MaskedRows(data.rows("train"), data.vocabulary(), config.data.mask_probability, seed=0)
    plan = plan_batch(BATCH, MICRO, 1)
    weights = {n: p for n, p in model.named_parameters() if p.dim() >= 2}
    record: dict[str, Any] = {"loss": [], "layers": list(weights), "ratios": [], "relative_steps": []}
    for step in range(steps):
        warm = min(1.0, (step + 1) / 10)
        for group in optimizer.param_groups:
            group["lr"] = lr * warm
        batches = rows.step_batches(step, plan, 0)
        masked = sum(len(batch.labels) for batch in batches)
        optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            loss, _ = model(batch.input_ids, batch.positions, batch.labels)
            (loss / masked).backward()
            total += loss.item() / masked
        before = {n: w.detach().clone() for n, w in weights.items()}
        optimizer.step()
        record["loss"].append(total)
        ratios = optimizer.trust_ratios()  # type: ignore[attr-defined]
        record["ratios"].append([ratios.get(n, 1.0) for n in weights])
        with torch.no_grad():
            moved = [((w - before[n]).norm() / before[n].norm() / (lr * warm)).item() for n, w in weights.items()]
        record["relative_steps"].append(moved)
    if all(ratio == 1.0 for row in record["ratios"] for ratio in row):
        record["ratios"] = None
    return record


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """One heat-map per optimizer, layers x steps, on a logarithmic scale of its own."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    columns = 3
    lines = math.ceil(len(runs) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(15, 2.7 * lines), squeeze=False)
    for axis in axes.flat[len(runs) :]:
        axis.set_axis_off()
    for axis, (name, run) in zip(axes.flat, runs.items(), strict=False):
        has_ratio = run["ratios"] is not None
        values = np.array(run["ratios"] if has_ratio else run["relative_steps"]).T
        values = np.where(values > 0, values, np.nan)
        low, high = np.nanpercentile(values, [1, 99])
        image = axis.imshow(
            values, aspect="auto", cmap="viridis", norm=LogNorm(low, max(high, low * 1.01)), interpolation="nearest"
        )
        what = "trust ratio" if has_ratio else "|Δw| / (lr |w|)"
        title = f"{OPTIMIZERS[name].optimizer_class.__name__}: {what}"
        axis.set_title(f"{title}   (loss {run['loss'][0]:.2f} to {run['loss'][-1]:.2f})", fontsize=9)
        axis.set_xlabel("step", fontsize=7)
        axis.set_yticks(range(len(run["layers"])), [shortened(n) for n in run["layers"]], fontsize=5)
        axis.tick_params(axis="x", labelsize=7)
        figure.colorbar(image, ax=axis).ax.tick_params(labelsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def shortened(layer: str) -> str:
    for long, short in (("bert.", ""), ("encoder.layer.", ""), ("attention.", "att."), (".weight", "")):
        layer = layer.replace(long, short)
    return layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for ratios.json and ratios.png")
    options = parser.parse_args()
    data = prepare(DataConfig(), Reporter(active=True))
    runs = {}
    for name in OPTIMIZERS:
        began = time.perf_counter()
        runs[name] = train(name, data, options.steps)
        losses = runs[name]["loss"]
        print(f"{name}: loss {losses[0]:.3f} to {losses[-1]:.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    rounded = {
        name: {"lr": OPTIMIZERS[name].starting_rate, "first_loss": run["loss"][0], "last_loss": run["loss"][-1]}
        for name, run in runs.items()
    }
    options.output.mkdir(exist_ok=True)
    (options.output / "ratios.json").write_text(
        json.dumps({"torch": torch.__version__, "runs": rounded}, indent=1) + "\n"
    )
    draw(runs, options.output / "ratios.png")


if __name__ == "__main__":
    main()
