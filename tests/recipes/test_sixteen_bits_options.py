"""What is asked of optimizer state and weights in bf16: taken or refused before any work, said, and planned for."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.configuration.command_line import parse_command_line
from trustratio.recipes.configuration.config import RecipeConfig
from trustratio.recipes.configuration.overrides import apply_overrides, from_dict
from trustratio.recipes.configuration.phases import phases_of
from trustratio.recipes.configuration.presets import PRESETS, get_preset
from trustratio.recipes.model.build import outline
from trustratio.recipes.model.sixteen_bits import describe_conversion, describe_storage
from trustratio.recipes.planning.memory import memory_parts, model_size
from trustratio.recipes.planning.phase_plan import Machine, plan_phase
from trustratio.recipes.planning.plan import main as plan_main
from trustratio.recipes.rules.global_batch import BatchPlan
from trustratio.recipes.runs.checkpoints import CheckpointFolder
from trustratio.recipes.training import deepspeed_settings
from trustratio.recipes.training.bert import main
from trustratio.recipes.training.checks import CheckedRun, check_run, early_identity
from trustratio.recipes.training.deepspeed_settings import describe_sums
from trustratio.recipes.training.launchers import AccelerateLauncher, mixed_precision

STATE, KAHAN = "training.state_dtype=bfloat16", "training.master=kahan"
NO_DEEPSPEED = AccelerateLauncher({})


def check(*arguments: str, launcher=None) -> CheckedRun:
    return check_run(parse_command_line(list(arguments)), launcher)


def merge(settings=None, zero_stage=1, precision="bf16", accumulation=2, master="stochastic", **options):
    plan = BatchPlan(4, accumulation, 1)
    return deepspeed_settings.merge(
        settings or {}, plan, zero_stage, precision, 1.0, elementwise=False, master=master, **options
    )


# Options


def test_presets_keep_what_they_kept():
    for preset in PRESETS.values():
        assert (preset.config.training.state_dtype, preset.config.training.master) == (None, None)
        model, optimizer = outline(preset.config)
        assert next(model.parameters()).dtype == torch.float32
        assert optimizer.defaults.get("master") is optimizer.defaults.get("state_dtype") is None


@pytest.mark.parametrize(("text", "value"), [("none", "none"), ("None", "none"), ('"none"', "none"), ("null", None)])
def test_none_is_a_master_and_null_is_not(text, value):
    config = apply_overrides(apply_overrides(RecipeConfig(), [KAHAN]), [f"training.master={text}"])
    assert config.training.master == value
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_options_reach_the_optimizer_and_the_model():
    config = apply_overrides(get_preset("lamb-tiny"), [STATE, KAHAN, "training.seed=7"])
    model, optimizer = outline(config)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for group in optimizer.param_groups:
        assert (group["state_dtype"], group["master"], group["rounding_seed"]) == ("bfloat16", "kahan", 7)
    _, optimizer = outline(apply_overrides(config, ["training.master=none", "optimizer.rounding_seed=3"]))
    assert (optimizer.defaults["master"], optimizer.defaults["rounding_seed"]) == (None, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("training.state_dtype=float16",), "state_dtype='float16' is out of range: allowed is float32, bfloat16 or"),
        (("training.master=fp32",), "master='fp32' is out of range: allowed is stochastic, kahan, none or null"),
        (
            ("--optimizer", "adamw", STATE),
            "only trustratio's optimizers take training.state_dtype=bfloat16, and 'adamw' is torch's: --optimizer lamb "
            "optimizer.adapt=false is AdamW",
        ),
        (("--optimizer", "SGD", "training.master=none"), "master=none, and 'SGD' is torch's: --optimizer lars"),
        (("optimizer.state_dtype=bfloat16",), "not the optimizer's alone: give it as training.state_dtype"),
        (("optimizer.master=kahan",), "not the optimizer's alone: give it as training.master"),
        (
            ("--precision", "fp32", KAHAN),
            "kahan keeps the weights in bf16, and training.precision=fp32 has others: use --precision bf16, or leave",
        ),
        (("--precision", "fp16", KAHAN), "kahan keeps the weights in bf16, and training.precision=fp16 has others"),
        (("optimizer.rounding_seed=-1", STATE), "rounding_seed must be a whole number of at least 0, got -1"),
    ],
)
def test_what_contradicts_is_refused_by_runs_and_plans(arguments, message, capsys):
    for launcher in (None, NO_DEEPSPEED) if "fp16" not in arguments else (None,):
        with pytest.raises(RecipeError, match=message):
            check(*arguments, launcher=launcher)
    assert plan_main(["--most_gpus", "1", *arguments]) == 2
    assert message[:40] in capsys.readouterr().err


def test_precision_is_bf16_wherever_there_are_no_masters():
    for launcher in (None, NO_DEEPSPEED):
        assert check(KAHAN, launcher=launcher).config.training.precision == "bf16"
        assert check(KAHAN, "--precision", "bf16", launcher=launcher).config.training.precision == "bf16"
    assert check(STATE).config.training.precision == "fp32"  # as ever on a CPU


# DeepSpeed's settings


@pytest.mark.parametrize(
    ("stage", "sums"), [(1, {"grad_accum_dtype": "bf16"}), (2, {"grad_accum_dtype": "fp32"}), (3, None)]
)
def test_deepspeed_is_told_to_keep_no_masters(stage, sums):
    merged = merge(zero_stage=stage)
    assert merged["bf16"] == {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    assert merged["data_types"] == (sums or {"grad_accum_dtype": "fp32"})
    again = merge(deepspeed_settings.as_given(merged), zero_stage=stage, saved=True)
    assert again == merged  # as a run is continued


def test_deepspeeds_stage_0_is_not_told_of_bf16():
    merged = merge(zero_stage=0)
    assert not {"bf16", "data_types"} & merged.keys()
    assert merge(deepspeed_settings.as_given(merged), zero_stage=0, saved=True) == merged


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        (0, {"bf16": {"enabled": True}}, "keeps fp32 masters at stage 0, and training.master=stochastic asks for none"),
        (0, {"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype=bf16, .* at stage 0 with training.master"),
        (1, {"data_types": {"grad_accum_dtype": "fp32"}}, "grad_accum_dtype=fp32, .* remove it, or use --zero_stage 2"),
        (2, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "zero_optimization.offload_optimizer can"),
        (
            3,
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            "offload_param cannot go together: .*CPU Adam",
        ),
        (1, {"bf16": {"bf16_optimizer_states": True}}, "bf16_optimizer_states is not supported: remove it; training.m"),
    ],
)
def test_settings_with_which_deepspeed_keeps_masters_are_refused(stage, settings, message):
    with pytest.raises(RecipeError, match=message):
        merge(settings, stage)


def test_a_file_with_fp16_contradicts(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"fp16": {"enabled": True}}))
    with pytest.raises(RecipeError, match=r"master=kahan keeps the weights in bf16, and training\.precision=fp16"):
        check("--deepspeed_config", str(file), KAHAN)


def test_accelerate_computes_in_what_the_model_is():
    training = check(KAHAN, launcher=NO_DEEPSPEED).config.training
    assert mixed_precision(training) == "no"
    assert mixed_precision(training, merge(zero_stage=0)) == "no"
    assert mixed_precision(training, merge(zero_stage=1)) == "bf16"
    assert mixed_precision(dataclasses.replace(training, master=None)) == "bf16"
    assert mixed_precision(dataclasses.replace(training, master=None, precision="fp32")) == "no"


# What is said


def test_the_first_lines_say_how_state_and_weights_are_kept(capsys):
    for arguments, line in (
        ((), "weights in fp32; optimizer state in fp32"),
        (("--precision", "bf16"), "weights in bf16 with fp32 masters; optimizer state in fp32"),
        ((STATE,), "weights in fp32; optimizer state in bf16, rounded stochastically"),
        (("training.master=none",), "weights in bf16 without fp32 masters, rounded to nearest, which loses small"),
    ):
        assert main(["--dry_run", *arguments]) == 0
        assert line in capsys.readouterr().out
    training = check("--precision", "bf16", launcher=NO_DEEPSPEED).config.training
    assert describe_storage(training, wrapped_by_deepspeed=False).startswith("weights in fp32, computed with in bf16;")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (None, "summed in bf16 (training.master=kahan has gradients in bf16: DeepSpeed's --zero_stage 2 sums"),
        (0, "summed in bf16 (DeepSpeed has no fp32 sums at stage 0: --zero_stage 2 has with training.master=kahan)"),
        (1, "summed in bf16 (DeepSpeed has no fp32 sums at stage 1: --zero_stage 2 has with training.master=kahan)"),
        (2, ""),
        (3, ""),
    ],
)
def test_sums_of_gradients_in_bf16_are_said(stage, message):
    settings = None if stage is None else merge(zero_stage=stage, master="kahan")
    lines = describe_sums(settings, "bf16", stage or 0, 2, "kahan")
    assert [message in line for line in lines] == [True] * bool(message)
    assert describe_sums(settings, "bf16", stage or 0, 1, "kahan") == []


def test_a_checkpoint_with_state_of_another_dtype_is_said(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    run = check("--steps", "9", STATE)
    (folder / "config.json").write_text(json.dumps(run.config.to_dict()))
    (folder / "deepspeed_config.json").write_text(json.dumps(run.settings))
    CheckpointFolder(folder, 3, early_identity(run)).write(5, lambda path: None, lambda failure: [], first=True)
    for options, line in (((), ""), (("training.state_dtype=null",), "is bfloat16 and becomes float32, which changes")):
        assert main(["--dry_run", "--resume", str(folder), *options]) == 0
        printed = capsys.readouterr().out
        assert line in printed
        assert ("the checkpoint's optimizer state" in printed) is bool(line)
    assert describe_conversion(None, "float32") == []
    assert "is float32 and becomes bfloat16, rounded to nearest once" in describe_conversion(None, "bfloat16")[0]
    with pytest.raises(RecipeError, match=r"master: checkpoint None, this run 'kahan'"):
        check("--resume", str(folder), KAHAN, "--precision", "bf16")


# Plans


def parts_of(*overrides: str, ranks: int = 8) -> dict[str, float]:
    config = apply_overrides(get_preset("lamb-64k-32k"), ["training.precision=bf16", *overrides])
    parts = memory_parts(model_size(config), config, phases_of(config)[0], 8, ranks)
    return {part.name: part.bytes for part in parts}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_plan_counts_two_bytes_of_what_is_kept_in_16_bits(stage):
    at_stage = f"training.zero_stage={stage}"
    before, state, kahan = parts_of(at_stage), parts_of(at_stage, STATE), parts_of(at_stage, STATE, KAHAN)
    elements = model_size(get_preset("lamb-64k-32k")).elements
    here = elements / 8 if stage else elements
    assert before["optimizer state"] == 2 * state["optimizer state"] == pytest.approx(8 * here)
    assert before["fp32 master weights"] == state["fp32 master weights"] == pytest.approx(4 * here)
    assert "fp32 master weights" not in kahan
    assert kahan["weights"] == before["weights"]
    assert kahan["what rounding left"] == pytest.approx(2 * here)
    assert kahan.get("copy of this rank's weights", 0) == pytest.approx(2 * here if stage else 0)
    stochastic = parts_of(at_stage, "training.master=stochastic")
    assert stochastic.keys() == kahan.keys() - {"what rounding left"}
    assert stochastic["optimizer state"] == before["optimizer state"]


def test_a_plan_counts_what_an_update_reads_and_writes():
    def seconds(*overrides):
        config = apply_overrides(get_preset("lamb-64k-32k"), ["training.zero_stage=0", *overrides])
        size = model_size(config)
        machine = Machine(memory_rate=size.elements)  # one byte of every element in a second
        return plan_phase(size, config, phases_of(config)[0], 1, machine, 8).update

    # Weights, gradient and two states are read twice; all but the gradient are written once.
    assert seconds() == pytest.approx(2 * 16 + 12)
    assert seconds(STATE) == pytest.approx(2 * 12 + 8)
    assert seconds(STATE, "training.master=stochastic") == pytest.approx(2 * 8 + 6)
    assert seconds(STATE, KAHAN) == pytest.approx(2 * 10 + 8)


def test_the_command_says_how_state_and_weights_are_kept(capsys):
    assert plan_main(["--preset", "lamb-64k-32k", "--most_gpus", "1", STATE, KAHAN]) == 0
    printed = capsys.readouterr().out
    assert (
        "weights in bf16 without fp32 masters, with what rounding leaves in a second bf16 number; optimizer" in printed
    )
    for name in ("what rounding left", "copy of this rank's weights", "bf16 gradients of the step"):
        assert name in printed
