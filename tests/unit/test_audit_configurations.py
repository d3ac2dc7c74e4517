"""What the audit reads of configurations: every key is followed, named in a note, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trustratio.integrations.audits.configurations import Configuration
from trustratio.integrations.audits.errors import CannotAudit
from trustratio.integrations.audits.reading import configuration_of


def accelerate_file(folder: Path, **content: Any) -> Configuration:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return configuration_of(path)


# accelerate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ({"distributed_type": "NO"}, "distributed_type NO is one process"),
        ({"distributed_type": "MULTI_GPU", "mixed_precision": "fp16"}, "mixed_precision fp16 is autocast"),
        (
            {"distributed_type": "MULTI_GPU", "num_processes": 8},
            "starts its own ranks, on this machine: num_processes 8",
        ),
        ({"distributed_type": "MULTI_GPU", "dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "of no influence"),
        (
            {"distributed_type": "MULTI_GPU", "fsdp_config": {"fsdp_version": 2}},
            "under distributed_type MULTI_GPU: fsdp",
        ),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_offload_params": True}}, "not followed"),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_sharding_strategy": "HYBRID_SHARD"}},
            "HYBRID_SHARD is FULL_SHARD within one machine",
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero3_init_flag": True}},
            "zero3_init_flag has no influence",
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"gradient_accumulation_steps": "auto"}},
            "gradient_accumulation_steps: auto",
        ),
    ],
)
def test_keys_of_accelerate_that_are_named(tmp_path: Path, content: dict[str, Any], note: str) -> None:
    assert note in "\n".join(accelerate_file(tmp_path, **content).notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "has distributed_type missing"),
        (
            {"distributed_type": "MULTI_GPU", "gradient_clipping": 1.0},
            "has gradient_clipping, of which it is not known",
        ),
        ({"distributed_type": "MULTI_GPU", "mixed_precision": "fp8"}, "has mixed_precision fp8"),
        ({"distributed_type": "MULTI_GPU", "parallelism_config": {"tp_size": 2}}, "has parallelism_config"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_ignored_modules": "x"}}, "has ignored_modules"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": "two"}}, "fsdp_version must be a whole number"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_sharding_strategy": "SOME"}}, "must be one of FULL_SHARD"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_use_orig_params": "x"}}, "must be true or false"),
        ({"distributed_type": "FSDP", "fsdp_config": 2}, "must be a section of settings"),
        ({"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stag": 3}}, "has zero_stag"),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": "x"}},
            "zero_stage must be a whole number",
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"gradient_clipping": "x"}},
            "gradient_clipping must be a number",
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "a", "zero_stage": 1}},
            "has zero_stage beside deepspeed_config_file, which accelerate refuses",
        ),
        (
            {
                "distributed_type": "DEEPSPEED",
                "mixed_precision": "bf16",
                "deepspeed_config": {"deepspeed_config_file": "a"},
            },
            "has mixed_precision beside deepspeed_config_file",
        ),
    ],
)
def test_keys_of_accelerate_that_are_refused(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises(CannotAudit, match=message):
        accelerate_file(tmp_path, **content)


def test_keys_of_accelerate_that_are_followed(tmp_path: Path) -> None:
    fsdp: dict[str, Any] = {"distributed_type": "FSDP", "mixed_precision": "bf16"}
    first = accelerate_file(tmp_path, **fsdp, fsdp_config={"fsdp_version": 1, "fsdp_sharding_strategy": 2})
    assert first.title == "accelerate FSDP1 bf16"
    assert first.options["sharding_strategy"].name == "SHARD_GRAD_OP"
    assert first.options["mixed_precision"].reduce_dtype == torch.bfloat16
    second = accelerate_file(tmp_path, **fsdp, fsdp_config={"fsdp_version": 2, "fsdp_reshard_after_forward": "false"})
    assert second.options["reshard_after_forward"] is False
    assert second.options["mp_policy"].param_dtype == torch.bfloat16
    offload = {"offload_optimizer_device": "nvme", "offload_optimizer_nvme_path": "/x", "zero_stage": "1"}
    zero = accelerate_file(tmp_path, distributed_type="DEEPSPEED", mixed_precision=False, deepspeed_config=offload)
    assert zero.options["zero_optimization"] == {"stage": 1, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}
    assert zero.dtype == "fp32"


def test_the_recipes_files() -> None:
    """As they are written for other programs."""
    for path in sorted((Path(__file__).parents[2] / "recipes" / "configs").glob("*.yaml")):
        assert configuration_of(path).wrapper in ("ddp", "deepspeed")
