"""Which implementation of attention a run computes with."""

from __future__ import annotations

from transformers.utils.import_utils import is_flash_attn_2_available

from ..common.errors import RecipeError
from ..configuration.config import RecipeConfig

SDPA, FLASH = "sdpa", "flash_attention_2"
_NAMES = {SDPA: "torch's scaled_dot_product_attention", FLASH: "FlashAttention 2"}


def attention_of(config: RecipeConfig) -> str:
    """Return "sdpa" or "flash_attention_2".

    "auto" is FlashAttention 2 for ModernBERT on a GPU in 16 bits where the package flash-attn is installed: it skips
    what lies outside the windows. BERT has none, and torch's own kernels are as good.

    Raises:
        RecipeError: FlashAttention 2 was asked for and cannot be had; the message says why.
    """
    asked, problem = config.model.attention, _why_not_flash(config)
    if asked == FLASH and problem:
        raise RecipeError(f"model.attention={FLASH} {problem}; leave it at auto, which chooses what there is")
    if asked == "auto":
        return FLASH if config.model.architecture == "modernbert" and not problem else SDPA
    return asked


def describe_attention(config: RecipeConfig) -> str:
    """Return the line that says what computes attention."""
    model = config.model
    windows = ""
    if model.architecture == "modernbert":
        windows = f"; windows of {model.local_attention} tokens but in every {model.global_attention_every}. layer"
    return f"attention by {_NAMES[attention_of(config)]}{windows}"


def _why_not_flash(config: RecipeConfig) -> str:
    """Return what is in the way of FlashAttention 2; "" if nothing is."""
    from deepspeed.accelerator import get_accelerator  # takes seconds, which a plan need not wait for

    if get_accelerator().device_name() != "cuda":
        return f"needs an NVIDIA or AMD GPU, and this run is on {get_accelerator().device_name()!r}"
    if config.training.precision == "fp32":
        return "computes in 16 bits alone, and --precision is fp32"
    if config.model.hidden // config.model.heads > 256:
        return "takes heads of at most 256 numbers"
    if not is_flash_attn_2_available():
        return "needs the package flash-attn, which is not installed"
    return ""
