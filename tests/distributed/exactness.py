"""Compares what the workers return with the float64 reference."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from trustratio.optimizers import OPTIMIZERS

from ..reference import REFERENCES, relative_error, run_reference
from .cases import DTYPES, Case, LayerSpec, group_gradients, initial_weights, mean_gradients

BOUND = 2e-6

# Odd sizes, so that layers straddle two, three and all ranks; biases and a matrix that fits no boundary.
MODEL = (
    LayerSpec("embedding", (37, 11)),
    LayerSpec("dense", (8, 16)),
    LayerSpec("conv", (3, 2, 5)),
    LayerSpec("bias", (13,), group=1),
    LayerSpec("norm", (7,), group=1),
    LayerSpec("scale", (1,), group=1),
)


# Options with which five steps change the weights by an amount comparable to the weights themselves, so that fp32
# rounding of the weights does not hide an error of the change.
BASE_OPTIONS: dict[str, dict[str, Any]] = {
    "lars": {"lr": 2.0, "trust_coefficient": 0.02},
    "novograd": {"lr": 1.0},
    "sngm": {"lr": 20.0},
    "tvlars": {"lr": 2.0, "trust_coefficient": 0.04},
    "mclr": {"lr": 0.5},
    "cblr": {"lr": 0.5},
    "curvature_sgd": {"lr": 2.0},
    "curvature_adamw": {"lr": 0.5},
    "clars": {"lr": 2.0, "trust_coefficient": 0.02},
    "vrsgd": {"lr": 2.0},
    "vrlars": {"lr": 2.0, "trust_coefficient": 0.02},
    "adabelief": {"lr": 5.0},  # as long as the gradient at first, and a twentieth of the rate later
    "fastadabelief": {"lr": 0.2},
    "adashift": {"lr": 0.2, "keep": 2},
}

STEPS = {"adabelief": 8}
"""Of AdaBelief the first five are SGD's."""

# Groups that differ by a common factor have the same signal-to-noise ratio in every element; see `group_gradients`.
NOISE = {
    name: {"norms": 1.0, "squares": 6.0}[entry.group_statistics]
    for name, entry in OPTIMIZERS.items()
    if entry.group_statistics is not None
}


def two_groups(name: str, **options: Any) -> tuple[dict[str, Any], ...]:
    """The options of both groups of `MODEL`: decay, and none for biases and norms."""
    if name.startswith("naive"):
        return ({"lr": 0.05, "weight_decay": 0.01 if name == "naive" else 0.1, "adapt": True},) * 2
    base = {"lr": 0.05, "weight_decay": 0.1, **BASE_OPTIONS.get(name, {}), **options}
    return base, {**base, "weight_decay": 0.0}


def expected(case: Case, ranks: int = 1) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The reference's weights and ratios. The number of ranks matters where statistics of their gradients do."""
    name = {"naive": "lamb", "naive trust ratio": "trust_ratio:adamw"}.get(case.optimizer, case.optimizer)
    options = {layer.name: case.groups[layer.group] for layer in case.layers}
    gradients = []
    for step, given in enumerate(mean_gradients(case)):
        if step in case.overflow:
            continue
        of_groups = group_gradients(case, step, given, case.accumulation * (1 if case.stage == "dense" else ranks))
        combined: dict[str, torch.Tensor] = {}
        for layer in case.layers:
            if layer.name in of_groups:
                owner = layer.tied_to or layer.name
                combined[owner] = combined.get(owner, torch.zeros(())) + of_groups[layer.name].double()
        gradients.append(combined)
    assert name in REFERENCES
    resolution = torch.finfo(DTYPES[case.dtype]).eps
    return run_reference(name, initial_weights(case), gradients, options, case.clipping or None, resolution)


def assemble(case: Case, answers: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The optimizer's own weights (fp32 masters), put together from the shards of all ranks."""
    whole = {name: torch.full(w.shape, float("nan")).reshape(-1) for name, w in initial_weights(case).items()}
    for answer in answers:
        for name, shards in answer["masters"].items():
            for offset, values in shards:
                whole[name][offset : offset + len(values)] = values.float()
    return {name: flat.reshape(initial_weights(case)[name].shape) for name, flat in whole.items()}


def path_lengths(case: Case, ranks: int = 1) -> dict[str, float]:
    """For each layer, the sum of the norms of its weight changes from step to step."""
    prefixes = [expected(replace(case, steps=n), ranks)[0] for n in range(case.steps + 1)]
    return {
        name: sum((after[name].double() - before[name].double()).norm().item() for before, after in pairwise(prefixes))
        for name in prefixes[0]
    }


def worst_error(
    case: Case, weights: dict[str, torch.Tensor], along_path: bool = False, ranks: int = 1
) -> tuple[float, str]:
    """The largest relative error of a layer's weight change, and the layer.

    With `along_path`, relative to the length of the way that the weights went: a layer of a few elements may come back
    to where it was, so that its net change is smaller than the rounding of its steps.
    """
    reference, _ = expected(case, ranks)
    initial = initial_weights(case)
    paths = path_lengths(case, ranks) if along_path else {}
    errors = {
        name: relative_error(weights[name], reference[name], initial[name], paths.get(name))
        for name in initial
        if initial[name].numel()
    }
    name = max(errors, key=lambda layer: float("inf") if errors[layer] != errors[layer] else errors[layer])
    return errors[name], name


def assert_exact(case: Case, answers: list[dict[str, Any]], bound: float = BOUND, along_path: bool = False) -> None:
    """Every rank's weights are within `bound` of the reference, and so are the trust ratios."""
    if case.dtype == "fp32":
        for answer in answers:
            error, layer = worst_error(case, answer["weights"], along_path, len(answers))
            assert error <= bound, f"{layer}: relative error of the weight change {error:.2e}"
    else:
        trained = {layer.name for layer in case.layers if not layer.frozen}
        weights = {n: w if n in trained else initial_weights(case)[n] for n, w in assemble(case, answers).items()}
        error, layer = worst_error(case, weights, along_path, len(answers))
        assert error <= bound, f"{layer}: relative error of the masters' change {error:.2e}"
    _, ratios = expected(case, len(answers))
    taken = [r for step, r in enumerate(answers[0]["ratios"]) if step not in case.overflow]
    if case.save_after is None:
        assert len(taken) == len(ratios)
        for found, wanted in zip(taken, ratios, strict=True):
            for layer, ratio in wanted.items():
                assert abs(found[layer] / ratio - 1) <= 1e-6, f"{layer}: ratio {found[layer]} for {ratio}"
    for answer in answers[1:]:
        assert answer["ratios"] == answers[0]["ratios"], "ranks disagree about the trust ratios"
