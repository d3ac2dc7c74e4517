"""The audit under what accelerate's files and DeepSpeed's sections ask for, on real ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trustratio.integrations.audits.examination import examine
from trustratio.integrations.audits.optimizer_section import chosen_subject
from trustratio.integrations.audits.reading import configuration_of
from trustratio.integrations.audits.subject import Subject
from trustratio.integrations.audits.verdict import EXACT, WRONG

from . import audited
from .pool import WorkerPool


@pytest.mark.parametrize(
    "section",
    [
        {"fsdp_version": 2, "fsdp_reshard_after_forward": False},
        {"fsdp_version": 1, "fsdp_sharding_strategy": "SHARD_GRAD_OP"},
        {"fsdp_version": 1, "fsdp_sharding_strategy": "NO_SHARD"},
    ],
    ids=lambda section: " ".join(map(str, section.values())),
)
@pytest.mark.parametrize("world_size", [2])
def test_accelerates_fsdp_in_16_bits(
    pool: WorkerPool, section: dict[str, Any], world_size: int, tmp_path: Path
) -> None:
    path = tmp_path / "fsdp.yaml"
    path.write_text(yaml.safe_dump({"distributed_type": "FSDP", "mixed_precision": "bf16", "fsdp_config": section}))
    report = examine(Subject("lamb", None, {"lr": 0.05}), configuration_of(path), pool)
    assert report.verdict == EXACT, report.sentence
    assert report.configuration == f"accelerate FSDP{section['fsdp_version']} bf16"


@pytest.mark.parametrize(
    ("optimizer", "verdict"),
    [
        (audited.zero_redundancy, EXACT),
        (audited.naive_zero_redundancy, WRONG),
        (audited.SumsInStep, EXACT),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
@pytest.mark.parametrize("world_size", [2])
def test_optimizers_that_use_process_groups(pool: WorkerPool, optimizer: Any, verdict: str, world_size: int) -> None:
    report = examine(Subject(optimizer), configuration_of("ddp"), pool)
    assert report.verdict == verdict, report.sentence
    assert not torch.distributed.is_initialized()


SECTION = {"type": "Adam", "params": {"lr": 0.01, "weight_decay": 0.1, "torch_adam": True}}
SCHEDULER = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 3}}


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("world_size", [2])
def test_the_optimizer_section_of_deepspeed(
    pool: WorkerPool, accelerated: bool, world_size: int, tmp_path: Path
) -> None:
    """With a scheduler that begins at 0."""
    settings: Any = {"zero_optimization": {"stage": 1}, "optimizer": SECTION, "scheduler": SCHEDULER}
    if accelerated:
        (tmp_path / "ds.json").write_text(json.dumps(settings))
        settings = tmp_path / "ds.yaml"
        section = {"deepspeed_config_file": "ds.json"}
        settings.write_text(yaml.safe_dump({"distributed_type": "DEEPSPEED", "deepspeed_config": section}))
    report = examine(*chosen_subject(None, None, {}, configuration_of(settings)), pool)
    assert report.verdict == EXACT, report.sentence
    assert report.optimizer.startswith("DeepSpeed's Adam")
