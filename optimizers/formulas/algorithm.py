"""What an algorithm is: its state, its options' ranges, the sums that it measures, and what it does to an element.

The first file to read for whoever writes one; docs/adding-an-optimizer.md goes through an example.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from ..gradient_statistics.watch import GradientStatistics
from ..sharding.layout import Layout
from .chunk_view import ChunkView
from .layer_table import LayerTable
from .stages import Stage
from .updates import Update

__all__ = ["Algorithm"]


class Algorithm:
    """The part of an optimizer that its paper describes; `LayerwiseOptimizer` makes a torch.optim.Optimizer of it.

    One `step()` call runs `stages` to their end, each followed by one reduction over the processes, and then `update`
    or `change`. All are given one parameter group and the numbers of its layers, and need no process group, no device
    and no number on the host. Groups that are stepped together, see `vector_options`, count as one.
    """

    vector_options: ClassVar[tuple[str, ...]] = ()
    """Options that the formulas here take as a vector over the layers too, such as ("lr", "weight_decay"); and "adapt",
    where they read `LayerTable.adapt` in its place. Neighbouring groups that differ in nothing else are stepped
    together, and an option in which they differ is an fp64 vector then. Any other key in which groups differ parts
    them, as formulas may read it, unless `step_options` says which they read. Only what torch's schedulers write, such
    as `initial_lr`, is a vector too. Each class says so for itself, as a subclass may have other formulas; where
    nothing is said, groups are stepped one by one."""

    step_options: ClassVar[tuple[str, ...] | None] = None
    """Keys of a group that `stages`, `update` and `change` read, its options and others: joined groups may differ in
    all that are not named. None for any key, in the package's own classes for all options. Not inherited either."""

    counts_steps: ClassVar[bool] = True
    """Whether each group's `step` is the number of steps taken. If not, that key is somebody else's."""

    group_statistics: ClassVar[str | None] = None
    """What is kept of the groups' gradients: None, "norms" per layer, or "squares" per element besides."""

    keeps_own_state: ClassVar[bool] = True
    """Whether state and weights are written here alone, so that the options in `STORAGE_OPTIONS` say how."""

    plan_options: ClassVar[tuple[str, ...]] = ("adapt", "segments")
    """Group options that `check_layout` and `has_rows` ask for, and the base's: setting one makes a new plan."""

    refused_options: ClassVar[Mapping[str, str]] = {}
    """Options of its relatives that have no meaning here, and why: a clause for the message that refuses them."""

    plain_options: ClassVar[tuple[str, ...] | None] = None
    """Options in which numbers of other kinds become Python's; None for all."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.vector_options = vars(cls).get("vector_options", ())
        cls.step_options = vars(cls).get("step_options")

    # What torch.optim.Optimizer and the base keep for it

    param_groups: list[dict[str, Any]]
    defaults: dict[str, Any]
    state: defaultdict[torch.Tensor, Any]

    @property
    def statistics(self) -> GradientStatistics | None:
        """Sees the groups' gradients, where they are wanted. See `LayerwiseOptimizer.collect_group_norms`."""
        return None

    implementation: str | None
    """Who goes over the elements. See `LayerwiseOptimizer.implementation`."""

    # What an algorithm fills in

    @property
    def element_state(self) -> tuple[str, ...]:
        """Names of the state with one value per element, zero at first."""
        return ()

    @property
    def layer_state(self) -> tuple[str, ...]:
        """Names of the state with one number per layer, zero at first; `step` counts the updates of the layer."""
        return ("step",)

    def accumulates(self, group: dict[str, Any]) -> str | None:
        """What the moments or the momentum of a group's layers add up, e.g. "gradient + decay".

        In the words of `MEANINGS` in integrations/checkpoints/conversion.py, for state that optimizers elsewhere keep
        under the same names; None if nobody's means the same.
        """
        return None

    def check(self, group: dict[str, Any]) -> None:
        """Raise ValueError if an option of the group is out of range."""

    newer_options: tuple[str, ...] = ()
    """Options that groups of older files lack: loading such a file leaves them as they are here."""

    def modernize(self, group: dict[str, Any]) -> None:
        """Rename, in place, the options of a group that an older version has saved."""

    def check_layout(self, layout: Layout) -> None:
        """Raise ValueError if an option cannot work with how the wrapper shards and steps.

        Asked whenever a plan is made: before the first step, after a load, when an option of `plan_options` was set.
        What counts are the groups' options, `self.param_groups[index]` for each index in `layout.groups`.
        """

    def has_rows(self, group: dict[str, Any]) -> bool:
        """Whether sums over the rows of this group's layers are measured; they must be two-dimensional."""
        return False

    def needs_model_norm(self, group: dict[str, Any]) -> bool:
        """Whether a step of this group uses the norm of the whole model's gradient."""
        return False

    def before_stages(self, layout: Layout) -> None:
        """Do what precedes the stages of one `step()` call, e.g. a reduction that cannot ride in theirs."""

    def inputs(
        self, layout: Layout, gradients: Sequence[torch.Tensor | None], *, is_first: bool
    ) -> Mapping[str, Sequence[torch.Tensor]]:
        """Return further tensors by name, each list with one like every local part, that chunks show: read only.

        Args:
            layout: Of the `step()` call.
            gradients: Of its local tensors, complete; None where there is none.
            is_first: Whether no step with these local tensors has found a gradient so far.
        """
        return {}

    def stages(self, group: dict[str, Any], layers: LayerTable) -> Iterator[Stage]:
        """Yield the stages whose sums the update needs; after each, its reduced sums are in `layers`.

        The sum of squares of the gradient, named "g", or its largest square must be among them.
        """
        raise NotImplementedError(f"{type(self).__name__} must define stages(): the sums that its update needs")

    def update(self, group: dict[str, Any], layers: LayerTable) -> Update | None:
        """Describe what happens to an element, with the numbers of the layers that are known by now.

        None if no description in `formulas.updates` fits; then `change` is called.
        """
        return None

    def change(self, group: dict[str, Any], layers: LayerTable, x: ChunkView) -> torch.Tensor:
        """Update the state in `x` and return what is subtracted from the weights, shape of `x.w`."""
        raise NotImplementedError(f"{type(self).__name__} must define change(): what happens to an element")
