"""What ZeRO does to a LAMB that takes norms of the tensors it is given, and to this package's.

    python -m benchmarks.sharded_norms

trains the same small transformer for five steps on two processes, unsharded and under ZeRO-1, 2 and 3, and compares
how far each layer moved: |w - w0| sharded over |w - w0| unsharded. 1 is right. Needs DeepSpeed and matplotlib, no GPU;
writes docs/results/sharded_norms.json and .png.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from benchmarks.ranks import run_on_ranks

RANKS = 2
STEPS = 5
STAGES = (0, 1, 2, 3)
OUTPUT = Path(__file__).parent.parent / "docs" / "results"


class TextbookLAMB(torch.optim.Optimizer):
    """LAMB as it is usually written: one ratio per tensor in `param_groups`, whatever that tensor is."""

    def __init__(self, params: Any, lr: float):
        super().__init__(params, {"lr": lr, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                t = state["step"] = state.get("step", 0) + 1
                m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * p.grad
                v = state["v"] = 0.999 * state.get("v", 0) + 0.001 * p.grad.square()
                u = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-6) + group["weight_decay"] * p
                w_norm, u_norm = p.norm(), u.norm()
                ratio = w_norm / u_norm if w_norm > 0 and u_norm > 0 else 1.0
                p.sub_(group["lr"] * ratio * u)


class SmallTransformer(torch.nn.Module):
    """Two encoder layers over a vocabulary of 500; predicts the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(500, 64)
        layer = torch.nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = torch.nn.Linear(64, 500)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.encoder(self.embedding(tokens[:, :-1])))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def parameter_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    return [{"params": decayed}, {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0}]


def train(optimizer_name: str, stage: int) -> dict[str, float]:
    """Five steps on this rank.

    Returns:
        How far each layer moved, by name; NaN if it did not stay finite.
    """
    import deepspeed

    from trustratio.optimizers import LAMB

    torch.manual_seed(0)
    model = SmallTransformer()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = parameter_groups(model)
    optimizer: torch.optim.Optimizer
    optimizer = LAMB(groups, lr=0.01, adapt=True) if optimizer_name == "trustratio" else TextbookLAMB(groups, lr=0.01)
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    generator = torch.Generator().manual_seed(engine.global_rank)
    for _ in range(STEPS):
        engine.backward(engine(torch.randint(500, (8, 17), generator=generator)))
        engine.step()
    moved = {}
    for name, p in model.named_parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=stage == 3):
            moved[name] = (p.detach() - before[name]).norm().item()
    engine.destroy()
    return moved


def train_all() -> dict[str, dict[int, dict[str, float]]]:
    """Every variant on this rank."""
    return {name: {stage: train(name, stage) for stage in STAGES} for name in ("textbook", "trustratio")}


def measure() -> dict[str, Any]:
    """Train all variants in two processes and relate each layer's movement to the unsharded run's."""
    moved = run_on_ranks(train_all, RANKS, deepspeed=True)
    ratios = {
        name: {
            f"ZeRO-{stage}": {layer: stages[stage][layer] / size if size else 1.0 for layer, size in stages[0].items()}
            for stage in STAGES[1:]
        }
        for name, stages in moved.items()
    }
    from importlib.metadata import version

    return {
        "ranks": RANKS,
        "steps": STEPS,
        "machine": platform.machine(),
        "versions": {package: version(package) for package in ("torch", "deepspeed")},
        "movement_over_unsharded": ratios,
    }


def table(result: dict[str, Any]) -> str:
    """A markdown table of the smallest and largest ratio over the layers."""
    lines = ["| LAMB | sharding | least | most |", "|---|---|---|---|"]
    for name, stages in result["movement_over_unsharded"].items():
        for stage, layers in stages.items():
            broken = [layer for layer, ratio in layers.items() if ratio != ratio]
            finite = [ratio for ratio in layers.values() if ratio == ratio]
            least, most = (f"{min(finite):.4g}", f"{max(finite):.4g}") if finite else ("NaN", "NaN")
            lines.append(f"| {name} | {stage} | {least} | {most}{f' and {len(broken)} NaN' if broken else ''} |")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ratios = result["movement_over_unsharded"]
    layers = list(ratios["textbook"]["ZeRO-1"])
    positions = range(len(layers))
    figure, axes = plt.subplots(figsize=(11, 4.6))
    styles = {"ZeRO-1": ("#c0392b", "o"), "ZeRO-2": ("#e67e22", "x"), "ZeRO-3": ("#8e44ad", "^")}
    for stage, (color, marker) in styles.items():
        values = [ratios["textbook"][stage][layer] for layer in layers]
        axes.plot(positions, values, marker, color=color, label=f"norms of local tensors, {stage}", alpha=0.8)
    for stage, (_, marker) in styles.items():
        values = [ratios["trustratio"][stage][layer] for layer in layers]
        axes.plot(positions, values, marker, color="#1a7f4b", label=f"trustratio, {stage}", markersize=5)
    axes.axhline(1.0, color="#333333", lw=0.8)
    axes.set_yscale("log")
    axes.set_ylabel("movement in five steps,\nsharded / one process")
    axes.set_xticks(list(positions), layers, rotation=75, ha="right", fontsize=6)
    axes.set_title("LAMB under ZeRO on two ranks: how far each layer moves (1 is right)", fontsize=11)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    result = measure()
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "sharded_norms.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, OUTPUT / "sharded_norms.png")
    print(table(result))


if __name__ == "__main__":
    main()
