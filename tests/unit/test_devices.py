"""Steps where the default device is another one, and on devices that lack what others have."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from trustratio.integrations.checkpoints import load_optimizer_state, save_optimizer_state
from trustratio.optimizers import OPTIMIZERS, CowClip, create_optimizer
from trustratio.optimizers.kernels import cpu
from trustratio.optimizers.noise_scale import gradient_noise

from .test_generic import make_parameters, train, values

IMPLEMENTATIONS = ["eager", "cpu", "triton"]

pytestmark = pytest.mark.filterwarnings("ignore:.*group.* of samples per step.*")


@contextmanager
def default_device(way: str) -> Iterator[None]:
    """A stand-in for an accelerator: what lands there has no numbers."""
    if way == "context":
        with torch.device("meta"):
            yield
        return
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)
        # get_default_device() of torch 2.9 trips over None.
        vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)


def needed(implementation: str) -> None:
    if implementation == "cpu" and cpu.KERNELS.missing() is not None:
        pytest.skip("built without a C compiler")
    if implementation == "triton":
        pytest.importorskip("triton")


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_lands_on_the_default_device(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needed(implementation)
    expected, found = make_parameters(), make_parameters()
    given = {"lr": 0.05, "implementation": implementation}
    optimizer = create_optimizer(name, list(expected.items()), **given)
    train(optimizer, expected, range(3))
    with default_device("context"):
        other = create_optimizer(name, list(found.items()), **given)
    # The step alone, as the tests' own tensors would be on the default device too.
    original = type(other).step
    monkeypatch.setattr(type(other), "step", lambda self: _inside(original, self))
    train(other, found, range(3))
    with default_device("set"):
        ratios = other.trust_ratios()
        noise = gradient_noise(other) if other.statistics is not None else {}
        other.load_state_dict(copy.deepcopy(other.state_dict()))
    assert ratios == optimizer.trust_ratios()
    assert noise == (gradient_noise(optimizer) if optimizer.statistics is not None else {})
    assert all(torch.equal(w, values(expected)[layer]) for layer, w in values(found).items())
    for kept in other.state.values():
        assert all(value.device.type == "cpu" for value in kept.values() if isinstance(value, torch.Tensor))


def _inside(step: Any, optimizer: Any) -> Any:
    with default_device("set"):
        return step(optimizer)


def test_rows_on_another_default_device() -> None:
    results = []
    for way in (None, "context", "set"):
        torch.manual_seed(0)
        embedding, ids = torch.nn.Embedding(7, 3), torch.tensor([0, 1, 1, 6])
        optimizer = CowClip(embedding.parameters(), lr=0.1, ratio=1e-3, cowclip=True)
        for _ in range(2):
            optimizer.zero_grad()
            embedding(ids).sum().backward()
            optimizer.count_ids(embedding.weight, ids)
            if way is None:
                optimizer.step()
            else:
                with default_device(way):
                    optimizer.step()
        results.append(embedding.weight.detach().clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("way", ["context", "set"])
def test_files_on_another_default_device(way: str, tmp_path: Path) -> None:
    expected, found = make_parameters(), make_parameters()
    optimizer, other = (create_optimizer("novograd", list(p.items()), lr=0.05) for p in (expected, found))
    train(optimizer, expected, range(2))
    with default_device(way):
        save_optimizer_state(optimizer, tmp_path / "state")
        load_optimizer_state(other, tmp_path / "state")
    assert all(torch.equal(w, values(expected)[layer]) for layer, w in values(found).items())
    train(optimizer, expected, [2])
    train(other, found, [2])
    assert all(torch.equal(w, values(expected)[layer]) for layer, w in values(found).items())
