import numpy as np
import pytest
import torch

from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.configuration.config import RecipeConfig
from trustratio.recipes.configuration.overrides import apply_overrides
from trustratio.recipes.configuration.phases import PhasedSchedule, carry_over, learning_rate, phases_of
from trustratio.recipes.configuration.ranges import check_ranges
from trustratio.recipes.rules.schedules import WarmupPolynomial, resolve_warmup, warmup_polynomial


def test_warmup_is_a_fraction_below_one_and_steps_from_one():
    assert resolve_warmup(0.1, 200) == 20
    assert resolve_warmup(1, 200) == 1
    assert resolve_warmup(30, 200) == 30
    assert resolve_warmup(0.0, 200) == 0


def test_warmup_reaches_the_peak_at_its_last_update():
    assert [warmup_polynomial(step, 4, 12) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(("degree", "half_way"), [(1.0, 0.5), (0.5, 0.5**0.5), (2.0, 0.25)])
def test_decay_of_any_degree(degree, half_way):
    assert warmup_polynomial(60, 20, 100, degree) == pytest.approx(half_way)
    assert warmup_polynomial(100, 20, 100, degree) == 0.0
    assert warmup_polynomial(1000, 20, 100, degree) == 0.0
    assert warmup_polynomial(60, 20, 100, degree, final=0.2) == pytest.approx(0.2 + 0.8 * half_way)
    assert warmup_polynomial(100, 20, 100, degree, final=0.2) == 0.2


def test_no_division_by_zero_at_the_edges():
    assert warmup_polynomial(0, 0, 1) == 1.0
    assert warmup_polynomial(5, 5, 5) == 0.0


def test_the_torch_scheduler_follows_the_formula():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = WarmupPolynomial(optimizer, 3, 10, degree=0.5)
    for step in range(10):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * warmup_polynomial(step, 3, 10, 0.5))
        optimizer.step()
        scheduler.step()


def test_a_warmup_may_begin_part_of_the_way_up():
    """MLPerf's start steps: the warm-up of 8 counts from update -3."""
    factors = [warmup_polynomial(step, 8, 20, warmup_start=-3) for step in range(7)]
    assert factors == pytest.approx([4 / 8, 5 / 8, 6 / 8, 7 / 8, 1.0, 1.0, 14 / 15])


def test_a_decay_from_the_start_hides_behind_the_warmup():
    """NVIDIA's: (1 - t/T)^degree of the number of the update, so the rate drops where the warm-up ends."""
    factors = [warmup_polynomial(step, 4, 16, degree=0.5, decay_from_start=True) for step in range(17)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:16] == pytest.approx([(1 - t / 16) ** 0.5 for t in range(5, 17)])
    assert factors[15] == factors[16] == 0.0


def rates(*overrides):
    config = apply_overrides(RecipeConfig(), ["optimizer.lr=2", *overrides])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.optimizer.lr)
    scheduler, seen = PhasedSchedule(optimizer, config), []
    for step in range(phases_of(config)[-1].last):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(learning_rate(config, step))
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


TWO = ("training.steps=4", "schedule.warmup=2", "phase_two.steps=4", "phase_two.lr=1", "phase_two.warmup=2")


def test_the_second_phase_warms_up_again():
    assert rates(*TWO) == pytest.approx([1, 2, 2, 1, 0.5, 1, 1, 0.5])


def test_one_schedule_may_go_over_both_phases():
    assert rates(*TWO, "phase_two.reset_schedule=false") == pytest.approx(
        [1, 2, 2, 10 / 6, 8 / 6, 1, 4 / 6, 2 / 6], rel=1e-6
    )


def test_exponential_phases_have_their_own_decay_and_offset():
    options = ("schedule.shape=exponential", "schedule.decay_steps=1", "schedule.decay_rate=0.5", "schedule.offset=0.5")
    seen = rates(*TWO, *options, "phase_two.decay_steps=2", "phase_two.offset=0.25")
    assert seen == pytest.approx([0.5, 1.0, 2.5, 1.5, 0.25, 0.5, 1.25, 0.25 + 0.5**0.5])


WSD = ("schedule.shape=wsd", "schedule.final=0.1", "training.steps=20", "schedule.cooldown=0.25")


def wsd(step, warmup, steps, cooldown, final, form):
    """The factor written out anew, in float64."""
    if step < warmup:
        return np.float64(step + 1) / warmup
    into = np.clip(np.float64(step - (steps - cooldown)) / max(cooldown, 1), 0, 1)
    return final + (1 - final) * (1 - (into if form == "linear" else np.sqrt(into)))


@pytest.mark.parametrize("form", ["linear", "1-sqrt"])
def test_warmup_stable_decay_in_both_phases(form):
    """ModernBERT's: warm-up and plateau on short sequences; on long ones a plateau and, last, the decay."""
    second = ("phase_two.steps=12", "phase_two.lr=0.5", "phase_two.warmup=0", "phase_two.cooldown=5")
    seen = rates(*WSD, "schedule.warmup=4", f"schedule.cooldown_form={form}", *second)
    expected = [2 * wsd(step, 4, 20, 5, 0.1, form) for step in range(20)]
    expected += [0.5 * wsd(step, 0, 12, 5, 0.1, form) for step in range(12)]
    assert seen == pytest.approx(expected, rel=1e-14)
    assert seen[4:16] == [2.0] * 12
    assert seen[20:28] == [0.5] * 8


def test_one_warmup_stable_decay_over_both_phases():
    seen = rates(*WSD, "schedule.warmup=0", "phase_two.steps=20", "phase_two.reset_schedule=false")
    assert seen == pytest.approx([2 * wsd(step, 0, 40, 10, 0.1, "1-sqrt") for step in range(40)], rel=1e-14)


@pytest.mark.parametrize(
    ("unit", "warmup", "cooldown"),
    [
        ("updates", 4, 6),
        ("sequences", 4 * 16, 6 * 16 + 7),
        ("tokens", 4 * 16 * 8 - 9, 6 * 16 * 8),
        ("tokens", 0.2, 0.3),
    ],
)
def test_durations_may_be_counted_in_sequences_and_tokens(unit, warmup, cooldown):
    """To the nearest update of the global batch; what is below 1 is a share in any unit."""
    sizes = ("training.global_batch=16", "data.sequence_length=8", "schedule.shape=wsd", "training.steps=20")
    seen = rates(*sizes, f"schedule.unit={unit}", f"schedule.warmup={warmup}", f"schedule.cooldown={cooldown}")
    assert seen == pytest.approx([2 * wsd(step, 4, 20, 6, 0, "1-sqrt") for step in range(20)], rel=1e-14)


def test_a_second_phase_counts_its_own_sequences():
    """64 sequences are 4 updates of 16 and 8 of 8."""
    options = ("training.global_batch=16", "training.steps=8", "schedule.unit=sequences", "schedule.warmup=64")
    second = ("phase_two.steps=10", "phase_two.global_batch=8", "phase_two.warmup=64", "phase_two.lr=2")
    seen = rates(*options, *second)
    assert [seen.index(2.0), seen.index(2.0, 8)] == [3, 8 + 7]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("schedule.shape=trapezoid",),
            "schedule.shape='trapezoid' is out of range: allowed is polynomial, exp.*, wsd",
        ),
        (("schedule.cooldown_form=sqrt",), "schedule.cooldown_form='sqrt' is out of range: allowed is linear, 1-sqrt"),
        (("schedule.unit=epochs",), "schedule.unit='epochs' is out of range: allowed is updates, sequences, tokens"),
        (("schedule.cooldown=341",), "schedule.cooldown=341.0 is out of range: allowed is 0 to training.steps"),
        (
            ("schedule.unit=sequences", "schedule.warmup=174081"),
            "schedule.warmup=174081.0 is out of range: allowed is 0 to 174080, the sequences of training.steps",
        ),
        (
            ("schedule.shape=wsd", "schedule.warmup=0.75", "schedule.cooldown=0.5"),
            "schedule.warmup=0.75 and schedule.cooldown=0.5 are 255 and 170 updates, more than the 340 that there are",
        ),
        (
            ("phase_two.steps=10", "schedule.shape=wsd", "phase_two.warmup=6", "phase_two.cooldown=5"),
            "phase_two.warmup=6 and phase_two.cooldown=5 are 6 and 5 updates, more than the 10",
        ),
        (
            ("phase_two.steps=10", "phase_two.reset_schedule=false", "schedule.unit=tokens"),
            "schedule.unit=tokens counts in sequences of one length, and phase_two.reset_schedule=false makes one",
        ),
    ],
)
def test_schedules_that_cannot_be_are_refused(overrides, message):
    with pytest.raises(RecipeError, match=message):
        check_ranges(apply_overrides(RecipeConfig(), overrides))


def test_a_schedules_state_is_its_position():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    assert PhasedSchedule(optimizer, RecipeConfig()).state_dict() == {"last_epoch": 0}


def adam_after_a_step():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    # As the optimizers of this package keep one number per layer of a flat tensor.
    optimizer.state[parameter]["layers"] = {"step": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    return optimizer, optimizer.state[parameter]


@pytest.mark.parametrize(("keep", "reset"), [(True, True), (True, False), (False, True), (False, False)])
def test_what_is_carried_over(keep, reset):
    optimizer, state = adam_after_a_step()
    carry_over(optimizer, keep_moments=keep, reset_step=reset)
    assert bool(state["exp_avg"].any()) == bool(state["exp_avg_sq"].any()) == keep
    assert bool(state["layers"]["exp_avg_sq"].any()) == keep
    assert bool(state["step"]) == bool(state["layers"]["step"].any()) == (not reset)
