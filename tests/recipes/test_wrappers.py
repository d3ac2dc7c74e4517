"""One preset under every wrapper and in both loops, across the border of its phases, and with failures; two ranks."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trustratio.recipes.common.files import read_sealed, write_sealed
from trustratio.recipes.common.marks import Share, mark_files
from trustratio.recipes.configuration.presets import get_preset

from .recipe_runs import TWO_PHASES, losses, recipe, records, train, trained_tensors
from .test_unpickling import exploit

ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_CONFIG_DS_FIELDS": "zero_stage,mixed_precision"}
DDP = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"}
LAUNCHED = {**ZERO, "ACCELERATE_MIXED_PRECISION": "no"}
ACCELERATE, TRAINER = "bert_accelerate.py", "bert_trainer.py"
# name: what the launcher sets, the script, further arguments
WRAPPERS = {
    "deepspeed-zero-1": ({}, "bert.py", ("--zero_stage", "1")),
    "accelerate-ddp": ({}, ACCELERATE, ()),
    "accelerate-zero-1": ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, ACCELERATE, ()),
    "accelerate-zero-2": ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, ACCELERATE, ()),
    "accelerate-zero-3": ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, ACCELERATE, ()),
    "trainer-ddp": (DDP, TRAINER, ()),
    "trainer-zero-1": ({}, TRAINER, ("--zero_stage", "1")),
    "trainer-zero-2": ({**LAUNCHED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, TRAINER, ()),
    "trainer-zero-3": ({**LAUNCHED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, TRAINER, ()),
}
REFERENCE = "deepspeed-zero-1"
NO_DROPOUT = "model.dropout=0"
FAILING = (REFERENCE, "accelerate-ddp", "trainer-ddp", "trainer-zero-1")
"""Failures are injected into the loop of the recipe on both of its engines, and into the Trainer's."""


@pytest.fixture(scope="module")
def launch(text_folder, pools, tmp_path_factory):
    """Run the recipe on two ranks; return its folder and how it ended on each rank."""
    root = tmp_path_factory.mktemp("wrappers")

    def start(
        name: str, wrapper: str, *arguments: str, sabotage: str = "", settings: tuple[str, ...] = TWO_PHASES
    ) -> tuple[Path, list[str]]:
        environment, script, own = WRAPPERS[wrapper]
        folder = root / name
        line = recipe(text_folder, folder, *own, *arguments, settings=settings)
        return folder, pools.get(2).run(train, str(root / "cache"), environment, script, line, sabotage)

    return start


@pytest.fixture(scope="module")
def runs(launch):
    """The folder of a finished run per wrapper and dropout, made when first asked for."""
    made: dict[tuple[str, str], Path] = {}

    def run(wrapper: str, *arguments: str) -> Path:
        key = (wrapper, *arguments)
        if key not in made:
            made[key], endings = launch(f"{wrapper}{len(made)}", wrapper, *arguments)
            assert endings == ["finished"] * 2
        return made[key]

    return run


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name != REFERENCE])
def test_every_wrapper_gives_the_same_first_ten_losses(runs, wrapper):
    """Dropout is off: it draws from torch's generator, which activation order of a wrapper may move."""
    expected = losses(runs(REFERENCE, NO_DROPOUT))
    assert len(expected) == 10
    assert losses(runs(wrapper, NO_DROPOUT)) == pytest.approx(expected, rel=1e-4)
    assert expected[0] != pytest.approx(expected[-1], rel=1e-2)  # the losses do move


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", [REFERENCE, "accelerate-ddp", "trainer-zero-2"])
def test_a_compiled_model_gives_the_same_losses(runs, wrapper):
    """By torch's own compiler, inside the wrapper."""
    compiled = losses(runs(wrapper, NO_DROPOUT, "training.compile=true"))
    assert compiled == pytest.approx(losses(runs(REFERENCE, NO_DROPOUT)), rel=1e-4)


def test_gradient_statistics_cross_the_border_too(runs):
    """VR-LAMB takes the gradient of every rank's every micro-batch: four of them in both phases, of other sizes."""
    options = (NO_DROPOUT, "optimizer.name=vrlamb", "phase_two.micro_batch=2")
    expected = losses(runs(REFERENCE, *options))
    assert losses(runs("accelerate-ddp", *options)) == pytest.approx(expected, rel=1e-4)
    assert expected[1:] != pytest.approx(losses(runs(REFERENCE, NO_DROPOUT))[1:], rel=1e-4)


def test_the_phases_follow_their_plan(runs):
    folder = runs(REFERENCE, NO_DROPOUT)
    steps = records(folder)
    assert [r["sequences"] for r in steps] == [16, 32, 48, 64, 80, 96, 104, 112, 120, 128]
    # One step of warm-up of six (10 %) and none of four; then linear decay, begun anew at update 7.
    rates = [0.01 * (6 - max(k, 1)) / 5 if k else 0.01 for k in range(6)] + [0.01 * (4 - k) / 4 for k in range(4)]
    assert [r["lr"] for r in steps] == pytest.approx(rates)
    assert (folder / "checkpoints" / "step-00000006").is_dir()  # at the border
    assert all("noise_scale" in r for r in steps)  # four micro-batches per update in both phases
    validations = records(folder, "validation")
    assert [r["step"] for r in validations] == [5, 6, 10]


@pytest.mark.parametrize(("wrapper", "step"), [(REFERENCE, 5), (REFERENCE, 6), ("accelerate-ddp", 5)])
def test_a_run_resumed_before_or_at_the_border_is_bit_exact(runs, launch, wrapper, step):
    straight = runs(wrapper)
    checkpoint = straight / "checkpoints" / f"step-{step:08d}"
    resumed, endings = launch(f"{wrapper}-from-{step}", wrapper, "--resume", str(checkpoint))
    assert endings == ["finished"] * 2
    assert losses(resumed) == losses(straight)[step:]
    one, other = (trained_tensors(folder / "checkpoints" / "step-00000010") for folder in (straight, resumed))
    assert len(one) > 20
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("wrapper", "step"), [("trainer-ddp", 5), ("trainer-zero-1", 6), ("trainer-zero-3", 5)])
def test_a_run_of_the_trainer_resumed_before_or_at_the_border_is_bit_exact(runs, launch, wrapper, step):
    straight = runs(wrapper, NO_DROPOUT)
    checkpoint = straight / "checkpoints" / f"step-{step:08d}"
    resumed, endings = launch(f"{wrapper}-from-{step}", wrapper, NO_DROPOUT, "--resume", str(checkpoint))
    assert endings == ["finished"] * 2
    assert losses(resumed) == losses(straight)[step:]
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (straight, resumed))
    assert len(one) > 20
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_moments_and_steps_are_carried_over_as_asked(runs):
    straight = losses(runs(REFERENCE))
    zeroed = losses(runs(REFERENCE, "phase_two.keep_moments=false"))
    counting = losses(runs(REFERENCE, "phase_two.reset_step=false"))
    assert straight[:7] == zeroed[:7] == counting[:7]  # the first loss after the border comes before its update
    assert straight[7] != zeroed[7] != counting[7] != straight[7]


@pytest.mark.parametrize("wrapper", FAILING)
def test_a_nan_loss_stops_all_ranks_and_names_the_last_good_checkpoint(launch, wrapper):
    folder, endings = launch(f"{wrapper}-nan", wrapper, "run.checkpoint_every=2", sabotage="loss")
    good = folder / "checkpoints" / "step-00000006"
    assert len(set(endings)) == 1
    assert endings[0].startswith("TrainingFailure: the loss became nan at step 8, at learning rate 0.0075; start anew")
    assert f"the last good checkpoint, {good}, is whole: continue with --resume {good}" in endings[0]
    assert sorted(p.name for p in good.parent.glob("step-*")) == ["step-00000002", "step-00000004", good.name]
    assert (folder / "report.png").exists()


@pytest.mark.parametrize("wrapper", FAILING)
def test_weights_that_broke_are_not_saved(launch, wrapper):
    folder, endings = launch(f"{wrapper}-weights", wrapper, sabotage="weights")
    assert len(set(endings)) == 1
    assert endings[0].startswith("TrainingFailure: after the update of step 10 the loss on held-out text is nan")
    assert (folder / "checkpoints" / "latest").read_text() == "step-00000006\n"


@pytest.mark.parametrize(
    ("wrapper", "sabotage", "failure"),
    [
        (REFERENCE, "disk", "rank 1: OSError: [Errno 28] No space left"),
        ("accelerate-ddp", "state", "rank 0: OSError: [Errno 28] No space left"),
        ("trainer-ddp", "model", "rank 0: OSError: No space left"),
        ("trainer-zero-1", "disk", "rank 1: OSError: [Errno 28] No space left"),
        ("trainer-zero-1", "model", "rank 0: OSError: No space left"),
        ("trainer-zero-1", "latest", "rank 0: OSError: [Errno 28] No space left"),
    ],
)
def test_a_full_disk_leaves_the_previous_checkpoint_whole(launch, wrapper, sabotage, failure):
    """And no rank waits for the one that failed, which would stop this test from ending."""
    folder, endings = launch(f"{wrapper}-{sabotage}", wrapper, sabotage=sabotage)
    assert len(set(endings)) == 1
    assert f"the checkpoint of step 10 could not be written ({failure}" in endings[0]
    assert f"{folder / 'checkpoints' / 'step-00000006'}, is whole: continue with --resume" in endings[0]
    assert sorted(p.name for p in (folder / "checkpoints").glob("step-*")) == ["step-00000005", "step-00000006"]
    assert len(trained_tensors(folder / "checkpoints" / "step-00000006")) > 20
    assert (folder / "report.png").exists()


@pytest.mark.parametrize(
    ("wrapper", "sabotage", "failure"),
    [
        (REFERENCE, "folder", "RecipeError: 'some/place': Read-only file system; choose a folder that can be written"),
        (REFERENCE, "config", "RecipeError: 'some/place': Read-only file system"),
        (REFERENCE, "cache", "RecipeError: 'some/place': Read-only file system"),
        (REFERENCE, "open", "RecipeError: the metrics cannot be written (rank 0: "),
        (REFERENCE, "metrics", "TrainingFailure: the metrics could not be written (rank 0: OSError: [Errno 28]"),
        ("trainer-ddp", "metrics", "TrainingFailure: the metrics could not be written (rank 0: OSError: [Errno 28]"),
        ("trainer-ddp", "final model", "TrainingFailure: the model could not be written (rank 0: "),
    ],
)
def test_a_place_that_cannot_be_written_ends_all_ranks_with_one_sentence(launch, wrapper, sabotage, failure):
    folder, endings = launch(f"{wrapper}-{sabotage}-refused", wrapper, sabotage=sabotage)
    assert len(set(endings)) == 1
    assert endings[0].startswith(failure)
    if sabotage == "metrics":  # noticed at the step after the one whose record was lost
        assert (folder / "checkpoints" / "latest").read_text() > "step-00000007"


def replaced_by_pickles(run: Path, folder: Path, trace: Path, *, listed: bool) -> Path:
    """Copy a run, with every file of its checkpoint that is unpickled replaced by one that would run code."""
    shutil.copytree(run, folder)
    checkpoint = folder / "checkpoints" / "step-00000005"
    pickles = [path for path in checkpoint.rglob("*") if path.suffix in (".pt", ".pth", ".bin")]
    assert pickles
    for path in pickles:
        exploit(path, trace)
    if listed:  # as somebody who gives the checkpoint away would
        description = read_sealed(checkpoint / "checkpoint.json")
        names = [str(path.relative_to(checkpoint)) for path in pickles]
        description["files"] |= mark_files(checkpoint, names, Share())
        write_sealed(checkpoint / "checkpoint.json", description)
    return checkpoint


@pytest.mark.parametrize("wrapper", [REFERENCE, "accelerate-ddp", "trainer-ddp", "trainer-zero-1"])
def test_a_foreign_checkpoint_is_not_unpickled(runs, launch, tmp_path, wrapper):
    trace = tmp_path / "it ran"
    for listed, said in (
        (False, "was changed, cut short or replaced"),
        (True, "holds more than tensors and DeepSpeed's"),
    ):
        checkpoint = replaced_by_pickles(runs(wrapper, NO_DROPOUT), tmp_path / f"listed-{listed}", trace, listed=listed)
        arguments = (NO_DROPOUT, "--resume", str(checkpoint), "--overwrite")
        _, endings = launch(f"{wrapper}-foreign-{listed}", wrapper, *arguments)
        assert len(set(endings)) == 1
        assert endings[0].startswith(f"RecipeError: {checkpoint}")
        assert said in endings[0]
        assert not trace.exists()


@pytest.mark.parametrize("wrapper", [REFERENCE, "trainer-zero-1"])
def test_a_checkpoint_that_lost_a_bit_or_got_a_file_is_refused_on_all_ranks(runs, launch, tmp_path, wrapper):
    shutil.copytree(runs(wrapper, NO_DROPOUT), tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000005"
    largest = max(checkpoint.rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 3] ^= 4
    largest.write_bytes(content)
    (largest.parent / "mp_rank_00_more.pt").write_bytes(b"")
    arguments = (NO_DROPOUT, "--resume", str(checkpoint), "--overwrite")
    _, endings = launch(f"{wrapper}-bit", wrapper, *arguments)
    assert len(set(endings)) == 1
    name = largest.relative_to(checkpoint)
    assert f"{checkpoint} is damaged: {name} was changed, cut short or replaced after it was written; " in endings[0]
    assert "mp_rank_00_more.pt was put there later: remove it" in endings[0]


TWINS = ("lamb-64k-32k-tiny", "lans-96k-33k-tiny", "vr-lamb-64k-32k-tiny", "adamw-64k-tiny")


@pytest.mark.parametrize("preset", TWINS)
def test_twins_of_published_presets_train_both_phases(launch, preset):
    """With their own model, batches, rates and optimizer options; two updates of each phase, on little text."""
    few = ("--steps", "2", "phase_two.steps=2", "data.vocabulary=200")
    little = ("data.validation_fraction=0.2", "data.validation_sequences=8")
    folder, endings = launch(preset, REFERENCE, settings=("--preset", preset, *few, *little))
    assert endings == ["finished"] * 2
    config, done = get_preset(preset), records(folder)
    batches = [config.training.global_batch] * 2 + [config.phase_two.global_batch] * 2
    assert [r["sequences"] for r in done] == list(itertools.accumulate(batches))
    assert config.data.sequence_length < config.phase_two.sequence_length
    assert all(math.isfinite(r["loss"]) for r in done)
    assert done[1]["loss"] != done[0]["loss"]
    assert all(any(ratio != 1 for ratio in r["trust_ratios"]) is not preset.startswith("adamw") for r in done)


def test_the_saved_configuration_is_what_was_used(runs):
    folder = runs("accelerate-zero-2", NO_DROPOUT)
    settings = json.loads((folder / "deepspeed_config.json").read_text())
    assert settings["zero_optimization"]["stage"] == 2
    assert settings["gradient_accumulation_steps"] == 2  # the recipe's, not accelerate's default of 1
    assert json.loads((folder / "config.json").read_text())["training"]["zero_stage"] == 2
    assert not (runs("accelerate-ddp", NO_DROPOUT) / "deepspeed_config.json").exists()
