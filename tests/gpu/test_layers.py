"""Layers of all kinds on a device: in another order in memory, without gradient, on another device."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from trustratio.optimizers import OPTIMIZERS

from ..swept import SWEPT
from .cases import Steps, assert_same, make

Tensor = torch.Tensor

ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda t: t.clone().to(memory_format=torch.channels_last),
    "reversed": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "with gaps": lambda t: torch.stack([t, t], dim=-1)[..., 0],
}
SHAPE = (18, 5, 7, 9)


@pytest.mark.parametrize("which", ["both", "weights", "gradients"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["lamb", "lars", "lans"])
def test_the_order_in_memory_changes_nothing(name: str, order: str, which: str, device: str) -> None:
    steps = Steps(name, device, shapes={"conv": SHAPE, "other": SHAPE})
    if which != "gradients":
        for p in steps.parameters.values():
            p.data = ORDERS[order](p.data)
            assert not p.is_contiguous()
    for step in range(3):
        gradients = steps.gradients(step)
        before = {layer: p.detach().cpu().double() for layer, p in steps.parameters.items()}
        steps.optimizer.zero_grad()
        for layer, p in steps.parameters.items():
            g = gradients[layer].mean(dim=0).to(p)
            p.grad = g if which == "weights" else ORDERS[order](g)
        steps.optimizer.step()
        steps.compare(before, gradients)


@pytest.mark.parametrize("name", SWEPT)
def test_gradients_that_are_missing_at_some_steps(name: str, device: str) -> None:
    """Other layers each time, once all; each layer's state goes on where it was."""
    steps = Steps(name, device)
    layers = ("blocks", "odd", "bias", "scalar", "wide")
    for step, missing in enumerate(((), layers[:1], layers[1:3], layers[3:], layers, ("wide",), ())):
        before = {layer: p.detach().clone() for layer, p in steps.parameters.items()}
        steps.step(step, without=missing)
        assert all(torch.equal(steps.parameters[layer], before[layer]) for layer in missing)
    assert steps.optimizer.state[steps.parameters["wide"]]["step"].item() == 4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_default_device_does_not_matter(name: str, device: str) -> None:
    """Where tensors are made if nobody says so: on the GPU, or nowhere."""
    steps = Steps(name, device)
    gradients = [steps.gradients(step) for step in range(2)]
    for of_step in gradients:
        before = {layer: p.detach().cpu().double() for layer, p in steps.parameters.items()}
        steps.backward(of_step)
        torch.set_default_device("cuda" if device == "cuda" else "meta")
        try:
            steps.optimizer.step()
        finally:
            torch.set_default_device(None)
        steps.compare(before, of_step)


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_another_thread_takes_the_step(name: str, device: str) -> None:
    """Whose current device and stream are its own."""
    steps = Steps(name, device)
    steps.step(0)
    before = {layer: p.detach().cpu().double() for layer, p in steps.parameters.items()}
    gradients = steps.gradients(1)
    steps.backward(gradients)
    thread = threading.Thread(target=steps.optimizer.step)
    thread.start()
    thread.join()
    steps.compare(before, gradients)


def test_a_step_on_a_stream_of_its_own(on_gpu: None) -> None:
    parameters, optimizer = make("lamb", "cuda", implementation="triton")
    expected, reference = make("lamb", "cpu", implementation="eager")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    stream.synchronize()
    for _ in range(3):
        reference.step()
    assert_same(parameters, expected, 1e-6)


@pytest.mark.parametrize("name", ["lamb", "lars", "lans"])
def test_parameters_on_the_cpu_beside_a_gpu(name: str, on_gpu: None) -> None:
    """They are on another device than the current one."""
    parameters, optimizer = make(name, "cpu")
    others, beside = make(name, "cuda", implementation="triton")
    expected, reference = make(name, "cpu", implementation="eager")
    for _ in range(2):
        for one in (optimizer, beside, reference):
            one.step()
    assert_same(parameters, expected, 1e-6)
    assert_same(others, expected, 1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", ["lamb", "lars", "lans"])
def test_parameters_on_another_gpu_than_the_current_one(name: str) -> None:
    steps = Steps(name, "cuda:1")
    for step in range(2):
        steps.step(step)
