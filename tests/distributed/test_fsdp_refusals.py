"""What is refused under FSDP2 and other uses of DTensors, and parameters that were replaced behind the optimizer."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from trustratio.optimizers import LAMB

from .cases import LayerSpec, Model, initial_weights, make_optimizer, mean_gradients
from .fsdp_runs import Setup, make_case, make_mesh, running, second_dimension
from .pool import CaseFailed, WorkerPool

# Refusals -----------------------------------------------------------------------------------------------------------


class Strange(torch.Tensor):
    """A subclass that nobody knows."""


def step_that_is_refused(name: str) -> None:
    """Take one step, or two, in a set-up that is deliberately broken."""
    if name in ("stale", "cowclip", "sharded later", "broken off", *KEPT_BACK):
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
    elif name in KEPT_BACK:
        step_with_gradients_kept_back(name)
    elif name == "broken off":
        step_after_an_exception_in_backward()
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


KEPT_BACK = {
    "no gradient sync": r"keeps gradients back .* of 0\.weight; 0\.bias; 1\.weight; 1\.bias: call set_requires",
    "no gradient sync of a block": r"keeps gradients back that step\(\) would not see, of 1\.weight; 1\.bias: call",
    "no all-reduce": r"fully_shard keeps gradients back.* and set_requires_all_reduce\(True\) before the last backward",
}


def step_with_gradients_kept_back(name: str) -> None:
    """A step whose last backward was not told to reduce."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards")) if name == "no all-reduce" else None
    for part in (*model, model):
        fully_shard(part, mesh=mesh)
    optimizer = LAMB(model.named_parameters())
    if name == "no gradient sync":
        model.set_requires_gradient_sync(False)
    elif name == "no gradient sync of a block":
        model[1].set_requires_gradient_sync(False)
    else:
        model.set_requires_all_reduce(False)
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()


def step_after_an_exception_in_backward() -> None:
    """The first block's parameters are whole when it comes, and stay so."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3))
    for part in (*model, model):
        fully_shard(part)
    optimizer = LAMB(model.named_parameters())
    for broken in (False, True, False):
        hidden = model[0](torch.ones(2, 4))
        if broken:
            hidden.register_hook(lambda gradient: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):
            model[1](hidden).square().sum().backward()
            optimizer.step()
        optimizer.zero_grad()


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
        ("broken off", STALE + r".*If an exception in forward or backward was caught.*anew, from a checkpoint"),
        *KEPT_BACK.items(),
        (
            "no gradient sync",
            r"keeps gradients back .* of 0\.weight; 0\.bias; 1\.weight; 1\.bias: call set_requires_grad",
        ),
        (
            "no gradient sync of a block",
            r"keeps gradients back that step\(\) would not see, of 1\.weight; 1\.bias: call",
        ),
        (
            "no all-reduce",
            r"keeps gradients back .* of 0\.weight; .* and set_requires_all_reduce\(True\) before the last",
        ),
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
