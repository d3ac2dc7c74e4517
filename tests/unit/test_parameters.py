"""What is given in place of parameters: one sentence for each mistake, the same from every optimizer."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, LARS, TrustRatio

OPTIMIZERS: dict[str, Any] = {
    "TrustRatio": partial(TrustRatio, torch.optim.AdamW, lr=0.1),
    "LAMB": partial(LAMB, lr=0.1),
    "LARS": partial(LARS, lr=0.1),
}
MODEL = torch.nn.Linear(2, 2)

MISTAKES: dict[str, tuple[Any, type[Exception], str]] = {
    "None": (None, TypeError, "params must be parameters, .*, got None"),
    "text": ("weight", TypeError, "got 'weight'"),
    "model": (MODEL, TypeError, r"got the model itself \(Linear\): write model.named_parameters\(\)"),
    "tensor": (MODEL.weight, TypeError, "got one tensor: put it in a list"),
    "group": ({"params": [MODEL.weight]}, TypeError, "got one dict: put it in a list"),
    "dict": (dict(MODEL.named_parameters()), TypeError, r"got one dict: write model.named_parameters\(\)"),
    "empty": ([], ValueError, "got an empty parameter list: a generator"),
    "models": ([MODEL], TypeError, "got a list with Linear.* in it"),
    "no params": ([{"lr": 0.1}], ValueError, "group 0 has no \"params\", only 'lr'"),
    "params None": ([{"params": None}], TypeError, 'the "params" of group 0 must be .*, got None'),
    "params model": ([{"params": MODEL}], TypeError, 'the "params" of group 0 must be .*, got a Linear'),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(name: str, mistake: str) -> None:
    given, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=message):
        OPTIMIZERS[name](given)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_generator_can_be_used_once(name: str) -> None:
    generator = MODEL.parameters()
    assert len(OPTIMIZERS[name](generator).param_groups[0]["params"]) == 2
    with pytest.raises(ValueError, match="can be gone over only once"):
        OPTIMIZERS[name](generator)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_group_may_be_empty(name: str) -> None:
    assert [len(g["params"]) for g in OPTIMIZERS[name]([{"params": []}, {"params": MODEL.weight}]).param_groups] == [
        0,
        1,
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trust_bounds": (1e300, 1e308)}, r"trust_bounds\[0\] must be at most 3.4e\+38, the largest number of fp32"),
        ({"trust_bounds": (0.0, 1e300)}, r"trust_bounds\[1\] must be at most 3.4e\+38"),
        ({"lr": 1e300}, "lr must be at most"),
        ({"weight_decay": 1e300}, "weight_decay must be at most"),
        ({"eps": 1e300}, "eps must be at most"),
    ],
)
def test_numbers_beyond_fp32_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAMB(MODEL.parameters(), **options)
