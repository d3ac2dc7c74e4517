"""Who averages gradients: what one process, a wrapper, the user and nobody say; and the search for wrappers."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from trustratio.optimizers import CLARS, LAMB, SNGM, VRSGD, CowClip, LayoutError
from trustratio.optimizers.sharding import data_parallel
from trustratio.optimizers.sharding.backends import find_data_parallel
from trustratio.optimizers.sharding.data_parallel import DataParallel
from trustratio.optimizers.sharding.living import living


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """The one process of a world of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD  # type: ignore[misc]
    dist.destroy_process_group()


@pytest.fixture
def several(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> dist.ProcessGroup:
    """As if there were another rank, which no collective of this process needs."""
    monkeypatch.setattr(data_parallel, "processes", lambda: 2)
    monkeypatch.setattr("trustratio.optimizers.sharding.backends.processes", lambda: 2)
    return group


def trained(model: torch.nn.Module, optimizer: Any, through: Any = None) -> Any:
    if isinstance(optimizer, CowClip):
        optimizer.count_ids(model.weight, torch.arange(2))
    (through or model)(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer


def test_one_process_needs_to_say_nothing(group: dist.ProcessGroup) -> None:
    optimizer = trained(model := torch.nn.Linear(3, 2), CLARS(model.parameters(), lr=0.1))
    assert find_data_parallel(optimizer) == DataParallel()
    optimizer.data_parallel_group = group
    trained(model, optimizer)


@pytest.mark.filterwarnings("ignore:.*of samples per step")
@pytest.mark.parametrize("optimizer_class", [CLARS, VRSGD, CowClip, LAMB])
def test_nobody_known_among_several_ranks_is_an_error(several: dist.ProcessGroup, optimizer_class: Any) -> None:
    """For whoever adds over samples, before a weight moves; the others go on."""
    model = torch.nn.Linear(3, 2, bias=False)
    options = {"cowclip": True} if optimizer_class is CowClip else {}
    optimizer = optimizer_class(model.parameters(), lr=0.1, **options)
    before = model.weight.detach().clone()
    if optimizer_class is LAMB:
        trained(model, optimizer)
        optimizer.collect_group_norms()
        before = model.weight.detach().clone()
    for _ in range(2):
        with pytest.raises(LayoutError, match=r"nobody says which of the 2 ranks.* optimizer\.data_parallel_group to"):
            trained(model, optimizer)
        assert torch.equal(model.weight, before)
    optimizer.zero_grad()
    optimizer.data_parallel_group = several
    trained(model, optimizer)
    assert not torch.equal(model.weight, before)


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("names", [True, False])
def test_parameters_that_the_model_has_no_more_are_named(names: bool) -> None:
    """As of a block that was cut out of the model, or of adapters that were merged into it."""
    model, gone = torch.nn.Linear(3, 2, bias=False), torch.nn.Linear(5, 2, bias=False)
    layers = [("kept", model.weight), ("gone", gone.weight)]
    optimizer = CLARS(layers if names else [p for _, p in layers], lr=0.1)
    wrapper = DistributedDataParallel(model)
    left_out = "gone" if names else r"one of shape \(2, 5\)"
    message = rf"holds the others, but not {left_out}: if .* take them out of param_groups or freeze them"
    with pytest.raises(LayoutError, match=message):
        trained(model, optimizer, wrapper)
    optimizer.zero_grad()
    gone.requires_grad_(False)
    trained(model, optimizer, wrapper)


@pytest.mark.usefixtures("several")
def test_it_is_asked_again_until_somebody_is_known_and_when_the_wrapper_is_another() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = CLARS(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()  # a dry run
    optimizer.zero_grad()
    wrapped = DistributedDataParallel(model)
    trained(model, optimizer, wrapped)
    del wrapped
    gc.collect()
    with pytest.raises(LayoutError, match="nobody says"):
        trained(model, optimizer)
    optimizer.zero_grad()
    wrapped = DistributedDataParallel(model)
    trained(model, optimizer, wrapped)
    copied = copy.deepcopy(model)
    other = CLARS(copied.parameters(), lr=0.1)
    with pytest.raises(LayoutError, match="nobody says"):
        trained(copied, other)
    again = DistributedDataParallel(copied)
    trained(copied, other, again)


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("kind", ["outside", "inside", "frozen", "in parts"])
def test_ddp_is_found(kind: str) -> None:
    model: Any = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    optimizer = CLARS(model.parameters(), lr=0.1)
    if kind == "outside":
        wrapped: Any = torch.compile(DistributedDataParallel(model), backend="eager")
    elif kind == "inside":
        wrapped = DistributedDataParallel(torch.compile(model, backend="eager"))  # type: ignore[arg-type]
    else:
        wrapped = DistributedDataParallel(model)
    if kind == "in parts":
        wrapped = torch.nn.Sequential(*map(DistributedDataParallel, model))
    if kind == "frozen":
        gc.freeze()
    try:
        found = find_data_parallel(optimizer)
    finally:
        gc.unfreeze()
    assert found is not None
    assert found.process_group is dist.group.WORLD
    del wrapped


@pytest.mark.usefixtures("several")
def test_ddp_of_some_parameters_says_nothing_of_the_others() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2))
    optimizer = CLARS(model.parameters(), lr=0.1)
    first = DistributedDataParallel(model[0])
    assert find_data_parallel(optimizer) is None
    model[1].requires_grad_(False)
    assert find_data_parallel(optimizer) is not None
    model[1].requires_grad_(True)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["1.weight"])
    second = DistributedDataParallel(model)
    assert find_data_parallel(optimizer) is None
    del first, second


def test_horovods_processes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(is_initialized=lambda: True, size=lambda: 3)
    monkeypatch.setitem(__import__("sys").modules, "horovod.torch", fake)
    with pytest.raises(LayoutError, match="which of the 3 ranks"):
        trained(model := torch.nn.Linear(3, 2), CLARS(model.parameters(), lr=0.1))


# What the user says -------------------------------------------------------------------------------------------------


def test_the_property_takes_groups_and_meshes_of_this_rank(group: dist.ProcessGroup) -> None:
    optimizer = LAMB([torch.nn.Parameter(torch.ones(2))])
    assert optimizer.data_parallel_group is None
    mesh = DeviceMesh("cpu", torch.arange(1))
    for value in (group, mesh, None):
        optimizer.data_parallel_group = value
        assert (optimizer.data_parallel_group is None) is (value is None)
    with pytest.raises(TypeError, match=r"must be .*ProcessGroup, a DeviceMesh .* or None, got int"):
        optimizer.data_parallel_group = 3
    with pytest.raises(ValueError, match="a mesh of one dimension, got 2"):
        optimizer.data_parallel_group = DeviceMesh("cpu", torch.arange(1).view(1, 1))
    with pytest.raises(ValueError, match="that this rank is in, got one that it is not"):
        optimizer.data_parallel_group = dist.GroupMember.NON_GROUP_MEMBER
    destroyed = dist.new_group([0])
    dist.destroy_process_group(destroyed)
    with pytest.raises(ValueError, match="that this rank is in, got one that was destroyed"):
        optimizer.data_parallel_group = destroyed


def test_copies_do_not_have_it(group: dist.ProcessGroup) -> None:
    optimizer = LAMB([torch.nn.Parameter(torch.ones(2))])
    optimizer.data_parallel_group = group
    assert copy.deepcopy(optimizer).data_parallel_group is None
    assert pickle.loads(pickle.dumps(optimizer)).data_parallel_group is None
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.data_parallel_group is group


def test_a_group_that_was_destroyed_afterwards(several: dist.ProcessGroup) -> None:
    optimizer = CLARS((model := torch.nn.Linear(3, 2)).parameters(), lr=0.1)
    optimizer.data_parallel_group = given = dist.new_group([0])
    trained(model, optimizer)
    dist.destroy_process_group(given)
    with pytest.raises(LayoutError, match="was set to has been destroyed"):
        trained(model, optimizer)
    optimizer.data_parallel_group = several
    trained(model, optimizer)


# The search ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("collects", [True, False])
def test_frozen_objects_are_found_and_stay_frozen(collects: bool) -> None:
    class Searched: ...

    before, during = Searched(), gc.isenabled()
    gc.freeze()
    after = Searched()
    try:
        gc.enable() if collects else gc.disable()
        count = gc.get_freeze_count()
        assert {id(one) for one in living(Searched)} == {id(before), id(after)}
        assert gc.get_freeze_count() >= count
        assert gc.isenabled() is collects
    finally:
        gc.unfreeze()
        gc.enable() if during else gc.disable()


def zero_redundancy() -> None:
    optimizer = ZeroRedundancyOptimizer((model := torch.nn.Linear(3, 2)).parameters(), optimizer_class=SNGM, lr=0.1)
    gc.freeze()
    trained(model, optimizer)


def abandoned_parameters() -> None:
    optimizer = LAMB((model := torch.nn.Linear(3, 2)).parameters())
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    gc.freeze()
    trained(model, optimizer)


def fsdp1() -> None:
    model = FullyShardedDataParallel(torch.nn.Linear(3, 2), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = CLARS(model.parameters(), lr=0.1)
    gc.freeze()
    trained(model, optimizer)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(
    ("program", "message"),
    [
        (zero_redundancy, "norm of the whole model's gradient"),
        (abandoned_parameters, "the model has other parameters than the optimizer"),
        (fsdp1, "FSDP1 makes it for whole flat parameters"),
    ],
)
def test_wrappers_that_are_frozen_are_found(program: Any, message: str) -> None:
    try:
        with pytest.raises(LayoutError, match=message):
            program()
    finally:
        gc.unfreeze()


@pytest.mark.usefixtures("group")
def test_fully_shard_is_found_when_it_is_frozen() -> None:
    model = fully_shard(torch.nn.Linear(3, 2), mesh=DeviceMesh("cpu", torch.arange(1)))
    optimizer = CLARS(model.parameters(), lr=0.1)
    gc.freeze()
    try:
        trained(model, optimizer)
    finally:
        gc.unfreeze()
    assert optimizer.statistics is not None
    assert optimizer.statistics._flow is not None
