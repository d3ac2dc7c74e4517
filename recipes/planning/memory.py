"""What a model and its optimizer measure, and how much memory a GPU needs for them, by part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from trustratio.optimizers import OPTIMIZERS, LayerwiseOptimizer
from trustratio.optimizers.gradient_statistics.squares import BUCKET_ELEMENTS

from ..configuration.config import ModelConfig, RecipeConfig
from ..configuration.phases import Phase
from ..model.build import outline
from ..model.optimizer import is_baseline, sample_interval
from ..model.sixteen_bits import state_bytes

GIB = 2**30
BF16, FP32, FP64 = 2, 4, 8
"""Bytes per number."""

REDUCE_BUCKET = 5 * 10**8
"""DeepSpeed's default of reduce_bucket_size, in elements."""

MOST_LIVE = 10**9
"""DeepSpeed's default of stage3_max_live_parameters and stage3_max_reuse_distance, in elements."""

SAMPLE = "sample of the curvature"
"""The name of the part that lasts from an update's first pass to the end of its second."""

_PERSISTENT = 10**5  # DeepSpeed's default of stage3_param_persistence_threshold, in elements


@dataclass(frozen=True)
class ModelSize:
    """What matters of a model and its optimizer.

    Attributes:
        shape: of the configuration.
        vocabulary: rows of the embedding.
        layers: elements of each.
        states: numbers per element that the optimizer keeps.
        statistics: of group gradients that it needs: "", "norms" or "squares".
        norm_sums: see `OptimizerEntry.sums`; None where the number is not known.
        sample_interval: updates from one sample of the curvature to the next; None: there are none.
    """

    shape: ModelConfig
    vocabulary: int
    layers: tuple[int, ...]
    states: int
    statistics: str
    norm_sums: tuple[int, ...] | None
    sample_interval: float | None = None

    @property
    def passes(self) -> float:
        """Passes over an update's micro-batches, on average: every sample of the curvature is one more."""
        return 1.0 if self.sample_interval is None else 1.0 + 1.0 / self.sample_interval

    @property
    def elements(self) -> int:
        """Number of parameters."""
        return sum(self.layers)


def model_size(config: RecipeConfig, vocabulary_size: int | None = None) -> ModelSize:
    """Measure a configuration's model and optimizer without allocating them."""
    model, optimizer = outline(config, vocabulary_size)
    return ModelSize(
        shape=config.model,
        vocabulary=model.config.vocab_size,
        layers=tuple(p.numel() for p in model.parameters()),
        states=_element_states(config, optimizer),
        statistics=_group_statistics(optimizer),
        norm_sums=() if is_baseline(config.optimizer.name) else _norm_sums(config),
        sample_interval=sample_interval(config.optimizer),
    )


def planned_precision(config: RecipeConfig) -> str:
    """Return the precision that a plan is made for: "auto" means bf16, since a GPU is planned for."""
    return "bf16" if config.training.precision == "auto" else config.training.precision


def _group_statistics(optimizer: Optimizer) -> str:
    return (optimizer.group_statistics or "") if isinstance(optimizer, LayerwiseOptimizer) else ""


def _norm_sums(config: RecipeConfig) -> tuple[int, ...] | None:
    entry, options = OPTIMIZERS[config.optimizer.name.lower()], config.optimizer.options
    clips = options.get("max_grad_norm") is not None
    has_ratio = entry.defaults.get("adapt") is False and options.get("adapt", False) is not False
    reduces_otherwise = options.get("reduction", "max") != "max"
    return None if clips or has_ratio or reduces_otherwise else entry.sums


def _element_states(config: RecipeConfig, optimizer: Any) -> int:
    name = config.optimizer.name.lower()
    if name == "adamw":
        return 2 + bool(config.optimizer.options.get("amsgrad"))
    if name == "sgd":
        return int(bool(config.optimizer.options.get("momentum")))
    return len(optimizer.element_state)


@dataclass(frozen=True)
class MemoryPart:
    """Bytes per rank of one part; `held` between steps, or only during one."""

    name: str
    bytes: float
    held: bool


def memory_parts(
    size: ModelSize,
    config: RecipeConfig,
    phase: Phase,
    micro: int,
    ranks: int,
    settings: Mapping[str, Any] | None = None,
) -> list[MemoryPart]:
    """Return the memory of one rank by part.

    Args:
        size: see `model_size`.
        config: ZeRO stage, precision, bits of state and weights, checkpointing.
        phase: sequence length.
        micro: sequences per forward pass.
        ranks: data-parallel processes.
        settings: DeepSpeed settings: bucket sizes, offload (offloaded parts are no GPU memory).
    """
    zero = (settings or {}).get("zero_optimization") or {}
    stage, precision = config.training.zero_stage, planned_precision(config)
    elements, share = size.elements, math.ceil(size.elements / ranks)
    width = FP32 if precision == "fp32" else 2
    bucket = int(_number(zero, "reduce_bucket_size", REDUCE_BUCKET))
    sharded = share if stage else elements
    master = config.training.master
    stepped = FP32 if master is None else BF16  # what the optimizer is given: masters, or the weights as they are
    sums_in_fp32 = _sums_in_fp32(settings, stage) and (master is None or stage > 1)
    own_sums = stage == 1 and precision == "bf16" and sums_in_fp32  # BF16_Optimizer
    separate_sums = precision != "fp32" and sums_in_fp32

    # In the precision of training: weights and the gradients of a micro-batch.
    parts = [MemoryPart("weights", width * (share if stage == 3 else elements), True)]
    if stage == 3:
        threshold = _number(zero, "stage3_param_persistence_threshold", _PERSISTENT)
        kept = sum(n for n in size.layers if n <= threshold)
        live = min(elements, int(_number(zero, "stage3_max_live_parameters", MOST_LIVE)))
        parts.append(MemoryPart("small weights kept whole", width * kept, True))
        parts.append(MemoryPart("gathered weights", width * max(0, live - kept), False))
    if stage in (1, 2):  # seen in some runs of real engines, not in all
        parts.append(MemoryPart("kept embedding gradient", width * size.vocabulary * size.shape.hidden, True))
    if stage >= 2:  # an update's, summed over its micro-batches
        parts.append(MemoryPart("gradients", (FP32 if separate_sums else width) * share, stage == 3))
    else:
        parts.append(MemoryPart("gradients", width * elements, False))

    # What the update is computed with.
    if separate_sums and stage == 1:
        parts.append(MemoryPart("fp32 sum of gradients", FP32 * elements, own_sums))
    if master is None and (stage or width == 2):
        parts.append(MemoryPart("fp32 master weights", FP32 * sharded, True))
    if master is not None and stage:
        parts.append(MemoryPart("copy of this rank's weights", BF16 * share, True))
    if master == "kahan":
        parts.append(MemoryPart("what rounding left", BF16 * sharded, True))
    parts.append(MemoryPart("optimizer state", state_bytes(config.training) * size.states * sharded, True))
    if size.sample_interval is not None:  # weights and gradient of its first pass
        parts.append(MemoryPart(SAMPLE, 2 * FP32 * sharded, False))
    if (stage == 1 and not own_sums) or (stage == 2 and not separate_sums):
        name = "fp32 gradients of the step" if master is None else "bf16 gradients of the step"
        parts.append(MemoryPart(name, stepped * share, False))
    if size.statistics == "squares":
        whole = elements if stage < 2 else 0  # until the step, as its gradients
        parts.append(MemoryPart("squares of gradients", FP32 * (whole + (share if stage else 0)), True))
        if stage:
            parts.append(MemoryPart("squares on their way", FP32 * min(2 * elements, BUCKET_ELEMENTS), False))

    # For a while: what is on its way to other ranks, and what backward needs.
    if stage >= 2 or (stage == 1 and not own_sums):
        buffers = 2 if stage < 3 and zero.get("overlap_comm") else 1
        parts.append(MemoryPart("reduction bucket", width * bucket * buffers, stage == 3))
    elif ranks > 1:
        parts.append(MemoryPart("reduction bucket", width * min(bucket, elements), False))
    parts.append(MemoryPart("activations", _activations(size, config, phase.sequence_length, micro, width), False))
    return [part for part in parts if part.name not in _offloaded(zero)]


def _activations(size: ModelSize, config: RecipeConfig, length: int, micro: int, width: int) -> float:
    """Bytes that autograd keeps of one micro-batch, with fused attention, and the logits' gradient.

    Checkpointing keeps each layer's input and, while it computes one layer again, the rest.
    """
    shape, tokens = size.shape, micro * length
    layer = tokens * _per_token(shape, width)
    boundary = tokens * shape.hidden * width
    checkpointing = config.training.activation_checkpointing
    encoder = shape.layers * boundary + layer if checkpointing else shape.layers * layer
    embeddings = boundary * (2 if shape.architecture == "bert" else 3)  # ModernBERT has a norm at its end, too
    masked = math.ceil(tokens * config.data.mask_probability)
    # Logits in the model's precision, in fp32, their log-softmax, and the gradients of the last two.
    head = masked * (4 * shape.hidden * width + size.vocabulary * (width + (2 if width == 2 else 1) * FP32 + FP32))
    return encoder + _masks(shape, length, width, checkpointing) + embeddings + head


def _per_token(shape: ModelConfig, width: int) -> float:
    """Bytes per token and encoder layer of width h and inner width f.

    BERT: the layer's input, q, k, v, the attention's output, the inputs and outputs of both norms and the two sides of
    the activation function, 7 h + 2 f numbers; with dropout one byte per element of its two masks.

    ModernBERT: the layer's input, its norm, q, k, v, turned q and k, the attention's output, the second norm's input
    and output, both halves of the gated layer, the activation and the product, 10 h + 4 f; with dropout one byte per
    element of its two masks, of h and of f.
    """
    h, f, dropped = shape.hidden, shape.intermediate, shape.dropout > 0
    if shape.architecture == "bert":
        return (7 * h + 2 * f) * width + 2 * h * dropped
    return (10 * h + 4 * f) * width + (h + f) * dropped


def _masks(shape: ModelConfig, length: int, width: int, checkpointing: bool) -> float:
    """Bytes of the windows' masks, which torch makes for every layer; FlashAttention 2 has none, and is not planned."""
    if length - 1 <= shape.local_attention // 2:
        return 0.0
    return (min(1, shape.local_layers) if checkpointing else shape.local_layers) * length**2 * width


def _sums_in_fp32(settings: Mapping[str, Any] | None, stage: int) -> bool:
    """Tell whether an update's gradients are summed in fp32: as complete settings say, else wherever the recipe can."""
    asked = ((settings or {}).get("data_types") or {}).get("grad_accum_dtype")
    complete = "train_batch_size" in (settings or {})
    return stage > 0 and (asked == "fp32" if complete or asked is not None else True)


def _number(section: Mapping[str, Any], name: str, default: float) -> float:
    value = section.get(name, default)
    return default if value == "auto" else float(value)


def _offloaded(zero: Mapping[str, Any]) -> set[str]:
    def away(name: str) -> bool:
        return (zero.get(name) or {}).get("device", "none") not in ("none", None)

    stepped = {"fp32 master weights", "optimizer state", "fp32 gradients of the step", SAMPLE}
    return (stepped if away("offload_optimizer") else set()) | ({"weights"} if away("offload_param") else set())
