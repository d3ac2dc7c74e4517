"""BERT for masked language modelling whose vocabulary projection runs on the masked positions only."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM

from ..common.errors import RecipeError
from ..common.marks import require_unchanged
from ..configuration.config import ModelConfig


class GatheredBertForMaskedLM(BertForMaskedLM):
    """`transformers`' BertForMaskedLM with another forward; parameters, names and checkpoints are unchanged.

    The stock head computes logits at every position and throws 85 % of them away. Here the hidden states at the
    masked positions are gathered first: the same loss, and for small models a fraction of the work.
    """

    def forward(  # type: ignore[override]
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
        # Rows are packed full, so every position is attended to; saying so explicitly is not needed and SDPA
        # takes its fastest path without a mask.
        hidden = self.bert(input_ids=input_ids).last_hidden_state
        gathered = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)
        logits = self.cls(gathered).float()
        loss = F.cross_entropy(logits, labels, reduction=reduction)
        correct = (logits.detach().argmax(dim=-1) == labels).sum()
        return loss, correct


def build_model(config: ModelConfig, vocabulary_size: int) -> GatheredBertForMaskedLM:
    """Build a model with SDPA attention, initialised from torch's current random state or from saved weights.

    Args:
        config: shape of the encoder, and the folder of initial weights if there are any.
        vocabulary_size: rows of the embedding table, see `padded_vocabulary`.

    Raises:
        RecipeError: the initial weights are missing or not those of this model.
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
    model = GatheredBertForMaskedLM(bert)
    if config.initial_weights is not None:
        _load_weights(model, config.initial_weights)
    return model


def _load_weights(model: GatheredBertForMaskedLM, folder: str) -> None:
    """Copy the weights of a folder that `save_pretrained` wrote, all of them."""
    if not Path(folder).is_dir():
        raise RecipeError(f"model.initial_weights={folder!r} is not a folder; give one in transformers' format")
    require_unchanged(Path(folder))
    try:
        saved = BertForMaskedLM.from_pretrained(folder, trust_remote_code=False).state_dict()
    except Exception as error:  # of many classes: it is damaged, foreign, or of another kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"model.initial_weights={folder!r} cannot be read: {reason}") from error
    try:
        model.load_state_dict(saved)
    except RuntimeError as error:
        raise RecipeError(
            f"model.initial_weights={folder!r} does not fit the model of this run (layers, sizes, positions and the "
            f"padded vocabulary must agree): {error}"
        ) from error


def padded_vocabulary(size: int) -> int:
    """Round a vocabulary up to a multiple of 8, which matrix units want; the extra rows are never a target."""
    return (size + 7) // 8 * 8
