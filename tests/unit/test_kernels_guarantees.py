"""What holds whoever computes a step: when nothing is written, what is refused, what is kept."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys

import pytest
import torch

from trustratio.optimizers import LAMB, LARS, OPTIMIZERS, create_optimizer
from trustratio.optimizers.kernels import cpu, interface
from trustratio.optimizers.kernels.interface import Operands
from trustratio.optimizers.sharding.layout import LayoutError

from .kernel_runs import LR, needs_compiler
from .test_generic import backward, make_gradients, make_parameters, train, values

pytestmark = [
    pytest.mark.usefixtures("many_threads"),
    pytest.mark.filterwarnings("ignore:.*group.* of samples per step.*"),
]


@needs_compiler
@pytest.mark.parametrize("name", [name for name, entry in OPTIMIZERS.items() if entry.group_statistics])
@pytest.mark.parametrize("implementation", ["cpu", "eager"])
def test_a_gradient_that_is_not_finite_changes_nothing(name: str, implementation: str) -> None:
    parameters = make_parameters()
    optimizer = create_optimizer(name, list(parameters.items()), lr=LR, implementation=implementation)
    train(optimizer, parameters, [0])
    before, state = values(parameters), copy.deepcopy(optimizer.state_dict()["state"])
    gradients = make_gradients(1, parameters)
    gradients["conv"][3, 0, 0] = torch.inf
    optimizer.zero_grad()
    backward(parameters, gradients)
    optimizer.step()
    assert all(torch.equal(parameters[layer], before[layer]) for layer in before)
    for index, expected in state.items():
        found = optimizer.state_dict()["state"][index]
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@needs_compiler
@pytest.mark.parametrize("implementation", ["cpu", "eager"])
def test_state_is_not_written_before_the_groups_are_known_to_be_finite(implementation: str) -> None:
    """LAMB with watched groups: what travels with its only reduction may still stop the step."""
    parameters = make_parameters()
    optimizer = LAMB(list(parameters.items()), implementation=implementation)
    optimizer.collect_group_norms()
    train(optimizer, parameters, [0])
    before = copy.deepcopy(optimizer.state_dict()["state"])
    gradients = make_gradients(1, parameters)
    gradients["bias"][0, 0] = torch.inf
    optimizer.zero_grad()
    backward(parameters, gradients)
    optimizer.step()
    for index, expected in before.items():
        assert all(torch.equal(optimizer.state_dict()["state"][index][key], value) for key, value in expected.items())


@needs_compiler
def test_autograd_sees_that_weights_changed() -> None:
    w = torch.nn.Parameter(torch.ones(3))
    optimizer = LARS([w], lr=0.1, implementation="cpu")
    loss = (w * w).sum()
    w.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_compiler
def test_tensors_that_move_between_steps() -> None:
    """Wrappers give weights, gradients and state new storage."""
    moved, kept = (torch.nn.Parameter(torch.linspace(-1, 1, 1001).view(7, 143)) for _ in range(2))
    optimizers = [LAMB([p], implementation="cpu") for p in (moved, kept)]
    for step in range(3):
        for p, optimizer in zip((moved, kept), optimizers, strict=True):
            p.grad = torch.linspace(1, 2 + step, 1001).view(7, 143)
            optimizer.step()
        moved.data = moved.data.clone()
        state = optimizers[0].state[moved]
        state["exp_avg"] = state["exp_avg"].t().clone().t() if step else state["exp_avg"].clone()
    assert torch.equal(moved, kept)


@pytest.mark.parametrize("implementation", [pytest.param("cpu", marks=needs_compiler), "eager"])
def test_a_gradient_of_another_shape_is_refused(implementation: str) -> None:
    """Compiled sweeps would read beyond its end."""
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    optimizer = LAMB([("bias", p)], implementation=implementation)
    p.data = torch.ones(100_000)
    with pytest.raises(LayoutError, match=r"gradient of bias has shape \(4,\), but the parameter has \(100000,\)"):
        optimizer.step()
    assert (p == 1).all()


@needs_compiler
def test_state_of_another_shape_or_device_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    optimizer = LAMB([("bias", p)], implementation="cpu")
    optimizer.step()
    state = optimizer.state[p]
    kept, state["exp_avg"] = state["exp_avg"], torch.zeros(3)
    with pytest.raises(LayoutError, match=r"exp_avg of bias is not cut like .* \(of shape \(3,\) beside \(4,\)\)"):
        optimizer.step()
    state["exp_avg"] = torch.zeros(4, device="meta")
    assert cpu.KERNELS.serves(Operands(optimizer._plan().layout, [p], [p.grad], {"exp_avg": [kept]})) == [True]
    assert cpu.KERNELS.serves(Operands(optimizer._plan().layout, [p], [p.grad], {"exp_avg": [state["exp_avg"]]})) == [
        False
    ]


@pytest.mark.parametrize("implementation", [pytest.param("cpu", marks=needs_compiler), "eager"])
def test_tables_of_sets_of_gradients_do_not_pile_up(implementation: str) -> None:
    ps = [torch.nn.Parameter(torch.ones(3, 3)) for _ in range(6)]
    optimizer = LAMB(ps, implementation=implementation)
    for step in range(40):
        for bit, p in enumerate(ps):
            p.grad = torch.ones(3, 3) if step >> bit & 1 else None
        optimizer.step()
    (plan,) = optimizer._plans.values()
    recent = [table for table in plan.cache.values() if isinstance(table, interface.Recent)]
    assert recent
    assert all(len(table.made) <= interface.SETS_OF_GRADIENTS for table in recent)
    assert len(plan.cache) <= 6  # one for each kind of table


@needs_compiler
@pytest.mark.parametrize("steps_before", [0, 1])
def test_steps_in_a_fork(steps_before: int) -> None:
    """Where the threads of torch's OpenMP runtime are gone. Torch itself works there with one thread only."""
    program = f"""
import os, signal, time, torch
from trustratio.optimizers import LAMB
torch.set_num_threads(2)
torch.ones(1000, 1000).exp()  # starts torch's threads
ps = [torch.nn.Parameter(torch.ones(100, 100)) for _ in range(100)]
optimizer = LAMB(ps, implementation="cpu")
for p in ps:
    p.grad = torch.ones(100, 100)
for _ in range({steps_before}):
    optimizer.step()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    torch.get_num_threads = lambda: 2
optimizer.step()
if child == 0:
    os._exit(0 if all(0 < p[0, 0] < 1 for p in ps) else 1)
for _ in range(100):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        break
    time.sleep(0.3)
else:
    os.kill(child, signal.SIGKILL)
assert ended and os.waitstatus_to_exitcode(status) == 0
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs a C compiler")
def test_compiled_functions_are_there_where_a_compiler_is() -> None:
    """Their build is optional, so nothing else tells that the C file does not compile."""
    assert cpu.KERNELS.missing() is None
