"""The configuration of a pretraining run: nested dataclasses of plain values."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

ARCHITECTURES = {"bert": "BERT", "modernbert": "ModernBERT"}
ATTENTIONS = ("auto", "sdpa", "flash_attention_2")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
SHAPES = ("polynomial", "exponential", "wsd")
COOLDOWNS = ("linear", "1-sqrt")
UNITS = ("updates", "sequences", "tokens")
MASKS = ("anew", "as_given")
STATE_DTYPES = ("float32", "bfloat16")
MASTERS = ("stochastic", "kahan", "none")


class Shape(NamedTuple):
    """What a name of `MODEL_SIZES` stands for; `local_attention` means something to ModernBERT alone."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    intermediate: int
    local_attention: int = 128


def _bert(layers: int, hidden: int) -> Shape:
    """Return a shape of the BERT family: heads are 64 wide, the inner layer 4 x hidden."""
    return Shape("bert", layers, hidden, hidden // 64, 4 * hidden)


MODEL_SIZES: dict[str, Shape] = {
    "tiny": _bert(2, 128),
    "mini": _bert(4, 256),
    "small": _bert(4, 512),
    "medium": _bert(8, 512),
    "base": _bert(12, 768),
    "large": _bert(24, 1024),
    "modernbert-tiny": Shape("modernbert", 3, 128, 2, 192, 32),
    "modernbert-mini": Shape("modernbert", 6, 256, 4, 384, 64),
    "modernbert-small": Shape("modernbert", 9, 512, 8, 768),
    "modernbert-base": Shape("modernbert", 22, 768, 12, 1152),
    "modernbert-large": Shape("modernbert", 28, 1024, 16, 2624),
}
"""Shapes by name. BERT's base and large are of Devlin et al. 2018 (arXiv 1810.04805), the rest of Turc et al. 2019
(1908.08962). ModernBERT's base and large are of Warner et al. 2024 (2412.13663); its smaller ones are scaled down here:
inner layers 1.5 x hidden as base has, windows cut as a preset's twin cuts its sequences."""

MODERNBERT_FIELDS = ("global_attention_every", "local_attention", "global_rope_theta", "local_rope_theta")
"""Fields of `ModelConfig` that BERT has no use for."""

MOST_POSITIONS = {"bert": 512, "modernbert": 8192}
"""`max_positions` of the published models."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the encoder, "bert" or "modernbert". `max_positions` is more than a first phase's sequences have, so
    that a later phase can use longer ones.

    ModernBERT alone has the next four: every `global_attention_every`th layer, from the first on, attends to the whole
    sequence, the others to a window of `local_attention` tokens, half of them on either side; `global_rope_theta` and
    `local_rope_theta` are the bases of the rotary positions in the two kinds of layer.

    `attention` computes it: "sdpa", "flash_attention_2", or "auto", see `attention_of`.
    `initial_weights` is a folder in transformers' format whose weights training starts from; None: random ones.
    """

    layers: int = 2
    hidden: int = 128
    heads: int = 2
    intermediate: int = 512
    max_positions: int = 512
    dropout: float = 0.0
    initial_weights: str | None = None
    architecture: str = "bert"
    global_attention_every: int = 3
    local_attention: int = 128
    global_rope_theta: float = 160000.0
    local_rope_theta: float = 10000.0
    attention: str = "auto"

    @property
    def local_layers(self) -> int:
        """How many layers attend to windows; none of BERT."""
        if self.architecture == "bert":
            return 0
        return self.layers - len(range(0, self.layers, self.global_attention_every))

    def of_size(self, name: str) -> ModelConfig:
        """Return the same with one of `MODEL_SIZES`; of another architecture it has the published limits and bases."""
        shape = MODEL_SIZES[name]
        if shape.architecture == self.architecture:
            return dataclasses.replace(self, **shape._asdict())
        return ModelConfig(
            max_positions=MOST_POSITIONS[shape.architecture],
            dropout=self.dropout,
            initial_weights=self.initial_weights,
            attention=self.attention,
            **shape._asdict(),
        )


@dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer, packing and masking.

    `sources` holds files, globs, folders of `Dataset.save_to_disk`, `hf:NAME` data sets, or one folder that `prepare`
    wrote; empty means the documentation of the installed packages. Tables have their text in `text_column`.
    Reading stops after `max_documents`, or when there are `max_characters`; None: at the end.
    `tokenizer` is a local path or a hub name; None trains a WordPiece vocabulary of `vocabulary` tokens on the text.
    `lowercase` is for a tokenizer that is a `vocab.txt`; None: as a file beside it or its own letters say.
    `masks` is "anew", drawn in every epoch, or "as_given", those of shards that are masked already.
    `workers` processes per rank read and mask ahead; None: up to two where there is an accelerator, none on a CPU.
    `validation_fraction` is a share of the documents, `validation_sequences` the most rows that a validation reads.
    `discard_smallest` of an update's masked tokens, those with the smallest losses, are left out of its loss.
    `verify` reads every byte of the prepared files once before training and compares their hashes.
    """

    sources: tuple[str, ...] = ()
    text_column: str = "text"
    max_documents: int | None = None
    max_characters: int | None = None
    tokenizer: str | None = None
    lowercase: bool | None = None
    vocabulary: int = 8192
    sequence_length: int = 32
    mask_probability: float = 0.15
    masks: str = "anew"
    discard_smallest: float = 0.0
    validation_fraction: float = 0.02
    validation_sequences: int = 2048
    workers: int | None = None
    verify: bool = True


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer by name. `options` are passed to its constructor besides lr and weight decay."""

    name: str = "lamb"
    lr: float = 0.02
    weight_decay: float = 0.01
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the updates of a phase.

    shape "polynomial": linear warm-up, a plateau of `constant`, then polynomial decay of `degree` to `final` times the
    peak. `decay_from_start` counts the decay from the phase's first update on, so that the warm-up hides its beginning;
    `warmup_start` is the update that the warm-up counts from (negative: it begins part of the way up).

    shape "exponential": quadratic warm-up, then the rate falls by the factor `decay_rate` every `decay_steps` updates
    (DeepSpeed's EE).

    shape "wsd" (warmup-stable-decay, trapezoidal): linear warm-up, the peak, and over the last `cooldown` a decay to
    `final` times the peak, "linear" or "1-sqrt" as `cooldown_form` says. 0: it stays at the peak.

    `warmup`, `constant` and `cooldown` below 1 are fractions of the phase, from 1 on numbers in `unit`: "updates" of
    the phase's global batch, "sequences" or "tokens"; so is `run.batch_warmup`. `warmup_start` and `decay_steps` are
    updates of the global batch in any unit. `offset` is added to the learning rate at every update.
    """

    shape: str = "polynomial"
    warmup: float = 0.1
    warmup_start: int = 0
    constant: float = 0.0
    degree: float = 1.0
    final: float = 0.0
    decay_from_start: bool = False
    decay_rate: float = 0.9
    decay_steps: float = 250.0
    offset: float = 0.0
    cooldown: float = 0.1
    cooldown_form: str = "1-sqrt"
    unit: str = "updates"


@dataclass(frozen=True)
class PhaseTwoConfig:
    """A second phase with longer sequences, after `training.steps` updates; `steps` = 0 means there is none.

    What it takes over from the first phase is explicit: weights always; the optimizer's moments if `keep_moments`; its
    count of updates, which bias correction uses, begins anew if `reset_step`. With `reset_schedule` the learning rate
    begins anew too: `lr`, `warmup`, `constant`, `cooldown`, `decay_steps` and `offset` are the second phase's,
    everything else of `schedule` holds for both. Without it, one schedule goes over the updates of both phases and
    these six are unused.

    `global_rope_theta` is ModernBERT's from the second phase on, which was trained on long sequences with a larger one
    than on short ones; None: the model's.
    """

    steps: int = 0
    sequence_length: int = 128
    global_batch: int = 192
    micro_batch: int = 24
    lr: float = 0.01
    warmup: float = 0.1
    constant: float = 0.0
    cooldown: float = 0.1
    decay_steps: float = 250.0
    offset: float = 0.0
    keep_moments: bool = True
    reset_step: bool = True
    reset_schedule: bool = True
    global_rope_theta: float | None = None


@dataclass(frozen=True)
class TrainingConfig:
    """Batch in sequences, number of optimizer steps (the schedule's length), precision, ZeRO stage and seed.

    `compile` runs the model through torch.compile; `activation_checkpointing` keeps only each encoder layer's input and
    computes the rest again in backward.

    `state_dtype` is what the optimizer keeps its element-wise state in, "float32" or "bfloat16", which is rounded
    stochastically; None: fp32. With `master` the weights are bf16 and nobody keeps fp32 masters of them: an update is
    rounded stochastically ("stochastic"), or what rounding left is kept beside it in bf16 ("kahan"), or it is rounded
    to nearest ("none", which loses small updates). None: fp32 weights, or masters kept by the wrapper.
    """

    global_batch: int = 512
    micro_batch: int = 64
    steps: int = 340
    precision: str = "auto"
    zero_stage: int = 1
    gradient_clipping: float = 1.0
    seed: int = 1
    compile: bool = False
    activation_checkpointing: bool = False
    state_dtype: str | None = None
    master: str | None = None


@dataclass(frozen=True)
class RunConfig:
    """How often, in steps, a run logs, prints, validates and writes checkpoints (0: only at the end).

    Every step is logged; `log_every` is how many steps' values are brought from the device together. `loggers` are
    "tensorboard" and "wandb", besides metrics.jsonl. `noise_scale` measures the gradient noise scale; None: where that
    is possible. `for_any_ranks` writes, beside the files of a checkpoint that ZeRO has cut up, one as large again that
    other numbers of ranks continue from. `peak_tflops` is what one device can do at most, for the utilisation; None:
    from a table of devices. `hang_seconds` is how long all ranks may stand still before the run ends with a message,
    which names the one that holds it up; 0 or None: for ever. `most_skipped_updates` in a row may be skipped because
    gradients overflow in fp16: even a loss scale that begins at 2^32 has been halved to 1 by then.

    With `batch_from_noise` the batch grows from `smallest_batch` to at most `largest_batch` (both in the first phase's
    sequences; None: the global batch): it doubles where the averaged gradient noise scale is at least `noise_per_batch`
    times the batch, which is looked at every `batch_every` updates. The noise is measured then whatever `noise_scale`
    says.

    With `batch_warmup` above 0 the batch of the first phase grows from `smallest_batch` to the global batch over so
    much of the phase, counted as `schedule.unit` says, in steps of `smallest_batch`; every size has as many updates.
    See `batch_growth` for both.
    """

    log_every: int = 10
    print_every: int = 10
    validate_every: int = 20
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    loggers: tuple[str, ...] = ()
    noise_scale: bool | None = None
    for_any_ranks: bool = True
    peak_tflops: float | None = None
    hang_seconds: float | None = 1800.0
    most_skipped_updates: int = 40
    batch_from_noise: bool = False
    smallest_batch: int | None = None
    largest_batch: int | None = None
    batch_every: int = 20
    noise_per_batch: float = 2.0
    batch_warmup: float = 0.0


@dataclass(frozen=True)
class RecipeConfig:
    """Everything that decides what a run computes; printed at the start and saved in the output folder."""

    preset: str = "custom"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    phase_two: PhaseTwoConfig = PhaseTwoConfig()
    run: RunConfig = RunConfig()

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and scalars, as they are written to JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def sequences_in(unit: str, global_batch: int, sequence_length: int) -> float:
    """Return how many sequences one of `UNITS` is."""
    return {"updates": global_batch, "sequences": 1, "tokens": 1 / sequence_length}[unit]


def batch_and_length(config: RecipeConfig, phase: int) -> tuple[int, int]:
    """Return sequences per update and tokens per sequence of phase 1 or 2."""
    if phase == 1:
        return config.training.global_batch, config.data.sequence_length
    return config.phase_two.global_batch, config.phase_two.sequence_length
