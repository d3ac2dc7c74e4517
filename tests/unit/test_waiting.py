"""A step on an accelerator waits for nothing: on the device "meta", whose tensors have no numbers to wait for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from trustratio.optimizers import OPTIMIZERS, create_optimizer
from trustratio.optimizers.kernels import device_copies
from trustratio.optimizers.kernels.device_copies import DeviceCopies, is_capturing
from trustratio.optimizers.sharding.layout import Layer, Layout, Shard
from trustratio.optimizers.stepping import plans
from trustratio.optimizers.stepping.plan import Plan

from ..swept import SWEPT

META = torch.device("meta")
PLAIN = [name for name in SWEPT if OPTIMIZERS[name].group_statistics is None]


class NothingFromTheHost(TorchFunctionMode):
    """Fails where host data goes to the device by a copy that waits. Reading from it fails by itself."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.__getitem__:
            assert not isinstance(args[1], list), "an index made of a list"
        of_numbers = function in (torch.tensor, torch.as_tensor) and not torch.is_tensor(args[0])
        on_host = of_numbers or function is torch.Tensor.new_tensor or (args and getattr(args[0], "is_cpu", False))
        found = function(*args, **(kwargs or {}))
        assert not (on_host and isinstance(found, torch.Tensor) and found.device == META), function
        return found


class Launcher:
    """In place of a kernel."""

    def __init__(self) -> None:
        self.launches = 0

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **constants: Any) -> None:
            self.launches += 1

        return launch


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    pytest.importorskip("triton")
    from trustratio.optimizers.kernels import triton_kernels

    launcher = Launcher()
    monkeypatch.setattr(triton_kernels, "_KERNELS", dict.fromkeys(triton_kernels._KERNELS, launcher))
    monkeypatch.setattr(triton_kernels, "_fold", launcher)
    monkeypatch.setattr(triton_kernels.TritonKernels, "devices", lambda self: ("meta",))
    return launcher


def take_steps(name: str, implementation: str, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    shapes = ((5, 7), (5,), (), (3, 2))
    parameters = [torch.nn.Parameter(torch.empty(shape, device=META, dtype=dtype)) for shape in shapes]
    optimizer = create_optimizer(name, parameters, lr=0.1, implementation=implementation, **options)
    for step in range(4):
        for p in parameters[step % 2 :]:  # one has no gradient in every second step
            p.grad = torch.empty_like(p)
        with NothingFromTheHost() if step >= 2 else nullcontext():
            optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", PLAIN)
def test_sweeps_wait_for_nothing(name: str, launcher: Launcher) -> None:
    take_steps(name, "triton")
    assert launcher.launches


@pytest.mark.parametrize("name", PLAIN)
def test_tensor_operations_wait_for_nothing(name: str) -> None:
    take_steps(name, "eager")


def take_steps_of_groups(name: str, groups: int, implementation: str, *, rates_on_device: bool = False) -> int:
    """Fifty layers in groups with rates and decays of their own; returns how many operations a step has."""
    parameters = [torch.nn.Parameter(torch.empty((5, 7) if index % 2 else (5,), device=META)) for index in range(50)]
    members = [
        {"params": parameters[50 // groups * i : 50 // groups * (i + 1)], "lr": 0.1 + i, "weight_decay": 0.1 * (i % 2)}
        for i in range(groups)
    ]
    optimizer = create_optimizer(name, members, lr=0.1, implementation=implementation)
    for step in range(4):
        for p in parameters:
            p.grad = torch.empty_like(p)
        for group in optimizer.param_groups if step == 1 and rates_on_device else ():
            group["lr"] = torch.empty((), device=META)
        with NothingFromTheHost() if step >= 2 else nullcontext(), Operations() as operations:
            optimizer.step()
    return operations.count


class Operations(TorchDispatchMode):
    """Counts what a device is asked to compute."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rates_on_device", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_launches_do_not_grow_with_groups(name: str, rates_on_device: bool, launcher: Launcher) -> None:
    """And groups of any number wait for nothing."""
    launches, operations = {}, {}
    for groups in (2, 1, 2, 50):  # the first of a process tries a launch
        before = launcher.launches
        operations[groups] = take_steps_of_groups(name, groups, "triton", rates_on_device=rates_on_device)
        launches[groups] = launcher.launches - before
    assert launches[50] == launches[2] == launches[1] > 0
    # What a group's rate is read from: a view of each tensor, which launches nothing.
    assert operations[50] == operations[2] + (2 * 48 if rates_on_device else 0)
    assert operations[50] - operations[1] <= 20 + (2 * 50 if rates_on_device else 0)


@pytest.mark.parametrize("name", PLAIN)
def test_tensor_operations_do_not_grow_with_groups(name: str) -> None:
    one, two, fifty = (take_steps_of_groups(name, groups, "eager") for groups in (1, 2, 50))
    assert fifty == two <= one + 30


@pytest.mark.parametrize("reduction", ["max", "mean", None])
def test_maxima_wait_for_nothing(reduction: str | None) -> None:
    take_steps("adashift", "eager", keep=1, reduction=reduction, adapt=None)


@pytest.mark.parametrize("master", ["stochastic", "kahan"])
@pytest.mark.parametrize("name", ["lars", "lamb", "adabelief"])
def test_sweeps_that_round_wait_for_nothing(name: str, master: str, launcher: Launcher) -> None:
    """And are as many as others."""
    counts = [0]
    for storage in ({}, {"state_dtype": "bfloat16", "master": master}, {}):  # the first of a process tries a launch
        take_steps(name, "triton", torch.bfloat16 if storage else torch.float32, **storage)
        counts.append(launcher.launches - sum(counts))
    assert counts[2] == counts[3] > 0


def test_clipping_waits_for_nothing(launcher: Launcher) -> None:
    take_steps("lamb", "triton", max_grad_norm=1.0)


def test_launches_are_on_the_device_of_the_parameters(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be the current one."""
    from trustratio.optimizers.kernels import triton_kernels

    entered: list[torch.device] = []

    @contextmanager
    def entering(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield

    assert isinstance(triton_kernels._launching_on(META), nullcontext)
    monkeypatch.setattr("torch.cuda.device", entering)
    with triton_kernels._launching_on(torch.device("cuda", 1)):
        assert entered == [torch.device("cuda", 1)]
    monkeypatch.setattr(triton_kernels, "_launching_on", entering)
    take_steps("lamb", "triton")
    assert entered[1:] == [META] * launcher.launches


class Capturing:
    """In place of a CUDA graph: as long as `now` is set, everything is captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = False
        for module in (device_copies, plans):
            monkeypatch.setattr(module, "is_capturing", lambda device: self.now)


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Capturing:
    return Capturing(monkeypatch)


def test_tables_in_a_captured_graph(capturing: Capturing) -> None:
    """They stay where they are, and cannot be made anew while a graph is captured."""
    triton_kernels = pytest.importorskip("trustratio.optimizers.kernels.triton_kernels")
    sweeps = object.__new__(triton_kernels.TritonSweeps)
    sweeps.cache, sweeps.copies = {}, DeviceCopies(META)

    def table(addresses: list[int], dtype: str = "fp32") -> torch.Tensor:
        content = {"weights": [8, 9], "gradients": addresses, "dtypes": [dtype]}
        found: torch.Tensor = sweeps._table(("pointers",), content, lambda: torch.tensor(addresses))
        return found

    first = table([1, 2])
    assert table([1, 2]) is first
    capturing.now = True
    assert table([1, 2]) is first
    with pytest.raises(RuntimeError, match=r"pointers of gradients changed.*zero_grad\(set_to_none=False\)"):
        table([3, 4])
    with pytest.raises(RuntimeError, match=r"^the dtypes changed since the last step, and a CUDA graph cannot"):
        table([1, 2], "bf16")
    with pytest.raises(RuntimeError, match=r"the blocks of 0 changed since the last step, and a CUDA graph cannot"):
        sweeps._table(("blocks", 0), [], list)
    capturing.now = False
    watched = weakref.ref(first)
    del first
    assert table([3, 4]).tolist() == [3, 4]
    assert watched() is not None
    of_no_graph = weakref.ref(table([5, 6]))
    table([7, 8])
    assert of_no_graph() is None


def test_rates_of_groups_in_a_captured_graph(capturing: Capturing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are sent once when they change, which cannot be captured, and stay where a graph reads them."""
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(DeviceCopies, "send", lambda self, numbers: sent.append(numbers) or numbers)
    parameters = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(3)]
    groups = [{"params": [p], "lr": 0.1 * i} for i, p in enumerate(parameters)]
    optimizer = create_optimizer("lamb", groups, lr=0.1, implementation="eager")

    def step() -> None:
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()

    step()
    step()
    assert [vector.tolist() for vector in sent] == [[0.0, 0.1, 0.2]]
    capturing.now = True
    step()
    assert len(sent) == 1
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(RuntimeError, match=r"^lr of parameter groups has changed.* as a tensor on the device"):
        step()
    capturing.now = False
    watched = weakref.ref(sent[0])
    sent.clear()
    step()
    assert [vector.tolist() for vector in sent] == [[0.5, 0.1, 0.2]]
    assert watched() is not None
    of_no_graph = weakref.ref(sent.pop())
    optimizer.param_groups[0]["lr"] = 0.6
    step()
    assert of_no_graph() is None


@pytest.mark.parametrize("captured", [True, False])
def test_the_numbers_of_a_captured_plan_stay(captured: bool, capturing: Capturing) -> None:
    """A group that is added makes another plan; a replay still reads which layers are adapted, and keys of chances."""
    parameters = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(3)]
    groups = [{"params": [p], "lr": 0.1 * i} for i, p in enumerate(parameters[:2])]
    optimizer = create_optimizer("lamb", groups, lr=0.1, state_dtype="bfloat16", implementation="eager")

    def step() -> Plan:
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        (plan,) = optimizer._plans.values()
        return plan

    step()
    capturing.now = captured
    plan = step()
    capturing.now = False
    keys = plan.storage._keys[0]
    read = [plan.cache["adapt", 0], plan.cache["elements", 0], plan.joint_groups[0]._group_of_layer]
    watched = [weakref.ref(tensor) for tensor in (*read, keys.gammas, keys._of_layers)]
    optimizer.add_param_group({"params": [parameters[2]]})
    assert step() is not plan
    del plan, read, keys
    assert [tensor() is not None for tensor in watched] == [captured] * 5


class Cuda:
    """In place of `torch.cuda`, with device 0 current, and some stream of device 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.current, self.stream = 0, "first"
        self.sent: list[tuple[torch.Tensor, dict[str, Any]]] = []
        self.recorded: list[tuple[int, str]] = []
        monkeypatch.setattr("torch.cuda.device", self.device)
        monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: self.current == 1)
        monkeypatch.setattr("torch.cuda.current_stream", lambda device: self.stream)
        monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **options: self.copied(tensor, **options))
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: self.recorded.append((id(x), stream)))

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        yield
        self.current = before

    def copied(self, tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        self.sent.append((tensor, options))
        return tensor


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def test_a_capture_is_on_the_device_of_the_parameters(cuda: Cuda) -> None:
    devices = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")
    assert [is_capturing(device) for device in devices] == [False, True, False]
    assert cuda.current == 0


def test_the_allocator_knows_which_streams_read_what_another_has_sent(cuda: Cuda) -> None:
    """Or it would be reused while they still read."""
    copies = DeviceCopies(torch.device("cuda", 1))
    tensors = [copies.send(torch.zeros(size)) for size in (2, 3)]
    copies.used(*tensors)
    assert not cuda.recorded
    cuda.stream = "second"
    copies.used(*tensors)
    assert cuda.recorded == [(id(tensor), "second") for tensor in tensors]


def test_what_is_sent_to_a_gpu_is_pinned(cuda: Cuda) -> None:
    """In memory of its own each time, so that a copy under way is not written over."""
    on_host = torch.zeros(3)
    copies = DeviceCopies(torch.device("cuda", 1))
    for _ in range(2):
        copies.send(on_host)
    assert len({on_host.data_ptr(), *(tensor.data_ptr() for tensor, _ in cuda.sent)}) == 3
    assert [options for _, options in cuda.sent] == [{"non_blocking": True}] * 2


def test_rates_that_are_numbers_beside_tensors_on_the_device(launcher: Launcher) -> None:
    """Whether plain, or tensors of the host, which would be copied, they are written by the device."""
    parameters = [torch.nn.Parameter(torch.empty(5, device=META)) for _ in range(3)]
    rates = torch.empty((), device=META), torch.tensor(0.1), 0.2
    optimizer = create_optimizer("lamb", [{"params": [p]} for p in parameters], lr=0.1, implementation="triton")
    for step in range(4):
        for p in parameters:
            p.grad = torch.empty_like(p)
        if step == 1:
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr
        with NothingFromTheHost() if step >= 2 else nullcontext():
            optimizer.step()


def test_layouts_wait_for_nothing_after_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only some layers are cut."""
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *args, **options: None)
    monkeypatch.setattr("trustratio.optimizers.sharding.layout.reduction_device", lambda group, preferred: preferred)
    flat = torch.nn.Parameter(torch.empty(12, device=META))
    layers = tuple(Layer(f"layer{i}", (4,), 0, flat) for i in range(3))
    shards = tuple(Shard(i, 4 * i, 0, 4) for i in range(3))
    process_group: Any = object()
    layout = Layout("test", (flat,), (0,), layers, shards, ((process_group, (0, 2)),))
    optimizer = create_optimizer("lamb", [flat], lr=0.1, implementation="eager")
    optimizer._plans.add(plan := Plan.of(optimizer, layout, [flat]))
    plan.agreement.steps_left = 0  # the ranks are not there
    flat.grad = torch.empty_like(flat)
    optimizer.step()
    assert layout.copies.shape == (3,)
    with NothingFromTheHost():
        optimizer.step()
        assert layout.copies.shape == (3,)


@pytest.mark.parametrize("only_some_are_cut", [False, True])
def test_rows_wait_for_nothing_after_the_first_step(monkeypatch: pytest.MonkeyPatch, only_some_are_cut: bool) -> None:
    """Neither those of whole embeddings nor those that a shard's end cuts are told to the device again."""
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *args, **options: None)
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda found, cut, group: found.__setitem__(0, cut))
    monkeypatch.setattr("trustratio.optimizers.sharding.layout.reduction_device", lambda group, preferred: preferred)
    flat = torch.nn.Parameter(torch.empty(22, device=META))
    embeddings = [torch.nn.Parameter(torch.empty(6, 3, device=META)) for _ in range(3)]
    layers = tuple(Layer(f"layer{i}", (6, 3), 0, p) for i, p in enumerate(embeddings))
    shards = (Shard(0, 0, 2, 16), Shard(1, 16, 0, 4), Shard(2, 20, 7, 2))
    process_group: Any = object()
    cut = (0, 2) if only_some_are_cut else (0, 1, 2)
    layout = Layout("test", (flat,), (0,), layers, shards, ((process_group, cut),))
    optimizer = create_optimizer("cowclip", [flat], lr=0.1, cowclip=True, implementation="eager")
    optimizer._plans.add(plan := Plan.of(optimizer, layout, [flat]))
    plan.agreement.steps_left = 0  # the ranks are not there
    assert len(plan.rows[0].slot_layers) == 2
    flat.grad = torch.empty_like(flat)
    for step in range(3):
        for embedding in embeddings:
            optimizer._counts.add(embedding, torch.empty(5, dtype=torch.long, device=META))
        with NothingFromTheHost() if step else nullcontext():
            optimizer.step()


@pytest.mark.parametrize("name", [name for name in SWEPT if OPTIMIZERS[name].group_statistics is not None])
@pytest.mark.filterwarnings("ignore:.*group.* of samples per step.*")
def test_statistics_wait_for_nothing_after_the_first_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in backward nor in the step; what was found wrong, the host reads when it is known."""
    monkeypatch.setattr("trustratio.optimizers.gradient_statistics.verdict.Verdict.give", lambda self, *args: None)
    parameters = [torch.nn.Parameter(torch.empty(shape, device=META)) for shape in ((5, 7), (8, 4), (5,), (), (8, 4))]
    optimizer = create_optimizer(name, parameters, lr=0.1, implementation="eager")
    for step in range(4):
        for _ in range(2):
            loss = sum((p * p).sum() for p in parameters[step % 2 :])
            with NothingFromTheHost() if step >= 2 else nullcontext():
                loss.backward()  # type: ignore[union-attr]
        with NothingFromTheHost() if step >= 2 else nullcontext():
            optimizer.step()
        optimizer.zero_grad()
