"""Programs with Lightning against the same without: sixteen bits, two optimizers, callbacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("lightning.pytorch", minversion="2.5")

from ..reference import relative_error
from .exactness import BOUND
from .lightning_programs import adversaries_plainly, both, logged, train_adversaries
from .lightning_runs import train_plainly
from .pool import WorkerPool
from .test_lightning import STAGES, run_of

two_ranks = pytest.mark.parametrize("world_size", [2])

FP16 = {"fp16": {"enabled": True, "initial_scale_power": 18, "hysteresis": 1}}
BF16 = {"bf16": {"enabled": True}}
SIXTEEN_BITS = [
    ("ddp", "bf16-mixed", {}),
    ("ddp", "16-mixed", {}),
    ("ddp", "bf16-true", {}),
    ("fsdp2", "bf16-mixed", {}),
    ("fsdp2", "bf16-true", {}),
    *((stage, "bf16-mixed", BF16) for stage in (1, 2, 3)),
    *((stage, "16-mixed", FP16) for stage in (1, 2, 3)),
]


@two_ranks
@pytest.mark.parametrize(("stage", "precision", "config"), SIXTEEN_BITS, ids=[f"{s}-{p}" for s, p, _ in SIXTEEN_BITS])
@pytest.mark.parametrize("optimizer", ["lars", "clars"])
def test_sixteen_bits_are_those_of_the_same_program_without(
    pool: WorkerPool,
    optimizer: str,
    stage: str | int,
    precision: str,
    config: dict[str, Any],
    world_size: int,
    tmp_path: Any,
) -> None:
    """To the bit, skipped steps included."""
    run = run_of(stage, optimizer, precision=precision, config=config, steps=6)
    for found, wanted in pool.run(both, run, tmp_path):
        assert found["ratios"] == wanted["ratios"]
        assert 0 < len(found["ratios"]) <= 6 - (precision == "16-mixed")
        for name, weights in wanted["weights"].items():
            assert torch.equal(found["weights"][name], weights), name


@two_ranks
@pytest.mark.parametrize("stage", ["ddp", "fsdp2"])
def test_two_optimizers_by_hand(pool: WorkerPool, stage: str, world_size: int, tmp_path: Any) -> None:
    start, plain = adversaries_plainly(world_size)
    for weights in pool.run(train_adversaries, stage, tmp_path):
        for name, weight in weights.items():
            assert relative_error(weight, plain[name], start[name]) <= BOUND, name


@two_ranks
@pytest.mark.parametrize("stage", STAGES)
def test_the_first_rank_logs_whole_layers(pool: WorkerPool, stage: str | int, world_size: int, tmp_path: Any) -> None:
    run = run_of(stage, accumulation=2)
    (noted, _), (nothing, _) = pool.run(logged, run, tmp_path)
    ratios = train_plainly(run, world_size)["ratios"]
    assert nothing == []
    assert [step for step, _ in noted] == [2, 4]
    for step, metrics in noted:
        wanted = {f"trust_ratio/{name}": ratio for name, ratio in ratios[step - 1].items()}
        scaled = [ratio for name, ratio in wanted.items() if name.endswith("weight")]
        wanted |= {"trust_ratio/min": min(scaled), "trust_ratio/max": max(scaled), "trust_ratio/median": min(scaled)}
        noise = {name: value for name, value in metrics.items() if name.startswith("gradient_noise")}
        assert {name: metrics[name] for name in metrics if name not in noise} == pytest.approx(wanted, rel=BOUND)
        assert set(noise) == (set() if stage == "fsdp1" else {f"gradient_noise/{name}" for name in NOISE})
        assert all(value > 0 for value in noise.values())


NOISE = ("scale", "signal", "noise", "adascale_gain")
