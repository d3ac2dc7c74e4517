"""A step on an accelerator waits for nothing: on the device "meta", whose tensors have no numbers to wait for."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from trustratio.optimizers import OPTIMIZERS, create_optimizer
from trustratio.optimizers.formulas.rounding import Rounding
from trustratio.optimizers.kernels.interface import GroupOperands, Operands
from trustratio.optimizers.sharding.layout import Layer, Layout, Shard
from trustratio.optimizers.stepping.plan import Plan

from ..swept import SWEPT

META = torch.device("meta")
PLAIN = [name for name in SWEPT if OPTIMIZERS[name].group_statistics is None]


class NothingFromTheHost(TorchFunctionMode):
    """Fails where host data goes to the device by a copy that waits. Reading from it fails by itself."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.__getitem__:
            assert not isinstance(args[1], list), "an index made of a list"
        on_host = function in (torch.tensor, torch.as_tensor) or (args and getattr(args[0], "is_cpu", False))
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


def test_tables_in_a_captured_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay where they are, and cannot be made anew while a graph is captured."""
    triton_kernels = pytest.importorskip("trustratio.optimizers.kernels.triton_kernels")
    capturing = [False]
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(triton_kernels, "_captured", {})
    sweeps = object.__new__(triton_kernels.TritonSweeps)
    sweeps.device, sweeps.cache = torch.device("cuda"), {}

    def table(addresses: list[int]) -> torch.Tensor:
        content = {"weights": [8, 9], "gradients": addresses}
        found: torch.Tensor = sweeps._table(("pointers",), content, lambda: torch.tensor(addresses))
        return found

    first = table([1, 2])
    assert table([1, 2]) is first
    capturing[0] = True
    assert table([1, 2]) is first
    with pytest.raises(RuntimeError, match=r"pointers of gradients changed.*zero_grad\(set_to_none=False\)"):
        table([3, 4])
    with pytest.raises(RuntimeError, match=r"the blocks of 0 changed since the last step, and a CUDA graph cannot"):
        sweeps._table(("blocks", 0), [], list)
    capturing[0] = False
    watched = weakref.ref(first)
    del first
    assert table([3, 4]).tolist() == [3, 4]
    assert watched() is not None
    of_no_graph = weakref.ref(table([5, 6]))
    table([7, 8])
    assert of_no_graph() is None


def test_gammas_of_a_captured_graph_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys are made while a graph is captured, in memory of its own; the gammas were there before."""
    triton_kernels = pytest.importorskip("trustratio.optimizers.kernels.triton_kernels")
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(triton_kernels, "_captured", {})
    rounding = Rounding(torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64), True)
    layout = Layout("test", (), (), (), ())
    operands = Operands(layout, [], [], {}, {0: GroupOperands({}, range(2), [], None, rounding)})  # type: ignore[arg-type]
    sweeps = triton_kernels.TritonSweeps(operands, [], {})
    sweeps.device = torch.device("cuda")
    given = sweeps._rounding(0, torch.zeros(1))
    assert given[1] is rounding.keys
    assert given[2] is rounding.gammas
    gammas = weakref.ref(rounding.gammas)
    del rounding, operands, sweeps, given
    assert gammas() is not None


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
