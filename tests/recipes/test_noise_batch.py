"""The batch that follows the gradient noise scale, as a rule of numbers, and how a loop's wrapper is told of it."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from trustratio.optimizers.noise_scale import NoiseScale, RunningNoise
from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.rules.noise_batch import NO_NOISE, BatchFromNoise, fewest_updates
from trustratio.recipes.rules.set_batch import set_global_batch

LARGE = NoiseScale(signal=1.0, noise=1e6)


def test_it_doubles_at_every_decision_up_to_the_largest():
    rule = BatchFromNoise(8, 40, unit=4, every=3)
    assert [rule.update(LARGE) for _ in range(12)] == [8, 8, 16, 16, 16, 32, 32, 32, 40, 40, 40, 40]
    assert rule.doublings == 3


def test_it_doubles_where_the_averaged_noise_scale_is_twice_the_batch():
    """Beta 0.5: after noise 8 and 24 at signal 1 the averages are (8 x .25 + 24 x .5) / .75 = 18.667 and 1."""
    for least, expected in ((18.6 / 8, 16), (18.7 / 8, 8)):
        rule = BatchFromNoise(8, 64, every=2, noise_per_batch=least, beta=0.5)
        rule.update(NoiseScale(1.0, 8.0))
        assert rule.update(NoiseScale(1.0, 24.0)) == expected
        assert rule.noise_scale == pytest.approx(56 / 3)


def test_signal_and_noise_are_averaged_apart():
    """Mean noise 10 over mean signal .2 is 50; the mean of the quotients 1000, 27 would be far above 2 x 32."""
    rule = BatchFromNoise(32, 128, every=2, beta=0.999999)
    for noise in (NoiseScale(0.01, 10.0), NoiseScale(0.39, 10.0)):
        rule.update(noise)
    assert rule.noise_scale == pytest.approx(50.0, rel=1e-4)
    assert rule.batch == 32


def test_it_never_shrinks_and_a_scale_that_is_not_positive_says_nothing():
    rule = BatchFromNoise(8, 64, every=1)
    assert rule.update(LARGE) == 16
    for noise in (NoiseScale(100.0, 1e-3), NoiseScale(-1e9, 1.0), NoiseScale(1e-9, -1e9)):
        rule = BatchFromNoise(8, 64, every=1)
        rule.doublings = 1
        assert rule.update(noise) == 16
    rule = BatchFromNoise(8, 64, every=1)
    assert rule.update(NoiseScale(-1.0, -1e9)) == 8  # whose quotient would be large


@pytest.mark.parametrize("noise", [NO_NOISE, NoiseScale(math.inf, 1.0), NoiseScale(1.0, math.nan)])
def test_an_update_without_an_estimate_counts_and_leaves_the_averages(noise):
    rule = BatchFromNoise(8, 64, every=2)
    assert rule.update(noise) == 8
    assert math.isnan(rule.noise_scale)
    rule.update(noise)
    assert rule.batch == 8
    rule.update(LARGE)
    assert rule.update(noise) == 16
    assert rule.noise_scale == 1e6


def test_running_averages_leave_out_what_is_not_finite():
    running = RunningNoise(0.5)
    assert math.isnan(running.average.scale)
    first = running.update(NoiseScale(1.0, 2.0))
    assert running.update(NoiseScale(math.nan, 2.0)) == first == running.average


def test_a_restored_rule_goes_on_alike():
    noises = [NoiseScale(0.3 * k, 7.0 + k * k) for k in range(1, 20)]
    rule = BatchFromNoise(2, 64, every=3, noise_per_batch=1.0)
    expected = []
    for number, noise in enumerate(noises):
        if number == 7:
            saved = json.dumps(rule.state_dict())
        expected.append((rule.update(noise), rule.noise_scale))
    resumed = BatchFromNoise(2, 64, every=3, noise_per_batch=1.0)
    resumed.load_state_dict(json.loads(saved))
    assert resumed.noise_scale == expected[6][1]
    assert [(resumed.update(noise), resumed.noise_scale) for noise in noises[7:]] == expected[7:]
    assert len({batch for batch, _ in expected}) > 2


def grown() -> BatchFromNoise:
    rule = BatchFromNoise(256, 8192, unit=64, every=1)
    for _ in range(3):
        rule.update(LARGE)
    return rule


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"smallest": 1024}, "smallest=256, and this one has 1024"),
        ({"largest": 4096}, "largest=8192, and this one has 4096"),
        ({"every": 7}, "every=1, and this one has 7"),
        ({"noise_per_batch": 1.0}, "noise_per_batch=2.0, and this one has 1.0"),
        ({"beta": 0.5}, "beta=0.95, and this one has 0.5"),
    ],
)
def test_a_state_of_other_arguments_is_refused_by_name(options, name):
    rule = BatchFromNoise(**{"smallest": 256, "largest": 8192, "every": 1, **options})
    fresh = rule.state_dict()
    with pytest.raises(ValueError, match=f"the state is of a BatchFromNoise with {name}"):
        rule.load_state_dict(grown().state_dict())
    assert rule.state_dict() == fresh


def test_a_state_of_another_unit_goes_on():
    """As of a run that goes on at another number of ranks."""
    rule = BatchFromNoise(256, 8192, unit=128, every=1)
    rule.load_state_dict(grown().state_dict())
    assert rule.batch == 2048


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"doublings": -1}, "doublings must be a whole number from 0 to 5, got -1: it is damaged"),
        ({"doublings": 6}, "doublings must be a whole number from 0 to 5, got 6"),
        ({"doublings": 1.0}, r"doublings must be a whole number from 0 to 5, got 1\.0"),
        ({"doublings": True}, "doublings must be a whole number from 0 to 5, got True"),
        ({"updates": "3"}, "updates must be a whole number from 0, got '3'"),
        ({"noise": None}, "its noise must be a mapping, got NoneType"),
        ({"noise": {"signal": 1.0, "noise": 1.0}}, "its noise has no weight"),
        ({"noise": {"signal": math.nan, "noise": 1.0, "weight": 0.5}}, "signal must be a finite number, got nan"),
        ({"noise": {"signal": 1.0, "noise": "1", "weight": 0.5}}, "noise must be a finite number, got '1'"),
        ({"noise": {"signal": 1.0, "noise": 1.0, "weight": -0.5}}, r"weight must be from 0 to 1, got -0\.5"),
    ],
)
def test_a_damaged_state_is_refused_before_anything_is_changed(damage, message):
    rule = grown()
    before = rule.state_dict()
    with pytest.raises(ValueError, match=message):
        rule.load_state_dict({**BatchFromNoise(256, 8192, every=1).state_dict(), **damage})
    assert rule.state_dict() == before
    assert rule.noise_scale == 1e6
    for broken in ([], {"doublings": 0, "updates": 0, "noise": before["noise"]}):
        with pytest.raises(ValueError, match=r"the state (must be a mapping|has no smallest)"):
            rule.load_state_dict(broken)


def test_the_largest_number_of_doublings_is_no_damage():
    for smallest, largest in ((8, 8), (8, 16), (8, 40), (3, 48)):
        rule = BatchFromNoise(smallest, largest, every=1)
        for _ in range(9):
            rule.update(LARGE)
        other = BatchFromNoise(smallest, largest, every=1)
        other.load_state_dict(rule.state_dict())
        assert other.batch == largest


@pytest.mark.parametrize("noise", [123.0, None, {"signal": 1.0, "noise": 2.0}])
def test_what_is_no_noise_is_refused_before_it_counts(noise):
    rule = grown()
    before = rule.state_dict()
    with pytest.raises(
        TypeError, match=rf"takes a NoiseScale, as gradient_noise\(\.\.\.\)\.model, got {type(noise).__name__}"
    ):
        rule.update(noise)
    with pytest.raises(TypeError):
        rule.update(NoiseScale("1", None))
    assert rule.state_dict() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smallest": 0}, "smallest must be a whole number from 1, got 0"),
        ({"largest": 8.0}, r"largest must be a whole number from 1, got 8\.0"),
        ({"smallest": 128}, "smallest must be at most largest, got 128 and 64"),
        ({"unit": 16}, "must be multiples of unit=16, got 8 and 64"),
        ({"every": 0}, "every must be a whole number from 1"),
        ({"noise_per_batch": math.nan}, "noise_per_batch must be finite and above 0, got nan"),
        ({"noise_per_batch": "2"}, "noise_per_batch must be finite and above 0, got '2'"),
        ({"beta": 1.0}, "beta"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BatchFromNoise(**{"smallest": 8, "largest": 64, **options})


@pytest.mark.parametrize(
    ("samples", "largest", "every"), [(96, 16, 2), (96, 12, 3), (100, 64, 1), (7, 64, 5), (96, 4, 9)]
)
def test_the_fewest_updates_are_those_of_a_run_that_doubles_at_every_decision(samples, largest, every):
    rule, left, updates = BatchFromNoise(4, largest, every=every), samples, 0
    while left > 0:
        left -= min(rule.batch, left)
        updates += 1
        rule.update(LARGE)
    assert fewest_updates(samples, BatchFromNoise(4, largest, every=every)) == (updates, rule.doublings)


# Wrappers


def of_two_ranks(kind: str) -> list[tuple[int, float]]:
    """On every rank: three updates of 8 samples, then three of 16; micro-batches and weight after each update."""
    import deepspeed
    import torch.distributed as dist
    from accelerate import Accelerator

    import trustratio.integrations.deepspeed  # noqa: F401
    from trustratio.optimizers import LAMB

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1, bias=False)
    optimizer = LAMB(list(model.named_parameters()), lr=0.1)
    samples = torch.randn(3 * 8 + 3 * 16, 3, generator=torch.Generator().manual_seed(1))
    settings = {
        **{"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "train_batch_size": 8},
        **{"zero_optimization": {"stage": 1}, "gradient_clipping": 0.0, "steps_per_print": 10**9},
    }
    if kind == "deepspeed":
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        wrapper, module = engine, engine.module
    else:
        wrapper = Accelerator(cpu=True, gradient_accumulation_steps=2)
        module, optimizer = wrapper.prepare(model, optimizer)
    begin, seen = 0, []
    for batch in (8, 8, 8, 16, 16, 16):
        accumulation = set_global_batch(wrapper, batch, None if kind == "deepspeed" else 2)
        of_update = samples[begin : begin + batch].view(accumulation, 2, 2, 3)[:, dist.get_rank()]
        begin += batch
        for inputs in of_update:
            if kind == "deepspeed":
                wrapper.backward(wrapper(inputs).square().mean())
                wrapper.step()
            else:
                with wrapper.accumulate(module):
                    wrapper.backward(module(inputs).square().mean())
                    optimizer.step()
                    optimizer.zero_grad()
        seen.append((accumulation, next(module.parameters()).detach().sum().item()))
    return seen


@pytest.mark.parametrize("kind", ["deepspeed", "accelerate"])
def test_a_wrapper_that_is_told_takes_whole_updates_of_the_new_batch(pools, kind):
    """Against one process on the whole batches. After three updates of two micro-batches a change to four is out of
    step with every count of micro-batches that is not begun anew.
    """
    from trustratio.optimizers import LAMB

    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1, bias=False)
    optimizer = LAMB(list(model.named_parameters()), lr=0.1)
    samples = torch.randn(3 * 8 + 3 * 16, 3, generator=torch.Generator().manual_seed(1))
    expected, begin = [], 0
    for batch in (8, 8, 8, 16, 16, 16):
        model(samples[begin : begin + batch]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        begin += batch
        expected.append((batch // 4, model.weight.detach().sum().item()))
    for answer in pools.get(2).run(of_two_ranks, kind):
        assert [number for number, _ in answer] == [number for number, _ in expected]
        assert [weight for _, weight in answer] == pytest.approx([weight for _, weight in expected], rel=1e-5)


class Engine:
    """What is asked of a DeepSpeed engine."""

    def __init__(self):
        self.micro_steps, self.global_steps, self.dp_world_size, self.optimizer = 6, 3, 2, SimpleNamespace()
        self.batch = 8

    def gradient_accumulation_steps(self):
        return self.batch // 4

    def train_micro_batch_size_per_gpu(self):
        return 2

    def set_train_batch_size(self, batch):
        self.batch = batch


def accelerator(step=6):
    return SimpleNamespace(gradient_state=None, step=step, gradient_accumulation_steps=2, num_processes=2)


def test_a_change_that_cannot_be_made_is_refused():
    engine = Engine()
    with pytest.raises(RecipeError, match="global batch 10 is not divisible by micro-batch x ranks = 2 x 2 = 4"):
        set_global_batch(engine, 10)
    with pytest.raises(ValueError, match="micro_batch=4 is not the engine's, 2"):
        set_global_batch(engine, 16, micro_batch=4)
    assert (engine.batch, engine.micro_steps) == (8, 6)
    engine.micro_steps = 7
    for middle in (engine, accelerator(step=7)):
        with pytest.raises(ValueError, match="between two updates"):
            set_global_batch(middle, 16)
    with pytest.raises(ValueError, match="needs micro_batch"):
        set_global_batch(accelerator(), 16)
    trainer = SimpleNamespace(args=SimpleNamespace(gradient_accumulation_steps=2))
    with pytest.raises(TypeError, match="a Trainer counts micro-batches through an epoch"):
        set_global_batch(trainer, 16)
