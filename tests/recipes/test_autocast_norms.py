"""Layer norms under autocast: 16 bits from the embeddings to the head, and torch's own numbers up to rounding."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from trustratio.recipes.configuration.config import ModelConfig
from trustratio.recipes.model.compiling import compile_regions
from trustratio.recipes.model.masked_language_model import build_model
from trustratio.recipes.model.norms import AutocastLayerNorm, stay_in_autocast

TINY = ModelConfig(layers=2, hidden=16, heads=2, intermediate=32, max_positions=32)
MODERN = ModelConfig(
    layers=3, hidden=16, heads=2, intermediate=24, max_positions=32, local_attention=4, architecture="modernbert"
)
BF16 = functools.partial(torch.autocast, "cpu", torch.bfloat16)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(5, 100, (4, 20), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(0, 80, 7)
    return tokens, positions, tokens.reshape(-1)[positions]


def model_of(shape: ModelConfig) -> Any:
    torch.manual_seed(0)
    return build_model(shape, 104)


@pytest.mark.parametrize("shape", [TINY, MODERN])
def test_norms_give_what_autocast_computes_in(shape: ModelConfig) -> None:
    model, seen = model_of(shape), []
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    for norm in norms:
        norm.register_forward_hook(lambda module, given, result: seen.append((given[0].dtype, result.dtype)))
    with BF16():
        model(*batch())
    assert len(norms) == len(seen) > 4
    assert {result for _, result in seen} == {torch.bfloat16}
    assert [given for given, _ in seen[1:]] == [torch.bfloat16] * (len(seen) - 1)  # the embeddings' sum is fp32


@pytest.mark.parametrize("shape", [TINY, MODERN])
def test_without_autocast_they_are_torchs(shape: ModelConfig) -> None:
    model = model_of(shape)
    loss, _ = model(*batch())
    for module in model.modules():
        if type(module) is AutocastLayerNorm:
            module.__class__ = nn.LayerNorm
    assert torch.equal(model(*batch())[0], loss)


@pytest.mark.parametrize("shape", [TINY, MODERN])
@pytest.mark.parametrize("compiled", [False, True])
def test_loss_and_gradient_are_those_of_fp32_up_to_rounding(shape: ModelConfig, compiled: bool) -> None:
    model = model_of(shape)
    exact, _ = model(*batch())
    exact.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if compiled:
        compile_regions(model, "eager")
    with BF16():
        loss, _ = model(*batch())
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=5e-3, atol=0)
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert p.grad.dtype == torch.float32
            assert (p.grad - expected[name]).norm() <= 0.1 * expected[name].norm() + 1e-3, name


def test_a_norm_without_bias_or_weight_is_normalized() -> None:
    for options in ({"bias": False}, {"elementwise_affine": False}):
        model = nn.Sequential(nn.LayerNorm(8, **options))
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
        expected = model(x)
        stay_in_autocast(model)
        with BF16():
            torch.testing.assert_close(model(x), expected.bfloat16(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "16-bit model"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_weight_and_bias_are_summed_over_tokens_in_fp32(dtype: torch.dtype, autocast: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16_384, 32, generator=generator).to(dtype)
    upstream = (torch.randn(16_384, 32, generator=generator) + 0.05).to(dtype)
    exact = nn.LayerNorm(32, dtype=torch.float64)
    exact(x.double()).backward(upstream.double())
    model = nn.Sequential(nn.LayerNorm(32, dtype=None if autocast else dtype))
    stay_in_autocast(model)
    with torch.autocast("cpu", dtype, enabled=autocast):
        result = model(x)
    assert result.dtype == dtype
    result.backward(upstream)
    for name, p in model[0].named_parameters():
        expected = exact.get_parameter(name).grad
        assert p.grad is not None
        assert expected is not None
        assert (p.grad - expected).norm() <= 5e-3 * expected.norm(), name
