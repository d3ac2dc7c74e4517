"""docs/coming-from.md: each call there takes the steps of the package that it replaces, in float64.

The references are written from the packages' published formulas; timm and torch are run themselves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, LARS, StableAdamW, TrustRatio

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "coming-from.md").read_text()
RATES = (0.1, 0.04, 0.2, 0.15)
MOMENTUM, DECAY = 0.9, 0.3
BETA1, BETA2 = 0.9, 0.999

BY_GROUP = (
    {"conv": (2, 3, 2), "dense": (4, 3), "zeros": (3, 3), "bias of a decayed group": (5,)},
    {"classifier": (3, 4), "bias": (4,)},
)
BY_DIMENSIONS = ({"conv": (2, 3, 2), "dense": (4, 3), "zeros": (3, 3)}, {"scale": (5,), "bias": (4,)})
"""Shapes of the decayed layers and of the others. Who goes by weight decay is tried with any number of dimensions."""


def start(shapes: tuple[dict[str, tuple[int, ...]], ...]) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Initial weights, and gradients by step and layer. One layer is zero at first; none of the gradients is."""
    generator = torch.Generator().manual_seed(7)
    named = [(name, shape) for group in shapes for name, shape in group.items()]

    def numbers(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = [numbers(shape) * (name != "zeros") for name, shape in named]
    return weights, [[numbers(shape) for _, shape in named] for _ in RATES]


def code_under(heading: str) -> str:
    """The block of code in the page's section."""
    section = re.search(rf"^### {re.escape(heading)}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section is not None, f"no section {heading}"
    (code,) = re.findall(r"```python\n(.*?)```", section[1], re.DOTALL)
    return code


def train_with(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    gradients: list[list[torch.Tensor]],
    factor: Callable[[int], float] = lambda step: 1.0,
) -> list[torch.Tensor]:
    for step, (rate, of_layers) in enumerate(zip(RATES, gradients, strict=True), 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor(step)
        for parameter, gradient in zip(parameters, of_layers, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def as_on_the_page(
    heading: str,
    shapes: tuple[dict[str, tuple[int, ...]], ...],
    *,
    edit: tuple[str, str] = ("", ""),
    factor: Callable[[int], float] = lambda step: 1.0,
) -> list[torch.Tensor]:
    """The weights after training with the optimizer that the page's section makes."""
    weights, gradients = start(shapes)
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    decayed, undecayed = parameters[: len(shapes[0])], parameters[len(shapes[0]) :]
    given = {"decayed": decayed, "undecayed": undecayed, "lr": 1.0, "momentum": MOMENTUM, "weight_decay": DECAY}
    given |= {"LAMB": LAMB, "LARS": LARS, "StableAdamW": StableAdamW, "TrustRatio": TrustRatio, "torch": torch}
    code = code_under(heading)
    assert edit[0] in code
    exec(code.replace(*edit), given)
    return train_with(given["optimizer"], parameters, gradients, factor)


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor], bound: float = 1e-12) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=bound, atol=bound)


# LARS ---------------------------------------------------------------------------------------------------------------


def lars_reference(
    shapes: tuple[dict[str, tuple[int, ...]], ...],
    change: Callable[[torch.Tensor, torch.Tensor, bool], torch.Tensor],
    *,
    rate_inside: bool = False,
    nesterov: bool = False,
    momentum: float = MOMENTUM,
) -> list[torch.Tensor]:
    """SGD with momentum over what `change` makes of (weight, gradient, whether its group is decayed)."""
    weights, gradients = start(shapes)
    buffers = [torch.zeros_like(w) for w in weights]
    for rate, of_layers in zip(RATES, gradients, strict=True):
        for index, gradient in enumerate(of_layers):
            added = change(weights[index], gradient, index < len(shapes[0])) * (rate if rate_inside else 1.0)
            buffers[index] = momentum * buffers[index] + added
            moved = added + momentum * buffers[index] if nesterov else buffers[index]
            weights[index] = weights[index] - moved * (1.0 if rate_inside else rate)
    return weights


def ratio(coefficient: float, w: torch.Tensor, denominator: Any, *norms: torch.Tensor) -> Any:
    return coefficient * w.norm() / denominator if all(norm > 0 for norm in (w.norm(), *norms)) else 1.0


def by_sum_of_norms(coefficient: float, *, adapts: Callable[[bool], bool]) -> Callable[..., torch.Tensor]:
    """lightly, apex, torchlars."""

    def change(w: torch.Tensor, g: torch.Tensor, decayed: bool) -> torch.Tensor:
        decay = DECAY if decayed else 0.0
        scale = ratio(coefficient, w, g.norm() + decay * w.norm() + 1e-8, g.norm()) if adapts(decayed) else 1.0
        return scale * (g + decay * w)

    return change


def by_norm_of_sum(w: torch.Tensor, g: torch.Tensor, decayed: bool) -> torch.Tensor:
    """SimCLR, Barlow Twins."""
    if not decayed:
        return g
    total = g + DECAY * w
    return ratio(0.001, w, total.norm(), total.norm()) * total


@pytest.mark.parametrize("nesterov", [False, True])
def test_lightly(nesterov: bool) -> None:
    edit = ("eps=1e-8", "eps=1e-8, nesterov=True") if nesterov else ("", "")
    found = as_on_the_page("lightly and Lightning Bolts `LARS`", BY_GROUP, edit=edit)
    change = by_sum_of_norms(0.001, adapts=lambda decayed: decayed)
    assert_same(found, lars_reference(BY_GROUP, change, nesterov=nesterov))


def test_defaults_are_not_lightlys() -> None:
    """So that the page is worth its place: an undecayed classifier under the defaults."""
    found = train_theirs(LARS, {"momentum": MOMENTUM})
    wanted = lars_reference(BY_GROUP, by_sum_of_norms(0.001, adapts=lambda decayed: decayed))
    assert (found[4] - wanted[4]).abs().max() > 0.1


@pytest.mark.parametrize(("heading", "coefficient"), [("apex `LARC`", 0.02), ("torchlars", 0.001)])
def test_wrappers_of_sgd_adapt_all_layers(heading: str, coefficient: float) -> None:
    found = as_on_the_page(heading, BY_GROUP)
    assert_same(found, lars_reference(BY_GROUP, by_sum_of_norms(coefficient, adapts=lambda decayed: True)))


def test_larc_that_clips() -> None:
    """At a rate that some layers' η‖w‖/‖g‖ are above, and some below."""
    coefficient, lr = 0.02, 0.018
    heading, edit = "apex `LARC` with `clip=True`", ("lr / 0.02", f"{lr} / 0.02")
    found = as_on_the_page(heading, BY_GROUP, edit=edit, factor=lambda step: coefficient / RATES[step - 1])
    weights, gradients = start(BY_GROUP)
    clipped = set()
    for of_layers in gradients:
        for index, g in enumerate(of_layers):
            adaptive = ratio(coefficient, weights[index], g.norm(), g.norm())
            clipped.add(bool(adaptive > lr))
            weights[index] = weights[index] - lr * min(adaptive / lr, 1.0) * g
    assert clipped == {True, False}
    assert_same(found, weights)


def test_simclr() -> None:
    found = as_on_the_page("SimCLR (google-research)", BY_DIMENSIONS)
    assert_same(found, lars_reference(BY_DIMENSIONS, by_norm_of_sum, rate_inside=True))


def test_barlow_twins() -> None:
    assert_same(as_on_the_page("Barlow Twins", BY_DIMENSIONS), lars_reference(BY_DIMENSIONS, by_norm_of_sum))


def test_pytorch_optimizer_lars() -> None:
    def change(w: torch.Tensor, g: torch.Tensor, decayed: bool) -> torch.Tensor:
        return g * (ratio(0.001, w, g.norm(), g.norm()) if g.ndim > 1 else 1.0)

    found = as_on_the_page("pytorch_optimizer `LARS`", BY_DIMENSIONS)
    assert_same(found, lars_reference(BY_DIMENSIONS, change, momentum=0.0))


# LAMB ---------------------------------------------------------------------------------------------------------------


def lamb_reference(
    shapes: tuple[dict[str, tuple[int, ...]], ...],
    trust: Callable[[torch.Tensor, torch.Tensor, bool], Any],
    *,
    eps: float,
    decay: float = DECAY,
    corrects: bool = True,
    factor: Callable[[int], float] = lambda step: 1.0,
    max_norm: float = math.inf,
) -> list[torch.Tensor]:
    """Adam's direction, its decay and the ratio that `trust` makes of (weight, direction, whether it is decayed)."""
    weights, gradients = start(shapes)
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step, (rate, of_layers) in enumerate(zip(RATES, gradients, strict=True), 1):
        clip = max(1.0, math.sqrt(sum(float(g.square().sum()) for g in of_layers)) / max_norm)
        for index, gradient in enumerate(of_layers):
            g, decayed = gradient / clip, index < len(shapes[0])
            first[index] = BETA1 * first[index] + (1 - BETA1) * g
            second[index] = BETA2 * second[index] + (1 - BETA2) * g * g
            m = first[index] / (1 - BETA1**step if corrects else 1.0)
            v = second[index] / (1 - BETA2**step if corrects else 1.0)
            u = m / (v.sqrt() + eps) + (decay * weights[index] if decayed else 0.0)
            weights[index] = weights[index] - rate * factor(step) * trust(weights[index], u, decayed) * u
    return weights


@pytest.mark.parametrize("nvlamb", [False, True])
def test_apex_lamb(nvlamb: bool) -> None:
    edit = ('"adapt": False', '"adapt": True') if nvlamb else ("", "")
    found = as_on_the_page("apex and NVIDIA `FusedLAMB`", BY_GROUP, edit=edit)

    def trust(w: torch.Tensor, u: torch.Tensor, decayed: bool) -> Any:
        return ratio(1.0, w, u.norm(), u.norm()) if nvlamb or decayed else 1.0

    assert_same(found, lamb_reference(BY_GROUP, trust, eps=1e-6, max_norm=1.0))


def of_deepspeed(step: int) -> float:
    return math.sqrt(1 - BETA2**step) / (1 - BETA1**step)


@pytest.mark.parametrize("corrects_rate", [False, True])
def test_deepspeed_lamb(corrects_rate: bool) -> None:
    factor = of_deepspeed if corrects_rate else lambda step: 1.0
    found = as_on_the_page("DeepSpeed `FusedLamb`", BY_GROUP, factor=factor)

    def trust(w: torch.Tensor, u: torch.Tensor, decayed: bool) -> Any:
        return min(max(ratio(1.0, w, u.norm(), u.norm()), 0.01), 10.0)

    assert_same(found, lamb_reference(BY_GROUP, trust, eps=1e-8, corrects=False, factor=factor))


def test_pytorch_optimizer_lamb() -> None:
    def factor(step: int) -> float:
        return 0.01 / (1 - BETA1**step)  # so small that norms stay below 10

    def trust(w: torch.Tensor, u: torch.Tensor, decayed: bool) -> Any:
        return ratio(1.0, w, u.norm() + 1e-6, u.norm()) if w.norm() <= 10 else 10 / (u.norm() + 1e-6)

    found = as_on_the_page("pytorch_optimizer `Lamb`", BY_DIMENSIONS, factor=factor)
    wanted = lamb_reference(BY_DIMENSIONS, trust, eps=1e-6, decay=0.0, corrects=False, factor=factor)
    assert_same(found, wanted, 1e-5)


# StableAdamW ----------------------------------------------------------------------------------------------------------


def stable_reference(eps: float, decay: Callable[[float, float], float]) -> list[torch.Tensor]:
    """With debiased averages; `decay` makes of the rate and the clipped one what multiplies the weights."""
    weights, gradients = start(BY_GROUP)
    m, v = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for t, (rate, of_layers) in enumerate(zip(RATES, gradients, strict=True), 1):
        hat1, hat2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in (0.9, 0.99))
        for index, g in enumerate(of_layers):
            m[index] = hat1 * m[index] + (1 - hat1) * g
            v[index] = hat2 * v[index] + (1 - hat2) * g.square()
            rms = math.sqrt((g.square() / v[index].maximum(torch.tensor(eps**2))).mean().item())
            clipped = rate / max(1.0, rms)
            if index < len(BY_GROUP[0]):
                weights[index] = weights[index] * (1 - decay(rate, clipped))
            weights[index] = weights[index] - clipped * m[index] / (v[index].sqrt() + eps)
    return weights


WRITTEN_FOR_MAX_LR = ("weight_decay=weight_decay", "weight_decay=weight_decay / 2.0")


@pytest.mark.parametrize(("max_lr", "edit"), [(None, ("", "")), (2.0, WRITTEN_FOR_MAX_LR)])
def test_optimi(max_lr: float | None, edit: tuple[str, str]) -> None:
    found = as_on_the_page("optimi `StableAdamW`", BY_GROUP, edit=edit)
    assert_same(found, stable_reference(1e-6, lambda rate, clipped: clipped / (max_lr or 1.0) * DECAY))
    optimi = pytest.importorskip("optimi")
    options = {} if max_lr is None else {"decouple_lr": True, "max_lr": max_lr}
    assert_same(found, train_theirs(optimi.StableAdamW, {"foreach": False, "triton": False, **options}))


def test_pytorch_optimizer_stableadamw() -> None:
    found = as_on_the_page("pytorch_optimizer `StableAdamW`", BY_GROUP)
    assert_same(found, stable_reference(1e-8, lambda rate, clipped: clipped * DECAY))
    package = pytest.importorskip("pytorch_optimizer")
    assert_same(found, train_theirs(package.StableAdamW, {"foreach": False}))


# Packages that are installed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heading", "name", "options", "edit"),
    [
        ("timm `Lars`", "Lars", {"momentum": MOMENTUM}, ("", "")),
        ("timm `Lars`", "Lars", {"momentum": MOMENTUM, "always_adapt": True}, ('"adapt": False', '"adapt": True')),
        ("timm `Lamb`", "Lamb", {}, ("", "")),
        ("timm `Lamb`", "Lamb", {"always_adapt": True}, ('"adapt": False', '"adapt": True')),
        ("timm `Lamb`", "Lamb", {"trust_clip": True}, ("max_grad_norm=1.0", "max_grad_norm=1.0, trust_bounds=(0, 1)")),
    ],
)
def test_timm(timm_optim: Any, heading: str, name: str, options: dict[str, Any], edit: tuple[str, str]) -> None:
    theirs = getattr(timm_optim[name.lower()], name)
    assert_same(as_on_the_page(heading, BY_GROUP, edit=edit), train_theirs(theirs, options))


@pytest.mark.parametrize(
    ("heading", "name", "options"),
    [("torch `SGD`", "SGD", {"momentum": MOMENTUM}), ("torch `AdamW`", "AdamW", {})],
)
def test_torch(heading: str, name: str, options: dict[str, Any]) -> None:
    assert_same(as_on_the_page(heading, BY_GROUP), train_theirs(getattr(torch.optim, name), options))


def train_theirs(optimizer_class: Any, options: dict[str, Any]) -> list[torch.Tensor]:
    weights, gradients = start(BY_GROUP)
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    count = len(BY_GROUP[0])
    groups = [{"params": parameters[:count]}, {"params": parameters[count:], "weight_decay": 0.0}]
    return train_with(optimizer_class(groups, lr=1.0, weight_decay=DECAY, **options), parameters, gradients)


def test_every_section_is_tried() -> None:
    tried = set(re.findall(r'"([^"\n]+)"', Path(__file__).read_text()))
    sections = re.findall(r"^### (.*)$", PAGE, re.MULTILINE)
    assert sections
    assert set(sections) <= tried
    assert len(re.findall("^```python", PAGE, re.MULTILINE)) == len(sections) + 1
