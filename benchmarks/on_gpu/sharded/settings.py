"""What is trained how: one training case of tests/distributed for each setting, in the order of their worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["BOUND", "CREWS", "Crew", "Setting"]

BOUND = 2e-6
"""Of the relative error of a layer's weight change."""
OFFLOADED = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
FP32_SUMS = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
FEWER_STEPS = 2  # of a rehearsal


@dataclass(frozen=True)
class Setting:
    """One optimizer under one sharding.

    Attributes:
        name: As it appears in tables.
        optimizer: Registered name.
        stage: As in `tests.distributed.cases.Case`, or "fsdp".
        changes: Its other arguments.
        on_host: Whether the optimizer steps on the CPU, beside a model on the device.
    """

    name: str
    optimizer: str
    stage: int | str
    changes: Mapping[str, Any] = field(default_factory=dict)
    on_host: bool = False

    def case(self, rehearse: bool) -> Any:
        """The training case; in a rehearsal a shorter one, whose kernels Triton's interpreter runs."""
        from tests.distributed.cases import Case
        from tests.distributed.exactness import MODEL, NOISE, STEPS, two_groups

        given = {"noise": NOISE.get(self.optimizer, 0.0), "steps": STEPS.get(self.optimizer, 5), **self.changes}
        if rehearse:
            given["steps"] = FEWER_STEPS
        if not self.on_host:
            given["constructor"] = {"implementation": "triton"}
        return Case(self.optimizer, MODEL, self.stage, two_groups(self.optimizer), **given)


@dataclass(frozen=True)
class Crew:
    """Processes that train one setting after the other.

    Attributes:
        name: As it appears in tables.
        ranks: How many; all on one device.
        backend: Of torch.distributed; gloo in a rehearsal.
        settings: What they train.
        rehearsed: How many of the settings a rehearsal trains.
        optional: Whether a setting that cannot be had is no failure: gloo does not carry all collectives from a device.
    """

    name: str
    ranks: int
    backend: str
    settings: tuple[Setting, ...]
    rehearsed: int
    optional: bool = False


def _zero(stage: int, optimizer: str = "lamb") -> Setting:
    return Setting(f"ZeRO-{stage}, {optimizer}", optimizer, stage)


def _offloaded(stage: int) -> Setting:
    changes = {"zero": OFFLOADED, "config": {"zero_force_ds_cpu_optimizer": False}}
    return Setting(f"ZeRO-{stage} with CPU offload, lamb", "lamb", stage, changes, on_host=True)


BF16_OPTIMIZER = Setting("BF16_Optimizer, lamb", "lamb", 1, {"dtype": "bf16", "spread": 0.0, "config": FP32_SUMS})


def _fsdp2(optimizer: str = "lamb") -> Setting:
    return Setting(f"FSDP2, {optimizer}", optimizer, "fsdp")


def _ddp(optimizer: str) -> Setting:
    return Setting(f"DDP, {optimizer}", optimizer, "ddp")


CREWS = (
    Crew(
        "one NCCL rank",
        1,
        "nccl",
        (
            *(_zero(1), _zero(2), _zero(3), BF16_OPTIMIZER, _offloaded(2), _fsdp2(), _offloaded(3)),
            *(_zero(1, "lans"), _zero(2, "lars"), _zero(3, "vrlamb"), _fsdp2("vrlamb"), _zero(2, "clars")),
        ),
        rehearsed=7,
    ),
    Crew(
        "two gloo ranks on one device",
        2,
        "gloo",
        (
            *(_ddp("lamb"), _zero(1), _zero(2), _zero(3), _fsdp2(), BF16_OPTIMIZER, _offloaded(2)),
            *(_ddp("vrlamb"), _zero(1, "vrlamb"), _fsdp2("lans")),
        ),
        rehearsed=5,
        optional=True,
    ),
)
