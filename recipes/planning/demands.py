"""What options demand of others: refused by the plan and before a run alike."""

from __future__ import annotations

from trustratio.optimizers import OPTIMIZERS

from ..common.errors import RecipeError
from ..configuration.config import RecipeConfig
from ..model.optimizer import is_baseline
from ..rules.global_batch import BatchPlan


def check_demands(config: RecipeConfig) -> None:
    """Check what no number of ranks changes.

    Raises:
        RecipeError: options that cannot go together.
    """
    _check_discarding(config)
    _check_waiting(config)
    if option := _measuring(config):
        _check_norms(config, option)


def check_groups(config: RecipeConfig, plan: BatchPlan) -> None:
    """Check that an update has micro-batches to compare where the gradient noise scale is asked for.

    Args:
        config: of the run.
        plan: of a phase's updates, of its smallest ones where batches grow.

    Raises:
        RecipeError: it has a single one.
    """
    option = _measuring(config)
    if option and plan.ranks * plan.accumulation < 2:
        raise RecipeError(
            f"{option}=true compares the gradients of at least 2 micro-batches per update; "
            f"{plan.describe(config.data.sequence_length)} has 1: halve --micro_batch"
        )


def check_first_groups(config: RecipeConfig, plan: BatchPlan) -> None:
    """Check that an optimizer which compares group gradients has several from the first update of a batch warm-up on.

    Args:
        config: of the run.
        plan: of the first phase's smallest updates.

    Raises:
        RecipeError: they have a single micro-batch, and the optimizer would be another one until the batch has grown.
    """
    if compares_growing_groups(config) and plan.ranks * plan.accumulation < 2:
        raise RecipeError(
            f"{config.optimizer.name} compares the gradients of an update's micro-batches, and the first updates of "
            f"run.batch_warmup={config.run.batch_warmup:g} have 1: {plan.describe(config.data.sequence_length)}; halve "
            "--micro_batch, or give a larger run.smallest_batch"
        )


def compares_growing_groups(config: RecipeConfig) -> bool:
    """Tell whether the optimizer goes by the gradients of single micro-batches, of batches that warm up."""
    entry = OPTIMIZERS.get(config.optimizer.name)
    return bool(config.run.batch_warmup and entry is not None and entry.group_statistics)


def _measuring(config: RecipeConfig) -> str:
    """Return the option that asks for the gradient noise scale, or ""."""
    if config.run.batch_from_noise:
        return "run.batch_from_noise"
    return "run.noise_scale" if config.run.noise_scale else ""


def _check_norms(config: RecipeConfig, option: str) -> None:
    if config.run.batch_from_noise and "segments" in config.optimizer.options:
        raise RecipeError(
            f"{option}=true goes by the norms of whole parameters' gradients, and optimizer.segments cuts them up: "
            "leave one of them out"
        )
    if is_baseline(config.optimizer.name):
        raise RecipeError(
            f"{option}=true needs one of trustratio's optimizers, which keep the norms of single micro-batches' "
            f"gradients; {config.optimizer.name!r} does not"
        )


def _check_waiting(config: RecipeConfig) -> None:
    """A run must be longer than its optimizer waits, or it measures the weights that it began with."""
    entry = OPTIMIZERS.get(config.optimizer.name)
    if entry is None or entry.waits is None:
        return
    waited = config.optimizer.options.get(entry.waits, entry.defaults[entry.waits])
    updates = config.training.steps + config.phase_two.steps
    if updates <= waited:
        raise RecipeError(
            f"{config.optimizer.name} moves no weight in its first {waited} updates (optimizer.{entry.waits}), and the "
            f"run has {updates}: give more training.steps, or a smaller optimizer.{entry.waits}"
        )


def _check_discarding(config: RecipeConfig) -> None:
    """The two forward passes of an update have to see the same dropout masks."""
    if config.data.discard_smallest and config.training.compile and config.model.dropout:
        raise RecipeError(
            f"data.discard_smallest={config.data.discard_smallest} and training.compile=true cannot go together with "
            f"model.dropout={config.model.dropout}: the losses come from a pass without gradients, where a compiled "
            "model is another program, which may draw other dropout masks; set model.dropout=0 or leave compile out"
        )
