"""FSDP2 and HSDP against the float64 reference: every optimizer, training options, and torch's own checkpoints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from trustratio.optimizers import OPTIMIZERS

from .cases import LayerSpec, initial_weights
from .exactness import MODEL, assert_exact
from .fsdp_runs import EXACT, MESHES, Setup, make_case, run_case, run_exact, running, second_dimension
from .pool import WorkerPool


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(("world_size", "mesh"), [(2, "fsdp"), (3, "fsdp"), (4, "hsdp")])
def test_weights_and_ratios_equal_one_process(pool: WorkerPool, name: str, world_size: int, mesh: str) -> None:
    case = make_case(name)
    answers = run_exact(pool, case, Setup(MESHES[mesh]))
    for answer in answers:
        # The first step also proves the layout, and compares what ranks of each dimension of the mesh have done.
        each = OPTIMIZERS[name].collectives
        assert answer["collectives"] == [
            each + (3 if mesh == "fsdp" else 5) * (step == 0) for step in range(case.steps)
        ]
        assert set(answer["step_counts"].values()) == {case.steps}
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
    assert clips_itself[0]["collectives"] == [5 if mesh == "fsdp" else 7, 2, 2, 2, 2]


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


@pytest.mark.parametrize("name", ["lamb", "lars", "novograd"])
@pytest.mark.parametrize("world_size", [2])
def test_shards_along_another_dimension(pool: WorkerPool, name: str, world_size: int) -> None:
    layers = (LayerSpec("wide", (5, 12)), LayerSpec("conv", (3, 4, 5)), LayerSpec("bias", (9,), group=1))
    run_exact(pool, make_case(name, layers), Setup(options={"shard_placement_fn": second_dimension}))


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


@pytest.mark.parametrize("name", ["lamb", "clars", "vrlamb"])
@pytest.mark.parametrize("world_size", [2])
def test_accelerate(pool: WorkerPool, name: str, world_size: int) -> None:
    run_exact(pool, make_case(name), Setup(wrap="accelerate"))


# Checkpoints --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
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
