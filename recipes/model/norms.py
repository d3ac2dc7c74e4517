"""Layer norms that stay in 16 bits under autocast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class AutocastLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm`, which under autocast takes and gives 16-bit numbers; all its sums are in fp32 anyway.

    torch's autocast computes norms in fp32 and leaves their output so: everything that is added to it, the whole
    residual stream, is fp32 then and moves twice the bytes. DeepSpeed's bf16 and fp16 have it in 16 bits.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize the last dimensions."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        if dtype not in (torch.bfloat16, torch.float16):
            return super().forward(input)
        # Of 16-bit input torch's kernel for CPUs adds the gradients of weight and bias up in 16 bits, over all tokens.
        inside = torch.float32 if kind == "cpu" else dtype
        weight, bias = (None if own is None else own.to(inside) for own in (self.weight, self.bias))
        with torch.autocast(kind, enabled=False):
            return F.layer_norm(input.to(inside), self.normalized_shape, weight, bias, self.eps).to(dtype)


def stay_in_autocast(model: nn.Module) -> None:
    """Make the layer norms of a model `AutocastLayerNorm`s, in place: weights, names and what is exported stay."""
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = AutocastLayerNorm
