"""Presets, overrides, the command line, DeepSpeed settings: what they resolve to, and every bad input."""

import json
import math
import shutil

import pytest

from trustratio.recipes.common.errors import NothingToDo, RecipeError
from trustratio.recipes.configuration.command_line import parse_command_line
from trustratio.recipes.configuration.config import PRECISIONS, RecipeConfig
from trustratio.recipes.configuration.overrides import apply_overrides, from_dict
from trustratio.recipes.configuration.presets import PRESETS, get_preset
from trustratio.recipes.configuration.ranges import check_ranges
from trustratio.recipes.rules.global_batch import BatchPlan, plan_batch
from trustratio.recipes.runs.checkpoints import CheckpointFolder
from trustratio.recipes.training import deepspeed_settings
from trustratio.recipes.training.bert import main
from trustratio.recipes.training.checks import check_run, early_identity
from trustratio.recipes.training.engines import ENGINE_STATE


def check(*arguments):
    return check_run(parse_command_line(arguments))


def merge(settings, **changes):
    options = {
        "plan": BatchPlan(4, 2, 2),
        "zero_stage": 1,
        "precision": "fp32",
        "gradient_clipping": 1.0,
        "elementwise": False,
    }
    return deepspeed_settings.merge(settings, **{**options, **changes})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name):
    config = get_preset(name)
    check_ranges(config)
    assert config.preset == name
    assert PRESETS[name].description
    assert PRESETS[name].source
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_flags_and_dotted_overrides_resolve_in_order():
    run = check(
        *("model.layers=3", "--preset", "adamw-tiny", "--lr", "0.5", "--data", "hf:a"),
        *("optimizer.lr=0.25", "optimizer.betas=[0.8,0.9]"),
    )
    config = run.config
    assert (config.optimizer.name, config.optimizer.lr) == ("adamw", 0.25)
    assert config.optimizer.options == {"betas": [0.8, 0.9]}
    assert config.data.sources == ("hf:a",)
    assert config.model.layers == 3
    assert config.training.precision == "fp32"
    assert check("optimizer.eps=1e-4", "--local_rank=1").config.optimizer.options == {"eps": 1e-4}


def test_max_steps_stops_early_and_keeps_the_schedule():
    run = check("--steps", "50", "--max_steps", "7")
    assert (run.last, run.config.training.steps) == (7, 50)
    assert check("--steps", "5", "--max_steps", "7").last == 5


def test_the_batch_line():
    plan = plan_batch(65536, 64, 8)
    assert plan == BatchPlan(64, 128, 8)
    assert plan.describe(128) == ("global = micro x accum x ranks = 64 x 128 x 8 = 65,536 sequences (8,388,608 tokens)")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--preset", "lamb-tinny"), r"unknown preset 'lamb-tinny'; nearest: lamb-tiny"),
        (("--optimizer", "lamd"), r"unknown optimizer 'lamd'; nearest: lamb.*known: ada"),
        (("optimizer.betaz=[0.9,0.99]",), r"optimizer 'lamb' refused its options .*betaz"),
        (("optimizer.name=Adam",), r"unknown optimizer 'Adam'; nearest: adamw"),
        (("--global_batch", "1000"), r"1000 is not divisible by .* 32 x 1 = 32; nearest possible .* 992 and 1024"),
        (("--global_batch", "1000"), r"keep 1000 with --micro_batch 25"),
        (("--global_batch", "10"), r"nearest possible global batches: 32; or keep 10 with --micro_batch 10"),
        (("--data", "/no/such/file.txt"), r"'/no/such/file.txt' does not exist"),
        (("--data", "optimizer.lr=0.1"), r"--data names no file"),
        (("model.layer=3",), r"unknown field of model 'layer'; nearest: layers"),
        (("--learning_rte", "1"), r"unknown option '--learning_rte'; nearest: --lr"),
        (("--micro_bach=3",), r"unknown option '--micro_bach'; nearest: --micro_batch"),
        (("--micro-bach=3",), r"nearest: --micro_batch"),
        (("-steps", "3"), r"unknown option '-steps'; nearest: --steps"),
        (("--max_grad_norm", "1"), r"nearest: training.gradient_clipping=NORM"),
        (("training.seed=99999999999999999999",), r"training.seed=99999999999999999999 is out of range: .*4294967295"),
        (("training.seed=-1",), r"training.seed=-1 is out of range"),
        (("--seed", "4294967296"), r"training.seed=4294967296 is out of range"),
        (("training.steps=1e400",), r"training.steps takes a whole number, given was inf"),
        (("training.steps=NaN",), r"training.steps takes a whole number, given was nan"),
        (("--steps", "1" + "0" * 30), r"training.steps=1000000000000000000000000000000 is out of range"),
        (("--steps", "9" * 5000), r"argument --steps: takes a whole number in digits"),
        (("optimizer.lr=1" + "0" * 400,), r"optimizer.lr takes a finite number, given was one of 401 digits"),
        (("--lr", "1e400"), r"optimizer.lr=inf is out of range"),
        (("training.gradient_clipping=NaN",), r"training.gradient_clipping=nan is out of range"),
        (("training.gradient_clipping=1e999",), r"training.gradient_clipping=inf is out of range"),
        (("--global-batch", "99999999999999999999"), r"training.global_batch=99999999999999999999 is out of range"),
        (("model.layers=1000000000",), r"model.layers=1000000000 is out of range: allowed is 1 to 1000"),
        (("model.hidden=0",), r"model.hidden=0 is out of range"),
        (("model.heads=0",), r"model.heads=0 is out of range"),
        (("data.workers=-1",), r"data.workers=-1 is out of range"),
        (("run.peak_tflops=1e999",), r"run.peak_tflops=inf is out of range"),
        (("phase_two.steps=10000000000000",), r"phase_two.steps=10000000000000 is out of range"),
        (
            ("--micro_batch", "268435456", "--global_batch", "268435456"),
            r"phase 1 needs at least .* GiB for 268435456 sequences of 32 on 1 ranks, and this machine has",
        ),
        (("--resume", "auto"), r"--resume auto begins or continues the run in --output DIR: give that, too"),
        (("training.zero_stage=two",), r"training.zero_stage takes a whole number, given was 'two'"),
        (("--steps", "many"), r"argument --steps: takes a whole number in digits, .*given was 'many'; --help lists"),
        (("modle.layers=3",), r"unknown configuration section 'modle'; nearest: model"),
        (("layers=3",), r"not of the form section.field=value"),
        (("optimizer=lamb",), r"optimizer is a section .*set its fields \(optimizer.name, .*or give --optimizer NAME"),
        (("model=3",), r"model is a section .*model.layers, .*or give --model SIZE"),
        (("run.=3",), r"run is a section of the configuration .*run.log_every"),
        (("--global_batch", "1e3"), r"--global_batch: takes a whole number in digits, such as 1000, given was '1e3'"),
        (("--lr", "0,1"), r"--lr: takes a number, such as 0.01 or 1e-2, given was '0,1'"),
        (("optimizer.lr=high",), r"optimizer.lr takes a number, given was 'high'"),
        (("optimizer.options=3",), r"optimizer.options takes a mapping such as .*, given was 3"),
        (("run.loggers=3",), r"run.loggers takes text or a list of texts, given was 3"),
        (("data.tokenizer=[3]",), r"data.tokenizer takes text, given was \[3\]"),
        (("run.noise_scale=3",), r"run.noise_scale takes true or false, given was 3"),
        (
            ("data.mask_probability=NaN",),
            r"data.mask_probability=nan is out of range: allowed is a finite number, above",
        ),
        (("schedule.warmup=NaN",), r"schedule.warmup=nan is out of range: allowed is a finite number, 0 to"),
        (("model.layers=two",), r"model.layers takes a whole number, given was 'two'"),
        (("model.layers=2.5",), r"model.layers takes a whole number, given was"),
        (("model.layers=true",), r"model.layers takes a whole number, given was"),
        (("model.heads=3",), r"model.hidden=128 is not divisible by model.heads=3"),
        (("--sequence_length", "1024"), r"data.sequence_length=1024 is out of range: .*max_positions=512"),
        (("--lr", "-1"), r"optimizer.lr=-1.0 is out of range"),
        (("--lr", "nan"), r"optimizer.lr=nan is out of range"),
        (("--steps", "0"), r"training.steps=0 is out of range"),
        (("--max_steps", "0"), r"--max_steps 0 is out of range"),
        (("--zero_stage", "4"), r"training.zero_stage=4 is out of range: allowed is 0, 1, 2 or 3"),
        (("--precision", "fp8"), r"training.precision='fp8' is out of range: allowed is auto, fp32, bf16"),
        (("data.mask_probability=1.5",), r"data.mask_probability=1.5 is out of range"),
        (("schedule.warmup=500", "--steps", "100"), r"schedule.warmup=500.0 is out of range"),
        (("schedule.shape=cosine",), r"schedule.shape='cosine' is out of range: allowed is polynomial, exponential"),
        (("schedule.warmup_start=3",), r"schedule.warmup_start=3 is out of range: allowed is 0 or less"),
        (("schedule.constant=0.5", "schedule.decay_from_start=true"), r"contradict each other: .*has no plateau"),
        (("training.compile=1",), r"training.compile takes true or false, given was 1"),
        (("phase_two.steps=-1",), r"phase_two.steps=-1 is out of range"),
        (("phase_two.steps=4", "phase_two.sequence_length=1024"), r"phase_two.sequence_length=1024 is out of range"),
        (("phase_two.steps=4", "phase_two.warmup=5"), r"phase_two.warmup=5.0 is out of range: .*phase_two.steps"),
        (
            ("phase_two.steps=4", "phase_two.global_batch=1000", "phase_two.micro_batch=64"),
            r"nearest possible .* 960 and 1024; or keep 1000 with phase_two.micro_batch=50",
        ),
        (("--model", "huge"), r"unknown model size 'huge'; .*known: base, large, .*, modernbert-base, .*, tiny"),
        (("--resume", "/no/such/run"), r"'/no/such/run': no such folder"),
        (("--deepspeed_config", "/no/such.json"), r"'/no/such.json' does not exist"),
    ],
)
def test_bad_command_lines_are_named(arguments, message):
    with pytest.raises(RecipeError, match=message):
        check(*arguments)


def test_an_output_that_cannot_be_is_named_before_data_are_read(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "runs").write_text("")
    monkeypatch.chdir(tmp_path)
    for arguments in (("--output", "file/run"), ("--output", "file/a/run", "--overwrite"), ("--output", "runs"), ()):
        with pytest.raises(
            RecipeError, match=r"cannot use output folder .*a part of the path is a file: choose another"
        ):
            check(*arguments)
    with pytest.raises(RecipeError, match="choose a shorter name"):
        check("--output", "x" * 300)
    check("--output", "new/run")
    assert not (tmp_path / "new").exists()


def test_help_names_every_precision(capsys):
    with pytest.raises(SystemExit):
        parse_command_line(["--help"])
    assert ", ".join(PRECISIONS) in " ".join(capsys.readouterr().out.split())


def test_a_saved_configuration_whose_section_is_no_mapping_is_named():
    with pytest.raises(RecipeError, match="model is a section"):
        from_dict({"model": 3})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": {"type": "Adam"}}, "its own `optimizer`; remove that section"),
        ({"scheduler": {"type": "WarmupLR"}}, "its own `scheduler`; remove that section"),
        ({"train_batch_size": 32}, r"train_batch_size=32, the recipe 16 \(4 x 2 x 2 = 16"),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu=8, the recipe 4"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps=1, the recipe 2"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zenflow is not supported"),
        ({"zero_optimization": {"stage3_module_granularity_threshold": 9}}, "granularity_threshold is not supported"),
        ({"zero_optimization": {"allgather_bucket_size": 501}}, "allgather_bucket_size=501: at stages 1 and 2"),
        ({"zero_optimization": {"offload_optimizer": {"super_offload": True}}}, "super_offload is not supported"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            r"ratio=0.5\) is not supported",
        ),
    ],
)
def test_bad_deepspeed_settings_are_named(settings, message):
    with pytest.raises(RecipeError, match=message):
        merge(settings)


def test_deepspeed_settings_are_completed():
    assert merge({}) == {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": 1},
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},
    }
    file = {"train_batch_size": "auto", "gradient_clipping": 0.5, "zero_optimization": {"overlap_comm": True}}
    merged = merge(file, zero_stage=2, elementwise=True)
    assert merged["train_batch_size"] == 16
    assert merged["gradient_clipping"] == 0.5
    assert merged["zero_optimization"] == {"overlap_comm": True, "stage": 2}
    assert merged["zero_allow_untested_optimizer"]
    assert file["train_batch_size"] == "auto"  # the caller's dict is left alone


@pytest.mark.parametrize("earlier", [True, False])
def test_a_run_is_continued_with_the_settings_it_was_started_with(earlier):
    """Earlier releases left DeepSpeed's timer on, which decides nothing."""
    begun = merge({})
    saved = {key: value for key, value in begun.items() if not (earlier and key == "timers")}
    continued = merge(deepspeed_settings.as_given(saved))
    assert continued == begun
    identities = [deepspeed_settings.without_batch_sizes(settings) for settings in (saved, continued)]
    assert identities[0] == identities[1]


def test_offload_keeps_our_optimizer():
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 1.0}}}
    assert merge(offload)["zero_force_ds_cpu_optimizer"] is False
    assert "zero_force_ds_cpu_optimizer" not in merge({"zero_optimization": {"offload_optimizer": {"device": "none"}}})


def write(path, values):
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return str(path)


def test_the_files_stage_and_precision_win_unless_the_command_line_contradicts(tmp_path):
    file = write(tmp_path / "ds.json", {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}})
    training = check("--deepspeed_config", file).config.training
    assert (training.zero_stage, training.precision) == (3, "bf16")
    assert check("--deepspeed_config", file, "--zero_stage", "3").config.training.zero_stage == 3
    with pytest.raises(RecipeError, match=r"--zero_stage 1 contradicts the DeepSpeed configuration, which has 3"):
        check("--deepspeed_config", file, "--zero_stage", "1")
    with pytest.raises(RecipeError, match=r"--precision fp32 contradicts the DeepSpeed configuration, which has bf16"):
        check("--deepspeed_config", file, "training.precision=fp32")


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read as JSON"), ("[]", "expected a JSON object")])
def test_an_unreadable_deepspeed_config_is_named(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        check("--deepspeed_config", write(tmp_path / "ds.json", text))


def test_an_occupied_output_folder_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(RecipeError, match=r"is not empty; .*--resume .*--overwrite"):
        check("--output", str(tmp_path))
    check("--output", str(tmp_path), "--overwrite")
    check("--output", str(tmp_path / "new"))


@pytest.fixture
def saved_run(tmp_path):
    """A run of adamw-tiny with its own DeepSpeed settings and a checkpoint of step 5, without the weights."""
    folder = tmp_path / "run"
    folder.mkdir()
    file = write(tmp_path / "ds.json", {"gradient_clipping": 0.25, "zero_optimization": {"stage": 2}})
    run = check(
        *("--preset", "adamw-tiny", "--global_batch", "512", "--micro_batch", "64"),
        *("--steps", "20", "--deepspeed_config", file),
    )
    write(folder / "config.json", run.config.to_dict())
    write(folder / "deepspeed_config.json", run.settings)
    CheckpointFolder(folder, 3, early_identity(run)).write(5, lambda path: None, lambda failure: [], first=True)
    return folder


def test_a_resumed_run_takes_its_saved_configuration(saved_run):
    run = check("--resume", str(saved_run))
    assert (run.first, run.last) == (5, 20)
    assert (run.config.preset, run.config.optimizer.name) == ("adamw-tiny", "adamw")
    assert (run.settings["gradient_clipping"], run.settings["zero_optimization"]) == (0.25, {"stage": 2})
    assert check("--resume", str(saved_run), "--micro_batch", "32", "--steps", "40").last == 40
    assert check("--resume", str(saved_run / "checkpoints" / "step-00000005"), "--max_steps", "7").last == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model.layers=3",), r"another model or run.*\n  model: checkpoint .*'layers': 2.* this run .*'layers': 3"),
        (("--preset", "lamb-tiny", "--steps", "20"), r"another model or run.*\n  optimizer: checkpoint .*'adamw'"),
        (("--global_batch", "1024"), r"global_batch: checkpoint 512, this run 1024"),
        (("training.gradient_clipping=1", "--zero_stage", "1"), r"--zero_stage 1 contradicts .* which has 2"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(saved_run, arguments, message):
    with pytest.raises(RecipeError, match=message):
        check("--resume", str(saved_run), *arguments)


def test_a_finished_run_has_nothing_left_to_do(saved_run, capsys):
    with pytest.raises(NothingToDo, match="is at step 5 and the run ends at step 5: nothing is left to do"):
        check("--resume", str(saved_run), "--max_steps", "5")
    assert main(["--resume", str(saved_run), "--max_steps", "5"]) == 0
    assert main(["--resume", "auto", "--output", str(saved_run), "--max-steps", "5"]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("nothing is left to do") == 2
    assert shown.err == ""


@pytest.mark.parametrize(("asked", "message"), [("foo", "must be one of .*, got 'foo'"), ("triton", "'triton' needs ")])
def test_an_implementation_that_is_not_there_is_named(asked, message, monkeypatch):
    """Before data are read and an earlier run is overwritten."""
    monkeypatch.setenv("TRUSTRATIO_IMPLEMENTATION", asked)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RecipeError, match=message):
        check("--preset", "lamb-tiny")
    check("--preset", "adamw-tiny")


def test_other_numbers_of_ranks_share_the_same_batch_out(saved_run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RecipeError, match=r"written by 1 ranks, and 3 cannot share out its global batch of 512 ") as no:
        check("--resume", str(saved_run))
    assert str(no.value).endswith("numbers of ranks that can: 1, 2, 4, 8, 16, 32, 64, 128")
    monkeypatch.setenv("WORLD_SIZE", "16")
    with pytest.raises(RecipeError, match=r"is cut up among the 1 ranks .* continue it with 1 ranks"):
        check("--resume", str(saved_run))
    (saved_run / "checkpoints" / "step-00000005" / ENGINE_STATE).touch()
    run = check("--resume", str(saved_run))
    assert run.plans == (BatchPlan(32, 1, 16),)  # the saved micro-batch, 64, is more than a rank's share
    assert check("--resume", str(saved_run), "--micro_batch", "8").plans == (BatchPlan(8, 4, 16),)
    with pytest.raises(RecipeError, match="512 is not divisible by micro-batch x ranks = 64 x 16"):
        check("--resume", str(saved_run), "--micro_batch", "64")


def test_resume_auto_begins_or_continues(saved_run, tmp_path):
    def auto(folder, *arguments):
        begun = ("--preset", "adamw-tiny", "--global_batch", "512", "--micro_batch", "64", "--steps", "20")
        return check(*begun, "--resume", "auto", "--output", str(folder), *arguments)

    file = ("--deepspeed_config", str(tmp_path / "ds.json"))
    assert auto(saved_run, *file).first == 5
    assert auto(tmp_path / "new").first == 0
    assert not auto(tmp_path / "new").invocation.overwrite
    # Killed before the rename of `latest`, and before its first checkpoint.
    (saved_run / "checkpoints" / "latest").unlink()
    assert auto(saved_run, *file).first == 5
    (saved_run / "checkpoints" / "step-00000005" / "checkpoint.json").unlink()
    with pytest.raises(RecipeError, match="has no complete checkpoint"):
        auto(saved_run, *file)
    shutil.rmtree(saved_run / "checkpoints")
    (saved_run / "checkpoints" / "step-00000005.partial").mkdir(parents=True)
    run = auto(saved_run, *file)
    assert run.first == 0
    assert run.invocation.overwrite
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("precious")
    with pytest.raises(RecipeError, match="is not empty"):
        auto(tmp_path / "mine")


def test_other_deepspeed_settings_do_not_continue_a_run(saved_run, tmp_path):
    other = write(tmp_path / "other.json", {"zero_optimization": {"stage": 2}})
    with pytest.raises(RecipeError, match=r"deepspeed: checkpoint .*'gradient_clipping': 0.25"):
        check("--resume", str(saved_run), "--deepspeed_config", other)


def test_a_run_without_deepspeed_is_not_continued_with_it(saved_run):
    (saved_run / "deepspeed_config.json").unlink()
    with pytest.raises(RecipeError, match=r"was trained without DeepSpeed; continue it with bert_accelerate.py"):
        check("--resume", str(saved_run))


def test_main_reports_bad_input_without_a_traceback(capsys):
    assert main(["--preset", "lamb-tinny"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown preset 'lamb-tinny'")


def test_other_ranks_stay_silent(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["--preset", "lamb-tinny"]) == 2
    assert capsys.readouterr() == ("", "")


def test_the_first_screen_has_what_is_special_and_short_lines(capsys):
    assert main(["--dry-run", "--global-batch", "128", "schedule.degree=0.5", "--zero_stage", "1"]) == 0
    printed = capsys.readouterr().out
    assert "schedule.degree=0.5" in printed
    assert "training.zero_stage=1" in printed  # as the preset has it, but it was asked for
    assert "schedule.final" not in printed
    assert len(printed.splitlines()) < 10
    assert max(map(len, printed.splitlines())) <= 120
    assert main(["--dry_run", "--verbose", "--data", *["hf:a-long-name-of-a-data-set"] * 9]) == 0
    verbose = capsys.readouterr().out
    assert "schedule.final=0.0" in verbose
    assert all(len(line) <= 120 or " " not in line.strip() for line in verbose.splitlines())


def test_dry_run_prints_the_plan_and_stops(capsys):
    assert main(["--dry_run", "--global_batch", "128", "schedule.degree=0.5"]) == 0
    printed = capsys.readouterr().out
    assert "global = micro x accum x ranks = 32 x 4 x 1 = 128 sequences" in printed


def test_overrides_leave_the_original_alone():
    config = RecipeConfig()
    changed = apply_overrides(config, ["schedule.final=0.1", "data.tokenizer=null"])
    assert (changed.schedule.final, config.schedule.final) == (0.1, 0.0)
    assert changed.data.tokenizer is None
    assert math.isclose(apply_overrides(changed, ["schedule.final=0"]).schedule.final, 0.0)
