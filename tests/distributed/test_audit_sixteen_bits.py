"""The audit of optimizers that keep numbers of 16 bits: rounding is no fault, and hides none."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from trustratio.integrations.audits.errors import CannotAudit
from trustratio.integrations.audits.neighbours import without_neighbours
from trustratio.integrations.audits.verdict import EXACT, WRONG
from trustratio.optimizers import LAMB
from trustratio.optimizers.formulas.layer_table import LayerTable
from trustratio.optimizers.formulas.rounding import LayerKeys
from trustratio.optimizers.formulas.updates import AdamUpdate

from . import audited
from .pool import WorkerPool
from .test_audit import BF16, audit, zero

NO_MASTERS = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}
STATE = {"lr": 0.02, "weight_decay": 0.1, "state_dtype": "bfloat16", "implementation": "eager"}


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class OfTheRank(LAMB):
    """Chance that is the rank's own."""

    def step(self, closure: Any = None) -> Any:
        at = LayerKeys.at
        with mock.patch.object(LayerKeys, "at", lambda keys, step: at(keys, step) + _rank()):
            return super().step(closure)


class ALittleFurther(LAMB):
    """Each step of the second rank is longer by a thousandth."""

    def step(self, closure: Any = None) -> Any:
        tensors = [p for group in self.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in tensors]
        answer = super().step(closure)
        with torch.no_grad():
            for p, old in zip(tensors, before, strict=True):
                p += 1e-3 * _rank() * (p - old)
        return answer


class AtALargerRate(LAMB):
    """The same, before the step is rounded to weights of 16 bits, which would not keep a thousandth of it after."""

    def update(self, group: dict[str, Any], layers: LayerTable) -> AdamUpdate:
        return super().update({**group, "lr": group["lr"] * (1 + 1e-3 * _rank())}, layers)


@pytest.mark.parametrize(
    "configuration",
    ["ddp", {"fsdp": 1}, {"fsdp": 2}, zero(1, **BF16, gradient_clipping=0.1), zero(3, gradient_clipping=0.5)],
    ids=["ddp", "fsdp1", "fsdp2", "zero 1, bf16, clipping", "zero 3, clipping"],
)
@pytest.mark.parametrize("world_size", [2])
def test_state_in_bf16_is_exact(pool: WorkerPool, configuration: Any, world_size: int) -> None:
    """Clipping makes gradients differ in their last bits, by which single elements are rounded to a neighbour."""
    report = audit(pool, "lamb", configuration, **STATE)
    assert report.verdict == EXACT, report.sentence
    copies = world_size if configuration == "ddp" else 1
    assert report.state_bytes_per_parameter == pytest.approx(4 * copies, rel=0.03)


@pytest.mark.parametrize("master", ["stochastic", "kahan"])
@pytest.mark.parametrize("configuration", ["ddp", {"fsdp": 1}, {"fsdp": 2}], ids=["ddp", "fsdp1", "fsdp2"])
@pytest.mark.parametrize("world_size", [2])
def test_bf16_weights_are_exact(pool: WorkerPool, configuration: Any, master: str, world_size: int) -> None:
    """Which to nearest could not be told: see test_what_rounding_hides_is_not_called_exact."""
    options = {**STATE, "lr": 1e-3, "state_dtype": None, "master": master}
    report = audit(pool, "lamb", configuration, audited.bf16_model, **options)
    assert report.verdict == EXACT, report.sentence


@pytest.mark.parametrize("master", ["stochastic", "kahan"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [2])
def test_bf16_weights_without_masters_are_exact(pool: WorkerPool, stage: int, master: str, world_size: int) -> None:
    """One process steps bf16 weights, too, and clips gradients as DeepSpeed clips those of 16 bits."""
    report = audit(pool, "lamb", zero(stage, **NO_MASTERS), **{**STATE, "master": master})
    assert report.verdict == EXACT, report.sentence
    assert all(layer.bound < 1e-4 for layer in report.layers if layer.has_gradient)


@pytest.mark.parametrize("master", ["stochastic", "kahan"])
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("world_size", [2])
def test_a_thousandth_is_found_without_masters(pool: WorkerPool, stage: int, master: str, world_size: int) -> None:
    report = audit(pool, AtALargerRate, zero(stage, **NO_MASTERS), **{**STATE, "master": master})
    assert report.verdict == WRONG, report.sentence


@pytest.mark.parametrize("world_size", [2])
def test_a_thousandth_is_found_in_the_sums(pool: WorkerPool, world_size: int) -> None:
    """Of which the model's own weights have the first half alone."""
    options = {**STATE, "lr": 1e-3, "state_dtype": None, "master": "kahan"}
    report = audit(pool, AtALargerRate, {"fsdp": 2}, audited.bf16_model, **options)
    assert report.verdict == WRONG, report.sentence
    wrong = [layer for layer in report.layers if not layer.is_exact]
    assert len(wrong) > len(report.layers) / 4


@pytest.mark.parametrize("world_size", [2])
def test_weights_to_nearest_without_masters_are_refused(pool: WorkerPool, world_size: int) -> None:
    with pytest.raises(CannotAudit, match="audit it without bf16_master_weights_and_grads"):
        audit(pool, "lamb", zero(1, **NO_MASTERS), **STATE)


@pytest.mark.parametrize("optimizer", [OfTheRank, ALittleFurther])
@pytest.mark.parametrize("world_size", [2])
def test_faults_are_told_from_rounding(pool: WorkerPool, optimizer: Any, world_size: int) -> None:
    report = audit(pool, optimizer, zero(1), **STATE)
    assert report.verdict == WRONG, report.sentence
    wrong = [layer for layer in report.layers if not layer.is_exact]
    assert len(wrong) > len(report.layers) / 4  # those of which the second rank has a part


@pytest.mark.parametrize("world_size", [2])
def test_chance_OfTheRank_is_told_from_rounding_of_bf16_weights(pool: WorkerPool, world_size: int) -> None:
    options = {**STATE, "state_dtype": None, "master": "stochastic"}
    report = audit(pool, OfTheRank, {"fsdp": 2}, audited.bf16_model, **options)
    assert report.verdict == WRONG, report.sentence


def test_a_few_elements_that_are_near_count_for_nothing() -> None:
    apart, path = torch.full((2000,), 1e-9, dtype=torch.float64), 2000**0.5
    apart[:2] = 2.0**-8
    assert float(without_neighbours(apart, path).norm()) < 1e-6
    apart[2] = 2.0**-8  # too many
    assert float(without_neighbours(apart, path).norm()) > 1e-3
    apart[:3] = torch.tensor([0.1, 0.0, 0.0])  # too far
    assert float(without_neighbours(apart, path).norm()) == pytest.approx(0.1)
    assert float(without_neighbours(apart, path, torch.full((2000,), 0.1)).norm()) < 1e-6
    apart[0] = torch.nan
    assert without_neighbours(apart, path).norm().isnan()
