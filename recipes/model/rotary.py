"""Rotary positions that are computed from their bases in every pass, and kept nowhere."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


class RotaryPositions(nn.Module):
    """Cosines and sines of the angles t / theta^(2i/d) by which a head's pairs of numbers are turned at position t.

    Su et al. 2021, arXiv 2104.09864. transformers keeps the frequencies in buffers, which bf16 and fp16 training under
    DeepSpeed rounds to 16 bits: at position 8,191 an angle would be off by up to 8 radians. Here there is no buffer,
    so a wrapper finds nothing to cast or to send, and another base holds from the next pass on.

    Attributes:
        width: d, of one head.
        bases: theta by kind of layer.
    """

    def __init__(self, width: int, bases: Mapping[str, float]) -> None:
        """Take d, an even number, and theta by kind of layer."""
        super().__init__()
        self.width, self.bases = width, dict(bases)

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines in the dtype of x, (rows of positions, length, d); computed in fp32.

        Args:
            x: hidden states; their dtype and device count.
            position_ids: int64 (rows of positions, length).
            layer_type: one of the kinds that have a base.
        """
        exponents = torch.arange(0, self.width, 2, dtype=torch.float32, device=x.device) / self.width
        frequencies = 1.0 / self.bases[layer_type] ** exponents
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)
