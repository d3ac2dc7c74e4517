"""The models that are audited where the user names none.

The audit replaces their forward (see `injection`), so they have none; what matters is what their parameters look like.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["Matrices", "SmallModel"]

VOCABULARY, WIDTH, POSITIONS, INNER, LAYERS = 61, 20, 13, 44, 2


class Block(nn.Module):
    """One encoder layer; its query, key and value are one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)


class SmallModel(nn.Module):
    """Like a BERT of 10,000 parameters: a tied embedding, fused matrices, biases, a scalar, and an unused layer.

    Sizes are such that layers lie across ranks' borders and padding is needed at 2 and at 3 ranks.

    Attributes:
        without_gradient: Names of parameters that get none; the audit reads it of any model that has it.
    """

    without_gradient = ("pooler.weight", "pooler.bias")

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(POSITIONS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.pooler = nn.Linear(WIDTH, 7)
        self.decoder = nn.Linear(WIDTH, VOCABULARY)
        self.decoder.weight = self.embedding.weight
        self.temperature = nn.Parameter(torch.ones(1))


class Matrices(nn.Module):
    """Matrices alone, for optimizers that take nothing else, as Muon does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 17, bias=False) for _ in range(3))
        self.last = nn.Linear(INNER, WIDTH + 1, bias=False)
