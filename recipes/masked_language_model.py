"""BERT for masked language modelling whose vocabulary projection runs on the masked positions only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM

from trustratio.recipes.recipe_config import ModelConfig


class GatheredBertForMaskedLM(BertForMaskedLM):
    """`transformers`' BertForMaskedLM with another forward; parameters, names and checkpoints are unchanged.

    The stock head computes logits at every position and throws 85 % of them away. Here the hidden states at the
    masked positions are gathered first: the same loss, and for small models a fraction of the work.
    """

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed cross-entropy in nats and the number of right predictions, both scalars.

        Args:
            input_ids: int64 (sequences, length).
            positions: int64 (masked,), indices into the flattened (sequences * length) positions.
            labels: int64 (masked,), the tokens to predict.

        The sum, not the mean: only the training loop knows how many tokens the whole global batch masks.
        """
        # Rows are packed full, so every position is attended to; saying so explicitly is not needed and SDPA
        # takes its fastest path without a mask.
        hidden = self.bert(input_ids=input_ids).last_hidden_state
        gathered = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)
        logits = self.cls(gathered).float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        correct = (logits.detach().argmax(dim=-1) == labels).sum()
        return loss, correct


def build_model(config: ModelConfig, vocabulary_size: int) -> GatheredBertForMaskedLM:
    """Build a randomly initialised model with SDPA attention from torch's current random state.

    Args:
        config: shape of the encoder.
        vocabulary_size: rows of the embedding table, see `padded_vocabulary`.
    """
    bert = BertConfig(
        vocab_size=vocabulary_size,
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.intermediate,
        max_position_embeddings=config.max_positions,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
    )
    bert._attn_implementation = "sdpa"
    return GatheredBertForMaskedLM(bert)


def padded_vocabulary(size: int) -> int:
    """Round a vocabulary up to a multiple of 8, which matrix units want; the extra rows are never a target."""
    return (size + 7) // 8 * 8
