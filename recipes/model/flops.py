"""Floating-point operations of an update of BERT or ModernBERT, and what devices can do at most.

A multiplication and an addition count as two. Backward costs twice the forward pass. Recomputation under activation
checkpointing counts only where it is asked for: model FLOP/s tell what the model needed, not what the device did
(Chowdhery et al. 2022, arXiv 2204.02311, appendix B). Embedding look-ups, norms, softmax and optimizer are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..configuration.config import ModelConfig


@dataclass(frozen=True)
class ModelFlops:
    """Forward and backward operations of an encoder with a masked-token head.

        per token             3 L (8 H^2 + 4 H I + 4 S H)
        per predicted token   3 (2 H^2 + 2 H V)

    8 H^2: query, key, value and output; 4 H I: the feed-forward pair; 4 S H: scores and their weighted sum. With I = 4H
    the first is 3 L (24 H^2 + 4 S H).

    A gated layer has three matrices between H and I, and 6 H I. In a layer with windows S is the number of tokens that
    a token attends to, averaged over the sequence. That is what the mathematics needs: an implementation that masks
    what lies outside the windows computes more.

    Attributes:
        layers: L.
        hidden: H.
        intermediate: I.
        vocabulary: V, rows of the output projection.
        gated: whether the feed-forward layers are gated.
        local_layers: how many of the layers attend to windows.
        reach: tokens on either side of a token that are in its window.
    """

    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    gated: bool = False
    local_layers: int = 0
    reach: int = 0

    @classmethod
    def of(cls, shape: ModelConfig, vocabulary: int) -> ModelFlops:
        """Return those of a model of this shape with `vocabulary` rows of the output projection."""
        sizes = (shape.layers, shape.hidden, shape.intermediate, vocabulary)
        if shape.architecture == "bert":
            return cls(*sizes)
        return cls(*sizes, gated=True, local_layers=shape.local_layers, reach=shape.local_attention // 2)

    def update(self, tokens: int, predicted: float, length: int, recomputed: bool = False) -> float:
        """Return the operations of an update over all ranks.

        Args:
            tokens: in the global batch.
            predicted: those whose logits are computed, or how many are expected.
            length: S, tokens per sequence.
            recomputed: count the encoder's second forward pass under activation checkpointing, too.
        """
        again = self.forward(tokens, 0, length) if recomputed else 0.0
        return 3.0 * self.forward(tokens, predicted, length) + again

    def forward(self, tokens: int, predicted: float, length: int) -> float:
        """Return the operations of a forward pass alone, over all ranks; arguments as for `update`."""
        feed_forward = (6 if self.gated else 4) * self.intermediate
        attended = (self.layers - self.local_layers) * length + self.local_layers * tokens_in_window(length, self.reach)
        encoder = tokens * self.hidden * (self.layers * (8 * self.hidden + feed_forward) + 4 * attended)
        head = predicted * 2 * self.hidden * (self.hidden + self.vocabulary)
        return float(encoder + head)


def tokens_in_window(length: int, reach: int) -> float:
    """Return how many tokens of a sequence a token attends to on average, if `reach` on either side and itself."""
    reach = min(reach, length - 1)
    return 2 * reach + 1 - reach * (reach + 1) / length  # the ends of the sequence cut windows off


# Dense peaks in TFLOP/s from the manufacturers' data sheets, (16-bit matrix units, fp32 without them). The first name
# that a device's own contains decides.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    ("GB200", 2500.0, 80.0),
    ("B200", 2250.0, 75.0),
    ("H200", 989.0, 67.0),
    ("H100 PCIe", 756.0, 51.0),
    ("H100 NVL", 835.0, 60.0),
    ("H100", 989.0, 67.0),
    ("A100", 312.0, 19.5),
    ("L40S", 362.0, 91.6),
    ("A40", 149.7, 37.4),
    ("A10G", 70.0, 35.0),
    ("A10", 125.0, 31.2),
    ("L4", 121.0, 30.3),
    ("V100", 125.0, 15.7),
    ("T4", 65.0, 8.1),
)


def device_peak(name: str, precision: str) -> float | None:
    """Return a device's peak in FLOP/s by the name that torch reports; None if it is not in the table.

    Args:
        name: e.g. "NVIDIA H100 80GB HBM3".
        precision: "bf16", "fp16" or "fp32".
    """
    for known, half, single in _PEAKS:
        if known in name:
            return 1e12 * (single if precision == "fp32" else half)
    return None


def peak_of(device: torch.device, precision: str, tflops: float | None) -> float | None:
    """Return the peak in FLOP/s of one device: `tflops` if it is not None, else from the table; None if unknown."""
    if tflops is not None:
        return 1e12 * tflops
    return device_peak(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None
