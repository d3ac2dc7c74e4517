"""Samples of the curvature in the recipe: an update of two passes, the same under every wrapper."""

from __future__ import annotations

import dataclasses
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from trustratio.optimizers import CurvatureAdamW
from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.configuration.command_line import parse_command_line
from trustratio.recipes.configuration.config import ModelConfig
from trustratio.recipes.configuration.overrides import apply_overrides
from trustratio.recipes.configuration.phases import phases_of
from trustratio.recipes.configuration.presets import get_preset
from trustratio.recipes.data.rows import MaskedRows
from trustratio.recipes.model.flops import ModelFlops
from trustratio.recipes.model.masked_language_model import build_model
from trustratio.recipes.planning.memory import SAMPLE, memory_parts, model_size
from trustratio.recipes.planning.phase_plan import Machine, plan_phase
from trustratio.recipes.planning.plan import main as plan_main
from trustratio.recipes.rules.global_batch import BatchPlan
from trustratio.recipes.training import engines
from trustratio.recipes.training.checks import check_run
from trustratio.recipes.training.loop import accumulate_step, seed_step
from trustratio.recipes.training.step_metrics import StepMetrics, measures_noise

from .recipe_runs import losses, records, trained_tensors
from .test_metrics import one_update
from .test_wrappers import NO_DROPOUT, REFERENCE, launch, runs  # noqa: F401 - fixtures

CAP = 0.05
SAMPLED = (
    *("optimizer.name=curvature_adamw", "optimizer.lr=0.2", "optimizer.interval=2", f"optimizer.cap={CAP}"),
    *("training.gradient_clipping=0.5", "run.noise_scale=false"),
)
"""Samples in updates 1, 3 and 5, and after the border, where counts begin anew, in 7 and 9. Gradients are clipped."""

# One update


class OneRank(engines.DataParallelTraining):
    """On the bare model, without a process group."""

    def sum_over_ranks(self, values):
        return values.clone()


@pytest.fixture
def batches(rows, vocabulary):
    """The micro-batches of some updates."""
    masked = MaskedRows(rows, vocabulary, 0.3, seed=7)
    return [masked.step_batches(step, BatchPlan(4, 3, 1), 0) for step in range(4)]


def model_and_optimizer():
    torch.manual_seed(0)
    shape = ModelConfig(layers=2, hidden=16, heads=2, intermediate=32, max_positions=32, dropout=0.1)
    model = build_model(shape, 104)
    return model, CurvatureAdamW(model.named_parameters(), lr=0.2, interval=3, cap=CAP)


def plain_loop(model, optimizer, micro_batches):
    """An update as docs/curvature.md has it; returns the loss and the norm before clipping."""
    masked = sum(len(batch.labels) for batch in micro_batches)

    def run():
        parts = [model(b.input_ids, b.positions, b.labels)[0] / float(masked) for b in micro_batches]
        for part in parts:
            part.backward()
        return sum(part.item() for part in parts)

    wanted = optimizer.wants_curvature()
    loss = run()
    if wanted:
        with optimizer.curvature():
            run()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm.item()


def test_an_update_is_that_of_a_plain_loop(batches, monkeypatch):
    monkeypatch.setattr(engines, "dist", SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 1))
    model, optimizer = model_and_optimizer()
    schedule = []
    scheduler = SimpleNamespace(step=lambda: schedule.append(int(optimizer.trust_ratio_vector()[1].numel())))
    engine = OneRank(model, optimizer, lambda _: scheduler, torch.device("cpu"), gradient_clipping=0.5)
    other, plain = model_and_optimizer()
    for step, micro_batches in enumerate(batches):
        seed_step(1, step, 0)
        twice = engine.wants_second_pass()
        assert twice == (step % 3 == 0)
        loss, _ = accumulate_step(engine, micro_batches, False, twice)
        seed_step(1, step, 0)
        expected, norm = plain_loop(other, plain, micro_batches)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        assert engine.gradient_norm() == pytest.approx(norm, rel=1e-6)
        assert norm > 0.5
        assert len(schedule) == step + 1
    ratios = [each.trust_ratio_vector()[1] for each in (optimizer, plain)]
    assert torch.allclose(*ratios, rtol=1e-4, atol=1e-6)
    assert (ratios[0] < CAP).sum() > 5
    for one, same in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, same, rtol=1e-4, atol=1e-6)


# Whole runs


def ratios(folder):
    """The trust ratios of each update by layer.

    Without the biases of keys, which move all of a query's scores alike: their gradients are rounding alone.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = next(line["trust_ratios"] for line in lines if line["kind"] == "names")
    steps = [dict(zip(names, line["trust_ratios"], strict=True)) for line in lines if line["kind"] == "train"]
    return [{name: ratio for name, ratio in step.items() if "key.bias" not in name} for step in steps]


@pytest.fixture
def sampled(runs):  # noqa: F811
    """Return the folder of a finished run."""
    return lambda wrapper, *arguments: runs(wrapper, *SAMPLED, "run.log_every=1", *arguments)


def samples(folder):
    """How many samples every layer has at the end of a run under DDP."""
    state = torch.load(folder / "checkpoints" / "step-00000010" / "training_state.pt", weights_only=True)
    return {float(number) for layer in state["optimizer"]["state"].values() for number in layer["samples"].reshape(-1)}


QUICK = ("accelerate-ddp", "trainer-zero-1")
SLOW = ("accelerate-zero-2", "accelerate-zero-3", "trainer-ddp", "trainer-zero-3")


@pytest.mark.parametrize("wrapper", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_every_wrapper_takes_the_same_samples(sampled, wrapper):
    ours, reference = records(sampled(wrapper, NO_DROPOUT)), records(sampled(REFERENCE, NO_DROPOUT))
    assert len(ours) == len(reference) == 10
    for one, other in zip(ours, reference, strict=True):
        for name in ("lr", "sequences", "masked_tokens"):
            assert one[name] == other[name]
        for name in ("loss", "gradient_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-5)
    for step, (one, other) in enumerate(
        zip(ratios(sampled(wrapper, NO_DROPOUT)), ratios(sampled(REFERENCE, NO_DROPOUT)), strict=True)
    ):
        assert one == pytest.approx(other, rel=1e-3), step
        assert sum(0 < ratio < CAP for ratio in one.values()) > 10


def test_samples_are_taken_every_interval_and_only_then(sampled):
    folder = sampled("accelerate-ddp", NO_DROPOUT)
    assert samples(folder) == {5.0}
    steps = ratios(folder)
    changed = [number + 1 for number in range(1, 10) if steps[number] != steps[number - 1]]
    assert changed == [3, 5, 7, 9]


def test_the_rates_and_the_counts_are_those_of_any_optimizer(sampled, runs):  # noqa: F811
    lamb = records(runs(REFERENCE, NO_DROPOUT, "optimizer.lr=0.2"))
    for wrapper in (REFERENCE, *QUICK):
        for one, other in zip(records(sampled(wrapper, NO_DROPOUT)), lamb, strict=True):
            assert [one[name] for name in ("step", "sequences", "lr", "masked_tokens")] == [
                other[name] for name in ("step", "sequences", "lr", "masked_tokens")
            ]
            assert "noise_scale" not in one


RESUMED = [REFERENCE, "accelerate-ddp", pytest.param("accelerate-zero-3", marks=pytest.mark.slow)]


@pytest.mark.parametrize("wrapper", RESUMED)
def test_a_resumed_run_is_bit_exact(sampled, launch, wrapper):  # noqa: F811
    """With dropout, the same in both passes, and from a step after which no sample is due at once."""
    straight = sampled(wrapper)
    checkpoint = straight / "checkpoints" / "step-00000005"
    options = (*SAMPLED, "run.log_every=1", "--resume", str(checkpoint))
    resumed, endings = launch(f"{wrapper}-sampled-from-5", wrapper, *options)
    assert endings == ["finished"] * 2
    assert losses(resumed) == losses(straight)[5:]
    assert ratios(resumed) == ratios(straight)[5:]
    one, other = (trained_tensors(folder / "checkpoints" / "step-00000010") for folder in (straight, resumed))
    assert len(one) > 20
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["trainer-ddp", "trainer-zero-1"])
def test_a_resumed_run_of_the_trainer_goes_on_alike(sampled, launch, wrapper):  # noqa: F811
    straight = sampled(wrapper, NO_DROPOUT)
    options = (*SAMPLED, NO_DROPOUT, "run.log_every=1", "--resume", str(straight / "checkpoints" / "step-00000005"))
    resumed, endings = launch(f"{wrapper}-sampled-from-5", wrapper, *options)
    assert endings == ["finished"] * 2
    assert losses(resumed) == losses(straight)[5:]
    assert ratios(resumed) == ratios(straight)[5:]


@pytest.mark.slow
def test_discarding_leaves_out_the_same_in_both_passes(sampled):
    discarded = "data.discard_smallest=0.3"
    found, expected = (sampled(wrapper, NO_DROPOUT, discarded) for wrapper in ("trainer-zero-1", "accelerate-ddp"))
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    for one, other in zip(ratios(found), ratios(expected), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", [REFERENCE, "trainer-zero-1"])
def test_skipped_updates_count_once(sampled, launch, wrapper, tmp_path):  # noqa: F811
    """At first both passes overflow in fp16: one update is skipped, of which the schedule, when resumed, knows."""
    fp16 = {"enabled": True, "initial_scale_power": 23, "hysteresis": 1}
    (tmp_path / "fp16.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "fp16": fp16}))
    options = ("--deepspeed_config", str(tmp_path / "fp16.json"), "training.steps=9", "phase_two.steps=0", NO_DROPOUT)
    straight = sampled(wrapper, *options, "run.checkpoint_every=7")
    rates = [record["lr"] for record in records(straight)]
    skipped = sum(one == other for one, other in itertools.pairwise(rates[1:]))
    assert 1 <= skipped <= 4
    checkpoint = str(straight / "checkpoints" / "step-00000007")
    more = (*SAMPLED, *options, "run.log_every=1", "run.checkpoint_every=7", "--resume", checkpoint)
    resumed, endings = launch(f"{wrapper}-sampled-fp16", wrapper, *more)
    assert endings == ["finished"] * 2
    assert [record["lr"] for record in records(resumed)] == rates[7:]
    assert losses(resumed) == losses(straight)[7:]


# What is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["run.noise_scale=true"], r"run\.noise_scale=true would count them among the groups of the gradient noise"),
        (["run.batch_from_noise=true", "run.smallest_batch=64"], r"run\.batch_from_noise=true would count them"),
        (
            ["--zero_stage", "0", "--precision", "fp32", "training.gradient_clipping=1"],
            r"stage 0 in fp32 does not tell by what it clips: use --zero_stage 1 or set training\.gradient_clipping=0",
        ),
    ],
)
def test_what_leaves_no_way_to_a_sample_is_refused_before_training(options, said):
    options = [*options, "--global_batch", "128", "--micro_batch", "32"]
    with pytest.raises(RecipeError, match=r"--optimizer curvature_sgd runs an update's micro-batches .* " + said):
        check_run(parse_command_line(["--optimizer", "curvature_sgd", *options]))
    check_run(parse_command_line(["--optimizer", "curvature_sgd", *options, "optimizer.interval=null"]))
    check_run(parse_command_line(["--optimizer", "lamb", *options]))


def test_the_noise_is_not_measured_unasked():
    plans = (BatchPlan(4, 2, 2),)
    for options, measured in (("", False), ("optimizer.interval=null", True)):
        assert measures_noise(config_of(*options.split()), plans) is measured


# What it costs


def config_of(*overrides, preset="lamb-64k-32k"):
    return apply_overrides(get_preset(preset), ["optimizer.name=curvature_adamw", *overrides])


def test_the_second_pass_is_measured():
    flops = ModelFlops(2, 16, 40, 104)
    both, one = (
        StepMetrics(None, flops)._rates(each, 2.0)["model_flops_per_second"]
        for each in (dataclasses.replace(one_update(), passes=2), one_update())
    )
    assert both == 2 * one


def test_a_plan_counts_the_passes_and_the_copies(capsys):
    sampling, never = config_of("optimizer.interval=4"), config_of("optimizer.interval=null")
    phase = phases_of(sampling)[0]
    more, plain = (plan_phase(model_size(each), each, phase, 8, Machine(), micro=32) for each in (sampling, never))
    assert more.compute == pytest.approx(1.25 * plain.compute)
    assert more.communication == pytest.approx(1.25 * plain.communication)
    size = model_size(sampling)
    for stage, share in ((0, size.elements), (1, -(-size.elements // 8)), (3, -(-size.elements // 8))):
        config = apply_overrides(sampling, [f"training.zero_stage={stage}"])
        parts = {part.name: part.bytes for part in memory_parts(size, config, phase, 8, 8)}
        assert parts[SAMPLE] == 2 * 4 * share
    assert SAMPLE not in [part.name for part in memory_parts(model_size(never), never, phase, 8, 8)]
    plan_main(["--preset", "lamb-64k-32k", "--gpus", "8", "optimizer.name=curvature_adamw", "optimizer.interval=4"])
    printed = capsys.readouterr().out
    assert "a sample of the curvature in every 4 updates: one more pass over the micro-batches" in printed
    assert SAMPLE in printed
