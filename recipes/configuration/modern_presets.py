"""Published recipes of BERT's successors, MosaicBERT and ModernBERT, and the same at larger batches."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from .config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PhaseTwoConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)
from .twins import CHOSEN, Preset, named

_MOSAIC = (
    "Portes et al. 2023 (arXiv 2312.17482), the authors' examples/benchmarks/bert/yamls/main/"
    "mosaic-bert-base-uncased.yaml (mosaicml/examples)"
)
_MODERN = (
    "Warner et al. 2024 (arXiv 2412.13663), the authors' yamls/modernbert (AnswerDotAI/ModernBERT, branch "
    "pretraining_documentation)"
)
_UNTUNED = f"{CHOSEN}; try at least three learning rates before comparing"

_RUN = RunConfig(validate_every=1000, checkpoint_every=1000, print_every=10)

# Tokens in billions: ModernBERT's three stages, of which the last two are one phase here.
_PRETRAINING, _EXTENSION, _DECAY = 1719, 250, 50
_TOKENS, _LONG_TOKENS = 1024, 8192


def _updates(billions: float, batch: int, length: int) -> int:
    return round(billions * 1e9 / (batch * length))


# MosaicBERT -----------------------------------------------------------------------------------------------------------

_MOSAIC_SEQUENCES = 286_720_000

_MOSAIC_UNVERIFIED = {
    "model.dropout": "the recipe's one number; theirs is 0.1 without any in the attention, as their kernel demands",
    "optimizer.weight_decay": "none on biases and norm weights, as everywhere here; whether theirs have was not read",
    "model.architecture": "BERT-Base's: MosaicBERT's ALiBi and gated layers are not in transformers",
}


def _mosaicbert(name: str, description: str, source: str, **sections: object) -> tuple[str, Preset]:
    shared: dict[str, object] = {
        "model": ModelConfig(dropout=0.1).of_size("base"),
        "data": DataConfig(vocabulary=30522, sequence_length=128, mask_probability=0.3, validation_sequences=10_000),
        "schedule": ScheduleConfig(warmup=0.06, final=0.02),
        "run": _RUN,
    }
    return named(name, description, source, **{**shared, **sections})


# ModernBERT -----------------------------------------------------------------------------------------------------------


class _Stages(NamedTuple):
    """Batches and peak rates of ModernBERT's phases, in sequences of 1,024 and 8,192 tokens.

    Attributes:
        smallest, batch, long_batch: sequences per update at first, then, and in the second phase.
        micro, long_micro: sequences per pass.
        lr, long_lr: peak rates.
        warmup, batch_warmup: billions of tokens over which rate and batch rise.
    """

    smallest: int
    batch: int
    micro: int
    long_batch: int
    long_micro: int
    lr: float
    long_lr: float
    warmup: float
    batch_warmup: float


_BASE = _Stages(768, 4608, 12, 576, 9, 8e-4, 3e-4, warmup=3, batch_warmup=50)
_LARGE = _Stages(448, 4928, 7, 616, 7, 5e-4, 5e-5, warmup=2, batch_warmup=10)


def _modernbert(
    name: str,
    description: str,
    source: str,
    stages: _Stages,
    optimizer: OptimizerConfig,
    unverified: dict[str, str],
    size: str = "modernbert-base",
    clipping: float = 0.0,
) -> tuple[str, Preset]:
    """Return a preset of ModernBERT's stages: constant rates after the warm-up, and 1-sqrt over the last 50 billion."""
    model = ModelConfig().of_size(size)
    return named(
        name,
        description,
        source,
        model=dataclasses.replace(model, global_rope_theta=1e4),
        data=DataConfig(vocabulary=50368, sequence_length=_TOKENS, mask_probability=0.3, validation_sequences=10_000),
        optimizer=optimizer,
        schedule=ScheduleConfig(shape="wsd", warmup=stages.warmup / _PRETRAINING, cooldown=0.0, final=0.001),
        training=TrainingConfig(
            global_batch=stages.batch,
            micro_batch=stages.micro,
            steps=_updates(_PRETRAINING, stages.batch, _TOKENS),
            gradient_clipping=clipping,
        ),
        phase_two=PhaseTwoConfig(
            steps=_updates(_EXTENSION + _DECAY, stages.long_batch, _LONG_TOKENS),
            sequence_length=_LONG_TOKENS,
            global_batch=stages.long_batch,
            micro_batch=stages.long_micro,
            lr=stages.long_lr,
            warmup=0.0,
            cooldown=_DECAY / (_EXTENSION + _DECAY),
            reset_step=False,
            global_rope_theta=1.6e5,
        ),
        run=dataclasses.replace(_RUN, smallest_batch=stages.smallest, batch_warmup=stages.batch_warmup / _PRETRAINING),
        unverified=unverified,
    )


def _stable_adamw(lr: float, decay: float) -> OptimizerConfig:
    """Return ModernBERT's: a `decay` that is not multiplied by the rate is one that is, over the peak rate."""
    options = {"betas": [0.9, 0.98], "eps": 1e-6}
    return OptimizerConfig(name="stableadamw", lr=lr, weight_decay=decay / lr, options=options)


_MODERN_UNVERIFIED = {
    "model.dropout": "none: theirs is 0.1 behind the attention alone, and the recipe's one number is everywhere",
    "phase_two.reset_step": "that the optimizer's count goes on is concluded from reset_time and load_path",
}

_LARGE_BATCH_UNVERIFIED = {
    **_MODERN_UNVERIFIED,
    **dict.fromkeys(
        (
            "optimizer.lr",
            "optimizer.weight_decay",
            "phase_two.lr",
            "phase_two.global_batch",
            "schedule.warmup",
            "training.gradient_clipping",
            "run.smallest_batch",
        ),
        _UNTUNED,
    ),
}


def _large_batch(
    name: str, optimizer: str, stages: _Stages, clipping: float, options: dict[str, object]
) -> tuple[str, Preset]:
    return _modernbert(
        name,
        f"ModernBERT-base with {optimizer.upper()} at {stages.batch // 1024}K, then {stages.long_batch // 1024}K, not "
        "tuned",
        f"{_MODERN}: data, tokens and schedule; everything that the batch changes is this recipe's",
        stages,
        OptimizerConfig(name=optimizer, lr=stages.lr, options=options),
        _LARGE_BATCH_UNVERIFIED,
        clipping=clipping,
    )


MODERN: tuple[tuple[str, Preset], ...] = (
    _mosaicbert(
        "mosaicbert-base",
        "BERT-Base with MosaicBERT's hyper-parameters and AdamW at 4,096: 70,000 updates",
        f"{_MOSAIC}; its DecoupledAdamW takes away 1e-5 of a weight at the peak rate, which is AdamW's 0.02",
        optimizer=OptimizerConfig(
            name="adamw", lr=5e-4, weight_decay=1e-5 / 5e-4, options={"betas": [0.9, 0.98], "eps": 1e-6}
        ),
        training=TrainingConfig(
            global_batch=4096, micro_batch=64, steps=_MOSAIC_SEQUENCES // 4096, gradient_clipping=0.0
        ),
        unverified=_MOSAIC_UNVERIFIED,
    ),
    _mosaicbert(
        "lamb-mosaicbert-64k",
        "BERT-Base on MosaicBERT's 287 million sequences with LAMB at 64K: 4,375 updates, not tuned",
        f"{_MOSAIC}: masking, sequences and shape of the schedule; everything that the batch changes is this recipe's",
        optimizer=OptimizerConfig(name="lamb", lr=6e-3),
        schedule=ScheduleConfig(warmup=0.2, final=0.02),
        training=TrainingConfig(global_batch=65536, micro_batch=256, steps=_MOSAIC_SEQUENCES // 65536),
        unverified={
            **_MOSAIC_UNVERIFIED,
            **dict.fromkeys(
                ("optimizer.lr", "optimizer.weight_decay", "schedule.warmup", "training.gradient_clipping"), _UNTUNED
            ),
        },
    ),
    _modernbert(
        "modernbert-base",
        "ModernBERT-base with StableAdamW at 4,608, then 576 long sequences: 2 trillion tokens",
        f"{_MODERN}: modernbert-base-pretrain, -context-extension and -learning-rate-decay.yaml; the weight decay of "
        "1e-5 that is not multiplied by the rate is 0.0125 that is",
        _BASE,
        _stable_adamw(_BASE.lr, 1e-5),
        {
            **_MODERN_UNVERIFIED,
            "optimizer.weight_decay": "the first phase's; 1e-5 at the second one's rate would be 0.0333",
        },
    ),
    _modernbert(
        "modernbert-large",
        "ModernBERT-large with StableAdamW at 4,928, then 616 long sequences: 2 trillion tokens",
        f"{_MODERN}: modernbert-large-pretrain, -context-extension and -learning-rate-decay.yaml; the weight decays of "
        "1e-5 and 1e-6 that are not multiplied by the rates are 0.02 that is",
        _LARGE,
        _stable_adamw(_LARGE.lr, 1e-5),
        {
            **_MODERN_UNVERIFIED,
            "optimizer.lr": "the configuration's, which calls it too high: the paper restarted at 5e-5 after 900 "
            "billion tokens. Theirs began from the base model's weights, tiled: model.initial_weights",
            "phase_two.global_batch": "that of the context extension; the decay's is 624",
        },
        size="modernbert-large",
    ),
    _large_batch(
        "lamb-modernbert-32k",
        "lamb",
        _Stages(4096, 32768, 64, 4096, 8, 4.243e-3, 1.591e-3, warmup=50, batch_warmup=50),
        1.0,
        {"betas": [0.9, 0.98]},
    ),
    _large_batch(
        "lamb-modernbert-64k",
        "lamb",
        _Stages(4096, 65536, 64, 8192, 8, 6e-3, 2.25e-3, warmup=100, batch_warmup=100),
        1.0,
        {"betas": [0.9, 0.98]},
    ),
    _large_batch(
        "lans-modernbert-64k",
        "lans",
        _Stages(4096, 65536, 64, 8192, 8, 5e-3, 1.875e-3, warmup=100, batch_warmup=100),
        0.0,
        {"betas": [0.9, 0.98]},
    ),
)
"""Entries of `PUBLISHED`. ModernBERT has three stages, and a run two phases: the second one here is context extension
and decay together, which share length, batch and peak: the rate is constant over 250 billion tokens, and falls over 50.
"""
