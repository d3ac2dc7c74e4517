import dataclasses

import numpy as np
import pytest
import torch

from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.configuration.command_line import parse_command_line
from trustratio.recipes.configuration.config import RecipeConfig
from trustratio.recipes.configuration.given_schedule import check_given_schedule
from trustratio.recipes.configuration.overrides import apply_overrides
from trustratio.recipes.configuration.phases import PhasedSchedule, carry_over, learning_rate, phases_of
from trustratio.recipes.configuration.presets import PRESETS, get_preset
from trustratio.recipes.configuration.ranges import check_ranges
from trustratio.recipes.configuration.twins import twin
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


def given(*arguments):
    return parse_command_line([str(argument) for argument in arguments]).config


@pytest.mark.parametrize("unit", ["tokens", "sequences"])
def test_another_unit_needs_the_presets_durations_anew(unit):
    """450 updates are no 450 tokens, which is no warm-up at all."""
    preset = ("--preset", "lamb-64k-32k-deepspeed", f"schedule.unit={unit}")
    with pytest.raises(
        RecipeError, match=rf"schedule.unit={unit} and schedule.warmup=450, phase_two.warmup=150 of"
    ) as e:
        given(*preset, "run.smallest_batch=8192", "run.batch_warmup=5e9")
    advice = str(e.value).partition("as long are ")[2].split()
    config, known = given(*preset, *advice), get_preset("lamb-64k-32k-deepspeed")
    assert [learning_rate(config, step) for step in range(0, 6760, 10)] == [
        learning_rate(known, step) for step in range(0, 6760, 10)
    ]
    assert given(*preset[:2], "schedule.unit=updates") == known  # its own
    with pytest.raises(RecipeError, match=rf"{unit} and phase_two.warmup=150 of"):
        given(*preset, advice[0])
    given(*preset, advice[0], "phase_two.steps=0")  # which nothing counts then
    given("--preset", "lamb-64k-32k", f"schedule.unit={unit}")  # whose durations are shares


def test_a_runs_own_unit_may_not_change_behind_its_durations(tmp_path):
    """Neither may that of a saved configuration, whose batch warms up in it."""
    config = apply_overrides(get_preset("lamb-tiny"), ["schedule.unit=tokens", "run.batch_warmup=81920"])
    config = apply_overrides(config, ["run.smallest_batch=32", "schedule.warmup=40960"])
    changed = apply_overrides(config, ["schedule.unit=updates"])
    with pytest.raises(RecipeError, match=r"as long are schedule.warmup=10 run.batch_warmup=20$"):
        check_given_schedule(config, changed, {"schedule.unit"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["schedule.cooldown=0.3"],
            "shape=polynomial makes nothing of schedule.cooldown=0.3: .* schedule.cooldown=0.1$",
        ),
        (["schedule.cooldown_form=linear"], "makes nothing of schedule.cooldown_form=linear"),
        (["schedule.decay_rate=0.5", "schedule.decay_steps=9"], "schedule.decay_rate=0.5, schedule.decay_steps=9:"),
        (["schedule.shape=wsd", "schedule.constant=0.3"], "shape=wsd makes nothing of schedule.constant=0.3"),
        (["schedule.shape=wsd", "schedule.degree=2"], "makes nothing of schedule.degree=2: "),
        (["schedule.shape=wsd", "schedule.warmup_start=-3"], "makes nothing of schedule.warmup_start=-3: "),
        (["schedule.shape=wsd", "schedule.decay_from_start=true"], "of schedule.decay_from_start=true: .*start=false$"),
        (["schedule.shape=exponential", "schedule.final=0.1"], "shape=exponential makes nothing of schedule.final=0.1"),
        (["phase_two.steps=9", "phase_two.cooldown=0.3"], "makes nothing of phase_two.cooldown=0.3"),
        (["phase_two.steps=9", "phase_two.decay_steps=3"], "makes nothing of phase_two.decay_steps=3"),
        (["phase_two.steps=9", "schedule.shape=wsd", "phase_two.constant=0.1"], "makes nothing of phase_two.constant"),
        (
            ["--preset", "lamb-64k-32k", "schedule.shape=wsd"],
            "of schedule.degree=0.5, schedule.decay_from_start=true: .* schedule.degree=1 schedule.decay",
        ),
        (
            ["--preset", "modernbert-base", "schedule.shape=polynomial"],
            "of schedule.cooldown=0, phase_two.cooldown=0.166667: .* schedule.cooldown=0.1 phase_two.cooldown=0.1$",
        ),
    ],
)
def test_fields_without_effect_are_refused(arguments, message):
    with pytest.raises(RecipeError, match=message):
        given(*arguments)


def test_fields_of_another_shape_may_have_their_defaults():
    given("schedule.shape=wsd", "schedule.constant=0", "schedule.cooldown=0.3")
    given("--preset", "lamb-64k-32k", "schedule.shape=wsd", "schedule.degree=1", "schedule.decay_from_start=false")
    given("--preset", "lamb-64k-32k-tiny", "schedule.warmup=3")  # twins scale what their shape does not have
    for name in PRESETS:
        given("--preset", name, "schedule.offset=0")


@pytest.mark.parametrize("unit", ["updates", "sequences", "tokens"])
@pytest.mark.parametrize("size", ["tiny", "mini"])
def test_twins_scale_durations_in_every_unit(unit, size):
    """As many updates, and as the share of the phase that they are."""
    known = PRESETS["modernbert-base"]
    durations = {"schedule.warmup": 400, "schedule.cooldown": 800, "run.batch_warmup": 1200, "phase_two.cooldown": 600}
    factors = {
        "updates": (1, 1),
        "sequences": (4608, 576),
        "tokens": (4608 * 1024, 576 * 8192),
    }[unit]
    given = [f"{key}={value * factors[key.startswith('phase')]}" for key, value in durations.items()]
    config = apply_overrides(known.config, [f"schedule.unit={unit}", *given])
    small = twin(dataclasses.replace(known, config=config), size).config
    first, second = phases_of(small)
    divisor = {"tiny": 20, "mini": 10}[size]
    assert first.updates(small.schedule.warmup, unit) == 400 / divisor
    assert first.updates(small.schedule.cooldown, unit) == 800 / divisor
    assert first.updates(small.run.batch_warmup, unit) == 1200 / divisor
    assert second.updates(small.phase_two.cooldown, unit) == 600 / divisor


GROWING = ("training.global_batch=512", "training.steps=100", "run.smallest_batch=16", "run.batch_warmup=0.5")


def test_durations_have_fractions_where_the_batch_warms_up():
    """Rates go by sequences there: a warm-up of 1,000 is 1.953 updates of 512, and rises at every update of 16."""
    by_sequences = ("schedule.shape=wsd", "schedule.unit=sequences", "schedule.warmup=1000", "schedule.cooldown=1300")
    config = apply_overrides(RecipeConfig(), ["optimizer.lr=2", *GROWING, *by_sequences])
    check_ranges(config)
    read = np.arange(0, 100 * 512, 16, dtype=np.float64)
    rising = np.minimum(1, (read + 512) / 1000)
    falling = 1 - np.sqrt(np.maximum(0, read - (51200 - 1300)) / 1300)
    seen = [learning_rate(config, position / 512) for position in read]
    assert seen == pytest.approx(2 * np.minimum(rising, falling), rel=1e-12)
    share = apply_overrides(
        config, ["schedule.unit=updates", "schedule.warmup=0.01953125", "schedule.cooldown=0.02539"]
    )
    assert learning_rate(share, 0.25) == pytest.approx(2 * 1.25 / 1.953125, rel=1e-12)
    noisy = apply_overrides(share, ["run.batch_warmup=0", "run.batch_from_noise=true"])
    assert learning_rate(noisy, 0.25) == pytest.approx(2 * 1.25 / 2, rel=1e-12)  # as the fixed batch's schedule


@pytest.mark.parametrize("growing", [(), GROWING])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("unit=sequences", "warmup=200"),
            r"warmup=200 sequences is less than one update of 512 .* at least 512, or 0",
        ),
        (
            ("unit=tokens", "warmup=16383"),
            r"warmup=16383 tokens is less than one update of 512 .* at least 16384, or 0",
        ),
        (("unit=sequences", "shape=wsd", "cooldown=1"), r"schedule.cooldown=1 sequences is less than one update"),
        (("unit=sequences", "constant=1.5"), r"schedule.constant=1.5 sequences is less than one update"),
    ],
)
def test_durations_that_would_be_none_are_refused(growing, overrides, message):
    with pytest.raises(RecipeError, match=message):
        check_ranges(apply_overrides(RecipeConfig(), [*growing, *(f"schedule.{text}" for text in overrides)]))


def test_a_second_phases_durations_are_of_its_own_updates():
    second = ("phase_two.steps=9", "phase_two.global_batch=64", "schedule.unit=sequences", "schedule.warmup=0")
    check_ranges(apply_overrides(RecipeConfig(), [*second, "phase_two.warmup=64"]))
    with pytest.raises(RecipeError, match=r"phase_two.warmup=63 sequences is less than one update of 64"):
        check_ranges(apply_overrides(RecipeConfig(), [*second, "phase_two.warmup=63"]))


def test_a_length_that_another_architecture_has_not_names_it():
    with pytest.raises(RecipeError, match=r"length=1024 is .* 4 to model.max_positions=512 of this BERT$"):
        check_ranges(given("--preset", "modernbert-base", "--model", "base"))


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
