"""Layers that are several matrices in one, each segment with its own ratio, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.tensor import Shard

from .. import reference
from . import fsdp_runs, test_fsdp1
from .cases import Case, LayerSpec, initial_weights, mean_gradients, run_case
from .exactness import BOUND, two_groups
from .pool import CaseFailed, WorkerPool

# Shards are cut inside segments: 9 rows in 3 segments over 2 ranks, experts of 2 x 5 x 3, and a layer beside them.
LAYERS = (
    LayerSpec("attn_qkv", (9, 7)),
    LayerSpec("experts", (4, 5, 4)),
    LayerSpec("plain", (5, 4)),
    LayerSpec("bias", (6,), group=1),
)
SEGMENTS = {"attn_*": 3, "experts": 4}


def make_case(name: str, stage: str | int, **changes: Any) -> Case:
    first, second = two_groups(name)
    changes.setdefault("segments", SEGMENTS)
    groups = ({**first, "segments": changes.pop("segments")}, {**second, "segments": {"bias": 2}})
    return Case(name, LAYERS, stage, groups, spread=0.0, **changes)


def cut(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    counts = {"attn_qkv": 3, "experts": 4, "bias": 2}
    parts: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name in counts:
            parts.update({f"{name}[{i}]": part for i, part in enumerate(tensor.chunk(counts[name]))})
        else:
            parts[name] = tensor
    return parts


def expected(case: Case) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The reference of a model whose segments are layers."""
    groups = two_groups(case.optimizer)
    initial = cut(initial_weights(case))
    options = {name: groups[name.startswith("bias")] for name in initial}
    gradients = [{n: g.double().unsqueeze(0) for n, g in cut(given).items()} for given in mean_gradients(case)]
    return reference.run_reference(case.optimizer, initial, gradients, options, None, 1.2e-7)


def assert_exact(case: Case, answers: list[dict[str, Any]]) -> None:
    wanted, ratios = expected(case)
    initial = cut(initial_weights(case))
    for answer in answers:
        for name, weights in cut(answer["weights"]).items():
            error = reference.relative_error(weights, wanted[name], initial[name])
            assert error <= BOUND, f"{name}: relative error of the weight change {error:.2e}"
        for found, step in zip(answer["ratios"], ratios, strict=True):
            assert found == pytest.approx(step, rel=1e-6)


@pytest.mark.parametrize("name", ["lamb", "lars", "novograd"])
@pytest.mark.parametrize("stage", ["dense", "ddp", 1, 2, 3])
@pytest.mark.parametrize("world_size", [2, 3])
def test_flat_layouts(pool: WorkerPool, name: str, stage: str | int, world_size: int) -> None:
    case = make_case(name, stage)
    assert_exact(case, pool.run(run_case, case))


@pytest.mark.parametrize("name", ["lamb", "lars", "novograd"])
@pytest.mark.parametrize(("world_size", "mesh"), [(2, None), (3, None), (4, (2, 2))])
def test_fsdp2(pool: WorkerPool, name: str, mesh: tuple[int, ...] | None, world_size: int) -> None:
    case = make_case(name, "fsdp")
    assert_exact(case, pool.run(fsdp_runs.run_case, case, fsdp_runs.Setup(mesh)))


def along_last(parameter: torch.nn.Parameter) -> Shard | None:
    return Shard(parameter.dim() - 1) if parameter.shape[-1] == 4 else None


@pytest.mark.parametrize("world_size", [2])
def test_blocks_that_are_narrower_than_the_layer(pool: WorkerPool, world_size: int) -> None:
    case = make_case("lamb", "fsdp")
    setup = fsdp_runs.Setup(options={"shard_placement_fn": along_last})
    assert_exact(case, pool.run(fsdp_runs.run_case, case, setup))


@pytest.mark.parametrize("world_size", [2, 3])
def test_fsdp1_flat_parameters(pool: WorkerPool, world_size: int) -> None:
    case = make_case("lamb", "fsdp1")
    assert_exact(case, pool.run(test_fsdp1.run_case, case, test_fsdp1.Setup()))


@pytest.mark.parametrize("name", ["lamb", "novograd"])
@pytest.mark.parametrize("world_size", [2])
def test_checkpoints(pool: WorkerPool, name: str, world_size: int, tmp_path: Any) -> None:
    case = make_case(name, "fsdp", steps=6)
    one = pool.run(fsdp_runs.run_case, case, fsdp_runs.Setup())
    other = pool.run(fsdp_runs.run_case, case, fsdp_runs.Setup(checkpoint=str(tmp_path / name)))
    for layer, weights in one[0]["weights"].items():
        assert torch.equal(weights, other[0]["weights"][layer]), layer
    assert one[0]["ratios"][3:] == other[0]["ratios"]


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", ["ddp", 1, 3, "fsdp", "fsdp1"])
def test_a_count_that_does_not_divide(pool: WorkerPool, stage: str | int, world_size: int) -> None:
    case = make_case("lamb", stage, segments={"plain": 2})
    wrapped = {"fsdp": (fsdp_runs.run_case, fsdp_runs.Setup()), "fsdp1": (test_fsdp1.run_case, test_fsdp1.Setup())}
    run, *setup = wrapped.get(stage, (run_case,))
    with pytest.raises(CaseFailed, match=r"ValueError: layer plain of shape \(5, 4\) does not divide into 2 segments"):
        pool.run(run, case, *setup)


@pytest.mark.parametrize("world_size", [2])
def test_statistics_are_of_whole_parameters(pool: WorkerPool, world_size: int) -> None:
    with pytest.raises(CaseFailed, match="CLARS takes norms of whole parameters' gradients"):
        pool.run(run_case, make_case("clars", "ddp"))
