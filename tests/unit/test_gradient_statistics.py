"""Statistics of group gradients on one process: worked examples, bookkeeping and errors."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from trustratio.optimizers import CLARS, LAMB, LARS, VRLAMB, VRLARS, VRSGD, StatisticsError, VRAdam
from trustratio.optimizers.gradient_statistics.norms import LOSES_HOOKS, GroupNorms
from trustratio.optimizers.noise_scale import (
    RunningNoise,
    adascale,
    gradient_noise,
    noise_scale,
    sum_of_layers,
)

# The groups' gradients of the two steps of the worked examples.
FIRST = torch.tensor([[1, 0.2, -0.1], [1.2, -0.2, 0.1], [0.8, 0.1, 0.3], [1, -0.1, -0.1]], dtype=torch.float64)
SECOND = torch.tensor([[0.5, 0.4, 0], [0.7, 0.2, 0.2], [0.6, 0.3, -0.2], [0.6, 0.3, 0.1]], dtype=torch.float64)
T0 = torch.tensor([[0.6, 0], [0, -0.8]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _few_groups_are_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*group.* of samples per step")
        yield


def ones(size: int = 3, dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(size, dtype=dtype))


def accumulate(w: torch.Tensor, groups: torch.Tensor, factor: float = 1.0) -> None:
    for g in groups:
        (factor * (w * g).sum() / len(groups)).backward()


def train(w: torch.Tensor, optimizer: Any, *steps: torch.Tensor) -> None:
    for groups in steps:
        accumulate(w, groups)
        optimizer.step()
        optimizer.zero_grad()


def assert_is(w: torch.Tensor, *values: float, digits: float = 1e-9) -> None:
    torch.testing.assert_close(w.detach(), w.new_tensor(values), rtol=digits, atol=0)


# Worked examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("statistic", "expected"), [("norm", (2.978571429, 4.028571429)), ("square", (2.985, 4.02))])
def test_clars(statistic: str, expected: tuple[float, float]) -> None:
    w = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    train(w, optimizer := CLARS([("w", w)], lr=1.0, trust_coefficient=0.01, statistic=statistic, adapt=True), T0)
    assert_is(w, *expected)
    assert optimizer.trust_ratios()["w"] == pytest.approx({"norm": 0.07142857143, "square": 0.05}[statistic])


def test_clars_is_lars_where_groups_agree() -> None:
    for statistic in ("norm", "square"):
        w, v = ones(), ones()
        clars = CLARS([w], lr=0.1, weight_decay=0.3, trust_coefficient=0.02, statistic=statistic, adapt=True)
        lars = LARS([v], lr=0.1, weight_decay=0.3, trust_coefficient=0.02, adapt=True)
        for g in (FIRST[:1].repeat(4, 1), SECOND[1:2].repeat(4, 1)):
            train(w, clars, g)
            train(v, lars, g)
        torch.testing.assert_close(w, v, rtol=1e-14, atol=0)


def test_vrsgd() -> None:
    w = ones()
    train(w, VRSGD([w], lr=0.1), FIRST)
    assert_is(w, 0.9, 1.0, 0.9995)


def test_vrsgd_on_two_elements() -> None:
    """Mean (1, 0) and variance (.02, .1) make ratios of 50 and 0, over their mean 2 and 0: 1 and the floor."""
    groups = torch.tensor([[1, 0.2], [1.2, -0.2], [0.8, 0.4], [1, -0.4]], dtype=torch.float64)
    w = ones(2)
    train(w, VRSGD([w], lr=1.0, gsnr_floor=0.1), groups)
    torch.testing.assert_close(w.detach(), w.new_tensor([0.0, 1.0]), rtol=0, atol=1e-15)


def test_vr_momentum() -> None:
    w = ones()
    train(w, VRSGD([w], lr=0.1, momentum=0.9), FIRST, FIRST)
    assert_is(w, 1 - 0.1 - 0.19, 1.0, 1 - 0.0005 - 0.00095)


def test_vrlamb() -> None:
    w = ones()
    optimizer = VRLAMB([w], lr=0.01, eps=1e-6, weight_decay=0.01, adapt=True)
    train(w, optimizer, FIRST)
    assert_is(w, 0.9877516451, 0.999878729, 0.987754058)
    train(w, optimizer, SECOND)
    assert_is(w, 0.977005748, 0.9915015942, 0.9772919266)
    p = optimizer.state[w]["exp_avg_gsnr"] / (1 - 0.9**2)
    assert_is(p, 1.0, 0.3630576759, 0.1)


def test_vrlars_takes_the_norm_of_the_adapted_gradient() -> None:
    w = ones()
    train(w, optimizer := VRLARS([("w", w)], lr=1.0, trust_coefficient=0.01, adapt=True), FIRST)
    norm = (1 + 0.005**2) ** 0.5
    assert optimizer.trust_ratios()["w"] == pytest.approx(0.01 * 3**0.5 / norm, rel=1e-14)


def test_second_moment_of_the_mean_gradient_lets_the_multiplier_through() -> None:
    steps = {}
    for second_moment in ("adapted", "mean"):
        w = ones()
        train(w, VRAdam([w], lr=0.01, second_moment=second_moment), FIRST)
        steps[second_moment] = 1 - w.detach()
    assert_is(steps["adapted"][[0, 2]], 0.01, 0.01, digits=1e-5)  # the sign of g
    assert_is(steps["mean"][[0, 2]], 0.01, 0.001, digits=1e-5)


def test_a_floor_of_one_is_the_base_optimizer() -> None:
    w, v = ones(), ones()
    train(w, VRLAMB([w], gsnr_floor=1.0, max_grad_norm=0.3, adapt=True), FIRST, SECOND)
    train(v, LAMB([v], max_grad_norm=0.3, adapt=True), FIRST, SECOND)
    torch.testing.assert_close(w, v, rtol=1e-14, atol=0)


def test_noise_scale_and_adascale() -> None:
    w = ones()
    optimizer = LARS([("w", w)], lr=0.1)
    optimizer.collect_group_norms()
    train(w, optimizer, FIRST)
    noise = gradient_noise(optimizer, group_size=16)
    assert noise.model == noise.layers["w"]
    assert noise.model.signal == pytest.approx(0.9783333333, rel=1e-9)
    assert noise.model.noise == pytest.approx(1.546666667, rel=1e-9)
    assert noise.model.scale == pytest.approx(1.580919932, rel=1e-9)
    gain = adascale(sum_of_layers(optimizer.statistics.norms().values()))  # type: ignore[union-attr]
    assert gain.variance == pytest.approx(0.09666666667, rel=1e-9)
    assert gain.signal == pytest.approx(0.9783333333, rel=1e-9)
    assert gain.gain == pytest.approx(1.072319202, rel=1e-9)


def test_noise_scale_is_unbiased() -> None:
    """Known signal and noise, many draws."""
    torch.manual_seed(0)
    true, deviation, size = torch.randn(50).double(), 3.0, 8
    found = RunningNoise(beta=0.999)
    for _ in range(4000):
        groups = true + deviation / size**0.5 * torch.randn(6, 50, dtype=torch.float64)
        norms = GroupNorms(6, 0.0, groups.square().sum(1).mean().item(), groups.mean(0).square().sum().item())
        averaged = found.update(noise_scale(norms, group_size=size))
    assert averaged.noise == pytest.approx(50 * deviation**2, rel=0.02)
    assert averaged.signal == pytest.approx(true.square().sum().item(), rel=0.02)


def test_gain_is_one_without_noise_and_the_scale_without_signal() -> None:
    assert adascale(GroupNorms(8, 1.0, 1.0, 1.0)).gain == pytest.approx(1.0, abs=1e-5)
    assert adascale(GroupNorms(8, 1.0, 1.0, 0.125)).gain == pytest.approx(8.0)


# Bookkeeping --------------------------------------------------------------------------------------------------------


def test_elements_without_gradient_and_layers_of_one_element() -> None:
    w, single = ones(), ones(1)
    optimizer = VRSGD([w, single], lr=0.1)
    for g in ([1.0, 0, 0.5], [1.1, 0, -0.5]):
        ((w * torch.tensor(g)).sum() / 2 + single.sum() * g[2]).backward()
        single.grad = None if g[2] > 0 else single.grad
    single.grad = None
    optimizer.step()
    assert w[1] == 1.0
    assert w[0] < 1.0
    optimizer.zero_grad()
    for g in (0.5, 1.5):
        (single.sum() * g / 2).backward()
    optimizer.step()
    assert_is(single, 0.9)


def test_one_group_is_the_base_optimizer_with_a_warning() -> None:
    w, v = ones(dtype=torch.float32), ones(dtype=torch.float32)
    with pytest.warns(UserWarning, match=r"VRAdam has 1 group of samples per step .* every multiplier is 1"):
        train(w, VRAdam([w], lr=0.1), FIRST[:1].float())
    plain = torch.optim.Adam([v], lr=0.1)
    train(v, plain, FIRST[:1].float())
    torch.testing.assert_close(w, v)


def test_the_warning_names_the_number_of_groups_once() -> None:
    w = ones()
    optimizer = VRSGD([w], lr=0.1)
    with pytest.warns(UserWarning, match="VRSGD has 4 groups of samples per step .* fewer than 8") as found:
        train(w, optimizer, FIRST, SECOND)
    assert len(found) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(v := ones(), VRSGD([v], lr=0.1), FIRST.repeat(2, 1))
        train(v := ones(), CLARS([v], lr=0.1), FIRST)


@pytest.mark.parametrize("optimizer_class", [CLARS, VRSGD, VRLAMB])
def test_unscaling_and_clipping_between_backward_and_step(optimizer_class: Any) -> None:
    """The factor is found out: GradScaler's unscale_, clip_grad_norm_, both."""
    options = {"lr": 0.1, "gsnr_floor": 0.01} if optimizer_class is not CLARS else {"lr": 0.1}
    w, v = ones(), ones()
    scaled, plain = optimizer_class([w], **options), optimizer_class([v], **options)
    for groups, loss_scale, clip in ((FIRST, 1.0, 0.4), (SECOND, 1024.0, None), (FIRST, 2.0**-7, 0.05)):
        accumulate(w, groups, loss_scale)
        w.grad /= loss_scale  # type: ignore[operator]
        norm = 1.0 if clip is None else groups.mean(0).norm().item() / clip
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([w], clip)
        scaled.step()
        scaled.zero_grad()
        train(v, plain, groups / norm)
    torch.testing.assert_close(w, v, rtol=1e-5, atol=0)


def test_gradients_that_zero_grad_discards_do_not_count() -> None:
    w, v = ones(), ones()
    optimizer = VRSGD([w], lr=0.1)
    accumulate(w, SECOND[:2])
    optimizer.zero_grad()
    train(w, optimizer, FIRST)
    train(v, VRSGD([v], lr=0.1), FIRST)
    assert torch.equal(w, v)


def test_a_second_step_on_the_same_gradients() -> None:
    w, v = ones(), ones()
    one, other = VRSGD([w], lr=0.1), VRSGD([v], lr=0.1)
    accumulate(w, FIRST)
    one.step()
    one.step()
    one.zero_grad()
    train(v, other, FIRST, FIRST)
    assert torch.equal(w, v)


def test_groups_by_hand() -> None:
    w, v = ones(), ones()
    by_hand, by_backward = VRSGD([("w", w)], lr=0.1), VRSGD([("w", v)], lr=0.1)
    for number, groups in enumerate((FIRST, SECOND)):
        by_hand.zero_grad()
        for g in groups:
            by_hand.statistics.add_group({"w" if number else w: g / len(groups)})  # type: ignore[union-attr]
        w.grad = groups.mean(0)
        by_hand.step()
        train(v, by_backward, groups)
    torch.testing.assert_close(w, v, rtol=1e-14, atol=0)
    with pytest.raises(KeyError, match="nothing is no parameter"):
        by_hand.statistics.add_group({"nothing": FIRST[0]})  # type: ignore[union-attr]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_shows_each_gradient_once(reentrant: bool) -> None:
    norms = []
    for checkpointed in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        optimizer = VRSGD(model.named_parameters(), lr=0.1)
        for _ in range(3):
            x = torch.randn(5, 4, requires_grad=True)
            for layer in model:
                x = checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
            (x.square().mean() / 3).backward()
        optimizer.step()
        norms.append((optimizer.statistics.norms(), [p.detach().clone() for p in model.parameters()]))  # type: ignore[union-attr]
    assert norms[0][0] == norms[1][0]
    assert norms[0][0]["0.weight"].groups == 3
    assert all(map(torch.equal, norms[0][1], norms[1][1]))


def test_parameters_without_gradient_frozen_and_thawed() -> None:
    w, unused, frozen = ones(), ones(), ones().requires_grad_(False)
    optimizer = VRSGD([w, unused, frozen], lr=0.1)
    assert not frozen.requires_grad
    train(w, optimizer, FIRST)
    assert torch.equal(unused, ones())
    frozen.requires_grad_(True)
    train(frozen, optimizer, FIRST)
    assert_is(frozen, 0.9, 1.0, 0.9995)
    assert optimizer.statistics.norms()["0.2"].groups == 4  # type: ignore[union-attr]


def test_copies_and_reloaded_optimizers_watch_their_own_parameters() -> None:
    w = ones()
    optimizer = VRLAMB([("w", w)], adapt=True)
    train(w, optimizer, FIRST)
    twin, other = copy.deepcopy((w, optimizer))
    train(twin, other, SECOND)
    v = torch.nn.Parameter(w.detach().clone())
    loaded = VRLAMB([("w", v)], adapt=True)
    loaded.load_state_dict(optimizer.state_dict())
    train(v, loaded, SECOND)
    train(w, optimizer, SECOND)
    assert torch.equal(w, twin)
    assert torch.equal(w, v)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_collect_group_norms_as_the_original_does(copied: Any) -> None:
    w = ones()
    optimizer = LAMB([("w", w)])
    for collects in (False, True):
        if collects:
            optimizer.collect_group_norms()
        twin, other = copied((w, optimizer))
        train(twin, other, FIRST)
        assert (other.statistics is not None) is collects
    assert other.statistics.norms()["w"].groups == len(FIRST)


def test_hooks_do_not_keep_the_optimizer_alive() -> None:
    w = ones()
    optimizer = VRSGD([w], lr=0.1)
    statistics = optimizer.statistics
    del optimizer
    accumulate(w, FIRST)
    del statistics
    accumulate(w, FIRST)


@pytest.mark.parametrize("optimizer_class", [CLARS, VRSGD, VRLARS, VRLAMB])
def test_a_resized_parameter_goes_on_as_a_new_one(optimizer_class: Any) -> None:
    """`resize_token_embeddings` puts larger data into the same parameter."""
    resized, fresh = ones(3), ones(5)
    optimizer = optimizer_class([("w", resized)], lr=0.1)
    train(resized, optimizer, FIRST)
    resized.data = torch.ones(5, dtype=torch.float64)
    optimizer.state.pop(resized, None)
    resized.grad = torch.ones(5, dtype=torch.float64)
    with pytest.raises(StatisticsError, match="saw no group"):  # what is kept of earlier steps has another size
        optimizer.step()
    optimizer.zero_grad()
    larger = torch.cat([SECOND, FIRST[:, :2]], dim=1)
    train(resized, optimizer, larger)
    train(fresh, optimizer_class([("w", fresh)], lr=0.1), larger)
    torch.testing.assert_close(resized, fresh, rtol=1e-12, atol=0)


class Product(torch.autograd.Function):
    """As DeepSpeed's linear layers are under ZeRO-3."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        x, w = ctx.saved_tensors
        return gradient * w, gradient * x


@pytest.mark.parametrize("optimizer_class", [CLARS, VRSGD])
@pytest.mark.parametrize("seen_before", [False, True])
def test_functions_that_keep_a_parameter_are_recomputed(optimizer_class: Any, seen_before: bool) -> None:
    """Torch 2.9 loses the parameter's hooks there, which must not pass for groups without a gradient."""
    wanted, w = ones(), ones()
    expected, optimizer = (optimizer_class([("w", p)], lr=0.1) for p in (wanted, w))
    train(wanted, expected, FIRST)
    for index, x in enumerate(FIRST / len(FIRST)):
        x = x.clone().requires_grad_()
        if seen_before and index == 0:
            (x * w).sum().backward()
        else:
            checkpoint(lambda x: Product.apply(x, w).sin().arcsin(), x, use_reentrant=False).sum().backward()
    if LOSES_HOOKS:
        with pytest.raises(StatisticsError, match=r"Before torch 2\.10, .* take a newer torch"):
            optimizer.step()
    else:
        optimizer.step()
        torch.testing.assert_close(w, wanted, rtol=1e-9, atol=0)


# Not finite ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("optimizer_class", [CLARS, VRSGD, VRLAMB])
def test_a_group_that_is_not_finite_leaves_everything_untouched(optimizer_class: Any, value: float) -> None:
    w, b = torch.nn.Parameter(torch.ones(2, 3)), ones(2, torch.float32)
    optimizer = optimizer_class([("w", w), ("b", b)], lr=0.1)
    for broken in (False, True, False):
        before = w.detach().clone(), b.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
        for number in range(3):
            factor = value if broken and number == 1 else 1.0 + number
            (w.sum() * factor / 3 + b.square().sum() * (1 + number) / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(b, before[1]) is broken
        assert torch.equal(w, before[0]) is broken
        if broken:
            torch.testing.assert_close(optimizer.state_dict()["state"], before[2], rtol=0, atol=0)
    assert w.isfinite().all()


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_class", [CLARS, VRSGD, VRAdam, VRLARS, VRLAMB])
def test_statistics_that_were_never_collected(optimizer_class: Any) -> None:
    w = ones()
    optimizer = optimizer_class([w], lr=0.1)
    w.grad = FIRST[0]
    with pytest.raises(StatisticsError, match=r"saw no group's gradient.*construct the optimizer with the model's own"):
        optimizer.step()
    optimizer.zero_grad()
    train(w, optimizer, FIRST)  # backward() makes it right
    w.grad = FIRST[0]
    with pytest.raises(StatisticsError, match="add_group"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # no gradient, nothing to do


def test_hooks_that_were_removed() -> None:
    w = ones()
    optimizer = VRSGD([w], lr=0.1)
    w._backward_hooks.clear()  # type: ignore[union-attr]
    accumulate(w, FIRST)
    with pytest.raises(StatisticsError, match="saw no group's gradient"):
        optimizer.step()


def test_diagnostics_say_what_is_missing() -> None:
    w = ones()
    optimizer = LAMB([w])
    with pytest.raises(StatisticsError, match=r"LAMB keeps no group norms: call collect_group_norms\(\)"):
        gradient_noise(optimizer)
    optimizer.collect_group_norms()
    with pytest.raises(StatisticsError, match="has taken no step yet"):
        gradient_noise(optimizer)
    train(w, optimizer, FIRST[:1])
    with pytest.raises(ValueError, match=r"at least 2 groups of samples per step .* got 1"):
        gradient_noise(optimizer)


@pytest.mark.parametrize(
    ("optimizer_class", "options", "message"),
    [
        (CLARS, {"statistic": "median"}, "statistic must be one of 'norm', 'square', got 'median'"),
        (CLARS, {"trust_coefficient": 0.0}, r"trust_coefficient must be in \(0, inf\), got 0.0"),
        (VRSGD, {"gsnr_floor": 0.0}, r"gsnr_floor must be in \(0, 1\], got 0.0"),
        (VRSGD, {"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        (VRLARS, {"gsnr_floor": 1.5}, r"gsnr_floor must be in \(0, 1\], got 1.5"),
        (VRLARS, {"nesterov": True, "momentum": 0.0}, "nesterov=True needs momentum"),
        (VRAdam, {"gsnr_beta": 1.0}, r"gsnr_beta must be in \[0, 1\), got 1.0"),
        (VRAdam, {"eps": -1.0}, r"eps must be in \[0, inf\), got -1.0"),
        (VRLAMB, {"second_moment": "none"}, "second_moment must be one of 'adapted', 'mean', got 'none'"),
        (VRLAMB, {"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1\), got 1.0"),
    ],
)
def test_options_out_of_range(optimizer_class: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer_class([ones()], lr=0.1, **options)
