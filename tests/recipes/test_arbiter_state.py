"""What an Arbiter goes on from, and what it refuses before it changes anything."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from trustratio.recipes.rules.arbiter import Arbiter

from .test_arbiter import SIZES, agent_of, alike, head_of, validation_of


def test_a_restored_arbiter_goes_on_alike(tmp_path):
    def fresh() -> Arbiter:
        return Arbiter(agent_of(), 2, 16, 256, lr=0.03, alpha_lr=0.1)

    def go_on(arbiter: Arbiter) -> list[float]:
        rows, head = validation_of(), head_of()
        inputs = torch.randn(12, 2, generator=torch.Generator().manual_seed(1))
        out = []
        for _ in range(3):
            out += [arbiter.update(inputs, rows, head) for _ in range(3)]
            out.append(float(arbiter.next_batch()))
        return out

    one = fresh()
    go_on(one)
    one.update(torch.ones(2, 2), validation_of(), head_of())
    torch.save(one.state_dict(), tmp_path / "arbiter.pt")
    other = fresh()
    other.load_state_dict(torch.load(tmp_path / "arbiter.pt", weights_only=True))
    assert go_on(other) == go_on(one)
    empty = fresh()
    empty.load_state_dict(fresh().state_dict())
    assert go_on(empty) == go_on(fresh())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smallest": 8}, "smallest=16, and this one has 8"),
        ({"largest": 512}, "largest=256, and this one has 512"),
        ({"unit": 8}, "unit=1, and this one has 8"),
        ({"width": 3}, "width=2, and this one has 3"),
        ({"lr": 0.5}, r"lr=1e-05, and this one has 0\.5"),
        ({"alpha_lr": 0.5}, r"alpha_lr=0\.0001, and this one has 0\.5"),
    ],
)
def test_a_state_of_other_arguments_is_refused_by_name(options, message):
    saved = Arbiter(agent_of(), 2, 16, 256)
    saved.update(torch.ones(2, 2), validation_of(), head_of())
    torch.manual_seed(5)
    other = Arbiter(nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 4)), **{**SIZES, **options})
    before = other.state_dict()
    with pytest.raises(ValueError, match=f"the state is of an Arbiter with {message}"):
        other.load_state_dict(saved.state_dict())
    assert alike(before, other.state_dict())


def test_a_damaged_state_is_refused_before_anything_is_changed():
    arbiter = Arbiter(agent_of(), **SIZES)
    arbiter.update(torch.ones(2, 2), validation_of(), head_of())
    before = arbiter.state_dict()
    good = arbiter.state_dict()
    first = good["adam"]["state"][0]
    for damage, message in (
        ({"agent": {}}, "the state's agent has no 0.weight"),
        (
            {"agent": {**good["agent"], "0.weight": torch.zeros(6, 3)}},
            r"0.weight is shape \(6, 3\), and shape \(6, 2\) here",
        ),
        ({"agent": {**good["agent"], "9.weight": torch.zeros(1)}}, "of another agent, with 9.weight"),
        ({"direction": torch.zeros(3)}, r"direction must be a tensor of shape \(2,\), got shape \(3,\)"),
        ({"direction": torch.full((2,), math.nan)}, "direction is not finite"),
        ({"adam": None}, "the state's adam must be a mapping"),
        ({"adam": {"state": {9: first}}}, "the state's adam has a parameter 9 of 5"),
        ({"adam": {"state": {1: first}}}, r"adam's exp_avg must be a tensor of shape \(6,\)"),
        (
            {"alpha": torch.zeros(3), "logits": None, "learned": False},
            "the state has 3 samples, and the agent here made 4",
        ),
        ({"alpha": None}, "the state has logits, and no alpha"),
        ({"alpha_adam": None}, "the state's alpha_adam must be a mapping, got NoneType"),
        ({"logits": torch.zeros(2)}, r"logits must be a tensor of shape \(4,\)"),
        ({"logits": None}, "learned something, and has no logits"),
        ({"learned": 1}, "learned must be True or False, got 1"),
        ({"generator": torch.zeros(3)}, "the state's generator is none of a CPU"),
    ):
        with pytest.raises(ValueError, match=message):
            arbiter.load_state_dict({**good, **damage})
    for broken in ([], {"agent": good["agent"]}):
        with pytest.raises(ValueError, match=r"the state (must be a mapping|has no arguments)"):
            arbiter.load_state_dict(broken)
    assert alike(before, arbiter.state_dict())


def test_a_state_stays_as_it_was_while_learning_goes_on():
    arbiter = Arbiter(agent_of(), **SIZES, lr=0.1)
    arbiter.update(torch.ones(2, 2), validation_of(), head_of())
    saved = arbiter.state_dict()
    losses = [arbiter.update(torch.ones(2, 2), validation_of(), head_of()) for _ in range(2)]
    for _ in range(2):  # nor does what was loaded change it
        arbiter.load_state_dict(saved)
        assert [arbiter.update(torch.ones(2, 2), validation_of(), head_of()) for _ in range(2)] == losses
