"""BERT and ModernBERT for masked language modelling whose vocabulary projection runs on the masked positions only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, BertConfig, BertForMaskedLM, ModernBertForMaskedLM

from ..common.errors import RecipeError
from ..common.files import parse_json
from ..common.marks import require_unchanged
from ..configuration.config import ModelConfig
from ..runs.checkpoints import ROWS
from .gathered_head import GatheredHead
from .initial_weights import require_same_computation
from .modern_bert import GatheredModernBertForMaskedLM, modern_bert_config
from .norms import stay_in_autocast


class GatheredBertForMaskedLM(GatheredHead, BertForMaskedLM):
    """`transformers`' BertForMaskedLM with a gathered head."""

    def hidden_states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the encoder's output; see `GatheredHead`."""
        # Rows are packed full, so every position is attended to; saying so explicitly is not needed and SDPA
        # takes its fastest path without a mask. Neither are token types: one row of zeros, which is added to all
        # sequences, in place of a look-up for every token, and of its backward.
        one_type = torch.zeros((1, input_ids.shape[1]), dtype=torch.int64, device=input_ids.device)
        return self.bert(input_ids=input_ids, token_type_ids=one_type).last_hidden_state

    def regions(self) -> Iterator[nn.Module]:
        """Yield embeddings and layers."""
        yield self.bert.embeddings
        yield from self.bert.encoder.layer

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of gathered hidden states."""
        return self.cls(hidden)


MaskedLanguageModel = GatheredBertForMaskedLM | GatheredModernBertForMaskedLM
"""What the recipe trains."""

STOCK: dict[str, Any] = {"bert": BertForMaskedLM, "modernbert": ModernBertForMaskedLM}
"""transformers' own class of each architecture."""


def build_model(
    config: ModelConfig,
    vocabulary_size: int,
    special_tokens: Mapping[str, int | None] | None = None,
    attention: str = "sdpa",
) -> MaskedLanguageModel:
    """Build a model, initialised from torch's current random state or from saved weights.

    Args:
        config: shape of the encoder, and the folder of initial weights if there are any.
        vocabulary_size: rows of the embedding table, see `padded_vocabulary`.
        special_tokens: ids of "pad", "cls" and "sep" (BERT: "pad" alone), None where there is no such token. None
            instead of ids: left open, and the padding of a BERT is 0. The input embedding of the padding begins at
            zero and gets no gradient.
        attention: transformers' name of what computes it, see `attention_of`.

    Raises:
        RecipeError: the initial weights are missing or not those of this model.
    """
    if config.architecture == "modernbert":
        shape: Any = modern_bert_config(config, vocabulary_size, special_tokens or {})
        kind: Any = GatheredModernBertForMaskedLM
    else:
        padding = 0 if special_tokens is None else special_tokens.get("pad")
        shape, kind = _bert_config(config, vocabulary_size, padding), GatheredBertForMaskedLM
    shape._attn_implementation = attention
    model = kind(shape)
    stay_in_autocast(model)
    if config.initial_weights is not None:
        _load_weights(model, config)
    return model


def stock_model(model: MaskedLanguageModel) -> Any:
    """Return transformers' own class in the model's shape, with other random weights."""
    return STOCK[model.config.model_type](model.config)


def _bert_config(config: ModelConfig, vocabulary_size: int, padding: int | None) -> BertConfig:
    return BertConfig(
        vocab_size=vocabulary_size,
        hidden_size=config.hidden,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.intermediate,
        max_position_embeddings=config.max_positions,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        pad_token_id=padding,
    )


def _load_weights(model: MaskedLanguageModel, config: ModelConfig) -> None:
    """Copy the weights of a folder that `save_pretrained` wrote, all of them."""
    folder = config.initial_weights
    assert folder is not None
    if not Path(folder).is_dir():
        raise RecipeError(f"model.initial_weights={folder!r} is not a folder; give one in transformers' format")
    require_unchanged(Path(folder))
    try:
        saved = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _require_architecture(config, saved.model_type)
        require_same_computation(config, saved, model.config)
        loaded, report = STOCK[config.architecture].from_pretrained(
            folder, trust_remote_code=False, output_loading_info=True
        )
    except RecipeError:
        raise
    except Exception as error:  # of many classes: it is damaged, foreign, or of another kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"model.initial_weights={folder!r} cannot be read: {reason}") from error
    if missing := sorted(report["missing_keys"]):
        raise RecipeError(
            f"model.initial_weights={folder!r} lacks {', '.join(missing[:3])}{' and more' * (len(missing) > 3)}: give "
            "the folder of a model with its masked-token head"
        )
    try:
        model.load_state_dict(loaded.state_dict())
    except RuntimeError as error:
        raise RecipeError(
            f"model.initial_weights={folder!r} does not fit the model of this run (layers, sizes, positions and the "
            f"padded vocabulary must agree): {error}"
        ) from error


def _require_architecture(config: ModelConfig, found: str) -> None:
    if found != config.architecture:
        raise RecipeError(
            f"model.initial_weights={config.initial_weights!r} holds a model of the architecture {found}, and this run "
            f"trains {config.architecture}: choose its --model, or other weights"
        )


EARLIER_MULTIPLE = 8
"""What earlier releases padded vocabularies to a multiple of."""


def padded_vocabulary(size: int, multiple: int = 64) -> int:
    """Round a vocabulary up to a multiple of 64, which matrix units want; the extra rows are never a target."""
    return -(-size // multiple) * multiple


def rows_of_checkpoint(identity: Mapping[str, Any], vocabulary_size: int) -> int:
    """Return the rows of the embedding table in a checkpoint with this identity."""
    rows: int = identity.get(ROWS, padded_vocabulary(vocabulary_size, EARLIER_MULTIPLE))
    return rows


def first_rows(config: ModelConfig, vocabulary_size: int) -> int:
    """Return the rows of the embedding table that a run begins with: `padded_vocabulary`.

    Where there are initial weights whose vocabulary an earlier release padded: theirs.
    """
    rows, earlier = padded_vocabulary(vocabulary_size), padded_vocabulary(vocabulary_size, EARLIER_MULTIPLE)
    if config.initial_weights is None:
        return rows
    try:
        saved = parse_json((Path(config.initial_weights) / "config.json").read_bytes())
    except (OSError, ValueError):  # `build_model` says what is wrong with them
        return rows
    return earlier if isinstance(saved, dict) and saved.get("vocab_size") == earlier else rows
