"""The forward pass that both architectures share: the head sees the masked positions alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..configuration.phases import Phase


class GatheredHead:
    """Mixed into a masked language model of transformers; parameters, names and checkpoints are unchanged.

    The stock head computes logits at every position and throws away those of all tokens that are not masked. Here the
    hidden states at the masked positions are gathered first: the same loss, and for small models a fraction of the
    work.
    """

    def hidden_states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the encoder's output, (sequences, length, hidden), of rows that are packed full."""
        raise NotImplementedError(f"{type(self).__name__} must define hidden_states(): the encoder's output")

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits (masked, vocabulary) of gathered hidden states (masked, hidden)."""
        raise NotImplementedError(f"{type(self).__name__} must define logits(): those of gathered hidden states")

    def regions(self) -> Iterator[nn.Module]:
        """Yield the modules that are compiled one by one; see `compile_regions`."""
        raise NotImplementedError(f"{type(self).__name__} must define regions(): the modules that are compiled")

    def begin_phase(self, phase: Phase) -> None:
        """Take over what a phase of the run changes about the model: nothing, unless an architecture says so."""

    def checkpoint_activations(self) -> None:
        """Keep each encoder layer's input alone, and compute the rest again in backward."""
        model: Any = self  # transformers renamed the method between 5.6 and 5.23
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor, reduction: str = "sum"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed cross-entropy in nats and the number of right predictions, both scalars.

        Args:
            input_ids: int64 (sequences, length).
            positions: int64 (masked,), indices into the flattened (sequences * length) positions.
            labels: int64 (masked,), the tokens to predict.
            reduction: "sum", or "none" for the cross-entropy of each prediction, fp32 (masked,), in place of the sum.

        The sum, not the mean: only the training loop knows how many tokens the whole global batch masks.
        """
        return self.predicted_loss(self.hidden_states(input_ids), positions, labels, reduction)

    def predicted_loss(
        self, hidden: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor, reduction: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `forward` does, of the encoder's output: logits of (masked, vocabulary) and no more."""
        gathered = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)
        logits = self.logits(gathered).float()
        loss = F.cross_entropy(logits, labels, reduction=reduction)
        correct = (logits.detach().argmax(dim=-1) == labels).sum()
        return loss, correct
