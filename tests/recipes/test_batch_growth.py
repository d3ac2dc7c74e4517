"""Batches that follow the gradient noise scale: the job at two ranks, its growth, its resume, its report."""

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
from trustratio.recipes.configuration.command_line import parse_command_line
from trustratio.recipes.configuration.overrides import apply_overrides
from trustratio.recipes.configuration.phases import learning_rate
from trustratio.recipes.configuration.presets import get_preset
from trustratio.recipes.runs.history import load_history
from trustratio.recipes.runs.report import notices, page_data, title
from trustratio.recipes.training.checks import check_run

from .recipe_runs import GROWING, GROWING_TWICE, losses, recipe, records, train, trained_tensors
from .test_wrappers import WRAPPERS

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
            made[key], endings = launch(f"run{len(made)}", *key, settings=GROWING_TWICE, report=report)
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


OVERRIDES = (
    *("training.global_batch=16", "training.steps=6", "optimizer.lr=0.002", "data.sequence_length=16"),
    *("phase_two.steps=4", "phase_two.global_batch=8", "model.max_positions=32"),
)
"""The schedule of these runs, spelt out."""


def test_the_learning_rate_is_that_of_as_many_sequences(runs):
    config = apply_overrides(get_preset("lamb-tiny"), list(OVERRIDES))
    for record in records(runs(REFERENCE)):
        before = record["sequences"] - record["batch"]
        step = before / 16 if before < 96 else 6 + (before - 96) / 8
        assert record["lr"] == pytest.approx(learning_rate(config, step), rel=1e-12)
        assert record["lr"] <= (0.002 if step < 6 else 0.01)


def test_the_rows_are_those_of_the_stream_whatever_the_batch(runs):
    """Masked tokens by the sequences' numbers: every row is read once, in the order of a run whose batch stays."""
    steps, plain = records(runs(REFERENCE)), runs(REFERENCE, "run.batch_from_noise=false", "run.smallest_batch=null")
    of_run = [r["masked_tokens"] for r in steps if r["sequences"] <= 96]
    assert sum(of_run) == sum(r["masked_tokens"] for r in records(plain) if r["sequences"] <= 96)


SLOW = ("accelerate-zero-1", "accelerate-zero-2", "trainer-zero-2", "trainer-zero-3")
"""Which show nothing that the others do not: the loops and the engines are the same."""


@pytest.mark.parametrize(
    "wrapper",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in WRAPPERS if name != REFERENCE],
)
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


@pytest.mark.parametrize(
    "wrapper", [REFERENCE, "accelerate-ddp", pytest.param("accelerate-zero-3", marks=pytest.mark.slow)]
)
def test_a_run_resumed_in_the_middle_of_growth_is_bit_exact(runs, launch, wrapper):
    straight = runs(wrapper)
    middle, done = in_the_middle(straight)
    resumed, endings = launch(f"{wrapper}-resumed", wrapper, "--resume", str(middle), settings=GROWING_TWICE)
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


@pytest.mark.parametrize("wrapper", [pytest.param("trainer-ddp", marks=pytest.mark.slow), "trainer-zero-1"])
def test_a_run_of_the_trainer_resumed_in_the_middle_of_growth_is_bit_exact(runs, launch, wrapper):
    straight = runs(wrapper)
    middle, done = in_the_middle(straight)
    resumed, endings = launch(f"{wrapper}-resumed", wrapper, "--resume", str(middle), settings=GROWING_TWICE)
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
    resumed, endings = launch(f"{wrapper}-border", wrapper, "--resume", str(checkpoint), settings=GROWING_TWICE)
    assert endings == ["finished"] * 2
    assert losses(resumed) == losses(straight)[border:]
    assert batches(resumed) == batches(straight)[border:]


def test_a_finished_run_has_nothing_left_to_do(runs, launch):
    """Though nobody knew after how many updates it would be, and more of them would have been allowed."""
    straight = runs(REFERENCE)
    line = recipe("nowhere", straight, "--resume", str(straight), settings=GROWING_TWICE)
    with pytest.raises(NothingToDo, match=rf"is at step {len(batches(straight))} and the run ends at step "):
        check_run(parse_command_line(line))
    _, endings = launch("cut-short", REFERENCE, "--max_steps", "3", settings=GROWING_TWICE)
    assert endings == ["finished"] * 2
    folder, endings = launch("cut-short", REFERENCE, "--resume", "auto", settings=GROWING_TWICE)
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
    line = recipe(text_folder, resumed, *own, "--resume", str(middle), settings=GROWING_TWICE)
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


def test_a_checkpoint_of_another_rule_is_refused(runs, tmp_path):
    checkpoint, _ = in_the_middle(runs(REFERENCE))
    for changed in (
        "run.batch_from_noise=false run.smallest_batch=null",
        "run.noise_per_batch=1",
        "run.largest_batch=8",
    ):
        line = recipe(
            "nowhere", tmp_path / "run", "--resume", str(checkpoint), *changed.split(), settings=GROWING_TWICE
        )
        with pytest.raises(RecipeError, match="batch_from_noise: checkpoint"):
            check_run(parse_command_line(line))


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
    stopped, _ = launch("early", REFERENCE, "--max_steps", "4", settings=GROWING_TWICE)
    assert not list(notices(load_history(stopped)))
    environment = json.loads((stopped / "environment.json").read_text())
    assert environment["last_sequences"] == 128
    environment["last_step"] = None
    (stopped / "environment.json").write_text(json.dumps(environment))
    read = records(stopped)[-1]["sequences"]
    assert list(notices(load_history(stopped))) == [f"The run ended after {read} of 128 sequences."]


def test_a_broken_file_stops_after_a_whole_update_on_all_ranks(launch):
    """Rounds are read ahead as far as a batch that doubles would take them."""
    folder, endings = launch("broken", REFERENCE, settings=GROWING_TWICE, sabotage="rows")
    assert all("the token file is cut short" in ending for ending in endings)
    steps = records(folder)
    newest = checkpoints(folder)[-1].name
    assert newest == f"step-{steps[-1]['step']:08d}"
    assert 0 < steps[-1]["sequences"] <= 40
