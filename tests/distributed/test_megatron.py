"""Layers of megatron-core, and layers that carry its attributes, against the float64 reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from trustratio.integrations.megatron import use_mpu
from trustratio.optimizers import LAMB, OPTIMIZERS, create_optimizer

from .cases import LayerSpec, Model, group_gradients, initial_weights, mean_gradients
from .cases import make_optimizer as make_case_optimizer
from .collective_counter import CollectiveCounter
from .exactness import NOISE, assert_exact
from .pool import CaseFailed, WorkerPool
from .recorded import Recorder, assert_recorded_exact, fresh_deepspeed_groups, make_optimizer
from .test_exactness import make_case

STEPS = 4


@contextmanager
def megatron(tensor_parallel: int, pipeline: int = 1, **sizes: int) -> Iterator[Any]:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_parallel, pipeline, **sizes)
    try:
        yield parallel_state
    finally:
        parallel_state.destroy_model_parallel()


class Network(torch.nn.Module):
    """An embedding cut along its rows, a matrix along its outputs, one along its inputs, and whole layers."""

    def __init__(self) -> None:
        super().__init__()
        from megatron.core.model_parallel_config import ModelParallelConfig
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

        options: dict[str, Any] = {
            "config": ModelParallelConfig(use_cpu_initialization=True, params_dtype=torch.float32),
            "init_method": torch.nn.init.normal_,
        }
        self.embedding = VocabParallelEmbedding(24, 8, **options)
        self.norm = torch.nn.LayerNorm(8)
        self.wide = ColumnParallelLinear(8, 12, bias=True, gather_output=False, **options)
        self.narrow = RowParallelLinear(12, 8, bias=True, input_is_parallel=True, skip_bias_add=False, **options)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.wide(self.norm(self.embedding(tokens)))
        x, _ = self.narrow(torch.tanh(hidden))
        return torch.nn.functional.cross_entropy(self.head(x), tokens % 5)


class OlderUnit:
    """megatron-core's groups under the names that DeepSpeed asks for, as Megatron-DeepSpeed's mpu has them."""

    def __init__(self, state: Any):
        self.state = state

    def __getattr__(self, name: str) -> Any:
        return getattr(self.state, name.replace("get_model_parallel", "get_tensor_model_parallel"))


def train(name: str, wrapper: str | int, tensor_parallel: int, **constructor: Any) -> dict[str, Any]:
    """Train under plain steps, "ddp" or a ZeRO stage."""
    with megatron(tensor_parallel) as state, fresh_deepspeed_groups():
        torch.manual_seed(0)
        model = Network()
        optimizer = make_optimizer(name, model, **constructor)
        trained: Any = model
        if isinstance(wrapper, int):
            config: dict[str, Any] = {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_clipping": 0.0,
                "zero_optimization": {"stage": wrapper},
                "steps_per_print": 10**9,
            }
            mpu = OlderUnit(state)
            trained, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)
        elif wrapper == "ddp":
            trained = DistributedDataParallel(model, process_group=state.get_data_parallel_group())
        recorder = Recorder(model, optimizer)
        generator = torch.Generator().manual_seed(100 + state.get_data_parallel_rank())
        for _ in range(STEPS):
            loss = trained(torch.randint(24, (6,), generator=generator))
            if isinstance(wrapper, int):
                trained.backward(loss)
                trained.step()
            else:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            recorder.end_step()
        result = recorder.result()
        recorder.counter.close()
        if isinstance(wrapper, int):
            trained.destroy()
        return result


@pytest.mark.parametrize("name", [name for name, entry in OPTIMIZERS.items() if entry.group_statistics is None])
@pytest.mark.parametrize("world_size", [2])
def test_layers_of_megatron_core(pool: WorkerPool, name: str, world_size: int) -> None:
    answers = pool.run(train, name, "plain", 2)
    # A ratio of MCLR and CBLR is of one weight, the median, and shows how that weight is rounded.
    assert_recorded_exact(name, answers, 2, ratio_bound=1e-4 if name in ("mclr", "cblr") else 1e-6)
    for answer in answers:
        assert answer["dimensions"] == {
            **{"embedding.weight": 0, "norm.weight": None, "norm.bias": None, "wide.weight": 0, "wide.bias": 0},
            **{"narrow.weight": 1, "narrow.bias": None, "head.weight": None, "head.bias": None},
        }
        assert answer["all_reduces"][1:] == [OPTIMIZERS[name].collectives] * (STEPS - 1)


@pytest.mark.parametrize("wrapper", ["ddp", 0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [4])
def test_with_data_parallelism(pool: WorkerPool, wrapper: str | int, world_size: int) -> None:
    for name in ("lamb", "sngm"):
        answers = pool.run(train, name, wrapper, 2)
        assert_recorded_exact(name, answers, 2)
    for rank, answer in enumerate(answers):
        pair = [rank // 2 * 2, rank // 2 * 2 + 1]
        partitioned = [[rank % 2, rank % 2 + 2]] if wrapper in (1, 2, 3) else []
        assert answer["ranks"][-1] == [*partitioned, pair]


@pytest.mark.parametrize("world_size", [2])
def test_own_clipping_sees_the_whole_model(pool: WorkerPool, world_size: int) -> None:
    answers = pool.run(train, "lamb", "plain", 2, max_grad_norm=0.3)
    assert_recorded_exact("lamb", answers, 2, clipping=0.3, bound=1e-5)


# An mpu that is handed over -----------------------------------------------------------------------------------------

DIMENSIONS: dict[str, int | None] = {"rows": 0, "columns": 1, "middle": 1, "whole": None, "bias": 0}
SHAPES = {"rows": (6, 5), "columns": (3, 8), "middle": (2, 4, 3), "whole": (4, 4), "bias": (6,)}


class Unit:
    def __init__(self, groups: list[list[int]]):
        own, replicas = None, None
        for ranks in groups:
            group = dist.new_group(ranks)
            own = group if dist.get_rank() in ranks else own
        for ranks in zip(*groups, strict=True):
            group = dist.new_group(list(ranks))
            replicas = group if dist.get_rank() in ranks else replicas
        self.tensor_parallel, self.data_parallel = own, replicas

    def get_tensor_model_parallel_group(self) -> Any:
        return self.tensor_parallel

    def get_data_parallel_group(self) -> Any:
        return self.data_parallel


def case_of(name: str) -> Any:
    layers = tuple(LayerSpec(layer, shape, group=len(shape) == 1) for layer, shape in SHAPES.items())
    return replace(make_case(name, "dense", layers), noise=NOISE.get(name, 0.0), spread=0.0)


def train_marked(name: str, groups: list[list[int]], marks: dict[str, Any] | None = None) -> dict[str, Any]:
    """Five steps with layers cut by hand; `marks` may spoil attributes of a layer on the last rank."""
    case, unit = case_of(name), Unit(groups)
    position, ranks = dist.get_rank(unit.tensor_parallel), dist.get_world_size(unit.tensor_parallel)

    def part(layer: str, value: torch.Tensor) -> torch.Tensor:
        dimension = DIMENSIONS[layer]
        return value if dimension is None else value.chunk(ranks, dim=dimension)[position].clone()

    parameters = {n: torch.nn.Parameter(part(n, w)) for n, w in initial_weights(case).items()}
    for layer, parameter in parameters.items():
        if DIMENSIONS[layer] is not None:
            parameter.tensor_model_parallel, parameter.partition_dim = True, DIMENSIONS[layer]  # type: ignore[attr-defined]
    if marks is not None and dist.get_rank() == dist.get_world_size() - 1:
        for attribute, value in marks.items():
            setattr(parameters["columns"], attribute, value)
    names = [[layer.name for layer in case.layers if layer.group == index] for index in range(2)]
    members = [
        {"params": [(n, parameters[n]) for n in of_group], **options}
        for of_group, options in zip(names, case.groups, strict=True)
    ]
    optimizer: Any = create_optimizer(name, members, lr=1.0)
    use_mpu(unit)
    counter = CollectiveCounter(optimizer)
    try:
        ratios = []
        for gradients in mean_gradients(case):
            for layer, parameter in parameters.items():
                parameter.grad = part(layer, gradients[layer])
            optimizer.step()
            ratios.append(optimizer.trust_ratios())
    finally:
        use_mpu(None)
        counter.close()
    weights = {}
    for layer, parameter in parameters.items():
        pieces = [torch.empty_like(parameter) for _ in range(ranks)]
        dist.all_gather(pieces, parameter.detach().contiguous(), group=unit.tensor_parallel)
        dimension = DIMENSIONS[layer]
        weights[layer] = parameter.detach() if dimension is None else torch.cat(pieces, dim=dimension)
    return {"weights": weights, "ratios": ratios, "collectives": counter.per_call}


@pytest.mark.parametrize("name", ["lamb", "lars", "lans", "novograd"])
@pytest.mark.parametrize(("world_size", "groups"), [(2, [[0, 1]]), (4, [[0, 2], [1, 3]])])
def test_marked_layers_over_any_ranks(pool: WorkerPool, name: str, world_size: int, groups: list[list[int]]) -> None:
    answers = pool.run(train_marked, name, groups)
    assert_exact(case_of(name), answers)
    for answer in answers:
        assert set(answer["collectives"][1:]) == {OPTIMIZERS[name].collectives}


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"tensor_model_parallel": False}, "disagree about the shape of these layers.*: columns"),
        ({"partition_dim": 0}, "disagree about the shape of these layers.*: columns"),
    ],
)
def test_ranks_that_disagree_are_refused(
    pool: WorkerPool, marks: dict[str, Any], message: str, world_size: int
) -> None:
    with pytest.raises(CaseFailed, match=message) as failure:
        pool.run(train_marked, "lamb", [[0, 1]], marks)
    assert str(failure.value).count("LayoutError") >= world_size


def train_averaged(name: str) -> dict[str, Any]:
    """Data parallelism alone, with gradients averaged by hand."""
    case, unit = make_case(name, "ddp"), Unit([[0], [1]])
    model = Model(case)
    model.load(initial_weights(case))
    optimizer: Any = make_case_optimizer(case, model)
    use_mpu(unit)
    try:
        ratios = []
        for step, means in enumerate(mean_gradients(case)):
            of_groups = group_gradients(case, step, means, 2)
            model({layer: g[dist.get_rank()] for layer, g in of_groups.items()}).backward()
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad, group=unit.data_parallel)
                parameter.grad.div_(2)
            optimizer.step()
            optimizer.zero_grad()
            ratios.append(optimizer.trust_ratios())
    finally:
        use_mpu(None)
    return {"weights": {n: leaf.weight.detach() for n, leaf in model.leaves.items()}, "ratios": ratios}


@pytest.mark.parametrize("name", ["clars", "vrlamb"])
@pytest.mark.parametrize("world_size", [2])
def test_the_mpu_tells_whose_samples_are_averaged(pool: WorkerPool, name: str, world_size: int) -> None:
    assert_exact(make_case(name, "ddp"), pool.run(train_averaged, name))


def step_of_a_part(mark: dict[str, Any], known: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 4))
    for attribute, value in mark.items():
        setattr(parameter, attribute, value)
    parameter.grad = torch.ones(3, 4)
    if known:
        use_mpu(Unit([[0, 1]]))
    try:
        LAMB([("layer.weight", parameter)]).step()
    finally:
        use_mpu(None)


@pytest.mark.parametrize("world_size", [2])
def test_parts_without_explanation_are_refused(pool: WorkerPool, world_size: int) -> None:
    with pytest.raises(CaseFailed, match=r"over ranks that are not known.*use_mpu"):
        pool.run(step_of_a_part, {"tensor_model_parallel": True, "partition_dim": 0}, False)
    with pytest.raises(CaseFailed, match=r"layer\.weight.*along a dimension that is not known"):
        pool.run(step_of_a_part, {"tensor_model_parallel": True}, True)


@pytest.mark.parametrize("world_size", [2])
def test_parts_that_are_not_equal_are_caught(pool: WorkerPool, world_size: int) -> None:
    """Megatron cuts into equal parts, so that a part tells the size of the whole."""
    with pytest.raises(CaseFailed, match=r"disagree about the shape of these layers.*: layer\.weight"):
        pool.run(step_of_uneven_parts)


def step_of_uneven_parts() -> None:
    parameter = torch.nn.Parameter(torch.ones(2 + dist.get_rank(), 4))
    parameter.tensor_model_parallel, parameter.partition_dim = True, 0  # type: ignore[attr-defined]
    parameter.grad = torch.ones_like(parameter)
    use_mpu(Unit([[0, 1]]))
    try:
        LAMB([("layer.weight", parameter)]).step()
    finally:
        use_mpu(None)


def step_in_a_pipeline(name: str) -> None:
    with megatron(1, 2):
        parameter = torch.nn.Parameter(torch.ones(3, 4))
        parameter.grad = torch.ones(3, 4)
        create_optimizer(name, [parameter], lr=0.1).step()


@pytest.mark.parametrize("world_size", [2])
def test_pipeline_stages(pool: WorkerPool, world_size: int) -> None:
    pool.run(step_in_a_pipeline, "lamb")
    with pytest.raises(CaseFailed, match="norm of the whole model's gradient"):
        pool.run(step_in_a_pipeline, "sngm")
    with pytest.raises(CaseFailed, match="a pipeline stage sees only its own layers"):
        pool.run(step_in_a_pipeline, "clars")


def step_with_experts(name: str, sizes: dict[str, int], **options: Any) -> None:
    """One step of a layer that all ranks have and one, an expert's, that only this rank has."""
    with megatron(1, **sizes):
        dense, expert = torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(3, 4))
        expert.allreduce = False  # type: ignore[attr-defined]
        dense.grad, expert.grad = torch.ones(3, 4), torch.full((3, 4), 1.0 + dist.get_rank())
        create_optimizer(name, [("dense", dense), ("expert", expert)], lr=0.1, **options).step()


@pytest.mark.parametrize("name", ["clars", "vrlamb"])
@pytest.mark.parametrize("world_size", [2])
def test_experts_and_context(pool: WorkerPool, name: str, world_size: int) -> None:
    experts, context = {"expert_model_parallel_size": 2}, {"context_parallel_size": 2}
    pool.run(step_with_experts, "lamb", experts)
    pool.run(step_with_experts, "sngm", context)
    with pytest.raises(CaseFailed, match="norm of the whole model's gradient"):
        pool.run(step_with_experts, "sngm", experts)
    with pytest.raises(CaseFailed, match="set clip_grad in Megatron's own step"):
        pool.run(step_with_experts, "lamb", experts, max_grad_norm=1.0)
    with pytest.raises(CaseFailed, match="an expert's gradient on one rank is made of the samples of several"):
        pool.run(step_with_experts, name, experts)
    with pytest.raises(CaseFailed, match="under context parallelism a rank has that of a part of each sample"):
        pool.run(step_with_experts, name, context)


def step_of_marked(wrapper: str, mark: str, tensor_parallel: int | None) -> None:
    """One step of a layer that Megatron's attributes mark as a part, inside another wrapper."""
    known = Unit([[0, 1]] if tensor_parallel == 2 else [[0], [1]]) if tensor_parallel else None
    model: Any = torch.nn.Linear(4, 6)
    setattr(model.weight, mark, True)
    model.weight.partition_dim = 0
    if wrapper == "fsdp1":
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    elif wrapper == "fsdp2":
        fully_shard(model)
        setattr(model.weight, mark, True)  # fully_shard drops it
    elif wrapper == "ddp":
        model = DistributedDataParallel(model)
    optimizer = LAMB(model.named_parameters())
    model(torch.ones(2, 4)).sum().backward()
    use_mpu(known)
    try:
        optimizer.step()
    finally:
        use_mpu(None)


@pytest.mark.parametrize("mark", ["tensor_model_parallel", "model_parallel"])
@pytest.mark.parametrize("world_size", [2])
def test_marked_parts_in_other_wrappers(pool: WorkerPool, mark: str, world_size: int) -> None:
    messages = {
        "ddp": "over ranks that are not known",
        "fsdp1": "weight is cut by tensor parallelism, and FSDP1 has flattened this rank's part",
        "fsdp2": "weight is a DTensor.*and Megatron's tensor parallelism may have cut it",
    }
    for wrapper, message in messages.items():
        for ranks in (None, 2) if wrapper == "fsdp1" else (None,):
            with pytest.raises(CaseFailed, match=message) as failure:
                pool.run(step_of_marked, wrapper, mark, ranks)
            assert str(failure.value).count("LayoutError: ") == world_size
        pool.run(step_of_marked, wrapper, mark, 1)  # Megatron marks layers of one rank too


def step_of_lost_marks() -> None:
    """FSDP2 over one pair of ranks, with layers that Megatron has cut over the other pair."""
    with megatron(2) as state:
        from torch.distributed.device_mesh import DeviceMesh

        model = torch.nn.Linear(4, 6)
        fully_shard(model, mesh=DeviceMesh.from_group(state.get_data_parallel_group(), "cpu"))
        optimizer = LAMB(model.named_parameters())
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("world_size", [2])
def test_marks_that_fully_shard_drops(pool: WorkerPool, world_size: int) -> None:
    with pytest.raises(CaseFailed, match=r"weight is a DTensor.*and Megatron's tensor parallelism may have cut it"):
        pool.run(step_of_lost_marks)


def step_of_a_copy() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = LAMB([parameter])
    copy = torch.nn.Parameter(parameter.detach().clone())
    copy.tensor_model_parallel, copy.grad = False, torch.ones(3, 4)  # type: ignore[attr-defined]
    optimizer.param_groups[0]["params"] = [copy]
    optimizer.step()


def test_copies_that_megatron_core_would_step_are_refused() -> None:
    with pytest.raises(RuntimeError, match="Megatron-core's optimizer wrappers step fp32 copies"):
        step_of_a_copy()


def test_an_mpu_must_know_its_groups() -> None:
    with pytest.raises(TypeError, match="get_tensor_model_parallel_group"):
        use_mpu(object())
