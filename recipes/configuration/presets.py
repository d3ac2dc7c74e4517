"""Named configurations: published large-batch BERT recipes, their scaled-down twins, and small ones of this recipe."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ..common.errors import unknown_name
from .config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PhaseTwoConfig,
    RecipeConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)
from .modern_presets import MODERN
from .twins import CHOSEN, TWIN_SIZES, Preset, named, twin

DEFAULT_PRESET = "lamb-tiny"

REMEMBERED = "quoted from memory, not read in the source"


def _large_bert(**sections: Any) -> dict[str, Any]:
    """Sections that the published recipes share: BERT-Large, 30,522 tokens, 128 then 512 tokens per sequence."""
    shared: dict[str, Any] = {
        "model": ModelConfig(dropout=0.1).of_size("large"),
        "data": DataConfig(vocabulary=30522, sequence_length=128, validation_sequences=10_000),
        "run": RunConfig(validate_every=100, checkpoint_every=200, print_every=1),
    }
    return {**shared, **sections}


_NVIDIA_SCHEDULE = ScheduleConfig(warmup=0.2843, degree=0.5, decay_from_start=True)
_NVIDIA = "NVIDIA DeepLearningExamples, PyTorch/LanguageModeling/BERT"
_LAMB_PAPER = "You et al. 2019 (arXiv 1904.00962)"
_LANS_PAPER = "Zheng et al. 2020 (arXiv 2006.13484)"
_VRGD_PAPER = "Jiang et al. 2023 (arXiv 2309.13681)"
_GLUONNLP = "GluonNLP, scripts/pretraining/torch/bert (README.md, run_pretraining.py, schedules.py, fused_lans.py)"
_MLPERF = "MLPerf training, last in 5.0, reference convergence points of BERT (mlcommons/logging, rcps_bert.json)"

_VR_LAMB_UNVERIFIED = {
    "optimizer.lr": f"{CHOSEN}: NVIDIA's, times the square root of the ratio of the batches (the paper's table is "
    "in an appendix that was not found)",
    "phase_two.lr": f"{CHOSEN}, as optimizer.lr",
    "schedule.warmup": "the paper follows NVIDIA's recipe; that the warm-up is its too is assumed",
    "phase_two.warmup": "as schedule.warmup",
    "training.steps": "the paper gives the total of both phases; split 9:1 in samples here",
    "phase_two.steps": "as training.steps",
}


class _Regime(NamedTuple):
    """Sequences per update and per pass, updates, and learning rate of a phase."""

    batch: int
    micro: int
    steps: int
    lr: float


def _vr_lamb(name: str, first: _Regime, second: _Regime) -> tuple[str, Preset]:
    total = f"{first.steps + second.steps:,}"
    return named(
        name,
        f"BERT-Large with VR-LAMB at {first.batch // 1024}K, then {second.batch // 1024}K: {total} updates",
        f"{_VRGD_PAPER}: batches and {total} updates; schedule of {_NVIDIA}",
        **_large_bert(
            optimizer=OptimizerConfig(name="vrlamb", lr=first.lr),
            schedule=_NVIDIA_SCHEDULE,
            training=TrainingConfig(global_batch=first.batch, micro_batch=first.micro, steps=first.steps),
            phase_two=PhaseTwoConfig(
                steps=second.steps,
                sequence_length=512,
                global_batch=second.batch,
                micro_batch=second.micro,
                lr=second.lr,
                warmup=0.128,
            ),
        ),
        unverified=_VR_LAMB_UNVERIFIED,
    )


class _ReferencePoint(NamedTuple):
    """MLPerf's LAMB at one batch; `samples` is how many sequences reached the target, mean of its runs, in millions."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float
    steps: int
    warmup: int
    warmup_start: int
    samples: float


_REFERENCE_POINTS = {
    256: _ReferencePoint(3.5e-4, (0.9, 0.999), 0.01, 13700, 0, 0, 2.55),
    448: _ReferencePoint(4.25e-4, (0.9, 0.999), 0.01, 6700, 0, 0, 2.41),
    1536: _ReferencePoint(2e-3, (0.66, 0.996), 0.01, 2254, 0, 0, 2.78),
    3072: _ReferencePoint(2e-3, (0.66, 0.998), 0.01, 1141, 100, 0, 2.77),
    4096: _ReferencePoint(2.4e-3, (0.66, 0.998), 0.01, 855, 0, 0, 2.84),
    4608: _ReferencePoint(3.5e-3, (0.62, 0.9), 0.01, 700, 0, 0, 2.79),
    6144: _ReferencePoint(2.9293e-3, (0.7206, 0.78921), 0.001, 700, 0, -700, 3.32),
    6912: _ReferencePoint(2.9293e-3, (0.7206, 0.78921), 0.001, 700, 0, -700, 3.60),
    8192: _ReferencePoint(2.88293e-3, (0.88, 0.88), 0.0166629, 600, 287, -76, 4.19),
    8704: _ReferencePoint(2.971656225e-3, (0.88, 0.88), 0.0166629, 600, 287, -76, 4.28),
    12288: _ReferencePoint(3.1e-3, (0.8, 0.925), 0.0166629, 500, 300, -100, 4.47),
    13056: _ReferencePoint(3.19540686e-3, (0.8, 0.925), 0.0166629, 500, 300, -100, 4.63),
    16384: _ReferencePoint(3.3e-3, (0.75, 0.9), 0.0166629, 600, 290, -100, 5.50),
}


def _mlperf(batch: int, point: _ReferencePoint) -> tuple[str, Preset]:
    return named(
        f"mlperf-{batch}",
        f"BERT-Large at 512 tokens with LAMB, MLPerf's reference point of batch {batch:,}, from a checkpoint of 28,252 "
        "earlier updates: model.initial_weights=FOLDER",
        f"{_MLPERF}: a masked-token accuracy of 0.72 after {point.samples:.2f} million sequences in the mean",
        **_large_bert(
            data=DataConfig(vocabulary=30522, sequence_length=512, validation_sequences=10_000),
            optimizer=OptimizerConfig(
                name="lamb",
                lr=point.lr,
                weight_decay=point.weight_decay,
                options={"betas": list(point.betas), "eps": 1e-6},
            ),
            schedule=ScheduleConfig(warmup=point.warmup, warmup_start=point.warmup_start, decay_from_start=True),
            # The largest micro-batch up to 16 that 64 ranks can share out.
            training=TrainingConfig(global_batch=batch, micro_batch=math.gcd(16, batch // 64), steps=point.steps),
        ),
    )


PUBLISHED: dict[str, Preset] = dict(
    [
        named(
            "lamb-64k-32k",
            "BERT-Large with LAMB at 64K, then 32K, NVIDIA's hyper-parameters",
            f"{_NVIDIA} (pretrain_config.sh, run_pretraining.py, schedulers.py)",
            **_large_bert(
                optimizer=OptimizerConfig(name="lamb", lr=6e-3),
                schedule=_NVIDIA_SCHEDULE,
                training=TrainingConfig(global_batch=65536, micro_batch=256, steps=7038),
                phase_two=PhaseTwoConfig(
                    steps=1563, sequence_length=512, global_batch=32768, micro_batch=32, lr=4e-3, warmup=0.128
                ),
            ),
        ),
        named(
            "lamb-64k-32k-deepspeed",
            "BERT-Large with LAMB at 64K, then 32K, DeepSpeed's hyper-parameters",
            "DeepSpeedExamples, bing_bert (bert_large_lamb.json, deepspeed_bsz64k_lamb_config_seq128.json, "
            "optimization.py); warm-up of the configuration, 6 % and 2 % of 7,500 updates",
            **_large_bert(
                optimizer=OptimizerConfig(
                    name="lamb",
                    lr=11e-3,
                    options={"bias_correction": False, "trust_bounds": [0.01, 0.3], "eps": 1e-8},
                ),
                schedule=ScheduleConfig(shape="exponential", warmup=450, decay_rate=0.9, decay_steps=250, offset=1e-3),
                training=TrainingConfig(global_batch=65536, micro_batch=64, steps=6150),
                phase_two=PhaseTwoConfig(
                    steps=610,
                    sequence_length=512,
                    global_batch=32768,
                    micro_batch=8,
                    lr=2e-3,
                    warmup=150,
                    decay_steps=150,
                ),
            ),
            unverified={
                "training.steps": "403 million samples of the tutorial over the batch; the schedule's length is 7,500",
                "phase_two.steps": "20 million samples, between the tutorial's 18 and 22, over the batch",
            },
        ),
        named(
            "lamb-32k",
            "BERT-Large with LAMB at 32K in both phases, the paper's hyper-parameters",
            f"{_LAMB_PAPER}: batch and 15,625 updates, the first 90 % of them short, as cited by {_VRGD_PAPER}",
            **_large_bert(
                optimizer=OptimizerConfig(name="lamb", lr=5e-3),
                schedule=ScheduleConfig(warmup=0.2),
                training=TrainingConfig(global_batch=32768, micro_batch=256, steps=14063),
                phase_two=PhaseTwoConfig(
                    steps=1562,
                    sequence_length=512,
                    global_batch=32768,
                    micro_batch=32,
                    reset_schedule=False,
                    reset_step=False,
                ),
            ),
            unverified={
                "optimizer.lr": REMEMBERED,
                "schedule.warmup": REMEMBERED,
                "phase_two.reset_schedule": f"one schedule over both phases is {REMEMBERED}",
            },
        ),
        named(
            "lans-96k-33k",
            "BERT-Large with LANS at 96K, then 33K: 4,301 updates",
            f"{_LANS_PAPER}: batches and target; 98,304 as in GluonNLP's recipe, of the same group",
            **_large_bert(
                optimizer=OptimizerConfig(name="lans", lr=6.75e-3),
                schedule=ScheduleConfig(warmup=0.4265, constant=0.2735),
                training=TrainingConfig(global_batch=98304, micro_batch=128, steps=3519, gradient_clipping=0.0),
                phase_two=PhaseTwoConfig(
                    steps=782,
                    sequence_length=512,
                    global_batch=33792,
                    micro_batch=16,
                    lr=5e-3,
                    warmup=0.192,
                    constant=0.108,
                ),
            ),
            unverified={
                **dict.fromkeys(
                    (
                        "optimizer.lr",
                        "schedule.warmup",
                        "schedule.constant",
                        "phase_two.lr",
                        "phase_two.warmup",
                        "phase_two.constant",
                    ),
                    REMEMBERED,
                ),
                "training.steps": f"{REMEMBERED}; Table 1 of {_VRGD_PAPER} has LANS in its column of 96K/32K, 6,256 "
                "updates, while 4,301 is its column of 128K/64K, which VR-LAMB alone has",
                "phase_two.steps": "as training.steps",
                "phase_two.global_batch": "33K is read as 33 x 1,024",
                "training.gradient_clipping": f"{CHOSEN}: LANS normalises every layer's gradient itself",
            },
        ),
        named(
            "lans-96k-gluonnlp",
            "BERT-Base with LANS at 96K, sequences of 128 alone: 3,870 updates",
            f"{_GLUONNLP}: cased, beside its own sentence objective; a second phase is announced there and not given",
            **_large_bert(
                model=ModelConfig(dropout=0.1).of_size("base"),
                data=DataConfig(vocabulary=28996, sequence_length=128, validation_sequences=10_000),
                optimizer=OptimizerConfig(name="lans", lr=5e-3),
                schedule=ScheduleConfig(warmup=0.05, constant=0.25),
                training=TrainingConfig(global_batch=98304, micro_batch=128, steps=3870),
            ),
            unverified={
                "model.dropout": "that of BERT-Base; the recipe takes it from a configuration that was not read",
                "data.vocabulary": "that of Google's cased BERT-Base, which the recipe names; not read there",
            },
        ),
        _vr_lamb(
            "vr-lamb-64k-32k",
            _Regime(batch=65536, micro=256, steps=7037, lr=6e-3),
            _Regime(batch=32768, micro=32, steps=1562, lr=4e-3),
        ),
        _vr_lamb(
            "vr-lamb-96k",
            _Regime(batch=98304, micro=128, steps=4693, lr=7.348e-3),
            _Regime(batch=98304, micro=16, steps=521, lr=6.928e-3),
        ),
        _vr_lamb(
            "vr-lamb-128k-64k",
            _Regime(batch=131072, micro=256, steps=3519, lr=8.485e-3),
            _Regime(batch=65536, micro=32, steps=782, lr=5.657e-3),
        ),
        named(
            "adamw-64k",
            "BERT-Large with AdamW at 64K, then 32K, the baseline that is often left untuned",
            "Nado et al. 2021 (arXiv 2102.06356): batches and 8,599 updates, as cited by " + _VRGD_PAPER,
            **_large_bert(
                optimizer=OptimizerConfig(name="adamw", lr=1e-3, options={"betas": [0.9, 0.999], "eps": 1e-6}),
                schedule=ScheduleConfig(warmup=0.2843),
                training=TrainingConfig(global_batch=65536, micro_batch=256, steps=7037),
                phase_two=PhaseTwoConfig(
                    steps=1562, sequence_length=512, global_batch=32768, micro_batch=32, lr=5e-4, warmup=0.128
                ),
            ),
            unverified={
                **dict.fromkeys(
                    (
                        "optimizer.lr",
                        "optimizer.betas",
                        "optimizer.eps",
                        "phase_two.lr",
                        "schedule.warmup",
                        "phase_two.warmup",
                    ),
                    f"{CHOSEN}; try at least three learning rates before comparing",
                ),
                "training.steps": "the source gives the total of both phases; split 9:1 in samples here",
                "phase_two.steps": "as training.steps",
            },
        ),
        *(_mlperf(batch, point) for batch, point in _REFERENCE_POINTS.items()),
        *MODERN,
    ]
)

# What two slow cores read in two and a half minutes. A small vocabulary and many small updates learn most from it;
# the noise scale, at micro-batches as small as these, would take a sixth of the time.
_TINY: dict[str, Any] = {
    "data": DataConfig(vocabulary=2048),
    "training": TrainingConfig(global_batch=128, micro_batch=32, steps=560),
    "run": RunConfig(print_every=20, validate_every=80, checkpoint_every=280, noise_scale=False),
}

SMALL: dict[str, Preset] = dict(
    [
        named(
            "lamb-tiny",
            "2 x 128 BERT on the installed packages' documentation with LAMB: minutes on two CPU cores",
            "this recipe; vocabulary, batch and learning rate chosen for what is learned from 72,000 sequences",
            **_TINY,
            optimizer=OptimizerConfig(name="lamb", lr=0.01),
        ),
        named(
            "adamw-tiny",
            "the same model, data and schedule with AdamW, as a baseline",
            "this recipe; the learning rate is a common one for models of this size, not tuned here",
            **_TINY,
            optimizer=OptimizerConfig(name="adamw", lr=0.002),
        ),
    ]
)

PRESETS: dict[str, Preset] = {
    **SMALL,
    **PUBLISHED,
    **{f"{name}-{size}": twin(preset, size) for name, preset in PUBLISHED.items() for size in TWIN_SIZES},
}


def get_preset(name: str) -> RecipeConfig:
    """Return the configuration of a preset.

    Raises:
        RecipeError: no preset has that name; the message gives the nearest ones.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name].config


def list_presets() -> list[str]:
    """Return the lines of `--list-presets`: every preset, what it is for, its source, and what is unverified."""
    lines = []
    for name, preset in PRESETS.items():
        lines.append(f"{name}: {preset.description}")
        if preset.twin_of is None:
            lines.append(f"    source: {preset.source}")
            lines.extend(f"    unverified: {key} ({why})" for key, why in preset.unverified.items())
    return lines
