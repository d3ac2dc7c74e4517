"""Batches that follow the gradient noise scale: the job at two ranks, its growth, its resume, its plan and report."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trustratio.optimizers.noise_scale import NoiseScale, RunningNoise
from trustratio.recipes.configuration.overrides import apply_overrides
from trustratio.recipes.configuration.phases import learning_rate
from trustratio.recipes.configuration.presets import get_preset

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


def test_the_rows_are_those_of_the_stream_whatever_the_batch(runs, monkeypatch):
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
