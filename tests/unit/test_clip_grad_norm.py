"""Clipping in one process: as torch clips, by layers, by rows, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate.utils import DeepSpeedOptimizerWrapper

from trustratio.integrations.layer_norms import LayerNorms, clip_grad_norm_
from trustratio.optimizers import LAMB, LayoutError

from .test_layer_norms import Chain, give_gradients, make_model


def gradients_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad.double().clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("limit", [0.0, 0.3, 1e4, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_as_torch_clips(dtype: torch.dtype, limit: float) -> None:
    model = make_model(dtype)
    other = copy.deepcopy(model)
    for one in (model, other):
        give_gradients(one)
        one[2].bias.grad = None
    optimizer = torch.optim.AdamW(model.parameters())
    wanted = torch.nn.utils.clip_grad_norm_(other.parameters(), limit)
    found = clip_grad_norm_(optimizer, limit, model=model)
    assert (found.shape, found.dtype) == ((), torch.float64)
    rtol = 0.02 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(found, wanted.double(), rtol=rtol, atol=0.0)
    torch.testing.assert_close(gradients_of(model), gradients_of(other), rtol=rtol, atol=1e-12)


def test_layers_by_their_own_norms() -> None:
    model = make_model()
    give_gradients(model)
    before = gradients_of(model)
    norms = clip_grad_norm_(LAMB(model.parameters(), lr=0.1), 1.5, per_layer=True)
    torch.testing.assert_close(norms, torch.stack([g.norm() for g in before]), rtol=1e-6, atol=0.0)
    wanted = [g * min(1.0, 1.5 / (g.norm().item() + 1e-6)) for g in before]
    torch.testing.assert_close(gradients_of(model), wanted, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("limit", [0.01, 0.5, 1e4])
def test_rows_by_their_weights(limit: float) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.Linear(5, 3)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        model[1].weight[1] = 0  # counts as 1e-3
    give_gradients(model)
    model[0].weight.grad[2] = 0
    before = gradients_of(model)
    norm = clip_grad_norm_(torch.optim.SGD(model.parameters(), lr=1.0), limit, per_layer="rows")
    torch.testing.assert_close(norm, torch.cat([g.reshape(-1) for g in before]).norm(), rtol=1e-6, atol=0.0)
    for p, g, found in zip(model.parameters(), before, gradients_of(model), strict=True):
        count = len(g) if g.dim() > 1 else 1
        largest = limit * p.detach().double().reshape(count, -1).norm(dim=1).clamp(min=1e-3)
        size = g.reshape(count, -1).norm(dim=1)
        factor = torch.where(size > largest, largest / size, 1.0)
        torch.testing.assert_close(
            found.reshape(count, -1), g.reshape(count, -1) * factor[:, None], rtol=1e-6, atol=0.0
        )


def test_optimizers_of_a_chain_together() -> None:
    model = make_model()
    give_gradients(model)
    before = gradients_of(model)
    one, *others = model.parameters()
    chain = Chain(torch.optim.SGD([one], lr=0.1), torch.optim.AdamW(others))
    norm = clip_grad_norm_(chain, 0.5)
    torch.testing.assert_close(norm, torch.cat([g.reshape(-1) for g in before]).norm(), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(gradients_of(model), [g * (0.5 / (norm + 1e-6)) for g in before], rtol=1e-6, atol=0.0)


def test_it_is_known_that_a_step_was_clipped() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = LayerNorms(optimizer, model)
    for limit, clipped in ((0.1, True), (1e4, False), (None, None)):
        give_gradients(model)
        if limit is not None:
            clip_grad_norm_(optimizer, limit, model=model)
        optimizer.step()
        assert norms.latest().clipped is clipped
    assert norms.latest().model is not None


def test_another_model_and_other_parameters() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for given in (None, model, None):
        give_gradients(model)
        clip_grad_norm_(optimizer, 0.5, model=given)
        assert torch.cat([g.reshape(-1) for g in gradients_of(model)]).norm().item() == pytest.approx(0.5, rel=1e-5)
    more = torch.nn.Linear(2, 2)
    optimizer.add_param_group({"params": more.parameters()})
    give_gradients(more)
    assert len(clip_grad_norm_(optimizer, 0.1, per_layer=True)) == 8


@pytest.mark.parametrize("limit", [-1.0, float("nan"), True, "1", None])
def test_bad_limits(limit: Any) -> None:
    with pytest.raises(ValueError, match="max_norm must be a number of at least 0, got"):
        clip_grad_norm_(torch.optim.SGD(make_model().parameters(), lr=0.1), limit)


def test_a_limit_larger_than_any_float_clips_nothing() -> None:
    model = make_model()
    give_gradients(model)
    before = gradients_of(model)
    clip_grad_norm_(torch.optim.SGD(model.parameters(), lr=0.1), 10**400, model=model)
    assert all(map(torch.equal, gradients_of(model), before))


def test_bad_arguments() -> None:
    optimizer = torch.optim.SGD(make_model().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r'per_layer must be False, True or "rows", got \'columns\''):
        clip_grad_norm_(optimizer, 1.0, per_layer="columns")
    with pytest.raises(ValueError, match=r'per_layer must be False, True or "rows", got 1'):
        clip_grad_norm_(optimizer, 1.0, per_layer=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"clip_grad_norm_ needs a torch\.optim\.Optimizer.*got dict"):
        clip_grad_norm_({}, 1.0)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module or None, got str"):
        clip_grad_norm_(optimizer, 1.0, model="model")  # type: ignore[arg-type]


def test_a_step_that_accelerate_takes_in_backward_is_not_clipped_after_it() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    wrapper = object.__new__(DeepSpeedOptimizerWrapper)  # whose constructor wants DeepSpeed's
    wrapper.optimizer = torch.optim.SGD([parameter])
    parameter.grad = torch.ones(2)
    with pytest.raises(LayoutError, match=r"clip_grad_norm_\(optimizer.optimizer, ...\) before accelerator.backward"):
        clip_grad_norm_(wrapper, 1.0)
    assert clip_grad_norm_(wrapper.optimizer, 1.0).item() == pytest.approx(2**0.5)
