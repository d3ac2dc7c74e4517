import pytest
import torch

from trustratio.recipes.configuration.config import RecipeConfig
from trustratio.recipes.configuration.overrides import apply_overrides
from trustratio.recipes.configuration.phases import PhasedSchedule, carry_over, learning_rate, phases_of
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
