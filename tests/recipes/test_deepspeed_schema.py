"""DeepSpeed configurations: what is refused, with the nearest key or what to do, and how gradients are summed."""

from __future__ import annotations

import json

import pytest
from deepspeed.accelerator import get_accelerator

from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.configuration.command_line import parse_command_line
from trustratio.recipes.rules.global_batch import BatchPlan
from trustratio.recipes.training.checks import check_run
from trustratio.recipes.training.deepspeed_schema import MODELS, REFUSED, SECTIONS, VALUES
from trustratio.recipes.training.deepspeed_settings import describe_sums, merge

STAGE_2 = {"stage": 2}


def checked(tmp_path, settings, *arguments):
    """Return the run of a command line with a file of these settings."""
    file = tmp_path / "ds.json"
    file.write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return check_run(parse_command_line(["--deepspeed_config", str(file), *arguments]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimisation": STAGE_2}, "unknown key 'zero_optimisation'; nearest: zero_optimization"),
        ({"gradient_cliping": 1.0}, "unknown key 'gradient_cliping'; nearest: gradient_clipping"),
        ({"Zero_Optimization": STAGE_2}, "nearest: zero_optimization"),
        ({"zero_optimization": {"stagee": 2}}, r"nearest: zero_optimization\.stage"),
        ({"zero_optimization": {"overlap_com": True}}, r"nearest: zero_optimization\.overlap_comm"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"devcie": "cpu"}}},
            r"nearest: zero_optimization\.offload_optimizer\.device",
        ),
        ({"fp16": {"loss_scale_windw": 3}}, r"nearest: fp16\.loss_scale_window"),
        ({"bf16": {"enable": True}}, r"nearest: bf16\.enabled"),
        (
            {"activation_checkpointing": {"partition_activation": True}},
            r"nearest: activation_checkpointing\.partition_activations",
        ),
        ({"aio": {"blok_size": 1}}, r"nearest: aio\.block_size"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, r"nearest: data_types\.grad_accum_dtype"),
        ({"flops_profiler": {"enable": True}}, r"nearest: flops_profiler\.enabled"),
        ({"wandb": {"projct": "x"}}, r"nearest: wandb\.project"),
        ({"checkpoint": {"load_universal": True}}, r"unknown key 'checkpoint\.load_universal'"),
    ],
)
def test_a_mistyped_key_is_answered_with_the_nearest_at_every_level(tmp_path, settings, message):
    with pytest.raises(RecipeError, match=message):
        checked(tmp_path, settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": True}, r"zero_optimization=True: allowed is an object"),
        ({"zero_optimization": None}, r"zero_optimization=None: allowed is an object"),
        ({"zero_optimization": {"stage": "two"}}, r"zero_optimization\.stage='two'"),
        ({"zero_optimization": {"stage": "2"}}, r"zero_optimization\.stage='2': allowed is a number"),
        ({"zero_optimization": {"stage": True}}, r"zero_optimization\.stage=True: allowed is a number"),
        ({"zero_optimization": {"stage": 4}}, r"zero_optimization\.stage=4"),
        ({"zero_optimization": {"stage": 1.5}}, r"zero_optimization\.stage=1\.5"),
        ({"zero_optimization": {"overlap_comm": "yes"}}, r"overlap_comm='yes': allowed is true or false"),
        ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, r"reduce_bucket_size='5e8'"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, r"reduce_bucket_size=0"),
        ('{"zero_optimization": {"reduce_bucket_size": 1e400}}', r"reduce_bucket_size=inf: allowed are finite"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, r"offload_optimizer='cpu'"),
        ({"zero_optimization": {"offload_optimizer": {"device": "disk"}}}, r"offload_optimizer\.device='disk'"),
        ({"bf16": True}, r"bf16=True: allowed is an object"),
        ({"bf16": {"enabled": "true"}}, r"bf16\.enabled='true': allowed is true or false"),
        ({"fp16": {"enabled": 1}}, r"fp16\.enabled=1: allowed is true or false"),
        ({"gradient_clipping": "one"}, r"gradient_clipping='one': allowed is a finite number, 0 or more"),
        ({"gradient_clipping": True}, r"gradient_clipping=True"),
        ({"gradient_clipping": -1}, r"gradient_clipping=-1"),
        ('{"gradient_clipping": NaN}', r"gradient_clipping=nan"),
        ({"train_batch_size": "512"}, r"train_batch_size='512': allowed is a whole number above 0"),
        ({"train_micro_batch_size_per_gpu": 0}, r"train_micro_batch_size_per_gpu=0"),
        ({"communication_data_type": "fp8"}, r"communication_data_type='fp8'"),
        ({"gradient_allreduce_op": "sum"}, r"gradient_allreduce_op='sum'"),
        ({"data_types": {"grad_accum_dtype": "fp64"}}, r"grad_accum_dtype='fp64'"),
        ({"checkpoint": {"tag_validation": "loud"}}, r"checkpoint\.tag_validation='loud': allowed is \"Ignore\", "),
        ({"checkpoint": {"tag_validation": None}}, r"checkpoint\.tag_validation=None: allowed is"),
        ({"aio": {"block_size": False}}, r"aio\.block_size=False: allowed is a finite number"),
        ({"aio": {"use_gds": 1}}, r"aio\.use_gds=1: allowed is true or false"),
        ({"aio": {"use_gds": True}}, r"aio\.use_gds needs a GPU"),
        ({"flops_profiler": {"enabled": "auto"}}, r"flops_profiler\.enabled='auto': allowed is true or false"),
        ('{"gradient_clipping": 1.0, "gradient_clipping": 2.0}', r"gradient_clipping is there twice"),
        ('{"bf16": {"enabled": true, "enabled": false}}', r"enabled is there twice"),
        ("[" * 100_000, r"cannot be read as JSON"),
    ],
)
def test_a_wrong_type_or_value_is_one_sentence(tmp_path, settings, message):
    with pytest.raises(RecipeError, match=message) as refused:
        checked(tmp_path, settings)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", [*REFUSED, "optimizer", "scheduler"])
@pytest.mark.parametrize(
    "value", [True, {}, {"enabled": False}, {"enabled": True, "ignore_non_elastic_batch_info": True}]
)
def test_what_the_recipe_cannot_do_is_refused_by_name(key, value):
    with pytest.raises(RecipeError, match=f"`{key}`.*remove"):
        merge({key: value}, BatchPlan(4, 2, 2), 1, "fp32", 1.0, False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights needs a GPU"),
        ({"zero_optimization": {"stage": 2, "zero_quantized_gradients": True}}, "zero_quantized_gradients needs a GPU"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "does not divide 1 ranks"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, 'cpu_offload is not supported: .*"device": "cpu"'),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "offload_param has no effect at stage 2",
        ),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "has no effect at stage 0"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm=false is not supported"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "remove it; training.master=stochastic"),
        ({"wandb": {"enabled": True}}, r"wandb\.enabled is not supported: .*run\.loggers=\[wandb\]"),
        ({"comet": {"enabled": True}}, r"comet\.enabled is not supported: .*metrics\.jsonl"),
        ({"zero_force_ds_cpu_optimizer": True}, "DeepSpeed's CPU Adam"),
        (
            {"prescale_gradients": True, "zero_optimization": STAGE_2},
            "prescale_gradients=True, which .* at stage 2 with",
        ),
        (
            {"gradient_predivide_factor": 2.0, "zero_optimization": {"stage": 3}},
            r"gradient_predivide_factor=2\.0, .*: remove it, or set reduce_scatter to false",
        ),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "enables both bf16 and fp16"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "use training.activation_checkpointing=true"),
    ],
)
def test_settings_without_effect_or_means_are_refused(tmp_path, settings, message):
    with pytest.raises(RecipeError, match=message):
        checked(tmp_path, settings)


@pytest.mark.parametrize("given", [{"fp16": {"enabled": True}}, None])
def test_fp16_needs_a_device_that_has_it(tmp_path, monkeypatch, given):
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(RecipeError, match="has no fp16 on this cpu"):
        checked(tmp_path, given or {}, *(() if given else ("--precision", "fp16")))


@pytest.mark.parametrize("path", ["missing.json", "."])
def test_a_file_that_is_none_is_refused(tmp_path, path):
    with pytest.raises(RecipeError, match=r"does not exist|cannot be read as JSON"):
        check_run(parse_command_line(["--deepspeed_config", str(tmp_path / path)]))


def test_ordinary_files_are_taken(tmp_path):
    settings = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "reduce_bucket_size": 5e8,
            "stage3_prefetch_bucket_size": "auto",
            "sub_group_size": 1e9,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "none"},
        },
        "activation_checkpointing": {"partition_activations": False},
        "comms_logger": {"enabled": False},
        "wall_clock_breakdown": False,
        "steps_per_print": 10,
    }
    run = checked(tmp_path, settings)
    assert run.config.training.zero_stage == 3
    assert run.settings["zero_optimization"]["sub_group_size"] == 1e9


@pytest.mark.parametrize("value", ["auto", None])
def test_what_is_left_open_is_not_taken_for_true(value):
    """DeepSpeed knows "auto" in the sections that it has models of; elsewhere it is a text, which passes for true."""
    merged = merge(dict.fromkeys(VALUES, value), BatchPlan(4, 2, 2), 1, "fp32", 0.5, False)
    kept = {key: merged[key] for key in VALUES if key in merged}
    assert kept.pop("steps_per_print") == 10**9
    assert kept == {
        **{"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2},
        "gradient_clipping": 0.5,
    }


def test_no_key_is_both_taken_and_refused():
    taken = [*VALUES, *MODELS, *SECTIONS]
    assert len(taken) == len(set(taken))
    assert not set(taken) & {*REFUSED, "optimizer", "scheduler"}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gradients_are_summed_in_fp32_wherever_deepspeed_can(monkeypatch, stage, precision, offload):
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)  # whatever processor runs this
    zero = {"offload_optimizer": {"device": "cpu"}} if offload and stage else {}
    if (stage, precision) == (0, "fp16"):
        with pytest.raises(RecipeError, match=r"fp16 at stage 0 has gradients that are too small .* --zero_stage 1"):
            merge({"zero_optimization": zero}, BatchPlan(4, 8, 2), stage, precision, 1.0, False)
        return
    merged = merge({"zero_optimization": zero}, BatchPlan(4, 8, 2), stage, precision, 1.0, False)
    asked = merged.get("data_types", {}).get("grad_accum_dtype")
    assert asked == ("fp32" if stage and precision != "fp32" else None)
    warnings = describe_sums(merged, precision, stage, 8)
    assert bool(warnings) == (stage == 0 and precision != "fp32")
    if warnings:
        assert "summed in" in warnings[0]
        assert "--zero_stage 1" in warnings[0]


def test_another_sum_is_the_users_and_is_said():
    asked = {"data_types": {"grad_accum_dtype": "bf16"}}
    merged = merge(asked, BatchPlan(4, 8, 2), 2, "bf16", 1.0, False)
    assert merged["data_types"] == {"grad_accum_dtype": "bf16"}
    (line,) = describe_sums(merged, "bf16", 2, 8)
    assert "8 micro-batches are summed in bf16 (as the DeepSpeed configuration says" in line
    assert describe_sums(merged, "bf16", 2, 1) == []  # nothing is summed
    with pytest.raises(RecipeError, match=r"grad_accum_dtype=fp32, which DeepSpeed cannot do with bf16 at stage 0"):
        merge({"data_types": {"grad_accum_dtype": "fp32"}}, BatchPlan(4, 8, 2), 0, "bf16", 1.0, False)


def test_a_run_that_was_begun_with_other_sums_keeps_them():
    saved = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    assert "data_types" not in merge(saved, BatchPlan(4, 8, 2), 2, "bf16", 1.0, False, saved=True)
