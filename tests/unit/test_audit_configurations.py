"""What the audit reads of configurations: every key is followed, named in a note, or refused."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trustratio.integrations.audit import audit
from trustratio.integrations.audits.configurations import FILLED, Configuration
from trustratio.integrations.audits.errors import CannotAudit
from trustratio.integrations.audits.optimizer_section import chosen_subject
from trustratio.integrations.audits.reading import configuration_of
from trustratio.integrations.audits.subject import Subject
from trustratio.optimizers import TrustRatio


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


# DeepSpeed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"zero_optimization": {"allgather_bucket_size": "auto"}},
            "zero_optimization.allgather_bucket_size: auto is none",
        ),
        ({"steps_per_print": "auto"}, "steps_per_print: auto is none of those"),
        ({"scheduler": {"type": "OneCycle", "params": {"cycle_max_lr": "auto"}}}, "cycle_max_lr: auto is none"),
        ({"zero_optimization": {"stage": "2"}}, "stage must be 0, 1, 2 or 3, not '2'"),
        ({"zero_optimization": {"stage": 4}}, "stage must be 0, 1, 2 or 3, not 4"),
        ({"bf16": {"enabled": "true"}}, "bf16.enabled must be true or false"),
        ({"bf16": {"bf16_master_weights_and_grads": "false"}}, "master_weights_and_grads must be true or false"),
        ({"gradient_accumulation_steps": True}, "a whole number of at least 1, not True"),
    ],
)
def test_values_that_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(CannotAudit, match=message):
        configuration_of(given)


def test_what_is_filled_in_is_what_the_trainer_fills_in(tmp_path: Path) -> None:
    """By the Trainer's own configuration, from its defaults."""
    deepspeed = pytest.importorskip("transformers.integrations.deepspeed")
    training_arguments = pytest.importorskip("transformers").TrainingArguments
    given: dict[str, Any] = {}
    for name in FILLED:
        if name.startswith("zero_optimization"):
            continue  # accelerate's plugin fills these in
        *sections, key = name.split(".")
        place = given
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = "auto"
    theirs = deepspeed.HfTrainerDeepSpeedConfig(given)
    theirs.trainer_config_process(training_arguments(output_dir=str(tmp_path), use_cpu=True))
    for name, (value, _) in FILLED.items():
        if not name.startswith("zero_optimization"):
            assert theirs.get_value(name) == value, name


SECTION = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}}


def chosen(optimizer: Any, section: Any, **options: Any) -> tuple[Subject, Configuration]:
    return chosen_subject(optimizer, None, options, configuration_of({"optimizer": section}))


def test_the_optimizer_section_is_audited() -> None:
    pytest.importorskip("deepspeed")
    subject, configuration = chosen(None, SECTION)
    assert subject.title == "DeepSpeed's AdamW lr=0.01 weight_decay=0.1 adam_w_mode=True"
    assert subject.optimizer == "deepspeed.ops.adam.FusedAdam"
    assert configuration.options["optimizer"] == SECTION
    assert 'the "optimizer" section is audited' in configuration.notes[-1]
    coupled = {"type": "Adam", "params": {"adam_w_mode": False, "torch_adam": True}}
    assert chosen(None, coupled)[0].optimizer == "torch.optim.Adam"
    assert chosen(None, {"type": "SGD"})[0].optimizer == "torch.optim.SGD"
    offload = {"optimizer": SECTION, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    subject, _ = chosen_subject(None, None, {}, configuration_of(offload))
    assert subject.optimizer == "deepspeed.ops.adam.DeepSpeedCPUAdam"


def test_the_optimizer_section_agrees() -> None:
    pytest.importorskip("deepspeed")
    subject, configuration = chosen("torch.optim.AdamW", SECTION, lr=0.01, weight_decay=0.1)
    assert subject.title == "torch.optim.AdamW lr=0.01 weight_decay=0.1"
    assert "optimizer" not in configuration.options
    assert "says the same" in configuration.notes[-1]


@pytest.mark.parametrize(
    ("optimizer", "section", "options", "message"),
    [
        (None, None, {}, "no optimizer is given"),
        (None, SECTION, {"lr": 1.0}, "options belong to an optimizer"),
        (None, "Adam", {}, "is written"),
        (None, {"type": "Adam", "params": 3}, {}, "is written"),
        (None, {"type": "OneBitAdam"}, {}, "the audit knows Adam"),
        ("lamb", SECTION, {}, r"section \(AdamW\), and lamb is another"),
        ("torch.optim.Adam", SECTION, {}, "torch.optim.Adam is another"),
        ("torch.optim.AdamW", SECTION, {"lr": 0.01}, "weight_decay 0.1 in the section, 0.01 in the optimizer given"),
        ("torch.optim.AdamW", {"type": "AdamW"}, {}, "weight_decay 0.0 in the section, 0.01"),  # by their defaults
    ],
)
def test_optimizer_sections_that_are_refused(optimizer: Any, section: Any, options: Any, message: str) -> None:
    pytest.importorskip("deepspeed")
    configuration = configuration_of({} if section is None else {"optimizer": section})
    with pytest.raises(CannotAudit, match=message):
        chosen_subject(optimizer, None, options, configuration)


def test_accelerate_refuses_a_section_beside_an_optimizer(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"optimizer": SECTION}))
    section = {"deepspeed_config_file": "ds.json"}
    configuration = accelerate_file(tmp_path, distributed_type="DEEPSPEED", deepspeed_config=section)
    with pytest.raises(CannotAudit, match="which accelerate refuses beside an optimizer"):
        chosen_subject("torch.optim.AdamW", None, {}, configuration)


def test_a_section_without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "deepspeed" else find(name))
    monkeypatch.setitem(sys.modules, "deepspeed.ops.adam", None)
    with pytest.raises(CannotAudit, match="needs deepspeed, which is not installed"):
        audit(None, "torch.optim.AdamW", {"optimizer": SECTION}, ranks=1)


def test_a_partial_is_titled_by_what_it_calls() -> None:
    made = functools.partial(TrustRatio, torch.optim.AdamW, lr=0.01)
    assert Subject(made).title == "TrustRatio AdamW lr=0.01"


# Loss scales --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["loss_scale", "min_loss_scale"])
@pytest.mark.parametrize("form", [float, str])
@pytest.mark.parametrize(("given", "taken"), [(1000, 512.0), (3, 2.0), (0.3, 0.25), (1024, 1024), (1, 1), (0, 0)])
def test_loss_scales_become_powers_of_two(given: float, taken: float, form: Any, key: str) -> None:
    """By which fp16 gradients are scaled without rounding; DeepSpeed reads numbers from texts, too."""
    section = {"enabled": True, key: form(given)}
    configuration = configuration_of({"zero_optimization": {"stage": 1}, "fp16": section})
    assert configuration.options["fp16"][key] == taken
    told = [note for note in configuration.notes if note.startswith(f"fp16.{key} is {given:g}, and {taken:g} is")]
    assert len(told) == (given != taken)
    assert section[key] == form(given)


def test_loss_scales_that_are_no_numbers_are_left_to_deepspeed() -> None:
    configuration = configuration_of({"fp16": {"enabled": True, "loss_scale": "much", "min_loss_scale": None}})
    assert configuration.options["fp16"] == {"enabled": True, "loss_scale": "much", "min_loss_scale": None}


@pytest.mark.parametrize(
    ("stage", "section", "told"), [(0, {}, 1), (0, {"loss_scale": 1}, 0), (0, {"loss_scale": "1"}, 0), (1, {}, 0)]
)
def test_fp16_without_zero_is_told_to_be_wrong(stage: int, section: dict[str, Any], told: int) -> None:
    given = {"zero_optimization": {"stage": stage}, "fp16": {"enabled": True, **section}}
    notes = [note for note in configuration_of(given).notes if note.startswith("fp16 without ZeRO")]
    assert len(notes) == told
