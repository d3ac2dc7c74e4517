"""FSDP2, HSDP and other placements of DTensors against the float64 reference, and what is refused under them."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

from trustratio.optimizers import LAMB, OPTIMIZERS, create_optimizer
from trustratio.optimizers.sharding.local_tensors import local_part

from ..reference import relative_error
from .cases import (
    Case,
    CollectiveCounter,
    LayerSpec,
    Model,
    group_gradients,
    initial_weights,
    make_optimizer,
    mean_gradients,
)
from .exactness import MODEL, NOISE, assert_exact, expected, two_groups, worst_error
from .group_runs import measured, seeing_reduced_gradients
from .pool import CaseFailed, WorkerPool
from .test_gradient_statistics import assert_norms

EXACT = [name for name, entry in OPTIMIZERS.items() if entry.group_statistics is None]
MESHES = {"fsdp": None, "hsdp": (2, 2)}


def make_case(name: str, layers: tuple[LayerSpec, ...] = MODEL, **changes: Any) -> Case:
    changes.setdefault("noise", NOISE.get(name, 0.0))
    return Case(name, layers, "fsdp", two_groups(name, **changes.pop("options", {})), **changes)


# Inside the workers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """How the model is sharded.

    Attributes:
        mesh: Shape of the mesh; None for all ranks in one dimension.
        units: Whether every layer is sharded on its own, beside the whole model.
        checkpointing: Recompute every layer in backward.
        keep: What to keep unreduced while gradients accumulate: "sharded" gradients (set_requires_gradient_sync), those
            of a replica (set_requires_all_reduce), or None.
        wrap: "fully_shard"; "accelerate", whose Accelerator calls it; "swap", where the optimizer is made before and
            its parameters are then replaced, as accelerate does; or "stale", where they are not replaced.
        options: Further arguments of fully_shard.
        clipping: The user's clip_grad_norm_.
        checkpoint: Save after three steps and go on in a new model and optimizer, from this folder.
    """

    mesh: tuple[int, ...] | None = None
    units: bool = False
    checkpointing: bool = False
    keep: str | None = "sharded"
    wrap: str = "fully_shard"
    options: dict[str, Any] | None = None
    clipping: float | None = None
    checkpoint: str | None = None


def make_mesh(shape: tuple[int, ...] | None) -> DeviceMesh:
    shape = shape or (dist.get_world_size(),)
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def prepare_with_accelerate(model: Model, optimizer: Any) -> None:
    """Accelerator.prepare with FSDP2, which accelerate itself leaves switched off without an accelerator."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerator = Accelerator(cpu=True)
    options = {"cpu_ram_efficient_loading": False, "auto_wrap_policy": "NO_WRAP"}
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **options)
    accelerator.prepare(model, optimizer)
    AcceleratorState._reset_state(reset_partial_state=True)


class Run:
    def __init__(self, case: Case, setup: Setup):
        self.case, self.setup = case, setup
        self.model = Model(case)
        self.model.load(initial_weights(case))
        early = None if setup.wrap == "fully_shard" else make_optimizer(case, self.model)
        before = dict(self.model.named_parameters())
        if setup.checkpointing:
            for name, leaf in self.model.leaves.items():
                self.model.leaves[name] = checkpoint_wrapper(leaf)
        if setup.wrap == "accelerate":
            prepare_with_accelerate(self.model, early)
        for part in (
            () if setup.wrap == "accelerate" else (*(self.model.leaves.values() if setup.units else ()), self.model)
        ):
            fully_shard(part, mesh=make_mesh(setup.mesh), **(setup.options or {}))
        after = dict(self.model.named_parameters())
        self.optimizer: Any = early or make_optimizer(case, self.model)
        if setup.wrap == "swap":
            replaced = {id(p): after[name] for name, p in before.items()}
            for group in self.optimizer.param_groups:
                group["params"] = [replaced[id(p)] for p in group["params"]]
        self.counter = CollectiveCounter(self.optimizer)
        self.ratios: list[dict[str, float]] = []

    def train(self, first: int, last: int) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        for step in range(first, last):
            means = mean_gradients(self.case)[step]
            of_groups = group_gradients(self.case, step, means, world * self.case.accumulation)
            for micro in range(self.case.accumulation):
                last = micro == self.case.accumulation - 1
                if self.setup.keep == "sharded":
                    self.model.set_requires_gradient_sync(last)
                elif self.setup.keep == "replica":
                    self.model.set_requires_all_reduce(last)
                given = {name: g[micro * world + rank] for name, g in of_groups.items()}
                (self.model(given) / self.case.accumulation).backward()
            if self.setup.clipping is not None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.setup.clipping)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ratios.append(self.optimizer.trust_ratios())

    def save(self, folder: str) -> None:
        state = {"model": self.model.state_dict(), "optimizer": get_optimizer_state_dict(self.model, self.optimizer)}
        dcp.save(state, checkpoint_id=folder)

    def load(self, folder: str) -> None:
        state = {"model": self.model.state_dict(), "optimizer": get_optimizer_state_dict(self.model, self.optimizer)}
        dcp.load(state, checkpoint_id=folder)
        self.model.load_state_dict(state["model"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])

    def result(self) -> dict[str, Any]:
        weights = {layer.name: self.model.leaves[layer.name].weight for layer in self.case.layers}
        state = self.optimizer.state
        return {
            "weights": {name: p.full_tensor().detach().float().clone() for name, p in weights.items()},
            "ratios": self.ratios,
            "collectives": self.counter.per_call,
            "all_reduces": self.counter.all_reduces,
            "step_counts": {name: float(state[p]["step"]) for name, p in weights.items()},
            "local_elements": {name: p.to_local().numel() for name, p in weights.items()},
            "cut_alike": all(
                isinstance(value, DTensor) and value.placements == p.placements and value.shape == p.shape
                for p in weights.values()
                for value in (state[p][name] for name in self.optimizer.element_state)
            ),
        }

    def close(self) -> None:
        self.counter.close()
        self.model = self.optimizer = None  # type: ignore[assignment]
        gc.collect()


@contextmanager
def running(case: Case, setup: Setup) -> Iterator[Run]:
    run = Run(case, setup)
    try:
        yield run
    finally:
        run.close()


def run_case(case: Case, setup: Setup) -> dict[str, Any]:
    with running(case, setup) as run:
        if setup.checkpoint is None:
            run.train(0, case.steps)
            return run.result()
        run.train(0, 3)
        run.save(setup.checkpoint)
    # Other weights, so that what is not restored shows.
    with running(replace(case, seed=case.seed + 7), setup) as fresh:
        fresh.load(setup.checkpoint)
        fresh.case = case
        fresh.train(3, case.steps)
        return fresh.result()


def run_exact(pool: WorkerPool, case: Case, setup: Setup, bound: float = 2e-6) -> list[dict[str, Any]]:
    answers = pool.run(run_case, case, setup)
    assert_exact(case, answers, bound)
    return answers


# fully_shard --------------------------------------------------------------------------------------------------------


def first_quick(names: list[str], quick: str) -> list[Any]:
    """All names, of which those that repeat what `quick` shows are slow."""
    return [name if name == quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", first_quick(EXACT, "lamb"))
@pytest.mark.parametrize(("world_size", "mesh"), [(2, "fsdp"), (3, "fsdp"), (4, "hsdp")])
def test_weights_and_ratios_equal_one_process(pool: WorkerPool, name: str, world_size: int, mesh: str) -> None:
    answers = run_exact(pool, make_case(name), Setup(MESHES[mesh]))
    for answer in answers:
        # The first step also proves the layout.
        assert answer["collectives"] == [OPTIMIZERS[name].collectives + (step == 0) for step in range(5)]
        assert set(answer["step_counts"].values()) == {5.0}
        assert answer["cut_alike"]
    assert any(answer["local_elements"]["scale"] == 0 for answer in answers)


@pytest.mark.parametrize(("world_size", "mesh"), [(2, "fsdp"), (4, "hsdp")])
def test_training_options(pool: WorkerPool, world_size: int, mesh: str) -> None:
    case = make_case("lamb")
    run_exact(pool, replace(case, accumulation=3), Setup(MESHES[mesh]))
    # torch divides by the norm + 1e-6, as the reference does.
    run_exact(pool, replace(case, clipping=0.5), Setup(MESHES[mesh], clipping=0.5))
    clips_itself = pool.run(run_case, make_case("lamb", constructor={"max_grad_norm": 0.5}), Setup(MESHES[mesh]))
    assert_exact(replace(case, clipping=0.5), clips_itself, bound=1e-5)
    assert clips_itself[0]["collectives"] == [3, 2, 2, 2, 2]


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize(
    "options",
    [
        {"reshard_after_forward": False},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    ],
    ids=["kept after forward", "offload"],
)
def test_options_of_fully_shard(pool: WorkerPool, options: dict[str, Any], world_size: int) -> None:
    run_exact(pool, make_case("lamb"), Setup(options=options))


def weights_after_a_small_step(mixed: bool) -> tuple[torch.dtype, dict[str, torch.Tensor]]:
    """One step that is too small for 16 bits, from a gradient that they represent."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if mixed else MixedPrecisionPolicy()
    case = replace(make_case("lamb", dtype="bf16", spread=0.0), groups=({"lr": 1e-4}, {"lr": 1e-4}))
    with running(case, Setup(options={"mp_policy": policy})) as run:
        run.train(0, 1)
        return run.model.leaves["dense"].weight.dtype, run.result()["weights"]


@pytest.mark.parametrize("world_size", [2])
def test_mixed_precision_steps_fp32_parameters(pool: WorkerPool, world_size: int) -> None:
    dtype, mixed = pool.run(weights_after_a_small_step, True)[0]
    _, full = pool.run(weights_after_a_small_step, False)[0]
    assert dtype == torch.float32
    assert all(torch.equal(mixed[layer], weights) for layer, weights in full.items())
    assert not torch.equal(mixed["dense"], mixed["dense"].bfloat16().float())


@pytest.mark.parametrize("world_size", [2])
def test_shards_along_another_dimension(pool: WorkerPool, world_size: int) -> None:
    layers = (LayerSpec("wide", (5, 12)), LayerSpec("conv", (3, 4, 5)), LayerSpec("bias", (9,), group=1))
    for name in ("lamb", "lars", "novograd"):
        run_exact(pool, make_case(name, layers), Setup(options={"shard_placement_fn": second_dimension}))


def second_dimension(parameter: torch.nn.Parameter) -> Shard | None:
    return Shard(1) if parameter.dim() > 1 else None


@pytest.mark.parametrize(("world_size", "mesh"), [(2, "fsdp"), (4, "hsdp")])
def test_layers_without_gradient_are_untouched(pool: WorkerPool, world_size: int, mesh: str) -> None:
    skipped = {0: ("dense", "norm"), 2: ("embedding",), 3: ("dense", "bias", "norm", "scale")}
    skipped = {step: (*names, "conv") for step, names in {**dict.fromkeys(range(5), ()), **skipped}.items()}
    case = make_case("lamb", skipped=skipped)
    for answer in run_exact(pool, case, Setup(MESHES[mesh])):
        assert answer["step_counts"] == {"embedding": 4, "dense": 3, "conv": 0, "bias": 4, "norm": 3, "scale": 4}
        assert torch.equal(answer["weights"]["conv"], initial_weights(case)["conv"])


@pytest.mark.parametrize("world_size", [2])
def test_parameters_replaced_after_construction(pool: WorkerPool, world_size: int) -> None:
    answers = run_exact(pool, make_case("lamb"), Setup(wrap="swap"))
    assert set(answers[0]["ratios"][0]) == {layer.name for layer in MODEL}
    unnamed = pool.run(run_case, make_case("lamb", named=False), Setup(wrap="swap"))
    assert set(unnamed[0]["ratios"][0]) == {"0.0", "0.1", "0.2", "1.0", "1.1", "1.2"}


@pytest.mark.parametrize("world_size", [2])
def test_accelerate(pool: WorkerPool, world_size: int) -> None:
    for name in ("lamb", "clars", "vrlamb"):
        run_exact(pool, make_case(name), Setup(wrap="accelerate"))


# Checkpoints --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", first_quick(EXACT, "lamb"))
@pytest.mark.parametrize(("world_size", "mesh"), [(2, "fsdp"), (4, "hsdp")])
def test_a_checkpoint_continues_bit_for_bit(
    pool: WorkerPool, name: str, world_size: int, mesh: str, tmp_path: Any
) -> None:
    case = make_case(name, steps=6, skipped={1: ("dense",)})
    one = pool.run(run_case, case, Setup(MESHES[mesh]))
    other = pool.run(run_case, case, Setup(MESHES[mesh], checkpoint=str(tmp_path)))
    for a, b in zip(one, other, strict=True):
        for layer, weights in a["weights"].items():
            assert torch.equal(weights, b["weights"][layer]), layer
        assert a["ratios"][3:] == b["ratios"]
        assert a["step_counts"] == b["step_counts"]


# Statistics of group gradients --------------------------------------------------------------------------------------

STATISTICS = [name for name, entry in OPTIMIZERS.items() if entry.group_statistics is not None]


@pytest.mark.parametrize("name", first_quick(STATISTICS, "clars"))
@pytest.mark.parametrize(("world_size", "mesh"), [(1, "fsdp"), (2, "fsdp"), (3, "fsdp"), (4, "hsdp")])
def test_statistics(pool: WorkerPool, name: str, world_size: int, mesh: str) -> None:
    case = make_case(name)
    run_exact(pool, case, Setup(MESHES[mesh]))
    for keep in ("sharded", "replica", None):
        run_exact(pool, replace(case, accumulation=3), Setup(MESHES[mesh], units=True, keep=keep))


@pytest.mark.parametrize("name", ["clars", "vrlamb"])
@pytest.mark.parametrize(("world_size", "mesh"), [(2, "fsdp"), (4, "hsdp")])
def test_statistics_with_options(pool: WorkerPool, name: str, world_size: int, mesh: str) -> None:
    case, shape = make_case(name), MESHES[mesh]
    for setup in (
        Setup(shape, wrap="swap"),
        Setup(shape, units=True, checkpointing=True),
        Setup(shape, options={"reshard_after_forward": False}),
        Setup(shape, options={"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    ):
        run_exact(pool, case, setup)
    run_exact(pool, replace(case, clipping=0.5), Setup(shape, clipping=0.5))
    layers = (LayerSpec("wide", (5, 12)), LayerSpec("conv", (3, 4, 5)), LayerSpec("bias", (9,), group=1))
    run_exact(pool, make_case(name, layers), Setup(shape, options={"shard_placement_fn": second_dimension}))
    skipped = {0: ("dense", "norm"), 2: ("embedding",), 3: ("dense", "bias", "norm", "scale")}
    answers = run_exact(pool, make_case(name, skipped=skipped), Setup(shape))
    assert answers[0]["step_counts"]["dense"] == 3


def run_mixed(case: Case, reduce_dtype: torch.dtype | None) -> dict[str, Any]:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    return run_case(case, Setup(options={"mp_policy": policy}))


@pytest.mark.parametrize("world_size", [2])
def test_statistics_in_mixed_precision(pool: WorkerPool, world_size: int) -> None:
    """Gradients that 16 bits represent, and so do their sums."""
    for name in ("clars", "vrlamb"):
        case = make_case(name, dtype="bf16", spread=0.0)
        answers = pool.run(run_mixed, case, None)
        reference, ratios = expected(case, world_size)
        for layer, weights in reference.items():
            error = relative_error(answers[0]["weights"][layer], weights, initial_weights(case)[layer])
            assert error <= 1e-5, f"{layer}: {error:.2e}"
        for found, wanted in zip(answers[0]["ratios"], ratios, strict=True):
            assert found == pytest.approx(wanted, rel=1e-6)


def run_norms(case: Case, setup: Setup) -> list[dict[str, tuple[float, ...]]]:
    with running(case, setup) as run:
        run.optimizer.collect_group_norms()
        found = []
        for step in range(case.steps):
            run.train(step, step + 1)
            norms = run.optimizer.statistics.norms()
            found.append({name: (n.groups, n.mean_norm, n.mean_square, n.square_of_mean) for name, n in norms.items()})
        return found


@pytest.mark.parametrize(("world_size", "mesh"), [(2, "fsdp"), (4, "hsdp")])
def test_norms_for_any_optimizer(pool: WorkerPool, world_size: int, mesh: str) -> None:
    case = make_case("lamb", accumulation=2, noise=1.0)
    for norms in pool.run(run_norms, case, Setup(MESHES[mesh])):
        assert_norms(case, norms, world_size)


def run_measured(case: Case, setup: Setup, bucket_elements: int) -> dict[str, Any]:
    with measured(bucket_elements) as traffic:
        return {**run_case(case, setup), "traffic": vars(traffic)}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_wire_and_memory_of_statistics(pool: WorkerPool, accumulation: int, world_size: int) -> None:
    """Squares are sent as often as gradients, and kept whole only while gradients are."""
    elements = sum(w.numel() for w in initial_weights(make_case("lamb")).values())
    case = make_case("vrlamb", accumulation=accumulation)
    for keep in ("sharded", None):
        passes = case.steps * (1 if keep else accumulation)
        for answer in pool.run(run_measured, case, Setup(units=True, keep=keep), 64):
            traffic = answer["traffic"]
            assert elements * passes <= traffic["sent"] <= 1.25 * elements * passes
            assert traffic["staged"] <= 1.25 * 64 / 2
            assert traffic["whole"] <= (elements if keep and accumulation > 1 else 0)
            assert traffic["partitions"] <= elements / world_size + 16 * len(MODEL)


def run_on_reduced_gradients(case: Case) -> dict[str, Any]:
    with seeing_reduced_gradients():
        return run_case(case, Setup())


@pytest.mark.parametrize("world_size", [2])
def test_statistics_of_reduced_gradients_are_caught(pool: WorkerPool, world_size: int) -> None:
    for name in ("clars", "vrsgd"):
        case = make_case(name)
        answer = pool.run(run_on_reduced_gradients, case)[0]
        assert worst_error(case, answer["weights"], ranks=world_size)[0] > 0.05


# Any placement ------------------------------------------------------------------------------------------------------

WHOLE, CUT = Replicate(), Shard(0)
PLACEMENTS: dict[str, tuple[Any, ...] | None] = {
    "cut by both dimensions": (CUT, CUT),
    "rows by columns": (CUT, Shard(1)),
    "columns": (WHOLE, Shard(1)),
    "cut by the first dimension": (Shard(1), WHOLE),
    "whole": (WHOLE, WHOLE),
    "on another mesh": (Shard(0),),
    "no DTensor": None,
}


def step_with_placements(name: str) -> dict[str, Any]:
    """Five steps of one optimizer whose layers are each cut in another way."""
    case = make_case(name, tuple(LayerSpec(cut, (5, 7)) for cut in PLACEMENTS))
    meshes = {2: make_mesh((2, 2)), 1: make_mesh(None)}

    def cut(layer: str, value: torch.Tensor) -> torch.Tensor:
        placements = PLACEMENTS[layer]
        return value if placements is None else distribute_tensor(value, meshes[len(placements)], placements)

    parameters = {layer: torch.nn.Parameter(cut(layer, w)) for layer, w in initial_weights(case).items()}
    optimizer = create_optimizer(name, [{"params": parameters.items(), **case.groups[0]}], lr=1.0)
    ratios, calls = [], []
    for step, gradients in enumerate(mean_gradients(case)):
        for layer, parameter in parameters.items():
            parameter.grad = cut(layer, gradients[layer])
        if step == 4:
            # A gradient that is still a sum over ranks, as tensor parallelism may leave it.
            whole = gradients["whole"]
            halves = [Partial(), WHOLE]
            parameters["whole"].grad = DTensor.from_local(whole / 2, meshes[2], halves)
        with CommDebugMode() as communication:
            optimizer.step()
        calls.append(sum(n for kind, n in communication.get_comm_counts().items() if "reduce" in str(kind)))
        ratios.append(optimizer.trust_ratios())
    weights = {
        layer: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for layer, p in parameters.items()
    }
    return {"weights": weights, "ratios": ratios, "collectives": calls}


@pytest.mark.parametrize("name", first_quick(["lamb", "lars", "lans", "novograd", "sngm"], "lamb"))
@pytest.mark.parametrize("world_size", [4])
def test_every_placement_in_one_optimizer(pool: WorkerPool, name: str, world_size: int) -> None:
    case = replace(make_case(name, tuple(LayerSpec(cut, (5, 7)) for cut in PLACEMENTS)), spread=0.0)
    answers = pool.run(step_with_placements, name)
    assert_exact(case, answers)
    # One for each dimension of the first mesh and one for the second.
    stages = OPTIMIZERS[name].collectives
    assert answers[0]["collectives"] == [3 * (stages + 1), 3 * stages, 3 * stages, 3 * stages, 3 * stages + 1]


def step_with_missing_parts() -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """One step with sums over ranks to which the second rank adds nothing for one layer; a third has no gradient."""
    mesh = make_mesh(None)
    parameters = {
        name: torch.nn.Parameter(distribute_tensor(torch.ones(4, 3) * (index + 1), mesh, [Replicate()]))
        for index, name in enumerate(("missing", "whole", "unused"))
    }
    optimizer = LAMB(parameters.items(), lr=0.1)
    for name in ("whole",) if dist.get_rank() == 1 else ("missing", "whole"):
        parameters[name].grad = DTensor.from_local(torch.ones(4, 3), mesh, [Partial()])
    optimizer.step()
    return {name: p.to_local().detach().clone() for name, p in parameters.items()}, optimizer.trust_ratios()


@pytest.mark.parametrize("world_size", [2])
def test_ranks_without_a_part_of_a_gradient_add_zeros(pool: WorkerPool, world_size: int) -> None:
    (one, ratios), (other, other_ratios) = pool.run(step_with_missing_parts)
    assert ratios == other_ratios
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(one["unused"], torch.full((4, 3), 3.0))
    assert not torch.equal(one["missing"], torch.ones(4, 3))


def step_with_fused_rows(name: str, dimension: int, segments: int | None, fused: bool) -> dict[str, Any]:
    """Three steps of a fused matrix of which each rank has a part of each of three, or all of it."""
    mesh = make_mesh(None)
    weight = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    cut = _StridedShard(dimension, split_factor=3)

    def place(value: torch.Tensor) -> torch.Tensor:
        if not fused:
            return value
        parts, _ = cut._split_tensor(value, dist.get_world_size(), with_padding=False, contiguous=True)
        return DTensor.from_local(parts[dist.get_rank()], mesh, [cut], shape=value.shape, stride=value.stride())

    parameter = torch.nn.Parameter(place(weight))
    group = {"params": [("qkv", parameter)], "segments": segments}
    optimizer: Any = create_optimizer(name, [group], lr=0.1)
    for step in range(3):
        parameter.grad = place(torch.randn(12, 6, generator=torch.Generator().manual_seed(step + 1)))
        optimizer.step()
    return {"weights": local_part(parameter.detach()).clone(), "ratios": optimizer.trust_ratios()}


@pytest.mark.parametrize("world_size", [2])
def test_fused_matrices_cut_apart(pool: WorkerPool, world_size: int) -> None:
    for name in ("lamb", "lars", "novograd"):
        for segments in (None, 3):
            wanted = pool.run(step_with_fused_rows, name, 0, segments, False)[0]
            pieces = wanted["weights"].chunk(3)
            for rank, found in enumerate(pool.run(step_with_fused_rows, name, 0, segments, True)):
                part = torch.cat([piece.chunk(world_size)[rank] for piece in pieces])
                torch.testing.assert_close(found["weights"], part, rtol=1e-6, atol=1e-7)
                assert found["ratios"] == pytest.approx(wanted["ratios"], rel=1e-6)
    with pytest.raises(CaseFailed, match="several pieces along dimension 1: supported along dimension 0 only"):
        pool.run(step_with_fused_rows, "lamb", 1, None, True)


# Refusals -----------------------------------------------------------------------------------------------------------


class Strange(torch.Tensor):
    """A subclass that nobody knows."""


def step_that_is_refused(name: str) -> None:
    """Take one step, or two, in a set-up that is deliberately broken."""
    if name in ("stale", "cowclip", "sharded later"):
        step_with_a_broken_model(name)
        return
    mesh = make_mesh(None)
    placement = Partial() if name == "partial" else Shard(0)
    weight = DTensor.from_local(torch.ones(3, 2), mesh, [placement])
    group = {"params": [("weight", torch.nn.Parameter(weight))], "segments": 4 if name == "segments" else None}
    optimizer = LAMB([group])
    parameters = optimizer.param_groups[0]["params"]
    if name == "statistics":
        optimizer.collect_group_norms()
    elif name == "uneven":
        # Ranks that hold more than the layer has: the proof counts.
        short = DTensor.from_local(torch.ones(3 + dist.get_rank(), 2), mesh, [Shard(0)], shape=(6, 2), stride=(2, 1))
        parameters[:] = [torch.nn.Parameter(short)]
    elif name == "mesh":
        own_order = DeviceMesh("cpu", [0, 1] if dist.get_rank() == 0 else [1, 0])  # both have the first rows
        parameters[:] = [torch.nn.Parameter(DTensor.from_local(torch.ones(3, 2), own_order, [Shard(0)]))]
    elif name == "placements":
        local = torch.ones((3, 2) if dist.get_rank() == 0 else (6, 1))
        weight = DTensor.from_local(local, mesh, [Shard(dist.get_rank())], shape=(6, 2), stride=(2, 1))
        parameters[:] = [torch.nn.Parameter(weight)]
    elif name == "subclass":
        optimizer.add_param_group({"params": [("strange", torch.nn.Parameter(torch.ones(3).as_subclass(Strange)))]})
    elif name == "two wrappers":
        options = {"use_orig_params": True, "device_id": torch.device("cpu")}
        other = FullyShardedDataParallel(torch.nn.Linear(4, 3), **options)
        optimizer.add_param_group({"params": list(other.named_parameters())})
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    if name == "plain gradient":
        parameters[0].grad = torch.ones(6, 2)
    optimizer.step()
    parameter = parameters[0]
    if name == "local state":
        state = optimizer.state[parameter]
        state["exp_avg"] = state["exp_avg"].to_local()
    elif name == "resharded":
        other = parameter.detach().redistribute(placements=[Replicate()])
        parameter._local_tensor, parameter._spec = other._local_tensor, other._spec
        parameter.grad = other.clone()
    elif name == "replaced":
        parameters[:] = [torch.nn.Parameter(parameter.detach().redistribute(placements=[Replicate()]))]
        parameters[0].grad = parameters[0].detach().clone()
    optimizer.step()


def step_with_a_broken_model(name: str) -> None:
    if name == "stale":
        with running(make_case("lamb"), Setup(wrap="stale")) as run:
            run.train(0, 1)
    elif name == "cowclip":
        layers = (LayerSpec("wide", (6, 4)), LayerSpec("bias", (5,), group=1))
        case = make_case("cowclip", layers, options={"cowclip": True})
        with running(case, Setup(options={"shard_placement_fn": second_dimension})) as run:
            run.optimizer.param_groups[1]["cowclip"] = False
            run.train(0, 1)
    else:
        case = make_case("lamb")
        model = Model(case)
        model.load(initial_weights(case))
        optimizer = make_optimizer(case, model)
        for step in range(2):
            model(mean_gradients(case)[step]).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 0:
                fully_shard(model, mesh=make_mesh(None))


STALE = r"the model has other parameters.*Make the optimizer from model.parameters\(\) after what replaced them"


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("statistics", "LAMB needs the gradient of every single micro-batch"),
        ("cowclip", "CowClip clips rows of embeddings, of which each must be whole"),
        ("mesh", "ranks disagree about the mesh or the placements of a parameter"),
        ("placements", "ranks disagree about the mesh or the placements of a parameter"),
        ("resharded", "is not cut like the parameter"),
        ("replaced", "parameter weight was replaced after the first step"),
        ("sharded later", STALE),
        ("segments", "layer weight of shape \\(6, 2\\) does not divide into 4 segments"),
        ("subclass", "a Strange of shape \\(3,\\) \\(a tensor subclass\\)"),
        ("two wrappers", "one kind of wrapper per optimizer"),
        ("partial", r"parameter weight has placements \(Partial"),
        ("stale", STALE),
        ("plain gradient", "parameter weight is a DTensor and its gradient a Tensor"),
        ("local state", "the state exp_avg of weight is not cut like the parameter"),
        ("uneven", r"weight \(6, 2\): 14 of 12 elements"),
    ],
)
def test_what_cannot_be_exact_is_refused(pool: WorkerPool, name: str, message: str, world_size: int) -> None:
    with pytest.raises(CaseFailed, match=message) as failure:
        pool.run(step_that_is_refused, name)
    assert len(re.findall("(LayoutError|ValueError): ", str(failure.value))) >= world_size


# Parameters that were replaced ---------------------------------------------------------------------------------------


def train_after_a_replacement(what: str) -> None:
    """Five steps of blocks of which a wrapper, or a load, replaces some parameters and not the optimizer's."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3), torch.nn.LayerNorm(3))
    if what in ("assigned", "assigned later"):
        fully_shard(model)
    optimizer = LAMB(model.named_parameters(), lr=0.1)
    if what == "blocks":
        fully_shard(model[0])
        fully_shard(model[1])
    elif what == "every block":
        for part in model:
            fully_shard(part)
    elif what == "flat blocks":
        model[0] = FullyShardedDataParallel(model[0], device_id=torch.device("cpu"))
    for step in range(5):
        if (what, step) in (("assigned", 0), ("assigned later", 3)):
            model.load_state_dict({name: p.clone() for name, p in model.state_dict().items()}, assign=True)
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("blocks", r"has other parameters.*: 0\.weight of shape \(6, 4\) \(now FSDPLinear\.weight\)"),
        ("every block", STALE),
        ("assigned", STALE),
        ("assigned later", STALE),
        ("flat blocks", "use_orig_params=True"),
    ],
)
def test_parameters_that_train_nothing_are_noticed(pool: WorkerPool, what: str, message: str, world_size: int) -> None:
    with pytest.raises(CaseFailed, match=message) as failure:
        pool.run(train_after_a_replacement, what)
    assert str(failure.value).count("LayoutError: ") == world_size


def train_with_an_unused_layer() -> None:
    """A sharded twin with gradients that nobody trains takes nothing's place."""
    model, twin = (torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)) for _ in range(2))
    fully_shard(model)
    fully_shard(twin)
    twin(torch.ones(2, 4)).sum().backward()
    optimizer = LAMB(model.named_parameters(), lr=0.1)
    model[1].requires_grad_(False)
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
        model[0].weight.grad = None
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("world_size", [2])
def test_a_twin_with_gradients_is_no_replacement(pool: WorkerPool, world_size: int) -> None:
    pool.run(train_with_an_unused_layer)
