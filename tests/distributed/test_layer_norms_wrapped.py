"""Measured norms of real layers under tensor parallelism, beside accumulation, and where another optimizer steps."""

from __future__ import annotations

import warnings
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

from trustratio.integrations.layer_norms import LayerNorms, clip_grad_norm_

from . import test_dtensor_parallel
from .accelerate_runs import unbuilt_cpu_adam
from .pool import WorkerPool
from .recorded import fresh_deepspeed_groups
from .test_megatron import Network, OlderUnit, megatron


def clip_layers(optimizer: Any) -> None:
    clip_grad_norm_(optimizer, 0.3, per_layer=True)


def train_dtensors(mesh: tuple[int, ...] | None, clip: bool) -> list[dict[str, Any]]:
    """The records of AdamW on layers that DTensor cuts, some of whose gradients are sums over ranks."""

    def make(name: str, groups: Any, lr: float) -> Any:
        optimizer: Any = torch.optim.AdamW(groups, lr=lr)
        norms = LayerNorms(optimizer)
        if clip:
            optimizer.register_step_pre_hook(lambda *_: clip_layers(optimizer))
            norms = LayerNorms(optimizer)  # after the clip
        optimizer.trust_ratios = lambda: norms.latest().record()
        return optimizer

    return list(test_dtensor_parallel.train("adamw", mesh, make)["ratios"])


def assert_same(found: list[dict[str, Any]], wanted: list[dict[str, Any]], rel: float) -> None:
    for record, reference in zip(found, wanted, strict=True):
        assert record["layers"].keys() == reference["layers"].keys()
        for name, numbers in reference["layers"].items():
            assert record["layers"][name] == pytest.approx(numbers, rel=rel), name
        assert record["model"] == pytest.approx(reference["model"], rel=rel)


@pytest.mark.parametrize(
    ("world_size", "mesh"), [(2, (2,)), (3, (3,)), (4, (2, 2)), pytest.param(8, (2, 2, 2), id="replicas of shards")]
)
def test_layers_that_dtensor_cuts(pool: WorkerPool, mesh: tuple[int, ...], world_size: int) -> None:
    for clip in (False, True):
        wanted = pool.run(train_dtensors, None, clip)[0]
        for found in pool.run(train_dtensors, mesh, clip):
            assert_same(found, wanted, 1e-9)


def train_megatron(wrapper: str | int | None, tensor_parallel: int) -> list[dict[str, Any]]:
    """The records of AdamW on Megatron's layers, in float64 where no wrapper has fp32 copies."""
    with megatron(tensor_parallel) as state, fresh_deepspeed_groups():
        torch.manual_seed(0)
        model = Network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        norms = LayerNorms(optimizer, model)
        trained: Any = model
        if isinstance(wrapper, int):
            config = {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_clipping": 0.0,
                "zero_optimization": {"stage": wrapper},
                "zero_allow_untested_optimizer": True,
            }
            trained, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=OlderUnit(state))
        elif wrapper == "ddp":
            trained = DistributedDataParallel(model, process_group=state.get_data_parallel_group())
        records = []
        for step in range(3):
            loss = trained(torch.randint(24, (6,), generator=torch.Generator().manual_seed(step)))
            if isinstance(wrapper, int):
                trained.backward(loss)
                trained.step()
            else:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            records.append(norms.latest().record())
        return records


@pytest.mark.parametrize("wrapper", [None, "ddp", 0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [4])
def test_layers_of_megatron_under_data_parallelism(pool: WorkerPool, wrapper: Any, world_size: int) -> None:
    """All ranks are fed the same, so that every one of these set-ups takes the steps of the first."""
    answers = pool.run(train_megatron, wrapper, 2)
    assert all(answer == answers[0] for answer in answers)
    assert_same(answers[0], pool.run(train_megatron, None, 2)[0], 1e-5)
    embedding = answers[0][0]["layers"]["embedding.weight"]
    # AdamW's first step moves every element with a gradient by the learning rate.
    moved = round((1 - embedding["zero_updates"]) * 24 * 8)
    assert moved > 24 * 8 // 2


def train_another_optimizer(stage: int, given: str) -> tuple[list[str], int]:
    """Warnings about the optimizer of the config, which steps in ours' place, and the number of the measured step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = LayerNorms(own, model) if given == "own" else None
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    norms = norms or LayerNorms(engine)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            engine.backward(engine(torch.ones(2, 4)).sum())
            engine.step()
    engine.destroy()
    norms.remove()
    return [str(warning.message) for warning in caught if "LayerNorms" in str(warning.message)], norms.latest().step


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("world_size", [2])
def test_the_optimizer_of_a_config_is_named(pool: WorkerPool, stage: int, world_size: int) -> None:
    for said, steps in pool.run(train_another_optimizer, stage, "own"):
        assert len(said) == 1
        assert "was given SGD, but AdamW steps its parameters" in said[0]
        assert steps == 0
    assert pool.run(train_another_optimizer, stage, "engine") == [([], 2)] * world_size


def train_offloaded(given: str) -> tuple[list[str], int, float]:
    """Warnings about DeepSpeedCPUAdam in AdamW's place, which moves all weights by 1; the last step and its norm."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    }
    with unbuilt_cpu_adam():
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
        model: Any = torch.nn.Linear(4, 3)
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.1)
        norms = LayerNorms(optimizer, model) if given == "own" else None
        model, optimizer = accelerator.prepare(model, optimizer)
        norms = norms or LayerNorms(optimizer, model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            accelerator.backward(model(torch.ones(2, 4)).square().sum())
            optimizer.step()
        model.destroy()
        norms.remove()
    found = norms.latest()
    said = [str(warning.message) for warning in caught if "LayerNorms" in str(warning.message)]
    return said, found.step, 0.0 if found.model is None else found.model.update


@pytest.mark.parametrize("world_size", [2])
def test_the_optimizer_that_accelerate_puts_in_the_place_under_offload(pool: WorkerPool, world_size: int) -> None:
    for said, step, _ in pool.run(train_offloaded, "own"):
        assert len(said) == 1
        assert "was given AdamW, but DeepSpeedCPUAdam steps its parameters" in said[0]
        assert '"zero_force_ds_cpu_optimizer" to false' in said[0]
        assert step == 0
    for said, step, update in pool.run(train_offloaded, "prepared"):
        assert (said, step) == ([], 1)
        assert update == pytest.approx(15**0.5, rel=1e-6)


def train_16_bits(stage: int) -> tuple[int, dict[str, Any], float]:
    """Norms that are asked for before BF16_Optimizer (1) or FP16_UnfusedOptimizer (0) is made."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    norms = LayerNorms(optimizer)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"} if stage else {},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    begun = norms.latest().step
    engine.backward(engine(torch.ones(2, 4, dtype=torch.bfloat16)).sum())
    engine.step()
    record = norms.latest().record()
    engine.destroy()
    return begun, record, float(norms.latest()["weight"].update)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("world_size", [2])
def test_norms_before_the_16_bit_wrappers(pool: WorkerPool, stage: int, world_size: int) -> None:
    # FP16_UnfusedOptimizer makes the state by a step with zeros, which counts like any other.
    before = 1 - stage
    # Of Adam's second step, whose first had no gradient, and of its first one.
    size = (0.1 / 0.19) / (0.001 / 0.001999) ** 0.5 if before else 1.0
    for begun, record, update in pool.run(train_16_bits, stage):
        assert (begun, record["step"]) == (before, before + 1)
        assert set(record["layers"]) == {"weight", "bias"}
        assert update == pytest.approx(12**0.5 * 0.1 * size, rel=1e-4)


def train_one_part() -> str:
    """An optimizer that DeepSpeed has made of flat tensors, and no model: what the error says."""
    model = torch.nn.Linear(4, 3)
    flat = torch.nn.Parameter(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    optimizer = torch.optim.SGD([flat], lr=0.1)
    LayerNorms(optimizer)
    flat.grad = torch.ones_like(flat)
    before = flat.detach().clone()
    try:
        optimizer.step()
    except RuntimeError as error:
        assert torch.equal(flat, before)
        return str(error)
    return "" if dist.is_initialized() else "alone"


@pytest.mark.parametrize("world_size", [2])
def test_a_flat_tensor_is_no_layer(pool: WorkerPool, world_size: int) -> None:
    for said in pool.run(train_one_part):
        assert "shape (15,)" in said
        assert "give LayerNorms the model" in said


class Experts(torch.nn.Module):
    """A layer that all ranks share, and one that DDP leaves to each."""

    def __init__(self, marked: bool) -> None:
        super().__init__()
        self.shared, self.own = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
        if marked:
            self.own.weight.allreduce = False  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.own(self.shared(x))
        return result


def train_own_layers(marked: bool, differ: bool, clip: bool) -> tuple[str, dict[str, float]]:
    """What is said of a layer that DDP does not average, and the norms of the gradients."""
    torch.manual_seed(0)
    model = Experts(marked)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["own.weight"])
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = None if clip else LayerNorms(optimizer, parallel)
    parallel(torch.full((2, 4), float(1 + differ * dist.get_rank()))).sum().backward()
    try:
        if clip:
            clip_grad_norm_(optimizer, 0.1, model=model)
        optimizer.step()
    except RuntimeError as error:
        return str(error), {}
    return "", {} if norms is None else {name: layer.gradient for name, layer in norms.latest().items()}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("world_size", [2])
def test_layers_that_differ_between_ranks(pool: WorkerPool, clip: bool, world_size: int) -> None:
    for said, _ in pool.run(train_own_layers, False, True, clip):
        assert "ranks that train the same layers have taken different steps" in said
        assert "own.weight: " in said
        assert "norm of the gradient" in said
        assert "allreduce = False" in said
    assert [said for said, _ in pool.run(train_own_layers, False, False, clip)] == [""] * 2
    of_ranks = pool.run(train_own_layers, True, True, clip)  # the program says that each rank has its own
    if clip:
        assert all("each rank has layers of its own (allreduce = False), own.weight" in said for said, _ in of_ranks)
    else:
        assert [said for said, _ in of_ranks] == [""] * 2
        assert of_ranks[0][1]["shared.weight"] == of_ranks[1][1]["shared.weight"]
        assert of_ranks[0][1]["own.weight"] != of_ranks[1][1]["own.weight"]


def train_local_sgd() -> tuple[list[str], list[float], float]:
    """What is said of ranks that drift apart before the first measured step, their norms, and that of this rank."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3, bias=False)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = PostLocalSGDOptimizer(inner, PeriodicModelAverager(period=8, warmup_steps=0))
    parallel = DistributedDataParallel(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        norms = LayerNorms(optimizer, parallel, every=3)
    with parallel.no_sync():
        for _ in range(3):
            before = model.weight.detach().norm().item()
            optimizer.zero_grad()
            parallel(torch.full((2, 4), 1.0 + dist.get_rank())).square().sum().backward()
            optimizer.step()
    return [str(warning.message) for warning in caught], [norms.latest()["weight"].weight], before


@pytest.mark.parametrize("world_size", [2])
def test_local_sgd_is_named(pool: WorkerPool, world_size: int) -> None:
    answers = pool.run(train_local_sgd)
    for said, found, wanted in answers:
        assert len(said) == 1
        assert "layer norms are each rank's own" in said[0]
        assert found == [pytest.approx(wanted, rel=1e-6)]
    assert answers[0][1] != answers[1][1]
