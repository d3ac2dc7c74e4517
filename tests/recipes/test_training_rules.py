"""Training rules against their formulas."""

import copy
import math

import pytest
import torch

from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.rules.large_batch import (
    GhostBatchNorm,
    adapt_regime,
    batch_instead_of_decay,
    batch_plan_at,
    batch_size_at,
    gradient_noise_variance,
    gradient_noise_weights,
    large_loss_mask,
    scale_learning_rate,
    staleness_learning_rate,
)
from trustratio.recipes.rules.schedules import (
    WarmupExponential,
    WarmupPolynomial,
    WarmupStableDecay,
    warmup_exponential,
    warmup_polynomial,
    warmup_stable_decay,
)

# Schedules


def test_lans_plateau():
    factors = [warmup_polynomial(step, 4, 20, constant_steps=6) for step in range(22)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4:11] == [1.0] * 7
    assert factors[11:] == pytest.approx([1 - k / 10 for k in range(1, 11)] + [0.0])


def test_deepspeeds_exponential_schedule():
    assert warmup_exponential(0, 100) == 0.0
    assert warmup_exponential(50, 100) == 0.25
    assert warmup_exponential(100, 100) == 1.0
    assert warmup_exponential(350, 100) == pytest.approx(0.9)
    assert warmup_exponential(250, 100, decay_steps=150) == pytest.approx(0.9)
    assert warmup_exponential(25, 50, degree=1.0) == 0.5


@pytest.mark.parametrize(("decay", "half"), [("linear", 0.5), ("1-sqrt", 1 - 0.5**0.5), ("sqrt", 1 - 0.5**0.5)])
def test_warmup_stable_decay(decay, half):
    def factor(step):
        return warmup_stable_decay(step, 10, 100, 20, final=0.1, decay=decay)

    assert factor(4) == 0.5
    assert {factor(step) for step in range(9, 81)} == {1.0}
    assert factor(90) == pytest.approx(0.1 + 0.9 * half)
    assert factor(100) == factor(500) == pytest.approx(0.1)
    assert {warmup_stable_decay(step, 0, 5, 0, decay=decay) for step in range(9)} == {1.0}  # none at all


def test_an_unknown_decay_is_named():
    with pytest.raises(ValueError, match="decay must be one of 'linear', '1-sqrt', 'sqrt', got 'exp'"):
        warmup_stable_decay(1, 0, 2, 1, decay="exp")


@pytest.mark.parametrize(
    ("scheduler_class", "options", "function"),
    [
        (
            WarmupPolynomial,
            {"warmup_steps": 3, "total_steps": 12, "degree": 2.0, "constant_steps": 2},
            warmup_polynomial,
        ),
        (WarmupExponential, {"warmup_steps": 4, "decay_rate": 0.5, "decay_steps": 3}, warmup_exponential),
        (
            WarmupStableDecay,
            {"warmup_steps": 2, "total_steps": 12, "decay_steps": 5, "decay": "sqrt"},
            warmup_stable_decay,
        ),
    ],
)
def test_schedulers_follow_their_functions_and_resume(scheduler_class, options, function, tmp_path):
    def build():
        parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
        return torch.optim.SGD([{"params": parameters[:1], "lr": 0.5}, {"params": parameters[1:], "lr": 2.0}])

    optimizer = build()
    scheduler = scheduler_class(optimizer, **options)
    for step in range(12):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [0.5 * function(step, **options), 2.0 * function(step, **options)]
        )
        if step == 6:
            torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, tmp_path / "state")
            saved = torch.load(tmp_path / "state", weights_only=True)
            optimizer = build()
            # The saved parameters of the schedule win over those it was built with.
            scheduler = scheduler_class(optimizer, **{**options, "warmup_steps": 1})
            optimizer.load_state_dict(saved["optimizer"])
            scheduler.load_state_dict(saved["scheduler"])
        optimizer.step()
        scheduler.step()


# Scaling


def test_learning_rates_scale_with_the_batch_or_its_root():
    assert scale_learning_rate(0.1, 256, 8192, "linear") == pytest.approx(3.2)
    assert scale_learning_rate(8e-4, 1024, 131072) == pytest.approx(90.50967e-4)
    assert scale_learning_rate(0.1, 256, 256) == 0.1
    with pytest.raises(ValueError, match="rule must be one of 'linear', 'sqrt', got 'cubic'"):
        scale_learning_rate(0.1, 1, 2, "cubic")
    with pytest.raises(ValueError, match="base_batch must be at least 1, got 0"):
        scale_learning_rate(0.1, 0, 2)


def test_regime_adaptation_keeps_the_number_of_updates():
    assert adapt_regime(90, [30, 60, 80], 128, 4096) == (90 * 32, [960, 1920, 2560])
    assert adapt_regime(10, [5], 128, 300) == (30, [15])
    assert adapt_regime(10, [5], 128, 64) == (10, [5])


# Ghost batch normalisation


def plain_and_ghost(ghost_size, **options):
    torch.manual_seed(0)
    plain = torch.nn.BatchNorm2d(3, **options).double()
    with torch.no_grad():
        plain.weight.uniform_(0.5, 2)
        plain.bias.normal_()
    return plain, GhostBatchNorm.convert(copy.deepcopy(plain), ghost_size)


def test_each_ghost_batch_is_normalised_by_itself():
    plain, ghost = plain_and_ghost(4)
    x = torch.randn(12, 3, 5, 2, dtype=torch.float64)
    expected = torch.cat([plain(part) for part in x.split(4)])
    torch.testing.assert_close(ghost(x), expected, rtol=0, atol=0)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, ghost.state_dict()[name]), name


def test_running_statistics_have_the_closed_form():
    _, ghost = plain_and_ghost(4, momentum=0.3)
    x = torch.randn(12, 3, 5, 2, dtype=torch.float64)
    ghost.running_mean.copy_(torch.tensor([1.0, -2.0, 0.5]))
    before, k = ghost.running_mean.clone(), 3
    ghost(x)
    means = [part.mean(dim=(0, 2, 3)) for part in x.split(4)]
    newest_first = means[::-1]
    closed = 0.7**k * before + sum(0.7**i * 0.3 * mean for i, mean in enumerate(newest_first))
    torch.testing.assert_close(ghost.running_mean, closed)


def test_evaluation_is_plain_and_uneven_batches_leave_no_small_part():
    plain, ghost = plain_and_ghost(4)
    x = torch.randn(11, 3, 5, 2, dtype=torch.float64)
    assert [len(part) for part in x.tensor_split(2)] == [6, 5]
    torch.testing.assert_close(ghost(x), torch.cat([plain(part) for part in x.tensor_split(2)]))
    torch.testing.assert_close(ghost.eval()(x), plain.eval()(x))
    assert ghost.train()(x[:2]).shape == (2, 3, 5, 2)


def test_convert_shares_parameters_and_keeps_state_dict_names():
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4), torch.nn.Sequential(torch.nn.BatchNorm1d(4))
    )
    weight, names = model[1].weight, list(model.state_dict())
    model[2].eval()
    GhostBatchNorm.convert(model, 8)
    assert isinstance(model[1], GhostBatchNorm)
    assert model[1].weight is weight
    assert not model[2][0].training
    assert list(model.state_dict()) == names
    with pytest.raises(ValueError, match="ghost_size must be at least 1"):
        GhostBatchNorm(4, 0)


# Noise, batches, losses, delays


def test_noise_gives_the_large_batch_the_small_ones_covariance():
    variance = gradient_noise_variance(8, 128)
    assert variance == 15.0
    assert gradient_noise_variance(128, 64) == 0.0
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(4000, 128, dtype=torch.float64, generator=generator)  # samples' gradients of mean zero
    z = gradient_noise_weights(4000 * 128, variance, generator).view(4000, 128).double()
    assert z.mean().item() == pytest.approx(1.0, abs=0.02)
    assert z.var().item() == pytest.approx(15.0, rel=0.02)
    noisy = (z * gradients).mean(dim=1).var().item()
    assert noisy == pytest.approx(1 / 8, rel=0.06)
    assert torch.equal(gradient_noise_weights(3, 0.0), torch.ones(3))
    with pytest.raises(ValueError, match="variance must be at least 0"):
        gradient_noise_weights(3, -1.0)


def test_batch_size_schedule_and_the_accumulation_it_implies():
    schedule = [(0, 256), (10, 1024), (30, 4096)]
    assert [batch_size_at(step, schedule) for step in (0, 9, 10, 29, 30, 1000)] == [256, 256, 1024, 1024, 4096, 4096]
    assert [batch_plan_at(step, schedule, 32, 4).accumulation for step in (0, 10, 30)] == [2, 8, 32]
    with pytest.raises(RecipeError, match="nearest possible global batches: 192 and 288"):
        batch_plan_at(0, schedule, 48, 2)
    for broken in ([], [(5, 8)], [(0, 8), (0, 16)]):
        with pytest.raises(ValueError, match="schedule must begin at update 0 and ascend"):
            batch_size_at(0, broken)


def test_a_batch_that_grows_instead_of_a_rate_that_decays():
    assert batch_instead_of_decay(128, [(100, 0.2), (150, 0.5)]) == [(0, 128), (100, 640), (150, 1280)]
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 2"):
        batch_instead_of_decay(128, [(1, 2)])


def test_small_losses_are_discarded():
    losses = torch.tensor([0.3, 0.1, 0.9, 0.5, 0.7], requires_grad=True)
    assert large_loss_mask(losses, 0.4).tolist() == [False, False, True, True, True]
    assert large_loss_mask(losses, 0.39).tolist() == [True, False, True, True, True]
    assert large_loss_mask(losses, 0.0).all()
    everyone = torch.cat([losses, torch.full((5,), 0.8)])
    assert large_loss_mask(losses, 0.3, among=everyone).tolist() == [False, False, True, False, True]
    losses[large_loss_mask(losses, 0.4)].mean().backward()
    torch.testing.assert_close(losses.grad, torch.tensor([0, 0, 1, 1, 1]) / 3)
    with pytest.raises(ValueError, match=r"discard must be in \[0, 1\), got 1"):
        large_loss_mask(losses, 1)


def test_learning_rate_falls_with_staleness():
    assert staleness_learning_rate(0.1, 8) == pytest.approx(0.0125)
    assert staleness_learning_rate(0.1, 8, reference_delay=4) == pytest.approx(0.05)
    assert staleness_learning_rate(0.1, 0) == staleness_learning_rate(0.1, 1) == 0.1
    assert math.isclose(staleness_learning_rate(0.1, 2, 4), 0.1)
    with pytest.raises(ValueError, match="delay must be at least 0"):
        staleness_learning_rate(0.1, -1)
