"""`load_optimizer_state(..., strict=False)`: layers were thawed and frozen in between; those of both models go on."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from trustratio.integrations.checkpoints import load_optimizer_state, save_optimizer_state

from .cases import Case
from .checkpoint_runs import SAVED, STEPS, make_case, start
from .exactness import BOUND, MODEL, expected, worst_error
from .pool import CaseFailed, WorkerPool

LATER, EARLIER = ("conv", "norm"), ("dense", "scale")  # trained after the file was written only, and before it only
LACKS = "layers that the file lacks: leaves.conv.weight; leaves.norm.weight"
ONLY = "layers that only the file has: leaves.dense.weight; leaves.scale.weight"


def with_frozen(case: Case, names: tuple[str, ...]) -> Case:
    return replace(case, layers=tuple(replace(layer, frozen=layer.name in names) for layer in MODEL))


def whole_run(name: str) -> Case:
    """Both runs as one, in which layers have gradients at times."""
    skipped = {step: LATER if step < SAVED else EARLIER for step in range(STEPS)}
    return replace(make_case(name, 1, "dense"), skipped=skipped)


def write(case: Case, path: str) -> None:
    run = start(with_frozen(case, LATER))
    try:
        run.train(0, SAVED)
        save_optimizer_state(run.optimizer, path, model=run.model)
    finally:
        run.close()


def read(case: Case, path: str, then: str, strict: bool = False) -> Any:
    """Load what both models have into another one, train on, and save."""
    run = start(with_frozen(case, EARLIER))
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load_optimizer_state(run.optimizer, path, model=run.model, strict=strict)
        run.train(SAVED, STEPS)
        save_optimizer_state(run.optimizer, then, model=run.model)
        return {**run.result(), "warnings": [str(warning.message) for warning in caught]}
    finally:
        run.close()


def assert_went_on(name: str, answers: list[Any], then: str, listed: str = LACKS) -> None:
    reference = whole_run(name)
    weights, _ = expected(reference)
    for answer in answers:
        known = {layer: value for layer, value in answer["weights"].items() if layer not in EARLIER}
        error, layer = worst_error(reference, {**{n: w.float() for n, w in weights.items()}, **known})
        assert error <= BOUND, f"{layer}: {error:.2e}"
        assert listed in answer["warnings"]
    steps = {key.split(".")[1]: int(value) for key, value in load_file(then).items() if key.startswith("step/")}
    for layer in EARLIER:  # which some optimizers are still given
        assert steps.pop(layer, SAVED) == SAVED
    assert steps == {"embedding": STEPS, "bias": STEPS, "conv": STEPS - SAVED, "norm": STEPS - SAVED}


@pytest.mark.parametrize("name", ["lamb", "novograd"])
def test_in_one_process(name: str, tmp_path: Path) -> None:
    case, path, then = make_case(name, 1, "dense"), str(tmp_path / "state"), str(tmp_path / "then")
    write(case, path)
    assert_went_on(name, [read(case, path, then)], then)


@pytest.mark.parametrize(
    ("name", "stage"),
    [("novograd", 1), ("lamb", 2), ("lamb", 3), ("novograd", 3), ("lamb", "fsdp"), ("novograd", "fsdp")],
)
@pytest.mark.parametrize("world_size", [2])
def test_under_wrappers(pool: WorkerPool, name: str, stage: str | int, world_size: int, tmp_path: Path) -> None:
    path, then = str(tmp_path / "state"), str(tmp_path / "then")
    write(make_case(name, 1, "dense"), path)
    # ZeRO's flat tensors have no frozen layers; elsewhere these are restored too.
    listed = f"{LACKS}; {ONLY}" if isinstance(stage, int) else LACKS
    assert_went_on(name, pool.run(read, make_case(name, world_size, stage), path, then), then, listed)


@pytest.mark.parametrize("world_size", [2])
def test_a_strict_load_lists_the_layers_on_all_ranks(pool: WorkerPool, world_size: int, tmp_path: Path) -> None:
    path = str(tmp_path / "state")
    write(make_case("lamb", 1, "dense"), path)
    with pytest.raises(CaseFailed, match=f"{LACKS}\n{ONLY}") as failure:
        pool.run(read, make_case("lamb", world_size, 3), path, path, True)
    assert str(failure.value).count("strict=False to restore the layers that are in both") >= world_size
