"""ModernBERT: rotary positions, gated layers, and attention to a window in two of three layers.

Warner et al. 2024, arXiv 2412.13663. Parameters, their names and what is computed are transformers'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import nn
from transformers import ModernBertConfig, ModernBertForMaskedLM

from ..configuration.config import ModelConfig
from ..configuration.phases import Phase
from .attention import FLASH
from .gathered_head import GatheredHead
from .rotary import RotaryPositions

GLOBAL: Final = "full_attention"
LOCAL: Final = "sliding_attention"
"""What transformers calls the two kinds of layer."""


class GatheredModernBertForMaskedLM(GatheredHead, ModernBertForMaskedLM):
    """`transformers`' ModernBertForMaskedLM with a gathered head, and rotary positions that no wrapper can round."""

    def __init__(self, config: ModernBertConfig) -> None:
        """Build it with random weights."""
        super().__init__(config)
        bases = {str(kind): rotary["rope_theta"] for kind, rotary in (config.rope_parameters or {}).items()}
        rotary: Any = RotaryPositions(config.hidden_size // config.num_attention_heads, bases)
        self.model.rotary_emb = rotary

    def hidden_states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the encoder's output; see `GatheredHead`."""
        return self.model(input_ids=input_ids, attention_mask=self._masks(input_ids)).last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of gathered hidden states."""
        return self.decoder(self.head(hidden))

    def regions(self) -> Iterator[nn.Module]:
        """Yield embeddings and layers."""
        yield self.model.embeddings
        yield from self.model.layers

    def begin_phase(self, phase: Phase) -> None:
        """Turn the global layers' positions by the phase's base from now on, in exported models, too."""
        rotary: Any = self.model.rotary_emb
        if phase.global_rope_theta is not None and self.config.rope_parameters is not None:
            rotary.bases[GLOBAL] = phase.global_rope_theta
            self.config.rope_parameters[GLOBAL]["rope_theta"] = phase.global_rope_theta

    def _masks(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """Return what each kind of layer attends to; None: everything, or FlashAttention's own window.

        transformers would make a mask for every sequence, and torch a copy of it in every layer, for backward.
        """
        if self.config._attn_implementation == FLASH:
            return {GLOBAL: None, LOCAL: None}
        return {GLOBAL: None, LOCAL: local_mask(input_ids.shape[1], self.config.local_attention // 2, input_ids.device)}


def local_mask(length: int, reach: int, device: torch.device) -> torch.Tensor | None:
    """Return where a token may look, boolean (1, 1, length, length): at `reach` tokens on either side and itself.

    None if that is the whole sequence.
    """
    if length - 1 <= reach:
        return None
    places = torch.arange(length, device=device)
    return ((places[:, None] - places[None, :]).abs() <= reach)[None, None]


def modern_bert_config(
    shape: ModelConfig, vocabulary_size: int, special_tokens: Mapping[str, int | None]
) -> ModernBertConfig:
    """Return transformers' configuration of a shape.

    Args:
        shape: of the model.
        vocabulary_size: rows of the embedding table.
        special_tokens: ids of "pad", "cls" and "sep"; those that are missing are left open, and none is transformers'
            own, which are of another tokenizer.
    """
    ids: dict[str, Any] = {f"{name}_token_id": special_tokens.get(name) for name in ("pad", "cls", "sep")}
    return ModernBertConfig(
        vocab_size=vocabulary_size,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.max_positions,
        layer_types=[LOCAL if layer % shape.global_attention_every else GLOBAL for layer in range(shape.layers)],
        rope_parameters={
            GLOBAL: {"rope_type": "default", "rope_theta": shape.global_rope_theta},
            LOCAL: {"rope_type": "default", "rope_theta": shape.local_rope_theta},
        },
        local_attention=shape.local_attention,
        embedding_dropout=shape.dropout,
        attention_dropout=shape.dropout,
        mlp_dropout=shape.dropout,
        bos_token_id=ids["cls_token_id"],
        eos_token_id=ids["sep_token_id"],
        **ids,
    )
