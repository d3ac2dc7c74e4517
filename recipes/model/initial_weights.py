"""Whether saved weights compute in a run's model what they computed in their own."""

from __future__ import annotations

from typing import Any

from ..common.errors import RecipeError
from ..configuration.config import ModelConfig
from .modern_bert import LOCAL

_OVERRIDES = {
    "num_attention_heads": "model.heads",
    "local_attention": "model.local_attention",
    "local rope_theta": "model.local_rope_theta",
}
"""transformers' names of what changes the results and not the weights' shapes, and what the recipe calls them."""

_FIXED = {
    "bert": ("hidden_act", "layer_norm_eps", "is_decoder", "add_cross_attention", "tie_word_embeddings"),
    "modernbert": (
        *("hidden_activation", "classifier_activation", "norm_eps", "norm_bias", "attention_bias", "mlp_bias"),
        *("decoder_bias", "classifier_bias", "tie_word_embeddings"),
    ),
}
"""Names of what the recipe has one value for."""


def require_same_computation(config: ModelConfig, saved: Any, built: Any) -> None:
    """Compare a folder's configuration with that of the run's model, where the weights' shapes say nothing.

    The base of ModernBERT's global rotary positions may differ: training on longer sequences raises it. Dropout may,
    too.

    Args:
        config: of the run.
        saved: transformers' configuration in the folder.
        built: that of the run's model, of the same architecture.

    Raises:
        RecipeError: names every difference, and the override that makes the run's model the folder's.
    """
    theirs, ours = _computed(saved), _computed(built)
    differing = [name for name in ours if theirs[name] != ours[name]]
    if not differing:
        return
    differences = ", ".join(f"{name} {theirs[name]} (this run's: {ours[name]})" for name in differing)
    advice = [_advice(name, saved, theirs[name]) for name in differing]
    found = f"model.initial_weights={config.initial_weights!r} holds a model with {differences}"
    if not all(advice):
        raise RecipeError(
            f"{found}, and the recipe trains {config.architecture} with no other value: give other weights"
        )
    raise RecipeError(f"{found}, so that its weights would be another model's in this run: set {' '.join(advice)}")


def _computed(config: Any) -> dict[str, Any]:
    """Return what decides the results, by name."""
    fixed = {name: getattr(config, name, None) for name in _FIXED[config.model_type]}
    if config.model_type == "bert":
        return {"num_attention_heads": config.num_attention_heads, **fixed}
    return {
        "num_attention_heads": config.num_attention_heads,
        "local_attention": config.local_attention,
        "layer_types": list(config.layer_types),
        "local rope_theta": config.rope_parameters[LOCAL]["rope_theta"],
        **fixed,
    }


def _advice(name: str, saved: Any, value: Any) -> str:
    """Return the override that makes the run's model the saved one; "" if none does."""
    if name != "layer_types":
        return f"{_OVERRIDES[name]}={value}" if name in _OVERRIDES else ""
    kinds = [kind == LOCAL for kind in value]
    for every in range(1, saved.num_hidden_layers + 1):
        if kinds == [bool(layer % every) for layer in range(len(kinds))]:
            return f"model.global_attention_every={every}"
    return ""
