"""How state and weights are kept: what the parts of this benchmark compare."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from trustratio.optimizers.formulas.chunk_view import ChunkView

__all__ = ["VARIANTS", "Variant", "rounding_to_nearest"]


@dataclass(frozen=True)
class Variant:
    """One way to keep state and weights.

    Attributes:
        state: The option `state_dtype`.
        weights: Dtype of the parameters.
        master: The option `master`, of bf16 weights.
        is_nearest: Whether bf16 state is rounded to nearest, which the package does not offer.
    """

    state: str = "float32"
    weights: torch.dtype = torch.float32
    master: str | None = None
    is_nearest: bool = False

    def options(self) -> dict[str, Any]:
        """Options of an optimizer. What rounds to nearest are tensor operations, see `rounding_to_nearest`."""
        implementation = {"implementation": "eager"} if self.is_nearest else {}
        return {"state_dtype": self.state, "master": self.master, **implementation}


VARIANTS = {
    "fp32 weights, fp32 state": Variant(),
    "fp32 weights, bf16 state": Variant("bfloat16"),
    "fp32 weights, bf16 state to nearest": Variant("bfloat16", is_nearest=True),
    "bf16 weights to nearest, fp32 state": Variant(weights=torch.bfloat16),
    "bf16 weights stochastic, fp32 state": Variant(weights=torch.bfloat16, master="stochastic"),
    "bf16 weights kahan, fp32 state": Variant(weights=torch.bfloat16, master="kahan"),
    "bf16 weights stochastic, bf16 state": Variant("bfloat16", torch.bfloat16, "stochastic"),
    "bf16 weights kahan, bf16 state": Variant("bfloat16", torch.bfloat16, "kahan"),
}


@contextlib.contextmanager
def rounding_to_nearest() -> Iterator[None]:
    """State of 16 bits is rounded to nearest within this: in tensor operations, the same places, no random numbers."""

    def nearest(view: ChunkView, name: str, elements: torch.Tensor) -> torch.Tensor:
        return elements.to(torch.bfloat16).to(elements.dtype)

    with mock.patch.object(ChunkView, "_rounded", nearest):
        yield
