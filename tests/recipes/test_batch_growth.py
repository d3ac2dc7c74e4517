"""Batches that follow the gradient noise scale: the job at two ranks, its growth, its resume, its plan and report."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trustratio.optimizers.noise_scale import NoiseScale, RunningNoise
from trustratio.recipes.common.errors import NothingToDo, RecipeError
from trustratio.recipes.comparison.compare import main as compare
from trustratio.recipes.configuration.batch_growth import describe_growth, growths_of
from trustratio.recipes.configuration.command_line import parse_command_line
from trustratio.recipes.configuration.overrides import apply_overrides
from trustratio.recipes.configuration.phases import learning_rate
from trustratio.recipes.configuration.presets import get_preset
from trustratio.recipes.planning.plan import main as plan
from trustratio.recipes.runs.history import load_history
from trustratio.recipes.runs.report import notices, page_data, title
from trustratio.recipes.training.checks import check_run
from trustratio.recipes.training.growth_state import growth_state

from .recipe_runs import losses, recipe, records, train, trained_tensors
from .test_wrappers import WRAPPERS

GROWING = (
    *("--sequence_length", "16", "--global_batch", "16", "--micro_batch", "2", "--steps", "6"),
    *("data.vocabulary=200", "data.validation_fraction=0.2", "data.validation_sequences=10"),
    *("model.hidden=32", "model.intermediate=64", "model.max_positions=32", "run.validate_every=0"),
    *("run.batch_from_noise=true", "run.smallest_batch=4", "run.batch_every=2", "run.noise_per_batch=0.001"),
    *("optimizer.lr=0.002", "run.checkpoint_every=1", "run.keep_checkpoints=99"),
)
"""96 sequences in updates of 4, 8 or 16 on two ranks, with a noise scale that is nearly always large enough."""

TWO_PHASES = (
    *GROWING,
    *("phase_two.steps=4", "phase_two.sequence_length=32", "phase_two.global_batch=8", "phase_two.micro_batch=1"),
)
"""After them 32 sequences of 32 tokens in updates of 2, 4 or 8."""

REFERENCE = "deepspeed-zero-1"


@pytest.fixture(scope="module")
def launch(text_folder, pools, tmp_path_factory):
    """Run the recipe on two ranks; return its folder and how it ended on each rank."""
    root = tmp_path_factory.mktemp("growth")

    def start(name: str, wrapper: str, *arguments: str, settings=GROWING, sabotage="", report=False):
        environment, script, own = WRAPPERS[wrapper]
        line = recipe(text_folder, root / name, *own, *arguments, settings=settings)
        return root / name, pools.get(2).run(train, str(root / "cache"), environment, script, line, sabotage, report)

    return start


@pytest.fixture(scope="module")
def runs(launch):
    """The folder of a finished run of two phases per wrapper, made when first asked for."""
    made: dict[tuple[str, ...], Path] = {}

    def run(wrapper: str, *arguments: str) -> Path:
        key = (wrapper, *arguments)
        if key not in made:
            report = wrapper == REFERENCE
            made[key], endings = launch(f"run{len(made)}", *key, settings=TWO_PHASES, report=report)
            assert endings == ["finished"] * 2
        return made[key]

    return run


def batches(folder: Path) -> list[int]:
    return [record["batch"] for record in records(folder)]


def test_the_batch_doubles_and_each_phase_reads_its_sequences(runs):
    steps = records(runs(REFERENCE))
    first, second = ([r for r in steps if (r["sequences"] > 96) is is_second] for is_second in (False, True))
    assert [sum(r["batch"] for r in part) for part in (first, second)] == [96, 32]
    assert [r["sequences"] for r in steps] == [sum(r["batch"] for r in steps[: i + 1]) for i in range(len(steps))]
    sizes = [r["batch"] for r in first]
    assert sizes[:2] == [4, 4]
    assert sizes[-1] <= sizes[-2]  # what is left
    assert sizes[-2] == 16
    assert all(b in (a, 2 * a) for a, b in itertools.pairwise(sizes[:-1]))
    assert second[0]["batch"] == 8  # as many doublings as the first phase ended with


def test_the_decisions_follow_from_the_recorded_noise(runs):
    """Recomputed from metrics.jsonl alone: averages from each phase's beginning, looked at every other update."""
    averages, batch, doubled = RunningNoise(), 4, []
    phase = [record for record in records(runs(REFERENCE)) if record["sequences"] <= 96]
    for number, record in enumerate(phase, start=1):
        assert record["batch"] == min(batch, 96 - (record["sequences"] - record["batch"]))
        average = averages.update(NoiseScale(record["gradient_signal"], record["gradient_noise"]))
        if number % 2 == 0 and batch < 16 and average.signal > 0 and average.scale >= 0.001 * batch:
            batch *= 2
            doubled.append(number)
    assert len(doubled) == 2


def test_the_learning_rate_is_that_of_as_many_sequences(runs):
    config = apply_overrides(get_preset("lamb-tiny"), list(GROWING_OVERRIDES))
    for record in records(runs(REFERENCE)):
        before = record["sequences"] - record["batch"]
        step = before / 16 if before < 96 else 6 + (before - 96) / 8
        assert record["lr"] == pytest.approx(learning_rate(config, step), rel=1e-12)
        assert record["lr"] <= (0.002 if step < 6 else 0.01)


GROWING_OVERRIDES = (
    *("training.global_batch=16", "training.steps=6", "optimizer.lr=0.002", "data.sequence_length=16"),
    *("phase_two.steps=4", "phase_two.global_batch=8", "model.max_positions=32"),
)


def test_the_rows_are_those_of_the_stream_whatever_the_batch(runs):
    """Masked tokens by the sequences' numbers: every row is read once, in the order of a run whose batch stays."""
    steps, plain = records(runs(REFERENCE)), runs(REFERENCE, "run.batch_from_noise=false", "run.smallest_batch=null")
    of_run = [r["masked_tokens"] for r in steps if r["sequences"] <= 96]
    assert sum(of_run) == sum(r["masked_tokens"] for r in records(plain) if r["sequences"] <= 96)


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name != REFERENCE])
def test_every_wrapper_grows_alike(runs, wrapper):
    expected, folder = runs(REFERENCE), runs(wrapper)
    assert batches(folder) == batches(expected)
    assert losses(folder) == pytest.approx(losses(expected), rel=1e-4)
    assert [r["lr"] for r in records(folder)] == [r["lr"] for r in records(expected)]


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*"))


def in_the_middle(folder: Path) -> tuple[Path, int]:
    """A checkpoint after one doubling of two, with averages that have not been looked at; and its step."""
    for number, checkpoint in enumerate(checkpoints(folder), start=1):
        state = json.loads((checkpoint / "batch_growth.json").read_text())
        if state["rule"]["doublings"] == 1 and state["rule"]["updates"] % 2:
            assert state["read"] == records(folder)[number - 1]["sequences"]
            assert state["rule"]["updates"] == number
            return checkpoint, number
    raise AssertionError("no checkpoint in the middle of growth")


@pytest.mark.parametrize("wrapper", [REFERENCE, "accelerate-ddp", "accelerate-zero-3"])
def test_a_run_resumed_in_the_middle_of_growth_is_bit_exact(runs, launch, wrapper):
    straight = runs(wrapper)
    middle, done = in_the_middle(straight)
    resumed, endings = launch(f"{wrapper}-resumed", wrapper, "--resume", str(middle), settings=TWO_PHASES)
    assert endings == ["finished"] * 2
    same = ("loss", "batch", "sequences", "lr", "noise_scale", "trust_ratios", "masked_tokens")
    assert [[r[key] for key in same] for r in records(resumed)] == [
        [r[key] for key in same] for r in records(straight)[done:]
    ]
    one, other = (trained_tensors(checkpoints(folder)[-1]) for folder in (straight, resumed))
    assert len(one) > 20
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    ends = [(checkpoints(folder)[-1] / "batch_growth.json").read_text() for folder in (straight, resumed)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("wrapper", ["trainer-ddp", "trainer-zero-1"])
def test_a_run_of_the_trainer_resumed_in_the_middle_of_growth_is_bit_exact(runs, launch, wrapper):
    straight = runs(wrapper)
    middle, done = in_the_middle(straight)
    resumed, endings = launch(f"{wrapper}-resumed", wrapper, "--resume", str(middle), settings=TWO_PHASES)
    assert endings == ["finished"] * 2
    assert losses(resumed) == losses(straight)[done:]
    assert batches(resumed) == batches(straight)[done:]
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (straight, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("wrapper", [REFERENCE, "trainer-zero-1"])
def test_a_run_resumed_at_the_border_goes_on_with_the_second_phase(runs, launch, wrapper):
    straight = runs(wrapper)
    border = [r["sequences"] for r in records(straight)].index(96) + 1
    checkpoint = straight / "checkpoints" / f"step-{border:08d}"
    resumed, endings = launch(f"{wrapper}-border", wrapper, "--resume", str(checkpoint), settings=TWO_PHASES)
    assert endings == ["finished"] * 2
    assert losses(resumed) == losses(straight)[border:]
    assert batches(resumed) == batches(straight)[border:]


def test_a_finished_run_has_nothing_left_to_do(runs, launch):
    """Though nobody knew after how many updates it would be, and more of them would have been allowed."""
    straight = runs(REFERENCE)
    line = recipe("nowhere", straight, "--resume", str(straight), settings=TWO_PHASES)
    with pytest.raises(NothingToDo, match=rf"is at step {len(batches(straight))} and the run ends at step "):
        check_run(parse_command_line(line))
    _, endings = launch("cut-short", REFERENCE, "--max_steps", "3", settings=TWO_PHASES)
    assert endings == ["finished"] * 2
    folder, endings = launch("cut-short", REFERENCE, "--resume", "auto", settings=TWO_PHASES)
    assert endings == ["finished"] * 2
    assert losses(folder) == losses(straight)


def test_a_finished_run_can_be_made_longer(launch):
    """It goes on after the rest of its 96 sequences, with the batch that it had grown to."""
    few = (*GROWING, "run.checkpoint_every=0")
    finished, endings = launch("short", REFERENCE, settings=few)
    assert endings == ["finished"] * 2
    longer, endings = launch("long", REFERENCE, "--resume", str(finished), "--steps", "9", settings=few)
    assert endings == ["finished"] * 2
    assert sum(batches(finished)) == 96
    assert batches(longer) == [16, 16, 16]
    assert records(longer)[-1]["sequences"] == 144


def test_fewer_ranks_go_on_with_the_same_batches(runs, pools, launch, text_folder, tmp_path):
    """Groups of as many sequences, of which one rank has all; the noise between them is the same."""
    straight = runs("accelerate-ddp")
    middle, done = in_the_middle(straight)
    environment, script, own = WRAPPERS["accelerate-ddp"]
    resumed, cache = tmp_path / "one", str(straight.parent / "cache")
    line = recipe(text_folder, resumed, *own, "--resume", str(middle), settings=TWO_PHASES)
    assert pools.get(1).run(train, cache, environment, script, line) == ["finished"]
    assert batches(resumed) == batches(straight)[done:]
    assert losses(resumed) == pytest.approx(losses(straight)[done:], rel=1e-4)
    shown = [r["noise_scale"] for r in records(straight)][done:]
    assert [r["noise_scale"] for r in records(resumed)] == pytest.approx(shown, rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        ("--zero_stage", "0"),
        ("--zero_stage", "2", "--precision", "bf16"),
        ("--zero_stage", "3", "optimizer.name=vrlamb"),
    ],
)
def test_other_stages_precisions_and_optimizers_grow_too(launch, options):
    folder, endings = launch("-".join(options), REFERENCE, *options, settings=(*GROWING, "run.checkpoint_every=0"))
    assert endings == ["finished"] * 2
    assert max(batches(folder)) == 16
    assert sum(batches(folder)) == 96
    assert all(math.isfinite(loss) for loss in losses(folder))


def test_an_update_that_is_skipped_has_no_noise(launch):
    """fp16 begins at a loss scale that overflows: the sequences are read, nothing else happens, and it counts."""
    settings = (*GROWING, "run.checkpoint_every=0", "--precision", "fp16", "training.steps=9")
    folder, endings = launch("fp16", REFERENCE, settings=settings)
    assert endings == ["finished"] * 2
    steps = records(folder)
    skipped = [number for number, r in enumerate(steps) if "noise_scale" not in r]
    # The optimizer has not stepped there: its ratios are those of the step before.
    stale = [n for n in range(1, len(steps)) if steps[n]["trust_ratios"] == steps[n - 1]["trust_ratios"]]
    assert skipped == stale != []
    assert sum(batches(folder)) == 144


# What is refused, planned and shown -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run.smallest_batch=16",), "cannot grow from a smallest batch of 16 to a largest of 16: give run.smallest"),
        (("run.largest_batch=2",), "cannot grow from a smallest batch of 4 to a largest of 2"),
        (
            ("run.smallest_batch=5",),
            r"run.smallest_batch makes 5 sequences in phase 1: .* 2 x 1 = 2; nearest .* 4 and 6",
        ),
        (("run.largest_batch=17",), r"run.largest_batch makes 17 sequences in phase 1: .* not divisible"),
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


def test_a_checkpoint_of_another_rule_is_refused(runs, tmp_path):
    checkpoint, _ = in_the_middle(runs(REFERENCE))
    for changed in (
        "run.batch_from_noise=false run.smallest_batch=null",
        "run.noise_per_batch=1",
        "run.largest_batch=8",
    ):
        line = recipe("nowhere", tmp_path / "run", "--resume", str(checkpoint), *changed.split(), settings=TWO_PHASES)
        with pytest.raises(RecipeError, match="batch_from_noise: checkpoint"):
            check_run(parse_command_line(line))


@pytest.mark.parametrize("content", [None, "", "[]", '{"phase": 1}', '{"phase": 0, "read": 4, "rule": {}}'])
def test_a_checkpoint_that_does_not_say_how_far_it_has_grown_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "batch_growth.json").write_text(content)
    with pytest.raises(RecipeError, match=r"cannot go on with the batch of .*batch_growth\.json: "):
        growth_state(tmp_path)


def test_the_plan_before_a_run_says_batches_and_updates():
    config = parse_command_line(recipe("nowhere", Path("run"), settings=TWO_PHASES)).config
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
    assert "run.smallest_batch makes 8192 sequences in phase 1: global batch 8192" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="cannot grow from a smallest batch of 65536"):
        growths_of(apply_overrides(get_preset("lamb-64k-32k"), ["run.batch_from_noise=true"]))


def test_a_comparison_refuses_batches_of_each_optimizers_own(tmp_path, capsys):
    options = ["--optimizers", "lamb,lans", "--lrs", "3", "--output", str(tmp_path / "comparison")]
    assert compare([*options, "run.batch_from_noise=true", "run.smallest_batch=64"]) == 2
    assert "gives each optimizer batches and updates of its own" in capsys.readouterr().err


def test_the_report_shows_batch_and_noise_by_update(runs):
    folder = runs(REFERENCE)
    history = load_history(folder)
    series = page_data(history)["series"]
    assert series["batch"] == batches(folder)
    assert len(series["noise_scale"]) == len(series["batch"])
    assert "2 to 16 sequences per step" in title(history) or "4 to 16 sequences per step" in title(history)
    assert not list(notices(history))
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_ended_early_is_said_to_have_by_its_sequences(launch):
    stopped, _ = launch("early", REFERENCE, "--max_steps", "4", settings=TWO_PHASES)
    assert not list(notices(load_history(stopped)))
    environment = json.loads((stopped / "environment.json").read_text())
    assert environment["last_sequences"] == 128
    environment["last_step"] = None
    (stopped / "environment.json").write_text(json.dumps(environment))
    read = records(stopped)[-1]["sequences"]
    assert list(notices(load_history(stopped))) == [f"The run ended after {read} of 128 sequences."]


def test_a_broken_file_stops_after_a_whole_update_on_all_ranks(launch):
    """Rounds are read ahead as far as a batch that doubles would take them."""
    folder, endings = launch("broken", REFERENCE, settings=TWO_PHASES, sabotage="rows")
    assert all("the token file is cut short" in ending for ending in endings)
    steps = records(folder)
    newest = checkpoints(folder)[-1].name
    assert newest == f"step-{steps[-1]['step']:08d}"
    assert 0 < steps[-1]["sequences"] <= 40
