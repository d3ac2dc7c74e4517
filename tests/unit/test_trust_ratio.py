"""TrustRatio on one process: equal to what it generalises, around every kind of base; files, copies, errors."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, TrustRatio

from ..base_optimizers import BASES, AdaBelief, Lion, SophiaLike, create
from ..reference import REFERENCES, relative_error

Named = list[tuple[str, torch.nn.Parameter]]

TORCHS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "Adam": (torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True}),
    "NAdam": (torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "RAdam": (torch.optim.RAdam, {"weight_decay": 0.1}),
    "Adamax": (torch.optim.Adamax, {}),
    "Adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    "Adadelta": (torch.optim.Adadelta, {"rho": 0.8}),
    "RMSprop": (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    "maximizing": (torch.optim.AdamW, {"maximize": True}),
    "foreach": (torch.optim.AdamW, {"foreach": True}),
    "fused": (torch.optim.AdamW, {"fused": True}),
    "Rprop": (torch.optim.Rprop, {}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "Lion": (Lion, {"weight_decay": 0.1}),
    "SophiaLike": (SophiaLike, {}),
    "AdaBelief": (AdaBelief, {"weight_decay": 0.1}),
}


def parameters(dtype: torch.dtype = torch.float32) -> Named:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (13, 7), "conv": (3, 2, 5), "bias": (6,), "scalar": ()}
    return [(name, torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype))) for name, s in shapes.items()]


def gradients(step: int, named: Named) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 + step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in named}


def train(optimizer: Any, named: Named, steps: Any = range(5), scale: float = 1.0) -> None:
    for step in steps:
        for (_, p), g in zip(named, gradients(step, named).values(), strict=True):
            p.grad = (scale * g).to(p.dtype)
        optimizer.step()


def values(named: Named) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in named}


def assert_same(one: Named, other: Named) -> None:
    for name, weights in values(other).items():
        assert torch.equal(dict(one)[name], weights), name


# The formula --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-5])
@pytest.mark.parametrize("name", BASES)
def test_it_equals_its_reference_whatever_the_size_of_the_gradients(name: str, scale: float) -> None:
    """At 1e-5 most digits of SGD's w - w_after are lost at its own rate."""
    options = {"lr": 0.2, "weight_decay": 0.1 * scale, "adapt": True}
    named = parameters()
    before = values(named)
    train(optimizer := create(name, named, **options), named, scale=scale)
    for layer, initial in before.items():
        w, state, ratio = initial.double(), {}, 1.0
        for step in range(5):
            w, ratio = REFERENCES[name](w, scale * gradients(step, named)[layer].double(), state, **options)
        assert relative_error(dict(named)[layer].detach(), w, initial) < 2e-6
        assert optimizer.trust_ratios()[layer] == pytest.approx(ratio, rel=2e-6)


def test_around_adamw_it_is_lamb() -> None:
    options = {"lr": 0.02, "eps": 1e-6, "weight_decay": 0.1, "trust_bounds": (0.05, 0.4), "adapt": True}
    lamb, ours = parameters(), parameters()
    before = values(lamb)
    train(one := LAMB(lamb, **options), lamb)
    train(other := TrustRatio(torch.optim.AdamW, ours, **options), ours)
    for name, weights in values(lamb).items():
        assert relative_error(dict(ours)[name].detach(), weights, before[name]) < 1e-6
    assert other.trust_ratios() == pytest.approx(one.trust_ratios(), rel=1e-6)
    assert other.adapted_layers() == one.adapted_layers()


class Larc:
    """What apex's LARC around SGD does: gradient and decay are scaled, by at most 1 / lr, before the momentum."""

    def __init__(self, named: Named, lr: float, coefficient: float, decay: float, momentum: float, *, clip: bool):
        self.named, self.lr, self.coefficient, self.decay, self.momentum = named, lr, coefficient, decay, momentum
        self.clip = clip
        self.buffers: dict[str, torch.Tensor] = {}

    def step(self) -> None:
        for name, p in self.named:
            ratio = self.coefficient * p.norm() / (p.grad.norm() + self.decay * p.norm())
            ratio = min(ratio / self.lr, 1.0) if self.clip else ratio
            d = ratio * (p.grad + self.decay * p)
            self.buffers[name] = d if name not in self.buffers else self.momentum * self.buffers[name] + d
            p.data -= self.lr * self.buffers[name]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("momentum", "decay", "is_same"), [(0.0, 0.0, True), (0.9, 0.0, False), (0.0, 0.1, False)])
def test_what_larc_has_in_common(momentum: float, decay: float, is_same: bool, clip: bool) -> None:
    """The coefficient is a factor of lr. LARC's ratio is inside the momentum, and its norm is ‖g‖ + λ‖w‖."""
    theirs, ours = parameters(torch.float64), parameters(torch.float64)
    lr, coefficient = 0.018, 0.02
    rate: dict[str, Any] = {"lr": lr * coefficient}
    if clip:
        rate = {"lr": coefficient, "trust_bounds": (0.0, lr / coefficient)}
    optimizer = TrustRatio(torch.optim.SGD, ours, **rate, momentum=momentum, weight_decay=decay, adapt=True)
    train(Larc(theirs, lr, coefficient, decay, momentum, clip=clip), theirs)
    train(optimizer, ours)
    differences = [(dict(ours)[name] - p).norm() / p.norm() for name, p in theirs]
    assert (max(differences) < 1e-12) == is_same
    if clip and is_same:
        assert 0.9 in {round(ratio, 6) for ratio in optimizer.trust_ratios().values()}


# Bases --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TORCHS)
def test_without_a_ratio_it_is_the_base(name: str) -> None:
    base_class, options = TORCHS[name]
    plain, ours = parameters(), parameters()
    before = values(plain)
    train(base := base_class([p for _, p in plain], lr=0.1, **options), plain)
    train(optimizer := TrustRatio(base_class, ours, lr=0.1, adapt=False, **options), ours)
    for key, weights in values(plain).items():
        assert relative_error(dict(ours)[key].detach(), weights, before[key]) < 2e-6
    assert optimizer.state_dict()["state"].keys() == base.state_dict()["state"].keys()
    kept = [set(state) for state in optimizer.state_dict()["state"].values()]
    assert kept == [set(state) for state in base.state_dict()["state"].values()]


@pytest.mark.parametrize("name", TORCHS)
def test_a_ratio_scales_the_bases_own_step(name: str) -> None:
    """One step: every adapted layer moves by lr·‖w‖, in the base's direction."""
    base_class, options = TORCHS[name]
    plain, ours = parameters(torch.float64), parameters(torch.float64)
    before = values(plain)
    train(base_class([p for _, p in plain], lr=0.01, **options), plain, range(1))
    train(TrustRatio(base_class, ours, lr=0.01, adapt=True, **options), ours, range(1))
    for key, w in before.items():
        u, moved = w - dict(plain)[key], w - dict(ours)[key]
        torch.testing.assert_close(moved, 0.01 * w.norm() / u.norm() * u, rtol=1e-6, atol=1e-8)


def test_whole_layers_may_have_a_base_that_is_not_element_wise() -> None:
    named = [(name, p) for name, p in parameters() if p.dim() == 2]
    before = values(named)
    train(TrustRatio(torch.optim.Muon, named, lr=0.01), named, range(1))
    moved = (before["matrix"] - dict(named)["matrix"]).norm().item()
    assert moved == pytest.approx(0.01 * before["matrix"].norm().item(), rel=1e-5)


def test_a_base_may_evaluate_again() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 1)
    x = torch.randn(32, 6)
    optimizer = TrustRatio(torch.optim.LBFGS, model.named_parameters(), lr=0.5, max_iter=3, adapt=False)
    evaluations = 0

    def closure() -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(6)]
    assert 6 < evaluations <= 6 * 4
    assert losses[-1] < 0.05 * losses[0]
    with pytest.raises(TypeError, match="closure"):
        optimizer.step()


def test_a_closure_is_evaluated_once_and_known_to_the_base() -> None:
    class WithLoss(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append(closure())
            return super().step()

    seen: list[Any] = []
    named = parameters()
    optimizer = TrustRatio(WithLoss, named, lr=0.1)
    for _, p in named:
        p.grad = torch.ones_like(p)
    evaluations: list[int] = []
    assert optimizer.step(lambda: evaluations.append(1) or 3.0) == 3.0
    assert (seen[-1], evaluations) == (3.0, [1])  # those before are of the trial


def test_a_group_key_step_of_the_base_survives() -> None:
    named = parameters()
    train(optimizer := TrustRatio(SophiaLike, named, lr=0.01), named, range(3))
    assert [group["step"] for group in optimizer.param_groups] == [3]
    train(adamw := TrustRatio(torch.optim.AdamW, named, lr=0.01), named, range(3))
    assert "step" not in adamw.param_groups[0]


def test_what_a_base_writes_into_its_groups_stays() -> None:
    """Tensors too, and a rate that it does not want to be 0 when it is made."""

    class Writing(torch.optim.SGD):
        def __init__(self, params: Any, lr: float = 0.1, factor: Any = None):
            if lr <= 0:
                raise ValueError("lr must be positive")
            super().__init__(params, lr=lr)
            for group in self.param_groups:
                group["factor"] = torch.tensor(1.0) if factor is None else factor

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["factor"].add_(1.0)
            return super().step()

    named = parameters()
    factor = torch.tensor(5.0)
    optimizer = TrustRatio(Writing, named, lr=0.01, factor=factor)
    optimizer.param_groups[0]["lr"] = 0.0
    train(optimizer, named, range(3))
    assert optimizer.param_groups[0]["factor"] is factor
    assert factor == 8.0


def test_an_option_that_a_base_keeps_to_itself() -> None:
    class Ascending(torch.optim.SGD):
        def __init__(self, params: Any, lr: float = 0.1, maximize: bool = False):
            super().__init__(params, lr=lr, maximize=maximize)
            self.sign = -1.0 if maximize else 1.0
            del self.defaults["maximize"]
            for group in self.param_groups:
                del group["maximize"]

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * self.sign * p.grad)

    one, other = parameters(), parameters()
    optimizer = TrustRatio(Ascending, one, lr=0.1, maximize=True)
    assert optimizer.param_groups[0]["maximize"] is True
    optimizer = copy_of(optimizer, one)
    train(optimizer, one, range(2))
    train(TrustRatio(torch.optim.SGD, other, lr=0.1, maximize=True), other, range(2))
    for name, weights in values(other).items():
        torch.testing.assert_close(dict(one)[name].detach(), weights)


def copy_of(optimizer: Any, named: Named) -> Any:
    """A copy, whose parameters take the others' places."""
    copied = copy.deepcopy(optimizer)
    named[:] = [(name, p) for (name, _), p in zip(named, copied.param_groups[0]["params"], strict=True)]
    return copied


def test_a_base_that_keeps_state_of_the_whole() -> None:
    class Counting(torch.optim.SGD):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            self.state["steps"] = [0]

        def step(self, closure: Any = None) -> Any:
            self.state["steps"][0] += 1
            return super().step()

    named = parameters()
    train(optimizer := TrustRatio(Counting, named, lr=0.01), named, range(3))
    assert optimizer.state["steps"] == [3]


def test_state_that_a_base_makes_when_it_is_constructed() -> None:
    """Older torch's Adagrad did; wrappers put other tensors into the groups afterwards."""

    class Early(torch.optim.SGD):
        def __init__(self, params: Any, lr: float = 0.1, start: float = 2.0):
            super().__init__(params, lr=lr)
            self.start = start
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["scale"] = torch.full_like(p, start)

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad * self.state[p]["scale"])

    named = parameters()
    optimizer = TrustRatio(Early, named[:3], lr=0.1, adapt=False, start=3.0)
    optimizer.add_param_group({"params": named[3:]})
    before = values(named)
    train(optimizer, named, range(1))
    for name, g in gradients(0, named).items():
        torch.testing.assert_close(dict(named)[name].detach(), before[name] - 0.3 * g)


# Edges --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_class", [torch.optim.AdamW, torch.optim.Adafactor])
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_nothing_moves_at_rate_zero(base_class: type[torch.optim.Optimizer], lr: Any) -> None:
    named = parameters()
    before = values(named)
    options = {"foreach": False} if isinstance(lr, torch.Tensor) else {}
    train(TrustRatio(base_class, named, lr=lr, weight_decay=0.1, **options), named)
    assert all(torch.equal(before[name], p) for name, p in named)


def test_a_tensor_rate_is_read_in_every_step() -> None:
    one, other = parameters(), parameters()
    rate = torch.tensor(0.01)
    tensor = TrustRatio(torch.optim.AdamW, one, lr=rate, foreach=False)
    number = TrustRatio(torch.optim.AdamW, other, lr=0.01, foreach=False)
    for step, lr in enumerate((0.01, 0.05, 0.02)):
        rate.fill_(lr)
        number.param_groups[0]["lr"] = lr
        train(tensor, one, [step])
        train(number, other, [step])
    assert tensor.param_groups[0]["lr"] is rate
    for name, weights in values(other).items():
        torch.testing.assert_close(dict(one)[name].detach(), weights, rtol=1e-6, atol=1e-7)


def test_layers_without_gradient_or_norm() -> None:
    named = parameters()
    with torch.no_grad():
        named[1][1].zero_()
    before = values(named)
    optimizer = TrustRatio(torch.optim.AdamW, named, lr=0.01, weight_decay=0.1, adapt=True)
    for name, p in named:
        p.grad = None if name == "bias" else torch.zeros_like(p) if name == "scalar" else torch.ones_like(p)
    optimizer.step()
    assert torch.equal(named[2][1], before["bias"])
    assert torch.equal(named[3][1], before["scalar"])
    assert optimizer.trust_ratios()["conv"] == 1.0
    assert named[2][1] not in optimizer.state or not optimizer.state[named[2][1]]


def test_steps_of_zeros_before_the_first_gradient_are_not_counted() -> None:
    one, other = parameters(), parameters()
    late, plain = (TrustRatio(SophiaLike, named, lr=0.01) for named in (one, other))
    for _ in range(2):
        for _, p in one:
            p.grad = torch.zeros_like(p)
        late.step()
    assert set(late.state[one[0][1]]) == {"exp_avg", "hessian"}  # made, as some wrappers want
    train(late, one)
    train(plain, other)
    assert_same(one, other)


def test_an_error_of_the_base_leaves_the_weights() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step()
            if len(self.param_groups[0]["params"]) == 4:
                raise RuntimeError("no more")

    named = parameters()
    before = values(named)
    with pytest.raises(RuntimeError, match="no more"):
        train(optimizer := TrustRatio(Failing, named, lr=0.1), named, range(1))
    assert all(torch.equal(before[name], p) for name, p in named)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_large_channels_last_and_strided_layers() -> None:
    """Proposals change places piece by piece, in whatever order elements lie."""
    generator = torch.Generator().manual_seed(0)
    plain = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((2049, 2100), (8, 4, 3, 3))]
    lying = [torch.nn.Parameter(p.detach().clone()) for p in plain]
    lying[1].data = lying[1].data.to(memory_format=torch.channels_last)
    lying[0].data = lying[0].data.t().contiguous().t()
    for members in (plain, lying):
        optimizer = TrustRatio(torch.optim.AdamW, members, lr=0.01)
        for p in members:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        optimizer.step()
    for one, other in zip(plain, lying, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_bf16_weights_lose_no_step_of_the_base() -> None:
    """The direction is rounded to bf16, element by element, but none is lost; the weights are rounded when written."""
    ratios = []
    for dtype in (torch.bfloat16, torch.float32):
        named = [(name, torch.nn.Parameter(p.detach().bfloat16().to(dtype))) for name, p in parameters()]
        optimizer = TrustRatio(torch.optim.AdamW, named, lr=1e-4)
        is_rounded = dtype == torch.bfloat16
        with pytest.warns(UserWarning, match="did not move") if is_rounded else nullcontext():
            train(optimizer, named, range(1))
        ratios.append(optimizer.trust_ratios())
    assert ratios[0] == pytest.approx(ratios[1], rel=2e-3)


def test_segments_have_ratios_of_their_own() -> None:
    whole = torch.nn.Parameter(torch.randn(12, 5, generator=torch.Generator().manual_seed(0)))
    parts = [torch.nn.Parameter(part.clone()) for part in whole.detach().chunk(3)]
    one = TrustRatio(torch.optim.AdamW, [("qkv", whole)], lr=0.1, segments=3)
    other = TrustRatio(torch.optim.AdamW, parts, lr=0.1)
    whole.grad = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    for part, g in zip(parts, whole.grad.chunk(3), strict=True):
        part.grad = g.clone()
    one.step()
    other.step()
    torch.testing.assert_close(whole, torch.cat(parts))
    assert list(one.trust_ratios()) == ["qkv[0]", "qkv[1]", "qkv[2]"]


# Files and copies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_it_goes_on_from_a_file_or_copy(name: str, way: str) -> None:
    straight = parameters()
    optimizer: Any = create(name, straight, lr=0.01)
    train(optimizer, straight, range(3))
    if way == "state_dict":
        resumed = [(n, torch.nn.Parameter(p.detach().clone())) for n, p in straight]
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other: Any = create(name, resumed, lr=0.5)
        other.load_state_dict(torch.load(file))
    else:
        copied = copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        resumed, other = [(n, p) for (n, _), p in zip(straight, copied.param_groups[0]["params"], strict=True)], copied
    train(optimizer, straight, range(3, 6))
    train(other, resumed, range(3, 6))
    assert_same(resumed, straight)
    assert other.base is not optimizer.base
    assert other.trust_ratios() == optimizer.trust_ratios() or way != "state_dict"


def test_a_running_job_changes_to_it_and_back() -> None:
    """The moments stay, and so do the own options where the file has none."""
    named = parameters()
    train(plain := torch.optim.AdamW([p for _, p in named], lr=0.01), named, range(3))
    optimizer = TrustRatio(torch.optim.AdamW, named, lr=0.5, trust_bounds=(0.0, 2.0), adapt=False)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["trust_bounds"] == (0.0, 2.0)
    assert optimizer.param_groups[0]["adapt"] is False
    assert optimizer.param_groups[0]["lr"] == 0.01
    twin = [(n, torch.nn.Parameter(p.detach().clone())) for n, p in named]
    back = torch.optim.AdamW([p for _, p in twin], lr=0.5)
    back.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(back, twin, range(3, 6))
    train(optimizer, named, range(3, 6))
    for name, weights in values(twin).items():
        torch.testing.assert_close(dict(named)[name].detach(), weights, rtol=1e-6, atol=1e-7)


def test_groups_schedulers_and_added_groups() -> None:
    named = parameters()
    groups = [{"params": named[:2], "weight_decay": 0.3}, {"params": iter([named[2]]), "adapt": True, "lr": 0.2}]
    optimizer = TrustRatio(torch.optim.AdamW, groups, lr=0.1, betas=(0.8, 0.9))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(optimizer, named[:3], range(1))
    scheduler.step()
    optimizer.add_param_group({"params": [named[3]], "weight_decay": 0.0})
    train(optimizer, named, range(1, 3))
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1, 0.1]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.01, 0.0]
    assert len(optimizer.state) == 4
    assert optimizer.base.param_groups is optimizer.param_groups
    assert list(optimizer.trust_ratios()) == ["matrix", "conv", "bias", "scalar"]


def test_repr_names_the_base() -> None:
    assert repr(TrustRatio(torch.optim.AdamW, parameters(), lr=0.1)).startswith("TrustRatio(AdamW) (")
