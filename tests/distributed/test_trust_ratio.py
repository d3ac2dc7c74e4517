"""TrustRatio around other optimizers equals one process, under every wrapper and in float64."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import deepspeed
import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from trustratio.optimizers import LayoutError, TrustRatio

from ..base_optimizers import BASES
from ..unit import test_proposals, test_proposals_groups
from . import fsdp_runs, megatron_distributed_runs, test_dtensor_parallel, test_fsdp1, test_megatron
from .cases import Case, initial_weights, run_case
from .exactness import MODEL, assert_exact, two_groups, worst_error
from .fsdp_runs import Setup
from .pool import WorkerPool
from .test_exactness import OFFLOAD, OWN_OPTIMIZER

STAGES: tuple[str | int, ...] = ("ddp", 0, 1, 2, 3)


def make_case(name: str, stage: str | int, **changes: Any) -> Case:
    return Case(name, MODEL, stage, two_groups(name, **changes.pop("options", {})), **changes)


def run_exact(pool: WorkerPool, case: Case) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = pool.run(run_case, case)
    assert_exact(case, answers)
    return answers


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", BASES)
def test_weights_and_ratios_equal_one_process(pool: WorkerPool, name: str, stage: str | int, world_size: int) -> None:
    answers = run_exact(pool, make_case(name, stage))
    calls = 2 if stage in (1, 2, 3) else 1
    for answer in answers:
        # The first step also proves the layout, and sees that somebody has a gradient.
        expected = 1 if stage in (1, 2, 3) and world_size > 1 else 0
        assert set(answer["all_reduces"][calls:]) == {expected}
        assert answer["collectives"] == answer["all_reduces"]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_harness_catches_ratios_of_local_parts(pool: WorkerPool, stage: int, world_size: int) -> None:
    unsharded, sharded = make_case("naive trust ratio", "ddp"), make_case("naive trust ratio", stage)
    weights = pool.run(run_case, unsharded)[0]["weights"]
    assert worst_error(unsharded, weights)[0] < 1e-5
    error, _ = worst_error(sharded, pool.run(run_case, sharded)[0]["weights"])
    assert not error < 0.05


# Other set-ups ------------------------------------------------------------------------------------------------------

ZERO: dict[str, tuple[int, dict[str, Any]]] = {
    "round robin": (2, {"zero": {"round_robin_gradients": True}}),
    "sub-groups": (3, {"zero": {"sub_group_size": 100}}),
    "offload": (3, {"zero": OFFLOAD, "config": OWN_OPTIMIZER}),
    "zero.Init": (3, {"zero_init": True}),
    "padding": (2, {"poison": True}),
    "accumulation": (1, {"accumulation": 3}),
    "nameless": (1, {"named": False}),
}


@pytest.mark.parametrize("name", ["trust_ratio:adamw", "trust_ratio:sgd", "trust_ratio:sophia"])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("setup", ZERO)
def test_options_of_zero(pool: WorkerPool, name: str, setup: str, world_size: int) -> None:
    stage, changes = ZERO[setup]
    answers = pool.run(run_case, make_case(name, stage, **changes))
    if setup == "nameless":
        assert "leaves.conv.weight" in answers[0]["ratios"][0]
    else:
        assert_exact(make_case(name, stage, **changes), answers)
    assert all(answer["padding_is_nan"] for answer in answers) or setup != "padding"


@pytest.mark.parametrize("name", ["trust_ratio:adamw", "trust_ratio:lion", "trust_ratio:adagrad"])
@pytest.mark.parametrize(
    ("stage", "config"), [(0, {}), (1, {}), (2, {}), (3, {}), (1, {"data_types": {"grad_accum_dtype": "fp32"}})]
)
@pytest.mark.parametrize("world_size", [2])
def test_fp32_masters_of_16_bit_weights(
    pool: WorkerPool, name: str, stage: int, config: dict[str, Any], world_size: int
) -> None:
    """Some wrappers step once with zeros, which is no step of the base's."""
    run_exact(pool, make_case(name, stage, dtype="bf16", spread=0.0, config={"bf16": {"enabled": True}, **config}))


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_overflow_skips_the_step(pool: WorkerPool, stage: int, world_size: int) -> None:
    config = {"fp16": {"enabled": True, "loss_scale": 16}}
    run_exact(pool, make_case("trust_ratio:adamw", stage, dtype="fp16", spread=0.0, overflow=(1,), config=config))


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", STAGES)
def test_weights_without_gradient_are_untouched(pool: WorkerPool, stage: str | int, world_size: int) -> None:
    case = make_case("trust_ratio:adamw", stage, skipped=dict.fromkeys(range(5), ("dense", "norm")))
    answers = run_exact(pool, case)
    assert torch.equal(answers[0]["weights"]["dense"], initial_weights(case)["dense"])


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_checkpoint_continues_bit_for_bit(
    pool: WorkerPool, name: str, stage: int, world_size: int, tmp_path: Any
) -> None:
    straight = make_case(name, stage, steps=6)
    resumed = replace(straight, save_after=3, folder=str(tmp_path))
    one, other = pool.run(run_case, straight), pool.run(run_case, resumed)
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(weights, b["weights"][layer]) for layer, weights in a["weights"].items())
        assert a["ratios"][3:] == b["ratios"]
        assert a["groups"] == b["groups"]


FSDP = {
    "fsdp": Setup(),
    "units": Setup(units=True),
    "swapped parameters": Setup(wrap="swap"),
    "accelerate": Setup(wrap="accelerate"),
    "checkpoint": Setup(checkpoint=""),
}


@pytest.mark.parametrize("name", ["trust_ratio:adamw", "trust_ratio:rmsprop", "trust_ratio:lion"])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("setup", FSDP)
def test_fsdp2(pool: WorkerPool, name: str, setup: str, world_size: int, tmp_path: Any) -> None:
    used = replace(FSDP[setup], checkpoint=None if setup != "checkpoint" else str(tmp_path))
    answers = pool.run(fsdp_runs.run_case, case := replace(make_case(name, 1), stage="fsdp"), used)
    if setup == "checkpoint":
        case = replace(case, save_after=3)
    assert_exact(case, answers)
    assert set(answers[0]["all_reduces"][2 if setup == "checkpoint" else 1 :]) == {1}


@pytest.mark.parametrize("world_size", [4])
def test_hybrid_sharding(pool: WorkerPool, world_size: int) -> None:
    fsdp_runs.run_exact(pool, replace(make_case("trust_ratio:adamw", 1), stage="fsdp"), Setup(mesh=(2, 2)))


FSDP1 = {
    "late": test_fsdp1.Setup(),
    "units, early": test_fsdp1.Setup(units=True, early=True),
    "whole": test_fsdp1.Setup(strategy="NO_SHARD"),
    "checkpoint": test_fsdp1.Setup(checkpoint=True),
}


@pytest.mark.parametrize("name", ["trust_ratio:adamw", "trust_ratio:sgd"])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("setup", FSDP1)
def test_fsdp1_with_original_parameters(pool: WorkerPool, name: str, setup: str, world_size: int) -> None:
    case = replace(make_case(name, 1), stage="fsdp1")
    answers = pool.run(test_fsdp1.run_case, case, FSDP1[setup])
    assert_exact(replace(case, save_after=3) if setup == "checkpoint" else case, answers)
    assert answers[0]["collectives"][1:] == [setup != "whole"] * (len(answers[0]["collectives"]) - 1)


@pytest.mark.parametrize("name", ["trust_ratio:adamw", "trust_ratio:rmsprop"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_megatrons_distributed_optimizer(pool: WorkerPool, name: str, world_size: int) -> None:
    case = make_case(name, "ddp")
    answers = pool.run(megatron_distributed_runs.train, case)
    assert_exact(case, answers)
    assert answers[0]["all_reduces"][1:] == [1] * 4


@pytest.mark.parametrize("world_size", [2])
def test_megatrons_tensor_parallelism(pool: WorkerPool, world_size: int) -> None:
    case = Case("trust_ratio:adamw", megatron_distributed_runs.CUT_MODEL, "ddp", two_groups("trust_ratio:adamw"))
    assert_exact(case, pool.run(megatron_distributed_runs.train, case, 2))


@pytest.mark.parametrize("name", ["trust_ratio:adamw", "trust_ratio:lion"])
@pytest.mark.parametrize(("world_size", "mesh"), [(2, (2,)), (3, (3,)), (4, (2, 2))])
def test_dtensors_of_tensor_parallelism(pool: WorkerPool, name: str, mesh: tuple[int, ...], world_size: int) -> None:
    """Gradients of norms are sums over ranks, which the base gets complete."""
    wanted = pool.run(test_dtensor_parallel.train, name, None)[0]
    found = pool.run(test_dtensor_parallel.train, name, mesh)
    test_dtensor_parallel.assert_same(found, wanted)
    # One per dimension that cuts a layer; one more adds up the norms' gradients, and the base sends nothing.
    assert set(found[0]["collectives"][1:]) == {min(2, len(mesh)) + (len(mesh) == 1)}


def train_under_zero_redundancy(base: str, wrapped: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6, bias=False), torch.nn.Tanh(), torch.nn.Linear(6, 3, bias=False))
    parallel = DistributedDataParallel(model)
    make = partial(TrustRatio, getattr(torch.optim, base))
    optimizer: Any = make(parallel.parameters(), lr=0.1)
    if wrapped:
        optimizer = ZeroRedundancyOptimizer(parallel.parameters(), optimizer_class=make, lr=0.1)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
    for _ in range(3):
        parallel(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("base", ["AdamW", "Muon"])
@pytest.mark.parametrize("world_size", [2])
def test_zero_redundancy_optimizer(pool: WorkerPool, base: str, world_size: int) -> None:
    """Layers are whole, so that a base that needs whole ones is exact, too."""
    wanted = pool.run(train_under_zero_redundancy, base, False)
    for found, expected in zip(pool.run(train_under_zero_redundancy, base, True), wanted, strict=True):
        assert all(torch.equal(found[layer], weights) for layer, weights in expected.items())


# Refusals -----------------------------------------------------------------------------------------------------------


def step_with(base_name: str, wrapper: str, keys: dict[str, Any] | None = None, tells_loss: bool = False) -> str:
    """Take a step under a wrapper, and return what was raised; with these keys in the first of two groups, if any."""
    homes = torch.optim, test_proposals, test_proposals_groups
    base: Any = next(getattr(home, base_name) for home in homes if hasattr(home, base_name))
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(4, 6, bias=False), torch.nn.Linear(6, 3, bias=False))
    if wrapper == "fsdp":
        fully_shard(model)
    first, second = model.named_parameters()
    groups = [first, second] if keys is None else [{"params": [first], **keys}, {"params": [second]}]
    optimizer: Any = TrustRatio(base, groups, lr=0.01)
    stepping, trained, engine = optimizer, model, None
    if wrapper == "ddp":
        trained = DistributedDataParallel(model)
    elif wrapper == "zero redundancy":
        trained = DistributedDataParallel(model)
        stepping = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=partial(TrustRatio, base), lr=0.01)
    elif wrapper.isdigit():
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": int(wrapper)}}
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        trained = engine
    try:
        loss = trained(torch.randn(2, 4, generator=torch.Generator().manual_seed(1))).square().sum()
        if engine is None:
            loss.backward()
            stepping.step(*([lambda: loss.item()] if tells_loss else []))
        else:
            engine.backward(loss)
            engine.step()
    except LayoutError as error:
        return str(error)
    finally:
        if engine is not None:
            engine.destroy()
    return ""


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize(
    ("base", "why"),
    [
        (
            "Muon",
            r"Muon fails when it is tried on flat pieces of layers \(in the trial: ValueError: Muon only supports 2D",
        ),
        ("Adafactor", "Adafactor makes other steps of flat pieces of a layer"),
        ("ClipsTheModel", "ClipsTheModel makes other steps of flat pieces"),
        ("WarmsUp", "WarmsUp makes other steps"),
        ("Noisy", "Noisy draws random numbers"),
    ],
)
@pytest.mark.parametrize("wrapper", ["1", "2", "3", "fsdp"])
def test_what_is_not_element_wise_is_refused_on_cut_layers(
    pool: WorkerPool, base: str, why: str, wrapper: str, world_size: int
) -> None:
    for raised in pool.run(step_with, base, wrapper):
        assert re.match(why, raised), raised
        assert "Keep layers whole (DistributedDataParallel), or take a base" in raised


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("wrapper", ["ddp", "1", "3", "fsdp"])
def test_a_count_outside_of_state_and_groups_is_refused(pool: WorkerPool, wrapper: str, world_size: int) -> None:
    for raised in pool.run(step_with, "ForgetsItsCount", wrapper):
        assert re.match("steps of ForgetsItsCount depend on what is neither in its state nor in its groups", raised)


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("base", ["Muon", "Adafactor", "ClipsTheModel", "AdamW"])
def test_it_is_accepted_on_whole_layers(pool: WorkerPool, base: str, world_size: int) -> None:
    assert pool.run(step_with, base, "ddp") == ["", ""]
    assert pool.run(step_with, base, "0") == ["", ""]


@pytest.mark.parametrize("world_size", [2])
def test_what_needs_all_layers_is_refused_where_ranks_step_some(pool: WorkerPool, world_size: int) -> None:
    for raised in pool.run(step_with, "ClipsTheModel", "zero redundancy"):
        assert re.match("a layer's step of ClipsTheModel depends on other layers, of which .* use Distributed", raised)


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("wrapper", ["1", "3", "fsdp"])
def test_a_group_key_of_the_base_alone_is_looked_at(pool: WorkerPool, wrapper: str, world_size: int) -> None:
    assert pool.run(step_with, "ReadsKeys", wrapper, {"normalized": False}) == ["", ""]
    for raised in pool.run(step_with, "ReadsKeys", wrapper, {"normalized": True}):
        assert raised.startswith("ReadsKeys makes other steps of flat pieces of a layer")


@pytest.mark.parametrize("world_size", [2])
def test_a_base_that_counts_its_groups_is_refused_where_they_come_one_by_one(pool: WorkerPool, world_size: int) -> None:
    for wrapper in ("1", "2", "3"):
        assert pool.run(step_with, "CountsGroups", wrapper) == ["", ""]
        for raised in pool.run(step_with, "CountsGroups", wrapper, {"lr": 0.02}):
            assert raised.startswith("CountsGroups takes other steps if groups are stepped one at a time, as DeepSpeed")
    for wrapper in ("ddp", "fsdp"):
        assert pool.run(step_with, "CountsGroups", wrapper, {"lr": 0.02}) == ["", ""]


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_a_base_that_reads_the_loss_is_refused_where_ranks_have_their_own(
    pool: WorkerPool, wrapper: str, world_size: int
) -> None:
    assert pool.run(step_with, "IgnoresLoss", wrapper, tells_loss=True) == ["", ""]
    assert pool.run(step_with, "ReadsLoss", wrapper) == ["", ""]
    for raised in pool.run(step_with, "NeedsItsLoss", wrapper, tells_loss=True):
        assert raised.startswith("steps of NeedsItsLoss depend on the loss")
    for raised in pool.run(step_with, "ReadsLoss", wrapper, tells_loss=True):
        assert raised.startswith(
            "steps of ReadsLoss depend on the loss, and each rank's closure returns one of its own"
        )


@pytest.mark.parametrize("world_size", [1])
def test_one_flat_tensor_of_several_layers_is_cut_too(pool: WorkerPool, world_size: int) -> None:
    (raised,) = pool.run(step_with, "Adafactor", "1")
    assert "which cuts layers or steps several as one" in raised


def step_a_part_of_a_layer(base_name: str) -> str:
    with test_megatron.megatron(2):
        part: Any = torch.nn.Parameter(torch.ones(3, 4))
        part.tensor_model_parallel, part.partition_dim, part.partition_stride = True, 0, 1
        part.grad = torch.ones(3, 4)
        try:
            TrustRatio(getattr(torch.optim, base_name), [("part", part)], lr=0.1).step()
        except LayoutError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("world_size", [2])
def test_parts_of_tensor_parallel_layers_are_cut_too(pool: WorkerPool, world_size: int) -> None:
    assert pool.run(step_a_part_of_a_layer, "AdamW") == ["", ""]
    for raised in pool.run(step_a_part_of_a_layer, "Adafactor"):
        assert raised.startswith("Adafactor makes other steps of flat pieces of a layer")


@torch.library.custom_op("trustratio_tests::subtract", mutates_args=("p",))
def subtract(p: torch.Tensor, g: torch.Tensor, lr: float) -> None:
    p.sub_(lr * g)


class OnlyPlain(torch.optim.SGD):
    """Has operators of its own, which know nothing of DTensors."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.change(p, float(group["lr"]))

    def change(self, p: Any, lr: float) -> None:
        subtract(p, p.grad, lr)


class MixesTensors(OnlyPlain):
    def change(self, p: Any, lr: float) -> None:
        p.sub_(lr * p.grad * torch.ones(p.shape))


class HasADemand(OnlyPlain):
    def change(self, p: Any, lr: float) -> None:
        if p.shape[0] == 6:
            raise ValueError("not six rows")
        p.sub_(lr * p.grad)


def cause_of_failure(base: type[torch.optim.Optimizer], kind: type[Exception]) -> tuple[str, str]:
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(4, 6, bias=False))
    fully_shard(model)
    optimizer = TrustRatio(base, model.named_parameters(), lr=0.01)
    model(torch.ones(2, 4)).square().sum().backward()
    with pytest.raises(kind) as raised:
        optimizer.step()
    return str(raised.value), type(raised.value.__cause__).__name__


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize(
    ("base", "kind", "message"),
    [
        (OnlyPlain, LayoutError, "OnlyPlain cannot step DTensors, which FSDP2 .* .NotImplementedError: Operator"),
        (MixesTensors, LayoutError, "MixesTensors cannot step DTensors, which FSDP2 .* take DeepSpeed ZeRO or"),
        (HasADemand, ValueError, "not six rows"),
    ],
)
def test_a_base_that_knows_nothing_of_dtensors_is_named(
    pool: WorkerPool, base: Any, kind: type[Exception], message: str, world_size: int
) -> None:
    causes = {OnlyPlain: "NotImplementedError", MixesTensors: "RuntimeError", HasADemand: "NoneType"}
    for raised, cause in pool.run(cause_of_failure, base, kind):
        assert re.search(message, raised), raised
        assert cause == causes[base]
