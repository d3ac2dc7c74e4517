"""What a preset is, and its twins: the same rules scaled to models and batches that a small machine trains."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .config import DataConfig, PhaseTwoConfig, RecipeConfig, RunConfig, batch_and_length, sequences_in


@dataclass(frozen=True)
class Preset:
    """A configuration under a name.

    Attributes:
        config: the configuration.
        description: what it is for, in one line.
        source: where its numbers come from.
        unverified: fields (`section.field`) whose value was not read in that source, and why.
        twin_of: the preset that it is scaled down from, or None.
    """

    config: RecipeConfig
    description: str
    source: str
    unverified: dict[str, str] = field(default_factory=dict)
    twin_of: str | None = None


CHOSEN = "not published; chosen here and not tuned"
"""Why a value is unverified that has no source."""


def named(name: str, description: str, source: str, **sections: Any) -> tuple[str, Preset]:
    """Return an entry of a table of presets: its `sections` that differ from the defaults, and what is `unverified`."""
    unverified = sections.pop("unverified", {})
    return name, Preset(RecipeConfig(preset=name, **sections), description, source, unverified)


_CORPUS_RATIO = 2048 / 3
"""Tokens of Wikipedia and Books over those of the built-in corpus, so rounded that 64K becomes 384 for a tiny twin:
3.3 billion words (Devlin et al. 2018) at about 1.3 tokens each, over 6.4 million, are 670."""

_TWIN_UNIT = 12
"""Twins' batches are multiples of this, so that most small numbers of ranks divide them."""


@dataclass(frozen=True)
class TwinSize:
    """How far a published recipe is scaled down.

    Attributes:
        sequence_divisor: of both phases' sequence lengths.
        step_divisor: of both phases' updates.
        runs_on: the machine it is meant for.
    """

    sequence_divisor: int
    step_divisor: int
    runs_on: str

    def batch(self, sequences: int) -> int:
        """Return the twin's global batch for a published one."""
        # The corpus in sequences of the phase's length shrinks by the ratio of the tokens over the divisor.
        exact = sequences / _CORPUS_RATIO * self.sequence_divisor
        return max(1, round(exact / _TWIN_UNIT)) * _TWIN_UNIT

    def updates(self, steps: float) -> int:
        """Return the twin's number of updates for a published one."""
        return round(steps / self.step_divisor)


TWIN_SIZES = MappingProxyType(
    {
        "tiny": TwinSize(sequence_divisor=4, step_divisor=20, runs_on="two CPU cores"),
        "mini": TwinSize(sequence_divisor=2, step_divisor=10, runs_on="CPU cores or one GPU"),
        "small": TwinSize(sequence_divisor=1, step_divisor=5, runs_on="one GPU"),
    }
)


def twin(preset: Preset, size: str) -> Preset:
    """Scale a published preset down to `size` ("tiny", "mini", "small").

    The share of the corpus that one batch is stays what it was (64K of 34 million sequences of 128: 1/512), and with
    it the ratio of the two phases' batches, both to the nearest multiple of 12; so do warm-up and decay as shares of
    the updates, and every other hyper-parameter, the learning rate among them. Model, vocabulary and sequences shrink,
    and the number of updates is divided too: a twin rehearses a recipe, it does not reproduce its result.
    """
    scale, config = TWIN_SIZES[size], preset.config
    global_batch = scale.batch(config.training.global_batch)
    run = _run(config, global_batch)
    scaled = dataclasses.replace(
        config,
        preset=f"{config.preset}-{size}",
        model=config.model.of_size(size if config.model.architecture == "bert" else f"modernbert-{size}"),
        data=dataclasses.replace(
            config.data,
            vocabulary=DataConfig().vocabulary,
            sequence_length=config.data.sequence_length // scale.sequence_divisor,
            validation_sequences=DataConfig().validation_sequences,
        ),
        schedule=dataclasses.replace(
            config.schedule,
            warmup_start=scale.updates(config.schedule.warmup_start),
            decay_steps=config.schedule.decay_steps / scale.step_divisor,
        ),
        training=dataclasses.replace(
            config.training,
            global_batch=global_batch,
            micro_batch=run.smallest_batch // 4 if run.smallest_batch else _micro_batch(global_batch),
            steps=scale.updates(config.training.steps),
        ),
        phase_two=_phase_two(config.phase_two, scale),
        run=run,
    )
    return Preset(
        _with_durations(config, scaled, scale),
        f"{size} twin of {config.preset}, for {scale.runs_on}",
        f"scaled down from {config.preset}: batch to data kept, sequences 1/{scale.sequence_divisor}, updates "
        f"1/{scale.step_divisor}",
        {**preset.unverified, "optimizer.lr": "the published recipe's, not tuned for this size"},
        twin_of=config.preset,
    )


def _with_durations(config: RecipeConfig, scaled: RecipeConfig, scale: TwinSize) -> RecipeConfig:
    """Scale durations: fractions (below 1) stay; numbers keep their share of the phase, whatever their unit."""
    ratios = [_ratio(config, scaled, phase, scale) for phase in (1, 2)]
    fields = [("run", "batch_warmup", ratios[0])]
    for section, ratio in zip(("schedule", "phase_two"), ratios, strict=True):
        fields += [(section, name, ratio) for name in ("warmup", "constant", "cooldown")]
    for section, name, ratio in fields:
        part = getattr(scaled, section)
        if (value := getattr(part, name)) >= 1:
            part = dataclasses.replace(part, **{name: float(max(1, round(value * ratio)))})
            scaled = dataclasses.replace(scaled, **{section: part})
    return scaled


def _ratio(config: RecipeConfig, scaled: RecipeConfig, phase: int, scale: TwinSize) -> float:
    """Return what a duration of a phase, in updates or in what as many updates read, is multiplied by."""
    old, new = (sequences_in(config.schedule.unit, *batch_and_length(part, phase)) for part in (config, scaled))
    batches = [batch_and_length(part, phase)[0] for part in (config, scaled)]
    return batches[1] / new / (batches[0] / old) / scale.step_divisor


def _run(config: RecipeConfig, global_batch: int) -> RunConfig:
    """Return a twin's intervals, and its batch's warm-up, which begins with the same share of the global batch.

    That is, the largest up to it, of at least 4 sequences, by which up to 4 ranks can share out every size.
    """
    run = config.run
    if not run.batch_warmup or run.smallest_batch is None:
        return RunConfig()
    share = max(4, run.smallest_batch * global_batch // config.training.global_batch)
    smallest = max(size for size in range(4, share + 1, 4) if global_batch % size == 0)
    return RunConfig(smallest_batch=smallest, batch_warmup=run.batch_warmup)


def _phase_two(second: PhaseTwoConfig, scale: TwinSize) -> PhaseTwoConfig:
    if not second.steps:
        return second
    global_batch = scale.batch(second.global_batch)
    return dataclasses.replace(
        second,
        steps=scale.updates(second.steps),
        sequence_length=second.sequence_length // scale.sequence_divisor,
        global_batch=global_batch,
        micro_batch=_micro_batch(global_batch),
        decay_steps=second.decay_steps / scale.step_divisor,
    )


def _micro_batch(global_batch: int) -> int:
    """Return a share of a twin's batch that 1, 2 and 4 ranks, and mostly 8, can work on."""
    return global_batch // (8 if global_batch % 8 == 0 else 12)
