"""What stands for an optimizer: proxies of its class, wrappers that delegate, and compiled steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trustratio.optimizers import CLARS, LAMB, create_optimizer
from trustratio.optimizers.noise_scale import gradient_noise

from .test_torch_contract import backward, train, values, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*group.* of samples per step.*")


class Copying:
    """As Lightning makes them: of the optimizer's class too, with most of its attributes."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.__dict__ = {key: value for key, value in optimizer.__dict__.items() if key not in ("step", "__del__")}
        self.__class__ = type(f"Copying{type(optimizer).__name__}", (type(self), type(optimizer)), {})
        self._optimizer = optimizer

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)


class Forwarding:
    """Of the optimizer's class too, and forwards what is read."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.__class__ = type(f"Forwarding{type(optimizer).__name__}", (type(self), type(optimizer)), {})
        self._optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_optimizer"], name)

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)


class Delegating:
    """As most wrappers are: of no optimizer's class, and forwards what is read."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["optimizer"], name)


PROXIES = (Copying, Forwarding, Delegating)
all_proxies = pytest.mark.parametrize("proxy", PROXIES)


def two_groups_of_samples(optimizer: Any, layers: dict[str, Any], step: int) -> None:
    optimizer.zero_grad()
    backward(layers, step)
    backward(layers, step + 50)
    optimizer.step()


@all_proxies
@pytest.mark.parametrize("started", [False, True])
def test_norms_are_collected_through_a_proxy(proxy: Any, started: bool) -> None:
    layers = weights()
    optimizer = LAMB(layers.items())
    if started:
        train(optimizer, layers, 0)
    other = proxy(optimizer)
    other.collect_group_norms()
    assert other.statistics is optimizer.statistics is not None
    two_groups_of_samples(other, layers, 1)
    noises = [gradient_noise(one) for one in (other, optimizer)]
    assert noises[0].model.noise == noises[1].model.noise > 0
    second = proxy(optimizer)  # a program may make several
    two_groups_of_samples(second, layers, 2)
    assert second.statistics.norms() == optimizer.statistics.norms()
    assert all(norms.groups == 2 for norms in optimizer.statistics.norms().values())


@all_proxies
def test_the_proxy_may_go(proxy: Any) -> None:
    layers = weights()
    optimizer = LAMB(layers.items())
    proxy(optimizer).collect_group_norms()
    two_groups_of_samples(optimizer, layers, 0)
    assert len(optimizer.statistics.norms()) == 3  # type: ignore[union-attr]


@all_proxies
def test_ratios_groups_and_gradients_through_a_proxy(proxy: Any) -> None:
    layers = weights()
    optimizer = CLARS([layers["matrix"], layers["bias"]], lr=0.1)
    other = proxy(optimizer)
    train(other, layers, 0)
    other.add_param_group({"params": layers["other"]})
    train(other, layers, 1)
    assert other.trust_ratios() == optimizer.trust_ratios()
    assert len(other.trust_ratios()) == 3
    assert [group["step"] for group in optimizer.param_groups] == [2, 2]


@pytest.mark.parametrize("proxy", PROXIES[:2])
def test_the_implementation_is_set_through_a_proxy_of_the_class(proxy: Any) -> None:
    optimizer = LAMB(weights().values())
    proxy(optimizer).implementation = "eager"
    assert optimizer.implementation == "eager"
    with pytest.raises(ValueError, match="implementation must be one of"):
        proxy(optimizer).implementation = "fast"


@pytest.mark.parametrize("name", ["lamb", "vrlars"])
def test_a_compiled_step_is_one_graph_break(name: str) -> None:
    from torch._dynamo.utils import counters

    layers, plain = weights(), weights()
    optimizer = create_optimizer(name, layers.values(), lr=0.1)
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(optimizer.step, backend="eager")
    for number in range(5):
        optimizer.zero_grad()
        backward(layers, number)
        step()
        if number == 1:
            compiled = counters["stats"]["unique_graphs"], counters["frames"]["total"]
    assert (counters["stats"]["unique_graphs"], counters["frames"]["total"]) == compiled
    assert sum(counters["graph_break"].values()) <= 1
    train(create_optimizer(name, plain.values(), lr=0.1), plain, *range(5))
    assert all(torch.equal(values(layers)[layer], plain[layer]) for layer in plain)
    torch._dynamo.reset()


@pytest.mark.parametrize("proxy", PROXIES[:2])
def test_who_averages_is_set_through_a_proxy_of_the_class(proxy: Any, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        optimizer = LAMB(weights().values())
        proxy(optimizer).data_parallel_group = group
        assert optimizer.data_parallel_group is group
    finally:
        torch.distributed.destroy_process_group()
