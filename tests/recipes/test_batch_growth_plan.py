"""Batches that follow the gradient noise scale: positions, what is refused, what a plan says; no training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.comparison.compare import main as compare
from trustratio.recipes.configuration.batch_growth import describe_growth, growths_of, updates_of
from trustratio.recipes.configuration.command_line import parse_command_line
from trustratio.recipes.configuration.overrides import apply_overrides
from trustratio.recipes.configuration.phases import phases_of
from trustratio.recipes.configuration.presets import get_preset
from trustratio.recipes.planning.plan import main as plan
from trustratio.recipes.rules.global_batch import BatchPlan
from trustratio.recipes.training.batches import NoiseBatches
from trustratio.recipes.training.checks import check_run
from trustratio.recipes.training.growth_state import growth_state

from .recipe_runs import GROWING, GROWING_TWICE, recipe

# Positions ------------------------------------------------------------------------------------------------------------


class FirstOfTwo:
    """What `NoiseBatches` asks of an engine: this rank's number, and sums to which the other one adds nothing."""

    rank = 0

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        return values.clone()


class SecondOfTwo(FirstOfTwo):
    rank = 1

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        assert not values.any()
        return values + torch.tensor([1.0, 1e9], dtype=torch.float64)


def positions(first: int = 0, last: int = 1000) -> NoiseBatches:
    config = parse_command_line(recipe("nowhere", Path("run"), settings=GROWING_TWICE)).config
    plans = [growth.plan(2) for growth in growths_of(config)]
    return NoiseBatches(config, phases_of(config), plans, first, last)


def done(batches: NoiseBatches, engine: FirstOfTwo, checkpoint: Path | None = None) -> list[tuple[int, float, int]]:
    """Do all updates that are left, each with much noise; return batch, position and sequences so far of each."""
    updates = []
    while not batches.is_over:
        batches.enter_phase()
        size, position = batches.plan.sequences, batches.position
        batches.advance()
        updates.append((size, position, batches.sequences))
        if batches.decides or batches.phase_is_over or checkpoint is not None:
            records = [{"gradient_signal": 1.0, "gradient_noise": 1e9}] * (batches._pending)
            batches.note(records, engine)
        if checkpoint is not None and batches.step == 3:
            batches.save(checkpoint, engine)
            return updates
    return updates


@pytest.mark.parametrize("engine", [FirstOfTwo(), SecondOfTwo()], ids=["first", "second"])
def test_sizes_and_positions_of_a_run_that_doubles_at_every_decision(engine):
    """On a rank whose own measurement is lost, too: the first one's counts."""
    updates = done(positions(), engine)
    assert [size for size, _, _ in updates] == [4, 4, 8, 8, 16, 16, 16, 16, 8, 8, 8, 8, 8]
    read = [4, 8, 16, 24, 40, 56, 72, 88, 96, 104, 112, 120, 128]
    assert [sequences for _, _, sequences in updates] == read
    assert [position for _, position, _ in updates] == [n / 16 for n in (0, *read[:8])] + [6, 7, 8, 9]
    assert updates_of(parse_command_line(recipe("nowhere", Path("run"), settings=GROWING_TWICE)).config)[0] == (9, 24)


def test_a_position_goes_on_from_its_file(tmp_path):
    straight = done(positions(), FirstOfTwo())
    begun = done(positions(), FirstOfTwo(), tmp_path)
    resumed = positions(first=3)
    resumed.load(tmp_path)
    assert not resumed.decides
    assert begun + done(resumed, FirstOfTwo()) == straight
    other = positions(first=3)
    other.plans = [BatchPlan(3, 1, 2), BatchPlan(1, 1, 2)]
    with pytest.raises(RecipeError, match="was written after 16 sequences, which 3 x 2 does not divide"):
        other.load(tmp_path)


# What is refused, planned and shown -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run.smallest_batch=16",), "cannot grow from a smallest batch of 16 to a largest of 16: give run.smallest"),
        (("run.largest_batch=2",), "cannot grow from a smallest batch of 4 to a largest of 2"),
        (
            ("run.smallest_batch=5",),
            r"run.smallest_batch makes 5 sequences in phase 1, not .* 2 x 1 = 2; --micro_batch 1 divides the smallest",
        ),
        (("run.largest_batch=17",), r"run.largest_batch makes 17 sequences in phase 1, not divisible"),
        (("run.largest_batch=98",), "run.largest_batch makes 98 sequences per update, and phase 1 has 96 in all"),
        (("run.smallest_batch=2",), r"run.batch_from_noise=true compares the gradients of at least 2 micro-batches"),
        (("optimizer.name=adamw",), "run.batch_from_noise=true needs one of trustratio's optimizers"),
        (("optimizer.segments=2",), "run.batch_from_noise=true goes by the norms of whole parameters' gradients"),
        (("run.batch_every=0",), "run.batch_every=0 is out of range: allowed is 1 to"),
        (("run.noise_per_batch=0",), "run.noise_per_batch=0.0 is out of range: allowed is finite and above 0"),
        (("run.batch_from_noise=false",), "run.smallest_batch=4 has no effect without run.batch_from_noise=true"),
        (
            ("phase_two.steps=4", "phase_two.global_batch=6", "phase_two.sequence_length=32"),
            r"run.smallest_batch=4 is 4/16 of the first phase's global batch, .* phase 2's 6 .*: use a multiple of 8",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(arguments, message, text_folder, tmp_path):
    line = recipe(text_folder, tmp_path / "run", *arguments, settings=GROWING)
    with pytest.raises(RecipeError, match=message):
        check_run(parse_command_line(line))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [None, "", "[]", '{"phase": 1}', '{"phase": 0, "read": 4, "rule": {}}'])
def test_a_checkpoint_that_does_not_say_how_far_it_has_grown_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "batch_growth.json").write_text(content)
    with pytest.raises(RecipeError, match=r"cannot go on with the batch of .*batch_growth\.json: "):
        growth_state(tmp_path)


def test_the_plan_before_a_run_says_batches_and_updates():
    config = parse_command_line(recipe("nowhere", Path("run"), settings=GROWING_TWICE)).config
    lines = list(describe_growth(config, 2))
    assert lines[0] == "phase 1: batch from the gradient noise: 4 to 16 sequences = 2 x 1 to 4 x 2"
    # At most 4, 4, 8, 8 and four of 16 and one of what is left; 96 / 4 at least.
    assert lines[1] == "  96 sequences in 9 to 24 updates (6 of 16, by which the learning rate is scheduled)"
    assert lines[2] == "phase 2: batch from the gradient noise: 2 to 8 sequences = 1 x 1 to 4 x 2"
    assert lines[3] == "  32 sequences in 4 to 16 updates (4 of 8, by which the learning rate is scheduled)"
    assert lines[4] == "  it doubles where the noise scale is at least 0.001 x the batch, looked at every 2 updates"
    assert lines[5].startswith("  from phase 1 to 2: weights kept")


def test_the_planner_says_batches_updates_and_time(capsys):
    options = ["--preset", "lamb-64k-32k", "--gpus", "8", "run.batch_from_noise=true", "run.smallest_batch=8192"]
    assert plan([*options, "--json", "--most_gpus", "8"]) == 0
    values = json.loads(capsys.readouterr().out)
    first, second = values["batch_from_noise"]
    assert (first["smallest"], first["largest"], second["smallest"], second["largest"]) == (8192, 65536, 4096, 32768)
    assert (first["most_updates"], second["most_updates"]) == (7038 * 8, 1563 * 8)
    # 20 updates of each smaller batch, which are 20, 40 and 80 eighths of an update of the largest.
    assert first["fewest_updates"] == 60 + math.ceil(7038 - 140 / 8)
    assert second["fewest_updates"] == 1563
    assert values["phases"][0]["micro"] * 8 <= 8192
    assert first["least_hours"] < first["most_hours"]
    assert first["least_hours"] == pytest.approx(values["phases"][0]["hours"])
    assert plan([*options, "--most_gpus", "8"]) == 0
    printed = capsys.readouterr().out
    assert "  batch from the gradient noise: 8,192 to 65,536 sequences\n    7,081 to 56,304 updates; phase: " in printed


def test_a_planned_range_that_the_gpus_cannot_share_is_named(capsys):
    options = ["--preset", "lamb-64k-32k", "run.batch_from_noise=true", "--most_gpus", "1"]
    assert plan([*options, "run.smallest_batch=8192", "--gpus", "8", "--micro_batch", "4096"]) == 1
    assert "run.smallest_batch makes 8192 sequences in phase 1, not divisible by" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="cannot grow from a smallest batch of 65536"):
        growths_of(apply_overrides(get_preset("lamb-64k-32k"), ["run.batch_from_noise=true"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("run.batch_from_noise=true", "run.smallest_batch=64", "optimizer.name=adamw"), "'adamw' does not"),
        (("run.batch_from_noise=true", "run.smallest_batch=64", "optimizer.segments=2"), "optimizer.segments cuts"),
        (("run.noise_scale=true", "optimizer.name=sgd"), "run.noise_scale=true needs one of trustratio's optimizers"),
        (("data.discard_smallest=0.1", "training.compile=true", "model.dropout=0.1"), "cannot go together with"),
        (("optimizer.name=adashift", "training.steps=9"), "moves no weight in its first 10 updates"),
        (("optimizer.name=adashift", "optimizer.keep=3", "training.steps=3"), "its first 3 updates"),
        (("run.noise_scale=true", "--gpus", "1", "--micro_batch", "128"), "has 1: halve --micro_batch"),
    ],
)
def test_what_a_run_refuses_is_not_planned(options, message, capsys):
    assert plan(["--preset", "lamb-tiny", "--gpus", "2", "--most_gpus", "1", *options]) == 2
    assert message in capsys.readouterr().err
    if "--gpus" not in options:  # the same sentence from the run itself
        with pytest.raises(RecipeError, match=message):
            check_run(parse_command_line(["--preset", "lamb-tiny", *options]))


@pytest.mark.parametrize(("smallest", "ranks", "hint"), [(48, 1, "--micro_batch 16"), (33, 2, "choose multiples of 2")])
def test_the_micro_batch_that_is_named_fits(smallest, ranks, hint):
    """All three batches, with two groups in the smallest."""
    settings = ["run.batch_from_noise=true", f"run.smallest_batch={smallest}"]
    (growth,) = growths_of(apply_overrides(get_preset("lamb-tiny"), settings))
    with pytest.raises(RecipeError, match=hint):
        growth.plan(ranks)
    if hint.startswith("--"):
        assert check_run(parse_command_line(["--preset", "lamb-tiny", *settings, *hint.split()])) is not None


def test_a_checkpoint_of_a_damaged_rule_is_refused_by_its_file(tmp_path):
    done(positions(), FirstOfTwo(), tmp_path)
    file = tmp_path / "batch_growth.json"
    state = json.loads(file.read_text())
    for name, value in {"doublings": 77, "smallest": 2}.items():
        file.write_text(json.dumps({**state, "rule": {**state["rule"], name: value}}))
        with pytest.raises(RecipeError, match=rf"cannot go on with the batch of .*growth\.json: the state.* {name}"):
            positions(first=3).load(tmp_path)


def test_a_comparison_refuses_batches_of_each_optimizers_own(tmp_path, capsys):
    options = ["--optimizers", "lamb,lans", "--lrs", "3", "--output", str(tmp_path / "comparison")]
    assert compare([*options, "run.batch_from_noise=true", "run.smallest_batch=64"]) == 2
    assert "gives each optimizer batches and updates of its own" in capsys.readouterr().err
