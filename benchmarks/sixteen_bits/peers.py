"""Optimizers of other packages with state of few bits: what they take, and what they come to on the tiny training.

Each is made, stepped and trained where it can be; where not, its error's first line is its result.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.contenders import ADAM_DECAY, BASELINE, LR
from benchmarks.shapes import Shape, make_parameters
from benchmarks.sixteen_bits.training import OPTIMIZERS, Corpus, state_bytes, train
from benchmarks.sixteen_bits.variants import VARIANTS, Variant
from benchmarks.timing import alternate
from trustratio.optimizers import LAMB

__all__ = ["PACKAGES", "PEERS", "WITHOUT_RATIO", "Peer", "measure_peer", "peer_steps", "same_steps", "versions"]

PACKAGES = ("torchao", "bitsandbytes")
BF16 = Variant(weights=torch.bfloat16)
FP32 = Variant()


@dataclass(frozen=True)
class Peer:
    """One optimizer.

    Attributes:
        kind: Whose learning rate it trains with: "LAMB" or "AdamW"; "LARS" is not trained.
        make: From parameter groups and a learning rate; may raise anything where it cannot be had.
        ratio: What it has for a trust ratio, in a few words.
        variant: Dtype of the weights that it trains.
        trained: Optimizer and variant of the run of the part "training" that it was trained in, for this package's own.
    """

    kind: str
    make: Callable[[Any, float], torch.optim.Optimizer]
    ratio: str = "none"
    variant: Variant = FP32
    trained: tuple[str, str] | None = None


def _of(module: str, name: str, **options: Any) -> Callable[[Any, float], torch.optim.Optimizer]:
    def make(params: Any, lr: float) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = getattr(importlib.import_module(module), name)(_unnamed(params), lr, **options)
        return made

    return make


def _unnamed(params: Any) -> Any:
    """Parameters without their names, which not everybody takes."""
    return [
        {**group, "params": [p for _, p in group["params"]]} if isinstance(group, dict) else group for group in params
    ]


def _ours(optimizer: str, name: str) -> Peer:
    variant = VARIANTS[name]
    options = {**OPTIMIZERS[optimizer], **variant.options()}
    ratio = "switched off" if optimizer == "AdamW" else "‖w‖/‖u‖ of whole layers, under every sharding"
    return Peer(optimizer, lambda params, lr: LAMB(params, lr, **options), ratio, variant, (optimizer, name))


PEERS = {
    BASELINE: Peer("AdamW", _of("torch.optim", "AdamW", fused=True, weight_decay=ADAM_DECAY)),
    "trustratio LAMB": _ours("LAMB", "fp32 weights, fp32 state"),
    "trustratio LAMB, bf16 state": _ours("LAMB", "fp32 weights, bf16 state"),
    "trustratio LAMB, bf16 weights and state, stochastic": _ours("LAMB", "bf16 weights stochastic, bf16 state"),
    "trustratio LAMB adapt=False, bf16 state": _ours("AdamW", "fp32 weights, bf16 state"),
    "torchao AdamW8bit": Peer("AdamW", _of("torchao.optim", "AdamW8bit", weight_decay=ADAM_DECAY)),
    "torchao AdamW4bit": Peer("AdamW", _of("torchao.optim", "AdamW4bit", weight_decay=ADAM_DECAY)),
    "torchao AdamWFp8": Peer("AdamW", _of("torchao.optim", "AdamWFp8", weight_decay=ADAM_DECAY)),
    "torchao _AdamW, bf16 weights stochastic": Peer(
        "AdamW",
        _of("torchao.optim", "_AdamW", weight_decay=ADAM_DECAY, bf16_stochastic_round=True),
        variant=BF16,
    ),
    "bitsandbytes AdamW8bit": Peer("AdamW", _of("bitsandbytes.optim", "AdamW8bit", weight_decay=ADAM_DECAY)),
    "bitsandbytes LAMB": Peer(
        "LAMB",
        _of("bitsandbytes.optim", "LAMB", weight_decay=ADAM_DECAY),
        "min(1, ‖w‖/‖u‖), u without decay, of the tensors that it is given",
    ),
    "bitsandbytes LAMB8bit": Peer("LAMB", _of("bitsandbytes.optim", "LAMB8bit", weight_decay=ADAM_DECAY)),
    "bitsandbytes LARS8bit": Peer("LARS", _of("bitsandbytes.optim", "LARS8bit", momentum=0.9)),
}
WITHOUT_RATIO = {"bitsandbytes LAMB8bit": "AdamW8bit", "bitsandbytes LARS8bit": "SGD8bit"}
"""Which element-wise optimizer of the same package each is compared with, bit for bit."""


def same_steps(name: str, steps: int = 5) -> bool | str:
    """Whether a peer takes exactly the steps of the element-wise one in `WITHOUT_RATIO`; the error if it cannot."""
    module, base = "bitsandbytes.optim", WITHOUT_RATIO[name]
    options = {"momentum": 0.9} if base == "SGD8bit" else {}
    ends = []
    try:
        for made in (name.split()[-1], base):
            weights = torch.nn.Parameter(torch.randn((256, 256), generator=torch.Generator().manual_seed(0)) * 0.02)
            generator = torch.Generator().manual_seed(1)
            optimizer = _of(module, made, weight_decay=ADAM_DECAY, **options)([weights], LR)
            for _ in range(steps):
                weights.grad = torch.randn(weights.shape, generator=generator) * 1e-3
                optimizer.step()
            ends.append(weights.detach())
    except Exception as error:
        return first_line(error)
    return torch.equal(*ends)


def peer_steps(peers: Sequence[str], shapes: Sequence[Shape], rounds: int) -> dict[str, Any]:
    """Time a step of each on the same shapes, in turn with torch's fused AdamW; and count what the state takes."""
    steps: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    for name in dict.fromkeys([BASELINE, *peers]):
        peer = PEERS[name]
        parameters = make_parameters(list(shapes))
        for parameter in parameters:
            gradient = parameter.grad
            parameter.data = parameter.data.to(peer.variant.weights)
            parameter.grad = None if gradient is None else gradient.to(peer.variant.weights)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer = peer.make(parameters, LR)
                optimizer.step()
        except Exception as error:  # whatever another package fails with here
            rows[name] = {"missing": first_line(error)}
            continue
        elements = sum(p.numel() for p in parameters)
        rows[name] = {"state_bytes_per_parameter": state_bytes(optimizer) / elements}
        steps[name] = optimizer.step
    for name, timing in alternate(steps, BASELINE, rounds).items():
        rows[name].update(timing.summary())
    steps.clear()
    gc.collect()
    return rows


def measure_peer(name: str, corpus: Corpus, seed: int) -> dict[str, Any]:
    """Train the tiny model with one of them; numbers as `train` has them, or "missing" with the error."""
    peer = PEERS[name]
    rates = corpus.training.rates
    if peer.kind not in rates:
        return {"missing": f"not trained: no learning rate of {peer.kind} was looked for"}
    try:
        return train(corpus, peer.make, rates[peer.kind], seed, peer.variant)
    except Exception as error:
        return {"missing": first_line(error)}


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    return {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}


def first_line(error: BaseException) -> str:
    """What it is and says, shortened."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]
