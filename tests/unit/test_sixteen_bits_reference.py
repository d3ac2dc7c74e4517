"""Every optimizer with state and weights of 16 bits against its float64 reference, which rounds number by number.

Each step starts from what the optimizer has, so that what differs does not add up. fp32 and fp64 differ in the last
digit of a number, and then go another way by a chance of about 2^-16: very few numbers may.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from trustratio.optimizers import OPTIMIZERS

from ..reference import REFERENCES
from ..references.rounding import Chances, RoundedState, rounded
from .test_generic import (
    LR,
    OWN_OPTIONS,
    SHAPES,
    all_variants,
    backward,
    make,
    make_gradients,
    make_parameters,
    values,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*group.* of samples per step.*", "ignore:.*sample of the curvature.*", "ignore:.*did not move in this step"
)

STEPS = 10
SEED = 5
OTHERS = 3
"""How many numbers of a whole run may go another way; about a tenth of one is expected."""

NAMES = {
    "exp_avg": "m",
    "exp_avg_sq": "v",
    "exp_avg_gsnr": "p",
    "exp_avg_var": "s",
    "max_exp_avg_var": "largest",
    "past_gradient_0": "newest",
}
"""What references call element-wise state."""


def reference_name(optimizer: str, name: str) -> str:
    if name == "momentum_buffer":
        return "u" if optimizer == "sngm" else "v"
    return NAMES.get(name, name)


class Reference:
    """The reference of all layers, step by step.

    Args:
        name: The optimizer's.
        options: The optimizer's.
        state: Names of the element-wise state.
        in_16_bits: Whether that is bf16.
        resolution: Of the parameters' dtype.
    """

    def __init__(self, name: str, options: dict[str, Any], state: tuple[str, ...], in_16_bits: bool, resolution: float):
        self.name, self.options = name, options
        self.names = {reference_name(name, one): one for one in state}
        self.places = {one: index for index, one in enumerate(self.names)} if in_16_bits else {}
        self.states: dict[str, dict[str, Any]] = {layer: {"resolution": resolution} for layer in SHAPES}
        # A maximum of what bf16 has needs no rounding, and gradients are rounded when they are first kept.
        for one in list(self.places):
            if one == "largest" or (one.startswith("past_gradient") and one != "newest"):
                del self.places[one]

    def step(self, number: int, weights: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]) -> Any:
        """The new weights in fp64; `states` has what is kept of the state."""
        norm = sum(g.mean(dim=0).square().sum().item() for g in gradients.values()) ** 0.5
        found = {}
        for layer, groups in gradients.items():
            state = self.states[layer]
            state.update(model_gradient_norm=norm, group_gradients=groups)
            state["keep"] = RoundedState(Chances(SEED, layer, number + 1), self.places)
            found[layer], _ = REFERENCES[self.name](weights[layer], groups.mean(dim=0), state, **self.options)
        return found

    def take(self, layer: str, state: dict[str, Any]) -> int:
        """Go on from the optimizer's state; how many of its numbers are other ones."""
        others = 0
        for one, theirs in self.names.items():
            if one not in self.states[layer]:
                continue
            mine, its = self.states[layer][one], state[theirs].double()
            if state[theirs].dtype == torch.bfloat16:
                others += int((mine != its).sum())
                torch.testing.assert_close(its, mine, rtol=2**-7, atol=2**-133)
            else:
                torch.testing.assert_close(its, mine, rtol=2e-6, atol=2e-6)
            self.states[layer][one] = its
        return others


def given_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    return {"lr": LR, "weight_decay": 0.1, **OWN_OPTIONS.get(name, {}), **options}


@all_variants
@pytest.mark.parametrize("implementation", [None, "eager"])
def test_state(name: str, options: dict[str, Any], implementation: str | None) -> None:
    given = given_options(name, options)
    parameters = make_parameters()
    optimizer = make(
        name, parameters, state_dtype="bfloat16", rounding_seed=SEED, implementation=implementation, **given
    )
    reference = Reference(name, given, optimizer.element_state, True, torch.finfo(torch.float32).eps)
    others = 0
    for number in range(STEPS):
        before = values(parameters)
        optimizer.zero_grad()
        gradients = make_gradients(number, parameters)
        backward(parameters, gradients)
        optimizer.step()
        wanted = reference.step(number, {layer: w.double() for layer, w in before.items()}, gradients)
        for layer, p in parameters.items():
            other = reference.take(layer, optimizer.state[p])
            others += other
            # One number that went another way is in the norm of all.
            error = (p.detach().double() - wanted[layer]).abs().max()
            largest = max((wanted[layer] - before[layer].double()).abs().max(), before[layer].abs().max())
            assert error <= (2e-6 if not other else 1e-2) * largest, layer
    assert others <= OTHERS
    if optimizer.element_state:
        assert all(s[n].dtype == torch.bfloat16 for s in optimizer.state.values() for n in optimizer.element_state)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("master", ["stochastic", "kahan"])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", [None, "eager"])
def test_weights(name: str, master: str, state_dtype: str, implementation: str | None) -> None:
    given = given_options(name, {})
    parameters = make_parameters(torch.bfloat16)
    optimizer = make(
        name,
        parameters,
        state_dtype=state_dtype,
        master=master,
        rounding_seed=SEED,
        implementation=implementation,
        **given,
    )
    in_16_bits = state_dtype == "bfloat16"
    reference = Reference(name, given, optimizer.element_state, in_16_bits, torch.finfo(torch.bfloat16).eps)
    others = 0
    for number in range(STEPS):
        before = {layer: sum_of(optimizer, p) for layer, p in parameters.items()}
        optimizer.zero_grad()
        gradients = make_gradients(number, parameters)
        backward(parameters, gradients)
        optimizer.step()
        wanted = reference.step(number, before, gradients)
        for layer, p in parameters.items():
            other = reference.take(layer, optimizer.state[p])
            others += other
            if other:
                continue  # the ratio is another one
            if master == "stochastic":
                chances = Chances(SEED, layer, number + 1)
                new = [rounded(w, chances.of_weights(i)) for i, w in enumerate(wanted[layer].flatten().tolist())]
                others += int((p.detach().double().flatten() != torch.tensor(new, dtype=torch.float64)).sum())
                torch.testing.assert_close(p.detach().double(), wanted[layer], rtol=2**-7, atol=1e-6)
            else:
                total = wanted[layer]
                # The rest, at most 2^-8 of it, is rounded up or down to what bf16 has.
                assert ((sum_of(optimizer, p) - total).abs() <= 2**-15 * total.abs() + 2e-6).all()
                assert ((p.detach().double() - total).abs() <= 2**-8 * (1 + 2**-6) * total.abs() + 2e-6).all()
                assert torch.equal(p.detach(), sum_of(optimizer, p).float().bfloat16())
    assert others <= OTHERS


def sum_of(optimizer: Any, p: torch.nn.Parameter) -> torch.Tensor:
    """The weights that the optimizer has, in fp64."""
    rest = optimizer.state[p].get("compensation")
    return p.detach().double() if rest is None else p.detach().double() + rest.double()


def test_every_option_of_storage_is_one_of_all_optimizers() -> None:
    for entry in OPTIMIZERS.values():
        parameters = inspect.signature(entry.optimizer_class).parameters
        assert {"state_dtype", "master", "rounding_seed"} <= set(parameters)
