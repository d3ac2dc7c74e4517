"""Optimizer state and weights in bf16 under every wrapper: losses, what is kept, checkpoints, and runs that go on."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.configuration.overrides import load_config
from trustratio.recipes.fine_tuning import fine_tune
from trustratio.recipes.planning.memory import model_size
from trustratio.recipes.training.export import export_checkpoint, trained_weights

from .recipe_runs import losses, recipe, records, train, trained_tensors
from .test_wrappers import NO_DROPOUT, REFERENCE
from .test_wrappers import WRAPPERS as WITH_MASTERS

STATE = "training.state_dtype=bfloat16"
STOCHASTIC, KAHAN = "training.master=stochastic", "training.master=kahan"
FEW = (NO_DROPOUT, "--steps", "4", "phase_two.steps=2", "run.checkpoint_every=3", "run.validate_every=0")
ACCELERATE = "accelerate-ddp"
WRAPPERS = {
    **WITH_MASTERS,
    "deepspeed-zero-0": ({}, "bert.py", ("--zero_stage", "0")),
    "deepspeed-zero-2": ({}, "bert.py", ("--zero_stage", "2")),
    "deepspeed-zero-3": ({}, "bert.py", ("--zero_stage", "3")),
}
WITHOUT_MASTERS = [ACCELERATE, "trainer-ddp", "trainer-zero-2", "accelerate-zero-3"] + [
    f"deepspeed-zero-{stage}" for stage in range(4)
]


def few(cases: Sequence[Any], quick: Sequence[Any]) -> list[Any]:
    """The cases, all but some of them among the slow tests: each is a run, or two."""
    return [pytest.param(*_several(case), marks=() if case in quick else pytest.mark.slow) for case in cases]


def _several(case: Any) -> tuple[Any, ...]:
    return case if isinstance(case, tuple) else (case,)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def launch(text_folder, cache, pools, tmp_path_factory):
    """Run the recipe for six updates, four and two; return its folder and how it ended on the first rank."""
    root = tmp_path_factory.mktemp("sixteen")

    def start(name: str, ranks: int, wrapper: str, *arguments: str) -> tuple[Path, str]:
        environment, script, own = WRAPPERS[wrapper]
        line = recipe(text_folder, root / name, *FEW, *own, *arguments)
        return root / name, pools.get(ranks).run(train, str(cache), environment, script, line)[0]

    return start


@pytest.fixture(scope="module")
def runs(launch):
    """The folder of a finished run per wrapper, options and ranks, made when first asked for."""
    made: dict[tuple, Path] = {}

    def run(wrapper: str, *options: str, ranks: int = 2) -> Path:
        key = (wrapper, ranks, *options)
        if key not in made:
            made[key], ending = launch(f"{wrapper}{len(made)}", ranks, wrapper, *options)
            assert ending == "finished"
        return made[key]

    return run


def kept(run: Path) -> Counter[torch.dtype]:
    """How many numbers a run's last checkpoint has of every dtype, those of a number per layer left out."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in trained_tensors(run / "checkpoints" / "step-00000006"):
        if tensor.dtype.is_floating_point and tensor.numel() > 1:
            counts[tensor.dtype] += tensor.numel()
    return counts


def elements(run: Path) -> int:
    """The number of a run's weights."""
    return model_size(load_config(run / "config.json"), 175).elements


# Losses and what is kept


@pytest.mark.parametrize("wrapper", few(sorted(WRAPPERS), [ACCELERATE, "trainer-ddp", REFERENCE, "deepspeed-zero-3"]))
def test_state_in_bf16_trains_alike_under_every_wrapper(runs, wrapper):
    run, with_fp32 = runs(wrapper, STATE), losses(runs(REFERENCE))
    assert losses(run) == pytest.approx(losses(runs(REFERENCE, STATE)), rel=1e-5)
    assert losses(run) != with_fp32
    assert losses(run) == pytest.approx(with_fp32, rel=1e-3)
    assert kept(run)[torch.bfloat16] == pytest.approx(2 * elements(run), rel=0.01)  # two moments


@pytest.mark.parametrize(
    "wrapper", few(WITHOUT_MASTERS, [ACCELERATE, "trainer-ddp", "deepspeed-zero-0", REFERENCE, "deepspeed-zero-3"])
)
def test_weights_without_masters_train_alike_under_every_wrapper(runs, wrapper):
    """Gradients are averaged over ranks in bf16, in an order of each wrapper's own."""
    run, dense = runs(wrapper, KAHAN, STATE), runs(ACCELERATE, KAHAN, STATE)
    assert losses(run) == pytest.approx(losses(dense), rel=2e-4)
    assert losses(run) == pytest.approx(losses(runs(REFERENCE)), rel=2e-3)
    assert kept(run)[torch.float32] < 0.01 * elements(run)
    norms = [record.get("gradient_norm") for record in records(run)]
    assert all(norm is None or torch.tensor(norm).bfloat16().item() != norm for norm in norms)


def test_masters_differ(runs):
    """The first loss is that of the same bf16 weights; then they go apart."""
    of = {master: losses(runs(ACCELERATE, f"training.master={master}")) for master in ("stochastic", "kahan", "none")}
    first, *others = of.values()
    assert all(other[0] == first[0] for other in others)
    assert len({tuple(values) for values in of.values()}) == 3


def test_random_bits_follow_the_seed(runs):
    """With the same weights: those of another run's beginning."""
    seeds = [runs(ACCELERATE, STOCHASTIC, f"optimizer.rounding_seed={seed}") for seed in (1, 2)]
    assert losses(seeds[0]) == losses(runs(ACCELERATE, STOCHASTIC))  # training.seed is 1
    assert losses(seeds[0]) != losses(seeds[1])


@pytest.mark.parametrize("wrapper", few([ACCELERATE, "trainer-ddp", REFERENCE], []))
def test_one_process(runs, wrapper):
    options = (STOCHASTIC, STATE)
    assert losses(runs(wrapper, *options, ranks=1)) == pytest.approx(losses(runs(wrapper, *options)), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["vrlamb", "curvature_adamw", "lars"])
@pytest.mark.parametrize("wrapper", [ACCELERATE, REFERENCE])
def test_other_optimizers(runs, wrapper, optimizer):
    """Of statistics of gradients, of samples of the curvature at moved weights, and without a second moment."""
    options = ("optimizer.name=" + optimizer, "optimizer.lr=0.01", "phase_two.micro_batch=2")
    options += ("run.noise_scale=false",) if optimizer == "curvature_adamw" else ()
    expected = losses(runs(wrapper, *options))
    assert losses(runs(wrapper, *options, KAHAN, STATE)) == pytest.approx(expected, rel=5e-3)


# Runs that go on


QUICK = [
    (ACCELERATE, (KAHAN, STATE)),
    ("trainer-ddp", (KAHAN, STATE)),
    (REFERENCE, (STATE,)),
    ("deepspeed-zero-3", (KAHAN, STATE)),
]
RESUMED = [
    *QUICK,
    (ACCELERATE, (STATE,)),
    (ACCELERATE, (STOCHASTIC,)),
    ("trainer-ddp", (STOCHASTIC,)),
    ("trainer-zero-2", (KAHAN, STATE)),
    ("deepspeed-zero-0", (KAHAN, STATE)),
    (REFERENCE, (STOCHASTIC,)),
    ("deepspeed-zero-2", (KAHAN, STATE)),
    ("deepspeed-zero-3", (STOCHASTIC,)),
]


@pytest.mark.parametrize(("wrapper", "options"), few(RESUMED, QUICK))
def test_a_resumed_run_is_bit_exact(runs, launch, wrapper, options):
    straight = runs(wrapper, *options)
    checkpoint = straight / "checkpoints" / "step-00000003"
    name = "-".join((wrapper, *options, "on")).replace("=", "")
    resumed, ending = launch(name, 2, wrapper, *options, "--resume", str(checkpoint))
    assert ending == "finished"
    assert losses(resumed) == losses(straight)[3:]
    one, other = (trained_tensors(run / "checkpoints" / "step-00000006") for run in (straight, resumed))
    assert len(one) > 3
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("wrapper", "options"),
    few([*itertools.product((REFERENCE, "deepspeed-zero-3", ACCELERATE), ((STATE,), (KAHAN, STATE)))], QUICK[2:]),
)
def test_another_number_of_ranks_goes_on(runs, launch, wrapper, options):
    straight = runs(wrapper, *options)
    checkpoint = straight / "checkpoints" / "step-00000003"
    name = "-".join((wrapper, *options, "alone")).replace("=", "")
    resumed, ending = launch(name, 1, wrapper, *options, "--resume", str(checkpoint))
    assert ending == "finished"
    assert losses(resumed) == pytest.approx(losses(straight)[3:], rel=1e-3 if KAHAN in options else 1e-5)
    if KAHAN not in options:
        assert losses(resumed)[0] == pytest.approx(losses(straight)[3], rel=1e-6)


DTYPES = [(None, "bfloat16"), ("bfloat16", None)]
CONVERTED = [
    (wrapper, *pair) for wrapper in (ACCELERATE, "trainer-ddp", REFERENCE, "deepspeed-zero-3") for pair in DTYPES
]


@pytest.mark.parametrize(("wrapper", "before", "after"), few(CONVERTED, [CONVERTED[0], CONVERTED[4], CONVERTED[5]]))
def test_a_run_goes_on_with_its_state_in_another_dtype(runs, launch, wrapper, before, after):
    options = () if before is None else (STATE,)
    straight = runs(wrapper, *options)
    checkpoint = straight / "checkpoints" / "step-00000003"
    now = "null" if after is None else after
    resumed, ending = launch(
        f"{wrapper}-{before}-{after}", 2, wrapper, "--resume", str(checkpoint), f"training.state_dtype={now}"
    )
    assert ending == "finished"
    assert losses(resumed)[0] == losses(straight)[3]
    assert losses(resumed) == pytest.approx(losses(straight)[3:], rel=1e-3)
    moments = 2 * elements(resumed) if after == "bfloat16" else 0
    assert kept(resumed)[torch.bfloat16] == pytest.approx(moments, rel=0.01)


# What is left


@pytest.mark.parametrize("wrapper", [ACCELERATE, "deepspeed-zero-0", REFERENCE, "deepspeed-zero-3"])
def test_an_exported_checkpoint_has_the_weights_that_were_trained(runs, cache, wrapper, tmp_path, monkeypatch):
    monkeypatch.setenv("TRUSTRATIO_CACHE", str(cache))
    run = runs(wrapper, KAHAN, STATE)
    folder = export_checkpoint(run, tmp_path / "model", Reporter(active=False))
    exported, trained = load_file(folder / "model.safetensors"), trained_weights(run / "checkpoints" / "step-00000006")
    assert {weight.dtype for weight in exported.values()} == {torch.float32}
    assert len(exported) > 20
    assert all(torch.equal(weight, trained[name].float()) for name, weight in exported.items())
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in exported.values())


def test_fine_tuning_of_a_model_in_bf16_is_in_fp32(runs):
    """The Trainer leaves the model as it was trained; all that is trained on it afterwards would lose updates."""
    folder = runs("trainer-ddp", KAHAN, STATE) / "model"
    assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    for random_start in (False, True):
        network = fine_tune._build(fine_tune.AutoModelForSequenceClassification, str(folder), random_start)
        assert {weight.dtype for weight in network.parameters()} == {torch.float32}


def test_initial_weights_of_another_precision(runs, launch):
    folder = runs("trainer-ddp", KAHAN, STATE) / "model"
    for name, options in (("from-bf16", ()), ("to-bf16", (KAHAN,))):
        _, ending = launch(name, 1, ACCELERATE, f"model.initial_weights={folder}", "phase_two.steps=0", *options)
        assert ending == "finished"


def test_the_saved_settings_say_what_was_used(runs):
    run = runs(REFERENCE, KAHAN, STATE)
    settings = json.loads((run / "deepspeed_config.json").read_text())
    assert settings["bf16"] == {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    assert settings["data_types"] == {"grad_accum_dtype": "bf16"}
    training = json.loads((run / "config.json").read_text())["training"]
    assert (training["precision"], training["master"], training["state_dtype"]) == ("bf16", "kahan", "bfloat16")
