"""State in bf16 and bf16 weights under each master have the same bits under any sharding as in one process.

Sums over a layer are fp64 numbers that are added in another order under another sharding, and so may differ in their
last bit. A step is made of them rounded to fp32; that they are the same then is not certain but very likely, about one
in 2^28 differs, and they are so here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from trustratio.optimizers import OPTIMIZERS

from .cases import Case, LayerSpec
from .pool import CaseFailed, WorkerPool
from .sixteen_bits import (
    MISTAKES,
    QUARTERS,
    WAYS,
    Bits,
    assert_same_bits,
    differing,
    make_case,
    one_process,
    optimizers,
    train,
    train_all,
    whole,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*group.* of samples per step.*", "ignore:.*sample of the curvature.*", "ignore:.*did not move in this step"
)

STATE = {"state_dtype": "bfloat16"}
BF16_PARAMETERS = ("ddp", "fsdp1", "fsdp2", "fsdp2 columns")
"""Ways in which nobody keeps fp32 weights."""
MASTERS = ("stochastic", "kahan")


def in_bf16(name: str, way: str | int, master: str | None, *layers: Any, **options: Any) -> Case:
    """A case with bf16 parameters."""
    options = {"master": master, **options}
    return make_case(name, way, *layers, options=options, others=options.pop("others", {}), parameters="bf16")


def wanted(pool: WorkerPool, case: Case) -> Bits:
    """What one process has.

    Of three ranks' squares the mean is rounded in fp32, and otherwise in one process that sees thirds of the gradients:
    there it is what ranks have of which each holds all.
    """
    of_squares = OPTIMIZERS[case.optimizer].group_statistics == "squares"
    if not (of_squares and pool.world_size == 3):
        return one_process(case, pool.world_size)
    return whole(pool.run(train, replace(case, stage="ddp" if case.accumulation == 1 else 0, zero={}, config={})))


def assert_same(pool: WorkerPool, cases: list[Case], **setup: Any) -> None:
    for case, *answers in zip(cases, *pool.run(train_all, cases, **setup), strict=True):
        try:
            assert_same_bits(whole(answers), wanted(pool, case))
        except AssertionError as error:
            raise AssertionError(f"{case.optimizer} {case.constructor}, {case.groups}: {error}") from error


@pytest.mark.parametrize("quarter", QUARTERS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_state(pool: WorkerPool, way: str | int, quarter: int, world_size: int) -> None:
    assert_same(pool, [make_case(name, way, options=STATE) for name in optimizers(quarter, way)])


@pytest.mark.parametrize(
    ("master", "state"),
    [
        (None, "bfloat16"),
        ("stochastic", None),
        ("stochastic", "bfloat16"),
        ("kahan", None),
        ("kahan", "bfloat16"),
    ],
)
@pytest.mark.parametrize("quarter", QUARTERS)
@pytest.mark.parametrize("way", BF16_PARAMETERS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_weights(
    pool: WorkerPool, way: str, quarter: int, master: str | None, state: str | None, world_size: int
) -> None:
    assert_same(pool, [in_bf16(name, way, master, state_dtype=state) for name in optimizers(quarter, way)])


# Variants of the way -----------------------------------------------------------------------------------------------

OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
ZERO_OPTIONS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "round robin": ((1, 2), {"round_robin_gradients": True, "parameter_alignment": True}),
    "offload": ((1, 2, 3), OFFLOAD),
    "sub-groups": ((3,), {"sub_group_size": 100}),
    "sub-groups and offload": ((3,), {"sub_group_size": 100, **OFFLOAD}),
    "persistent parameters": ((3,), {"stage3_param_persistence_threshold": 20}),
}
NAMES = ("lamb", "lars", "lans", "vrlamb")
"""One, two and three numbers per element."""


@pytest.mark.parametrize(
    ("way", "zero"),
    [pytest.param(way, zero, id=f"{name}-{way}") for name, (ways, zero) in ZERO_OPTIONS.items() for way in ways],
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_options_of_zero(pool: WorkerPool, way: int, zero: dict[str, Any], world_size: int) -> None:
    config = {"zero_force_ds_cpu_optimizer": False}
    assert_same(pool, [make_case(name, way, options=STATE, zero=zero, config=config) for name in NAMES])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_groups_of_which_one_has_state_in_16_bits(pool: WorkerPool, way: str | int, world_size: int) -> None:
    others = {"state_dtype": None, "rounding_seed": 3}
    assert_same(pool, [make_case(name, way, options=STATE, others=others) for name in ("lamb", "lars")])
    assert_same(pool, [make_case("lamb", way, others={**STATE, "rounding_seed": 2**64 + 3})])


@pytest.mark.parametrize("way", BF16_PARAMETERS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_groups_of_other_masters(pool: WorkerPool, way: str, world_size: int) -> None:
    pairs = (("kahan", "stochastic"), ("stochastic", None), (None, "kahan"))
    assert_same(pool, [in_bf16("lamb", way, one, others={"master": other, **STATE}) for one, other in pairs])


@pytest.mark.parametrize(
    ("way", "world_size"),
    # DDP divides what it has accumulated at each micro-batch anew, which is not exact for three ranks.
    [(way, size) for way in WAYS if way != "megatron" for size in (2, 3) if (way, size) != ("ddp", 3)],
)
def test_accumulation(pool: WorkerPool, way: str | int, world_size: int) -> None:
    names = [name for name in NAMES if name in {name for quarter in QUARTERS for name in optimizers(quarter, way)}]
    assert_same(pool, [make_case(name, way, options=STATE, accumulation=2) for name in names])


SEGMENTED = (LayerSpec("qkv", (9, 7)), LayerSpec("experts", (4, 5, 4)), LayerSpec("bias", (6,), group=1))


@pytest.mark.parametrize("way", ["ddp", 1, 2, 3, "fsdp1", "fsdp2"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_segments(pool: WorkerPool, way: str | int, world_size: int) -> None:
    options, others = {**STATE, "segments": {"qkv": 3, "experts": 4}}, {"segments": {"bias": 2}}
    assert_same(pool, [make_case(name, way, SEGMENTED, options=options, others=others) for name in ("lamb", "lars")])
    if way in BF16_PARAMETERS:
        options["others"] = others
        assert_same(pool, [in_bf16("lamb", way, master, SEGMENTED, **options) for master in MASTERS])


TINY = (LayerSpec("a", (1, 2)), LayerSpec("b", (3,), group=1))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "fsdp2 columns"])
@pytest.mark.parametrize("world_size", [3])
def test_ranks_that_hold_nothing(pool: WorkerPool, way: str | int, world_size: int) -> None:
    assert_same(pool, [make_case("lamb", way, TINY, options=STATE)])
    if way in BF16_PARAMETERS:
        assert_same(pool, [in_bf16("lamb", way, master, TINY, **STATE) for master in MASTERS])


@pytest.mark.parametrize("way", ["ddp", 0, 1, 2, "fsdp2"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_layers_without_gradient_in_some_steps(pool: WorkerPool, way: str | int, world_size: int) -> None:
    """Their steps are not counted, so that later chances are of other steps than the other layers'."""
    skipped = {0: ("dense", "norm"), 2: ("embedding",), 3: ("dense", "bias", "norm", "scale"), 7: ("wide", "conv")}
    assert_same(pool, [make_case(name, way, options=STATE, skipped=skipped) for name in ("lamb", "lars")])
    if way in BF16_PARAMETERS:
        cases = [in_bf16("lamb", way, master, **STATE) for master in MASTERS]
        assert_same(pool, [replace(case, skipped=skipped) for case in cases])


# Wrappers that have weights in 16 bits of their own -----------------------------------------------------------------

ENGINES: dict[str, dict[str, Any]] = {
    "fp32 masters": {"bf16": {"enabled": True}},
    "gradients in fp32": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
}


@pytest.mark.parametrize(
    ("way", "engine"), [*((way, "fp32 masters") for way in (0, 1, 2, 3)), (1, "gradients in fp32")]
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_deepspeeds_bf16_engine(pool: WorkerPool, way: int, engine: str, world_size: int) -> None:
    """Its fp32 weights are those of one process that has fp32 weights; its gradients are of 16 bits."""
    assert_same(pool, [make_case(n, way, options=STATE, dtype="bf16", config=ENGINES[engine]) for n in NAMES[:3]])


@pytest.mark.parametrize("master", [None, "stochastic", "kahan"])
@pytest.mark.parametrize("way", [1, 2, 3])
@pytest.mark.parametrize("world_size", [2, 3])
def test_deepspeed_without_fp32_weights(pool: WorkerPool, way: int, master: str | None, world_size: int) -> None:
    """ZeRO whose flat partitions are bf16: against one process with bf16 parameters."""
    engine = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    options = {**STATE, "master": master}
    cases = [make_case(name, way, options=options, dtype="bf16", config={"bf16": engine}) for name in NAMES[:3]]
    for case, *answers in zip(cases, *pool.run(train_all, cases), strict=True):
        assert_same_bits(whole(answers), one_process(replace(case, parameters="bf16"), world_size))


# The harness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("way", [1, 3, "fsdp2"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_harness_catches(pool: WorkerPool, way: str | int, mistake: str, world_size: int) -> None:
    case = make_case("lamb", way, options=STATE, constructor={"implementation": "eager"})
    (answers,) = zip(*pool.run(train_all, [case], mistake), strict=True)
    assert differing(whole(answers), one_process(case, world_size)) > 0.2
    with pytest.raises(AssertionError, match=r"elements of .* have other bits"):
        assert_same_bits(whole(answers), one_process(case, world_size))


@pytest.mark.parametrize("world_size", [2])
def test_ranks_of_which_each_has_a_generator_are_refused(pool: WorkerPool, world_size: int) -> None:
    """Where they hold the same layers: their ratios differ."""
    case = make_case("lamb", "ddp", options=STATE, constructor={"implementation": "eager"})
    with pytest.raises(CaseFailed, match="have taken different steps"):
        pool.run(train_all, [case], "a generator of the rank")


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("way", ["fsdp2"])
@pytest.mark.parametrize("world_size", [2])
def test_the_harness_catches_of_weights(pool: WorkerPool, way: str, mistake: str, world_size: int) -> None:
    case = replace(in_bf16("lamb", way, "stochastic"), constructor={"implementation": "eager"})
    (answers,) = zip(*pool.run(train_all, [case], mistake), strict=True)
    assert differing(whole(answers), one_process(case, world_size)) > 0.1


# Who computes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ddp", 1, 3, "fsdp1", "fsdp2"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_compiled_code_rounds_as_tensor_operations_do(pool: WorkerPool, way: str | int, world_size: int) -> None:
    """It multiplies and adds at once, so that fp32 numbers differ in their last bit; then chance has the same number
    to decide about but for one in 2^16. The same bits under every sharding are those of one implementation.
    """
    cases = [make_case(name, way, options=STATE) for name in NAMES[:3]]
    if way in BF16_PARAMETERS:
        cases += [in_bf16("lamb", way, master, **STATE) for master in MASTERS]
    for case, *answers in zip(cases, *pool.run(train_all, cases), strict=True):
        eager = one_process(replace(case, constructor={"implementation": "eager"}), world_size)
        assert differing(whole(answers), eager, of_bits=16) < 0.01
        assert differing(whole(answers), eager, of_bits=32, tolerance=16) < 0.03


@pytest.mark.parametrize("way", [1, "fsdp2"])
@pytest.mark.parametrize("world_size", [2])
def test_compiled_code_takes_positions_in_the_layer(pool: WorkerPool, way: str | int, world_size: int) -> None:
    """What it is compared with above catches positions in the shard."""
    case = make_case("lamb", way, options=STATE)
    (answers,) = zip(*pool.run(train_all, [case]), strict=True)
    eager = replace(case, constructor={"implementation": "eager"})
    (naive,) = zip(*pool.run(train_all, [eager], "a position in the shard"), strict=True)
    assert differing(whole(answers), whole(naive), of_bits=16) > 0.05
