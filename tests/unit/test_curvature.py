"""Step sizes from curvature: the blocks of a known Hessian, each way to sample, and what is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trustratio.optimizers import CurvatureAdamW, CurvatureSGD
from trustratio.optimizers.sampling.random_numbers import RandomNumbers
from trustratio.optimizers.sampling.signs import signs

from ..references.curvature import CurvatureReference

Tensor = torch.Tensor

H = torch.tensor([[4.0, 1.0, 0.5], [1.0, 3.0, 0.2], [0.5, 0.2, 1.0]], dtype=torch.float64)
KINDS: dict[str, Any] = {"curvature_sgd": CurvatureSGD, "curvature_adamw": CurvatureAdamW}
both_kinds = pytest.mark.parametrize("kind", KINDS)


class Quadratic:
    """½wᵀHw over layers {1, 2} and {3}."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        self.one = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=dtype))
        self.two = torch.nn.Parameter(torch.tensor([-1.0], dtype=dtype))
        self.named = [("one", self.one), ("two", self.two)]

    def loss(self) -> Tensor:
        w = torch.cat([self.one, self.two])
        return 0.5 * w @ H.to(w.dtype) @ w

    def backward(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        return loss

    def values(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.named}


def closure_of(optimizer: torch.optim.Optimizer, backward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        return backward()

    return closure


def sampled_step(optimizer: Any, backward: Callable[[], Tensor]) -> bool:
    """A step in a loop of one's own; whether it had a sample."""
    optimizer.zero_grad()
    wanted: bool = optimizer.wants_curvature()
    backward()
    if wanted:
        with optimizer.curvature():
            backward()
    optimizer.step()
    return wanted


# The numbers --------------------------------------------------------------------------------------------------------


def test_the_worked_example_of_two_samples() -> None:
    """Both patterns of signs, with p = -g: their mean is exactly the blocks, each has the other layers' part in it."""
    problem = Quadratic()
    optimizer = CurvatureSGD(problem.named, lr=0.0, momentum=0.0, interval=1, beta=0.0, floor=1e-30, negative="floor")
    g1, g2 = H[:2] @ torch.tensor([1, 2, -1.0]).double(), H[2:] @ torch.tensor([1, 2, -1.0]).double()
    assert torch.cat([g1, g2]).tolist() == pytest.approx([5.5, 6.8, -0.1])
    blocks = (g1 @ H[:2, :2] @ g1).item(), (g2 @ H[2:, 2:] @ g2).item()
    assert blocks == pytest.approx((334.52, 0.01))
    cross = (g1 @ H[:2, 2:] @ g2).item()
    # With one h for all layers the samples would be (334.109, -.401) and (334.931, .421).
    assert blocks[0] + cross == pytest.approx(334.109)
    assert blocks[1] - cross == pytest.approx(0.421)
    moves = 5**0.5 / g1.norm().item(), 1 / g2.norm().item()  # in proportion to the norms of w
    found: dict[float, tuple[float, float]] = {}
    while len(found) < 2:
        product = signs(0, optimizer.param_groups[0].get("step", 0), ["one/0", "two/0"]).prod().item()
        optimizer.step(closure_of(optimizer, problem.backward))
        numbers = tuple(optimizer.state[p]["curvature"].item() for _, p in problem.named)
        assert numbers[0] == pytest.approx(blocks[0] + product * moves[1] / moves[0] * cross, rel=1e-9)
        assert numbers[1] == pytest.approx(blocks[1] + product * moves[0] / moves[1] * cross, rel=1e-6)
        found[product] = numbers
    means = [sum(pair) / 2 for pair in zip(*found.values(), strict=True)]
    assert means == pytest.approx(list(blocks), rel=1e-9)
    assert (g1 @ g1).item() / means[0] == pytest.approx(0.228656, rel=1e-5)
    assert (g2 @ g2).item() / means[1] == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_blocks_of_a_quadratic_are_recovered(dtype: torch.dtype) -> None:
    """200 samples at one point: within 1 % of the step sizes that the blocks have."""
    generator = torch.Generator().manual_seed(3)
    sizes = {"large": 12, "small": 5, "tiny": 3}
    total = sum(sizes.values())
    root = torch.randn(total, total, generator=generator, dtype=torch.float64)
    hessian = root @ root.T / total + torch.diag(torch.linspace(0.5, 20, total, dtype=torch.float64))
    layers = {
        name: torch.nn.Parameter(torch.randn(size, generator=generator, dtype=dtype)) for name, size in sizes.items()
    }

    def backward() -> Tensor:
        w = torch.cat(list(layers.values()))
        loss = 0.5 * w @ hessian.to(dtype) @ w
        loss.backward()
        return loss

    optimizer = CurvatureSGD(layers.items(), lr=0.0, momentum=0.0, interval=1, beta=0.999)
    for _ in range(200):
        optimizer.step(closure_of(optimizer, backward))
    begin = 0
    for name, w in layers.items():
        g, block = w.grad.double(), hessian[begin : begin + len(w), begin : begin + len(w)]  # type: ignore[union-attr]
        begin += len(w)
        assert optimizer.trust_ratios()[name] == pytest.approx((g @ g / (g @ block @ g)).item(), rel=0.01)


OPTIONS: dict[str, dict[str, Any]] = {
    "curvature_sgd": {"lr": 0.3, "momentum": 0.5, "weight_decay": 0.1},
    "curvature_adamw": {"lr": 0.5, "weight_decay": 0.2, "cap": 0.5, "betas": (0.8, 0.9)},
}


@both_kinds
@pytest.mark.parametrize("changes", [{}, {"negative": "floor", "floor": 0.5}, {"adapt": None, "beta": 0.0, "seed": 5}])
@pytest.mark.parametrize("how", ["closure", "context"])
def test_equals_the_reference(kind: str, changes: dict[str, Any], how: str) -> None:
    problem, options = Quadratic(), {**OPTIONS[kind], **changes}
    optimizer = KINDS[kind](problem.named, interval=2, **options)
    seed = options.pop("seed", 0)
    reference = CurvatureReference(
        kind, problem.values(), dict.fromkeys(("one", "two"), options), interval=2, seed=seed
    )

    def gradient(step: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        g = H @ torch.cat([weights["one"], weights["two"]])
        return {"one": g[:2], "two": g[2:]}

    for step in range(7):
        if how == "closure":
            optimizer.step(closure_of(optimizer, problem.backward))
        else:
            assert sampled_step(optimizer, problem.backward) == (step % 2 == 0)
        (expected,) = reference.train(gradient, step, step + 1)
        assert optimizer.trust_ratios() == pytest.approx(expected, rel=1e-6)
    for name, p in problem.named:
        torch.testing.assert_close(p.detach(), reference.weights[name], rtol=1e-7, atol=1e-9)


@both_kinds
def test_maximizing_is_minimising_the_other_sign(kind: str) -> None:
    ends = []
    for sign in (1, -1):
        problem = Quadratic()
        optimizer = KINDS[kind](problem.named, interval=1, maximize=sign < 0, **OPTIONS[kind])
        for _ in range(3):
            sampled_step(optimizer, lambda problem=problem, sign=sign: (sign * problem.loss()).backward())  # type: ignore[misc]
        ends.append(problem.values())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_ratio_before_the_first_sample_is_one_or_the_cap() -> None:
    for cap, ratio in ((1.0, 1.0), (0.25, 0.25), (3.0, 1.0)):
        problem = Quadratic()
        optimizer = CurvatureSGD(problem.named, lr=0.1, cap=cap, interval=None)
        problem.backward()
        optimizer.step()
        assert set(optimizer.trust_ratios().values()) == {ratio}


def test_negative_curvature_counts_by_its_size_or_as_the_floor() -> None:
    for negative, ratio in (("absolute", 0.5), ("floor", 7.0)):
        w = torch.nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
        optimizer = CurvatureSGD([w], lr=0.0, momentum=0.0, negative=negative, cap=7.0)
        optimizer.step(closure_of(optimizer, lambda w=w: (-w.square()).sum().backward()))  # type: ignore[misc]
        assert optimizer.trust_ratios() == pytest.approx({"0.0": ratio})


def test_signs_are_fair_independent_and_fixed() -> None:
    drawn = torch.stack([signs(0, number, ("a/0", "b/0", "c/0")) for number in range(2000)])
    assert drawn.abs().eq(1).all()
    assert drawn.mean(dim=0).abs().max() < 0.08
    products = drawn[:, 0] * drawn[:, 1], drawn[:, 1] * drawn[:, 2], drawn[:-1, 0] * drawn[1:, 0]
    assert max(product.mean().abs().item() for product in products) < 0.08
    assert signs(7, 3, ("a/0", "b/0", "c/0", "d/0")).tolist() == [-1, 1, -1, -1]
    assert not torch.equal(drawn, torch.stack([signs(1, number, ("a/0", "b/0", "c/0")) for number in range(2000)]))


# Samples ------------------------------------------------------------------------------------------------------------


def test_weights_and_gradients_come_back_to_the_bit() -> None:
    problem = Quadratic(torch.float32)
    optimizer = CurvatureSGD(problem.named, lr=0.1)
    assert optimizer.wants_curvature()
    problem.backward()
    before, gradients = problem.values(), [p.grad.clone() for _, p in problem.named]  # type: ignore[union-attr]
    with optimizer.curvature():
        moved = problem.values()
        assert all(p.grad is None for _, p in problem.named)
        problem.backward()
    for name, w in before.items():
        change = (moved[name] - w).norm() / w.norm()
        assert change.item() == pytest.approx(0.01, rel=1e-3)
        assert torch.equal(problem.values()[name], w)
    assert all(torch.equal(p.grad, g) for (_, p), g in zip(problem.named, gradients, strict=True))  # type: ignore[arg-type]


def test_an_exception_in_the_second_pass_restores_everything() -> None:
    problem = Quadratic()
    optimizer = CurvatureSGD(problem.named, lr=0.1)
    optimizer.wants_curvature()
    problem.backward()
    before, gradient = problem.values(), problem.one.grad.clone()  # type: ignore[union-attr]
    with pytest.raises(KeyError), optimizer.curvature():
        raise KeyError("out of data")
    assert torch.equal(problem.values()["one"], before["one"])
    assert torch.equal(problem.one.grad, gradient)  # type: ignore[arg-type]
    assert optimizer.wants_curvature()


def test_samples_are_due_every_interval_steps_and_never_without_one() -> None:
    for interval, due in ((1, [0, 1, 2, 3, 4]), (3, [0, 3]), (None, [])):
        problem = Quadratic()
        optimizer = CurvatureSGD(problem.named, lr=0.01, interval=interval)
        assert [step for step in range(5) if sampled_step(optimizer, problem.backward)] == due


def test_a_sample_that_was_wanted_and_not_taken_is_wanted_again() -> None:
    problem = Quadratic()
    optimizer = CurvatureSGD(problem.named, lr=0.01, interval=10)
    assert optimizer.wants_curvature()
    problem.backward()
    with pytest.warns(UserWarning, match="without the sample of the curvature that was due"):
        optimizer.step()
    assert sampled_step(optimizer, problem.backward)
    assert not optimizer.wants_curvature()


def test_a_sample_that_overflows_is_taken_again_when_the_step_is() -> None:
    """As torch's GradScaler leaves out a step, and makes the scale smaller."""
    problem = Quadratic()
    optimizer = CurvatureSGD(problem.named, lr=0.01, interval=10)
    for scale in (float("inf"), 2.0):
        optimizer.zero_grad()
        assert optimizer.wants_curvature()
        (scale * problem.loss()).backward()
        with optimizer.curvature(loss_scale=scale):
            (scale * problem.loss()).backward()
    assert optimizer.state[problem.one]["samples"] == 1
    assert not optimizer.wants_curvature()


def test_a_loop_that_never_samples_is_told_once() -> None:
    problem = Quadratic()
    optimizer = CurvatureSGD(problem.named, lr=0.01, interval=1)
    problem.backward()
    with pytest.warns(UserWarning, match=r"give step\(\) a closure, or ask wants_curvature"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["first", "second"])
def test_what_is_not_finite_does_not_enter_the_averages(bad: float, where: str) -> None:
    problem = Quadratic()
    optimizer = CurvatureSGD(problem.named, lr=0.0, interval=1)
    sampled_step(optimizer, problem.backward)
    before = copy.deepcopy(optimizer.state[problem.one]), optimizer.state[problem.two]["samples"].clone()
    optimizer.zero_grad()
    optimizer.wants_curvature()
    problem.backward()
    weights = problem.values()
    if where == "first":
        problem.one.grad[0] = bad  # type: ignore[index]
    with optimizer.curvature():
        assert problem.one.isfinite().all()
        problem.backward()
        if where == "second":
            problem.one.grad[0] = bad  # type: ignore[index]
    assert all(
        torch.equal(optimizer.state[problem.one][key], before[0][key]) for key in ("descent", "curvature", "samples")
    )
    assert optimizer.state[problem.two]["samples"] == before[1] + 1
    assert torch.equal(problem.one, weights["one"])


def test_layers_without_gradient_are_neither_moved_nor_measured() -> None:
    problem = Quadratic()
    unused, zero, frozen = (torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64)) for _ in range(3))
    frozen.requires_grad_(False)
    named = [*problem.named, ("unused", unused), ("zero", zero), ("frozen", frozen)]
    optimizer = CurvatureSGD(named, lr=0.1, interval=1)
    optimizer.wants_curvature()
    problem.backward()
    zero.grad = torch.zeros_like(zero)
    with optimizer.curvature():
        assert all(torch.equal(p, torch.ones_like(p)) for p in (unused, zero, frozen))
        assert not torch.equal(problem.one.detach(), torch.tensor([1.0, 2.0]).double())
        problem.backward()
    optimizer.step()
    assert unused.grad is None
    assert torch.equal(zero.grad, torch.zeros_like(zero))
    assert optimizer.state[zero].get("samples", 0) == 0
    assert optimizer.state[problem.one]["samples"] == 1


def test_a_loss_scale_that_is_still_in_the_gradients() -> None:
    ratios = []
    for scale in (1.0, 1024.0):
        problem = Quadratic()
        optimizer = CurvatureSGD(problem.named, lr=0.1, momentum=0.0)
        optimizer.wants_curvature()
        (scale * problem.loss()).backward()
        with optimizer.curvature(loss_scale=scale):
            (scale * problem.loss()).backward()
        assert problem.one.grad[0] == 5.5 * scale  # type: ignore[index]
        for _, p in problem.named:
            p.grad /= scale
        optimizer.step()
        ratios.append(optimizer.trust_ratios())
    assert ratios[1] == pytest.approx(ratios[0], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_come_back_and_are_measured(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.randn(64, 32, generator=generator).to(dtype))
    optimizer = CurvatureSGD([("w", w)], lr=0.0, momentum=0.0, interval=1)
    before = w.detach().clone()
    for _ in range(4):
        optimizer.step(closure_of(optimizer, lambda: (0.25 * w.float().square()).sum().backward()))  # type: ignore[arg-type,return-value]
    assert torch.equal(w.detach(), before)
    assert optimizer.trust_ratios()["w"] == pytest.approx(min(1.0, 2.0))
    assert (optimizer.state[w]["descent"] / optimizer.state[w]["curvature"]).item() == pytest.approx(2.0, rel=0.05)


def test_dropout_is_the_same_in_both_passes() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(torch.randn(200, generator=generator, dtype=torch.float64))
    optimizer = CurvatureSGD([("w", w)], lr=0.0, momentum=0.0, interval=1, beta=0.0)
    torch.manual_seed(1)
    optimizer.step(
        closure_of(optimizer, lambda: torch.nn.functional.dropout(w.square(), 0.5).sum().backward())  # type: ignore[arg-type,return-value]
    )
    assert optimizer.trust_ratios()["w"] == pytest.approx(0.25)  # every element that is left has the curvature 4
    after = torch.get_rng_state()
    torch.manual_seed(1)
    torch.nn.functional.dropout(w.square(), 0.5)
    assert torch.equal(torch.get_rng_state(), after)  # and the run goes on with the numbers of one pass


def test_other_random_numbers_in_the_second_pass_are_refused() -> None:
    w = torch.nn.Parameter(torch.randn(200, dtype=torch.float64))
    optimizer = CurvatureSGD([("w", w)], lr=0.1, interval=1)
    before = w.detach().clone()
    torch.nn.functional.dropout(w.square(), 0.5).sum().backward()
    assert optimizer.wants_curvature()  # too late
    with pytest.raises(RuntimeError, match="drew different random numbers"), optimizer.curvature():
        torch.nn.functional.dropout(w.square(), 0.5).sum().backward()
    assert torch.equal(w.detach(), before)
    assert optimizer.state[w].get("samples", 0) == 0


def test_random_numbers_again() -> None:
    numbers = RandomNumbers()
    drawn = torch.rand(3)
    with numbers.again():
        assert torch.equal(torch.rand(3), drawn)
    after = torch.rand(3)
    assert not torch.equal(after, drawn)


def test_clipping_in_the_closure_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.rand(50, generator=generator, dtype=torch.float64)
    w = torch.nn.Parameter(torch.randn(50, generator=generator, dtype=torch.float64))
    optimizer = CurvatureSGD([("w", w)], lr=0.1, interval=1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (scales * w.square()).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([w], 0.5)
        return loss

    optimizer.step(closure)
    with pytest.raises(RuntimeError, match="leave clipping out of the closure"):
        optimizer.step(closure)


def test_a_loss_without_curvature_is_not_taken_for_clipped() -> None:
    w, other = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(5))
    optimizer = CurvatureSGD([("w", w), ("other", other)], lr=0.1, interval=1, cap=3.0)
    for _ in range(3):
        optimizer.step(closure_of(optimizer, lambda: (w + other.square()).sum().backward()))  # type: ignore[arg-type,return-value]
    assert optimizer.trust_ratios()["w"] == 3.0


def test_misuse_is_refused() -> None:
    problem = Quadratic()
    optimizer = CurvatureSGD(problem.named, lr=0.1)
    with pytest.raises(RuntimeError, match=r"call wants_curvature\(\) before the first pass"), optimizer.curvature():
        pass
    optimizer.wants_curvature()
    problem.backward()
    before = problem.values()
    with optimizer.curvature():
        for call in (optimizer.step, optimizer.state_dict, optimizer.wants_curvature):
            with pytest.raises(RuntimeError, match=r"moved for a sample|inside curvature"):
                call()
        problem.backward()
    assert torch.equal(problem.values()["one"], before["one"])
    optimizer.step()


def test_a_move_that_the_dtype_cannot_hold_is_refused() -> None:
    w = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = CurvatureSGD([("w", w)], lr=0.1, perturbation=1e-3)
    w.sum().backward()
    with pytest.raises(ValueError, match=r"perturbation=0\.001 moves the weights of w by less than torch\.bfloat16"):
        optimizer.step()


def test_interval_and_seed_are_the_same_in_all_groups() -> None:
    one, two = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    with pytest.raises(ValueError, match=r"every group must have the same interval, got 3\.0 in one"):
        CurvatureSGD([{"params": [one]}, {"params": [two], "interval": 3}], lr=0.1)


@both_kinds
def test_a_resumed_run_goes_on_bit_for_bit(kind: str) -> None:
    def made() -> tuple[Quadratic, Any]:
        problem = Quadratic(torch.float32)
        return problem, KINDS[kind](problem.named, interval=2, **OPTIONS[kind])

    problem, optimizer = made()
    for _ in range(9):
        sampled_step(optimizer, problem.backward)
    expected, ratios = problem.values(), optimizer.trust_ratios()
    problem, optimizer = made()
    for _ in range(5):
        sampled_step(optimizer, problem.backward)
    saved, weights = copy.deepcopy(optimizer.state_dict()), problem.values()
    problem, optimizer = made()
    with torch.no_grad():
        for name, p in problem.named:
            p.copy_(weights[name])
    optimizer.load_state_dict(saved)
    for _ in range(4):
        sampled_step(optimizer, problem.backward)
    assert all(torch.equal(problem.values()[name], w) for name, w in expected.items())
    assert optimizer.trust_ratios() == ratios


def test_a_layer_of_zeros_is_moved_and_measured() -> None:
    """Biases begin at zero, where 1 % of their norm is nothing."""
    w = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = CurvatureSGD([("w", w)], lr=0.0, momentum=0.0)
    optimizer.wants_curvature()
    (w - 1).square().sum().backward()
    with optimizer.curvature():
        assert w.detach().square().mean().sqrt().item() == pytest.approx(1e-4)
        (w - 1).square().sum().backward()
    optimizer.step()
    assert optimizer.trust_ratios()["w"] == pytest.approx(0.5)
