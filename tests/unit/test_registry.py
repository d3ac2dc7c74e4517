"""What the registry says of an optimizer is what its step does, and what can be registered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, OPTIMIZERS, create_optimizer, register_optimizer
from trustratio.optimizers.sharding.layout import Layout

from .test_generic import LR, make_parameters, train


@pytest.mark.filterwarnings("ignore:.*group.* of samples per step.*")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sums_are_those_of_a_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reduced: list[int] = []
    reduce = Layout.reduce

    def counting(layout: Layout, sums: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        reduced.append(len(sums))
        return reduce(layout, sums, *arguments, **options)

    parameters = make_parameters()
    optimizer = create_optimizer(name, list(parameters.items()), lr=LR)
    train(optimizer, parameters, [0])  # which proves the layout besides
    monkeypatch.setattr(Layout, "reduce", counting)
    train(optimizer, parameters, [1])
    assert tuple(reduced) == OPTIMIZERS[name].sums


class Another(LAMB):
    pass


def test_registering(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = replace(OPTIMIZERS["lamb"], optimizer_class=Another)
    monkeypatch.setitem(OPTIMIZERS, "another", entry)  # forgotten afterwards
    register_optimizer("another", entry)
    assert type(create_optimizer("Another", make_parameters().values())) is Another
    with pytest.raises(ValueError, match="name must be a new one, got 'lamb', which LAMB has"):
        register_optimizer("lamb", entry)
    with pytest.raises(ValueError, match="name must be in lower case, got 'Other'"):
        register_optimizer("Other", entry)
    assert OPTIMIZERS["lamb"].optimizer_class is LAMB


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "Adagrad"])
def test_a_name_of_torchs_leads_to_its_class(name: str) -> None:
    for spelled in (name, name.lower()):
        with pytest.raises(ValueError, match=f"torch.optim.{name} is torch's own.*'trust_ratio' with base_class"):
            create_optimizer(spelled, make_parameters().values())
    with pytest.raises(ValueError, match=r"nearest: .*stableadamw"):
        create_optimizer("adamw", make_parameters().values())
