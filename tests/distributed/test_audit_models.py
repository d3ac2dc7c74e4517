"""Models that the audit refuses in a sentence, before or while ranks make them."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from trustratio.integrations.audits.errors import CannotAudit
from trustratio.integrations.audits.examination import examine
from trustratio.integrations.audits.reading import configuration_of
from trustratio.integrations.audits.subject import Subject
from trustratio.integrations.audits.verdict import EXACT, REFUSED

from . import audited
from .pool import WorkerPool


class OfTheRank(torch.nn.Module):
    """A model that is made otherwise where there is a rank: in one process there is none."""

    without_gradient: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        names = ("first", "second", "third")
        self.layers = torch.nn.ModuleDict({name: torch.nn.Linear(4, 4) for name in names})
        self.register_buffer("mask", torch.ones(3))
        if "RANK" in os.environ:
            self.change()

    def change(self) -> None:
        pass


class OrderedByRank(OfTheRank):
    def change(self) -> None:
        self.layers = torch.nn.ModuleDict({name: self.layers[name] for name in ("third", "second", "first")})


class FrozenByRank(OfTheRank):
    def change(self) -> None:
        self.layers["second"].requires_grad_(False)


class IdleByRank(OfTheRank):
    def change(self) -> None:
        self.without_gradient = ("layers.second.weight",)


class BufferByRank(OfTheRank):
    def change(self) -> None:
        self.register_buffer("mask", torch.ones(4))


class DtypeByRank(OfTheRank):
    def change(self) -> None:
        self.layers["second"].double()


class MemoryByRank(OfTheRank):
    def change(self) -> None:
        self.layers["second"].weight = torch.nn.Parameter(torch.ones(4, 4).T)


def single_pixels() -> torch.nn.Module:
    """Called contiguous by torch, with other strides."""
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1)).to(memory_format=torch.channels_last)


def without_dimensions() -> torch.nn.Module:
    model = audited.two_layers()
    model.temperature = torch.nn.Parameter(torch.ones(()))
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (OrderedByRank, "its layers in another order on rank 0 than in one process: names, order"),
        (FrozenByRank, "other layers on rank 0 than in one process (layers.second.bias; layers.second.weight)"),
        (IdleByRank, "other layers on rank 0 than in one process (layers.second.weight)"),
        (BufferByRank, "other layers on rank 0 than in one process (mask)"),
        (DtypeByRank, "other layers on rank 0 than in one process (layers.second.bias; layers.second.weight)"),
        (MemoryByRank, "other layers on rank 0 than in one process (layers.second.weight)"),
    ],
)
@pytest.mark.parametrize("world_size", [2])
def test_models_that_are_others_on_a_rank(pool: WorkerPool, model: Any, message: str, world_size: int) -> None:
    with pytest.raises(CannotAudit) as caught:
        examine(Subject(audited.adamw, model), configuration_of("ddp"), pool)
    assert message in str(caught.value)
    assert examine(Subject(audited.adamw, OfTheRank), configuration_of("ddp"), pool).verdict == EXACT


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (audited.images, "whose elements lie in another order in memory, as 0.weight"),
        (single_pixels, "whose elements lie in another order in memory, as 0.weight"),
        (without_dimensions, "DeepSpeed takes no parameter without dimensions, as temperature"),
    ],
)
@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("world_size", [2])
def test_parameters_that_deepspeed_does_not_take(
    pool: WorkerPool, model: Any, message: str, stage: int, world_size: int
) -> None:
    report = examine(Subject(audited.adamw, model), configuration_of({"zero_optimization": {"stage": stage}}), pool)
    assert report.verdict == REFUSED
    assert message in report.sentence
