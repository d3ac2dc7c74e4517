"""What a rank sends per update, by kind."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trustratio.optimizers.gradient_statistics.squares import BUCKET_ELEMENTS

from ..configuration.config import RecipeConfig
from .memory import FP32, FP64, MOST_LIVE, REDUCE_BUCKET, ModelSize, planned_precision

_GROUP_SUMS = 21
"""fp64 numbers per layer that statistics of group gradients add up in the step where nothing is sharded."""


@dataclass(frozen=True)
class Traffic:
    """What one update sends: bytes per rank by purpose, and the number of collectives by purpose."""

    bytes: dict[str, float]
    collectives: dict[str, int]


def traffic(size: ModelSize, config: RecipeConfig, accumulation: int, ranks: int, groups: int = 2) -> Traffic:
    """Return what one update sends, with ring algorithms: 2 (r - 1) / r of an all-reduced vector, half of it otherwise.

    Stage 2 reduces after every micro-batch, and DeepSpeed does so with all-reduces of whole buckets. Stage 3 gathers
    weights once per update as long as the model is smaller than stage3_max_reuse_distance, else once per pass over a
    micro-batch. `data.discard_smallest` adds a forward pass, one count and four times 256 counts.

    Args:
        size: see `model_size`.
        config: ZeRO stage and precision.
        accumulation: micro-batches per update.
        ranks: data-parallel processes.
        groups: parameter groups, which the sharded optimizers step one by one.
    """
    if ranks == 1:
        return Traffic({}, {})
    stage, precision = config.training.zero_stage, planned_precision(config)
    width = FP32 if precision == "fp32" else 2
    ring = (ranks - 1) / ranks
    buckets = math.ceil(size.elements / REDUCE_BUCKET)
    rounds = accumulation if stage >= 2 else 1

    sent = {"gradients": rounds * (1 if stage == 3 else 2) * ring * width * size.elements}
    calls = {"gradients": rounds * buckets}
    if stage in (1, 2):
        sent["weights"] = ring * width * size.elements
        calls["weights"] = groups
    if stage == 3:
        gathers = 1 if size.elements <= MOST_LIVE else (3 if config.data.discard_smallest else 2) * accumulation
        sent["weights"] = gathers * ring * width * size.elements
        calls["weights"] = gathers * len(size.layers)

    if stage and size.norm_sums:
        # BF16_Optimizer (stage 1, bf16) steps all groups in one call; each call carries the layers of its groups.
        in_one_call = stage == 1 and precision == "bf16" and config.training.master is None
        steps = 1 if in_one_call else groups
        calls["norms"] = steps * len(size.norm_sums)
        sent["norms"] = 2 * ring * FP64 * sum(size.norm_sums) * len(size.layers)
    if stage and size.norm_sums is None:
        calls["norms (a guess)"], sent["norms (a guess)"] = groups * 2, 2 * ring * FP64 * 6 * len(size.layers)
    if stage == 0 and size.statistics:
        calls["norms"], sent["norms"] = 1, 2 * ring * FP64 * _GROUP_SUMS * len(size.layers)
    if size.statistics == "squares":
        calls["squares of gradients"], travels = _squares_traffic(size.elements, stage, accumulation, ranks)
        sent["squares of gradients"] = travels * (2 if stage == 0 else 1) * ring * FP32 * size.elements

    calls["scalars"] = 3  # masked tokens and stop flags, gradient norm, overflow
    sent["scalars"] = calls["scalars"] * 2 * ring * FP64
    if config.data.discard_smallest:
        calls["counts of losses"], sent["counts of losses"] = 5, (1 + 4 * 256) * 2 * ring * FP64
    return Traffic(sent, calls)


def _squares_traffic(elements: int, stage: int, accumulation: int, ranks: int) -> tuple[int, int]:
    """Return the collectives of an update that send squares, and how often each square travels.

    Whole ones are packed into buckets. Sharded ones are staged in half a bucket: a model that fits is sent once per
    update, a larger one with every micro-batch from stage 2 on. Stages 1 and 2 cut the parameters' buffer, so
    a border between two owners makes one more collective; stage 3 cuts every layer.
    """
    if stage == 0:
        return math.ceil(elements / BUCKET_ELEMENTS), 1
    if elements <= BUCKET_ELEMENTS // 2:
        return 1, 1
    travels = accumulation if stage >= 2 else 1
    borders = travels * (ranks - 1) if stage < 3 else 0
    return math.ceil(travels * elements / (BUCKET_ELEMENTS // 2)) + borders, travels
