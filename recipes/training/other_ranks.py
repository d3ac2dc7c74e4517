"""A run that another number of ranks continues: the same global batch, samples and masks, shared out anew."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from trustratio.optimizers import LayerwiseOptimizer

from ..common.errors import RecipeError
from ..configuration.batch_growth import growths_of
from ..configuration.config import RecipeConfig
from ..configuration.phases import Phase, phases_of
from ..model.build import outline
from ..planning.phase_plan import divisors
from .engines import ENGINE_STATE, TRAINING_STATE

_MOST_SHOWN = 8


def shared_anew(
    config: RecipeConfig, given: Collection[str], checkpoint: Path, saved: int | None, ranks: int
) -> RecipeConfig:
    """Return the configuration with micro-batches by which `ranks` can share out the global batch of each phase.

    A micro-batch that was given on the command line stays. Of an optimizer that takes statistics over the gradients of
    single micro-batches it stays, too: the groups of samples are then those of the undisturbed run.

    Args:
        config: of the run.
        given: names of the fields that the command line set.
        checkpoint: to continue.
        saved: ranks that wrote it; None if it does not say.
        ranks: of this run.

    Raises:
        RecipeError: these ranks cannot; the message names numbers of ranks that can.
    """
    if saved in (None, ranks):
        return config
    phases, kept = phases_of(config), _takes_statistics(config)
    shares = [batch // phase.micro_batch if kept else batch for phase, batch in _batches(config, phases)]
    if any(share % ranks for share in shares):
        batches = " and ".join(f"{phase.global_batch:,}" for phase in phases)
        cut = f" in micro-batches of {phases[0].micro_batch}, which its statistics are taken over," if kept else ""
        raise RecipeError(
            f"{checkpoint} was written by {saved} ranks, and {ranks} cannot share out its global batch of {batches} "
            f"sequences{cut} evenly; numbers of ranks that can: {_listed(math.gcd(*shares), ranks)}"
        )
    for section, phase in zip(("training", "phase_two"), phases, strict=False):
        if f"{section}.micro_batch" not in given:
            common = math.gcd(*(batch for owner, batch in _batches(config, phases) if owner == phase))
            part = dataclasses.replace(getattr(config, section), micro_batch=_fitting(common, phase.micro_batch, ranks))
            config = dataclasses.replace(config, **{section: part})
    return config


def _batches(config: RecipeConfig, phases: Sequence[Phase]) -> Iterator[tuple[Phase, int]]:
    """Yield the batches that have to be shared out, each with its phase."""
    yield from ((phase, phase.global_batch) for phase in phases)
    for growth in growths_of(config):
        yield from ((growth.phase, batch) for batch in growth.sizes)


def require_readable(checkpoint: Path, saved: int | None, ranks: int, zero_stage: int) -> None:
    """Check that another number of ranks can read a checkpoint.

    Raises:
        RecipeError: only as many ranks as wrote it can.
    """
    whole = zero_stage == 0 or any((checkpoint / name).is_file() for name in (ENGINE_STATE, TRAINING_STATE))
    if saved not in (None, ranks) and not whole:
        raise RecipeError(
            f"{checkpoint} is cut up among the {saved} ranks that wrote it under ZeRO-{zero_stage}, without "
            f"{ENGINE_STATE}, which other numbers of ranks read (bert.py and bert_accelerate.py write it for this "
            f"package's optimizers, unless run.for_any_ranks=false): continue it with {saved} ranks"
        )


def is_read(checkpoint: Path, saved: int | None, ranks: int) -> Callable[[str], bool]:
    """Return what tells whether `ranks` read a file of a checkpoint, which `saved` ranks wrote, by its name."""
    by_others = saved not in (None, ranks) and (checkpoint / ENGINE_STATE).is_file()
    return lambda name: (name == ENGINE_STATE) == by_others


def _takes_statistics(config: RecipeConfig) -> bool:
    if config.run.batch_from_noise:
        return True
    _, optimizer = outline(config)
    return isinstance(optimizer, LayerwiseOptimizer) and bool(optimizer.group_statistics)


def _fitting(batch: int, micro_batch: int, ranks: int) -> int:
    """Return the largest micro-batch, at most the given one, that divides a rank's share of the batch."""
    return max(size for size in divisors(batch // ranks) if size <= micro_batch)


def _listed(share: int, ranks: int) -> str:
    nearest = sorted(divisors(share), key=lambda count: abs(count - ranks))[:_MOST_SHOWN]
    return ", ".join(str(count) for count in sorted(nearest))
