"""Accelerate's launcher: what a run takes of its configuration, and what is refused."""

import json
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.configuration.command_line import parse_command_line
from trustratio.recipes.training.checks import check_run
from trustratio.recipes.training.launchers import AccelerateLauncher

CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "configs"


def write(path, values):
    path.write_text(json.dumps(values))
    return str(path)


def under_accelerate(arguments=(), **environment):
    names = {name.upper(): value for name, value in environment.items()}
    return check_run(parse_command_line(arguments), AccelerateLauncher(names))


def test_accelerate_without_deepspeed_is_data_parallel():
    run = under_accelerate()
    assert run.settings is None
    assert run.config.training.zero_stage == 0
    with pytest.raises(RecipeError, match="--zero_stage 2 contradicts the DDP configuration, which has 0"):
        under_accelerate(["--zero_stage", "2"])


def test_accelerates_stage_is_used_and_its_batch_sizes_are_not(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    run = under_accelerate(accelerate_use_deepspeed="true", accelerate_mixed_precision="bf16")
    assert run.settings["zero_optimization"]["stage"] == run.config.training.zero_stage == 3
    assert run.settings["gradient_accumulation_steps"] == 4
    assert run.settings["bf16"] == {"enabled": True}
    assert run.config.training.precision == "bf16"
    assert "offload_optimizer" not in run.settings["zero_optimization"]


def test_offload_through_accelerate_keeps_our_optimizer(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    run = under_accelerate(accelerate_use_deepspeed="true")
    assert run.settings["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert run.settings["zero_force_ds_cpu_optimizer"] is False


def test_accelerates_deepspeed_file_is_checked_like_ours(tmp_path):
    file = write(tmp_path / "ds.json", {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 8})
    with pytest.raises(RecipeError, match="gradient_accumulation_steps=8, the recipe 4"):
        under_accelerate(accelerate_use_deepspeed="true", accelerate_deepspeed_config_file=file)
    file = write(tmp_path / "ds.json", {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}})
    with pytest.raises(RecipeError, match="its own `optimizer`; remove that section"):
        under_accelerate(accelerate_use_deepspeed="true", accelerate_deepspeed_config_file=file)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"accelerate_use_deepspeed": "true", "accelerate_use_cpu": "true"}, "use_cpu: true makes accelerate ignore"),
        ({"accelerate_use_fsdp": "true"}, "asks for FSDP, which this recipe has no engine for"),
        ({"accelerate_use_megatron_lm": "true"}, "asks for MEGATRON_LM"),
        ({"accelerate_mixed_precision": "fp16"}, "fp16 needs DeepSpeed in this recipe"),
    ],
)
def test_what_accelerate_would_do_silently_is_refused(environment, message):
    with pytest.raises(RecipeError, match=message):
        under_accelerate(**environment)


def test_a_deepspeed_file_belongs_into_accelerates_configuration():
    with pytest.raises(RecipeError, match="as deepspeed_config_file in its section deepspeed_config"):
        under_accelerate(["--deepspeed_config", "ds.json"])


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "ddp"])
def test_the_shipped_configurations_are_accelerates(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    deepspeed = config.deepspeed_config
    assert deepspeed.get("zero_stage") == (int(name[-1]) if name.startswith("zero") else None)
    assert not config.use_cpu
    # A batch size, clipping or precision here would contradict the recipe's.
    assert not {"gradient_accumulation_steps", "gradient_clipping", "deepspeed_config_file"} & set(deepspeed)
    assert config.mixed_precision in (None, "no")
