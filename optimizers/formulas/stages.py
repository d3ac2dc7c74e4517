"""The stages of a step: sums over layers that are measured together and added up by one all-reduce.

Largest numbers of layers are measured in the same way, and take an all-reduce of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .chunk_view import ChunkView
from .chunks import Summand, squares
from .layer_table import LayerTable
from .updates import Measurable, TrustRule

__all__ = ["Stage", "Sums", "maxima_over_layers", "sums_over_layers", "sums_over_rows"]


class Stage(Protocol):
    """Sums that are measured together: `Sums`, or a method with `sums_over_layers` or `maxima_over_layers` above it."""

    @property
    def sum_sizes(self) -> Mapping[str, int]:
        """Names of the sums over layers, in the order in which they are returned, and how many numbers each has."""

    @property
    def maximum_names(self) -> Sequence[str]:
        """Names of the largest squares in layers, which are returned after the sums over layers."""

    @property
    def row_names(self) -> Sequence[str]:
        """Names of the sums over rows, which are returned last."""

    def __call__(self, group: dict[str, Any], layers: LayerTable, x: ChunkView) -> Sequence[Summand]:
        """Return the elements whose sums are wanted, of one chunk."""


StageMethod = Callable[[Any, dict[str, Any], LayerTable, ChunkView], tuple[Summand, ...]]


def sums_over_layers(*names: str, **histograms: int) -> Callable[[StageMethod], Any]:
    """Declare the sums that a stage measures, in the order in which it returns them.

    The names must be known without running the stage, because a rank that holds no shard joins the reduction too.

    Args:
        names: Sums of one number per layer (`squares`, `values`).
        histograms: Name and number of bins of each histogram (`counts`); they follow the others.
    """

    def declare(stage: StageMethod) -> StageMethod:
        stage.sum_sizes = {**dict.fromkeys(names, 1), **histograms}  # type: ignore[attr-defined]
        stage.maximum_names = stage.row_names = ()  # type: ignore[attr-defined]
        return stage

    return declare


def maxima_over_layers(*names: str) -> Callable[[StageMethod], Any]:
    """Declare the largest squares in each layer that a stage measures (`largest`), after its sums if it has some.

    `LayerTable.total` returns them, so that `LayerTable.norm` is the maximum norm. Stands alone, or above
    `sums_over_layers`; then the stage takes two all-reduces.
    """

    def declare(stage: StageMethod) -> StageMethod:
        if not hasattr(stage, "sum_sizes"):
            stage = sums_over_layers()(stage)
        stage.maximum_names = names  # type: ignore[attr-defined]
        return stage

    return declare


def sums_over_rows(*names: str) -> Callable[[StageMethod], Any]:
    """Declare sums over each row, which a stage returns after those over layers; for groups with `has_rows`.

    Stands above `sums_over_layers`.
    """

    def declare(stage: StageMethod) -> StageMethod:
        stage.row_names = names  # type: ignore[attr-defined]
        return stage

    return declare


@dataclass(frozen=True, eq=False)
class Sums:
    """A stage: sums over layers, by the names that the update gives them.

    Attributes:
        names: E.g. "w" and "g", the sums of squares of the weights and of the gradient; and "c" where a rule clips.
        of: What is measured; None for the weights "w" and the gradient "g" alone.
        rules: If given, this is the last stage, and `of` is the whole update but for the vectors that these rules name:
            each must be multiplied by its rule's ratio. So whoever has all of a layer may apply the update at once.
    """

    names: tuple[str, ...]
    of: Measurable | None = None
    rules: tuple[TrustRule, ...] = ()

    def __init__(self, *names: str, of: Measurable | None = None, rules: Sequence[TrustRule] = ()):
        clips = any(rule.update_clip is not None for rule in rules)
        object.__setattr__(self, "names", (*names, "c") if clips else names)
        object.__setattr__(self, "of", of)
        object.__setattr__(self, "rules", tuple(rules))

    @property
    def sum_sizes(self) -> dict[str, int]:
        return dict.fromkeys(self.names, 1)

    @property
    def maximum_names(self) -> tuple[str, ...]:
        return ()

    @property
    def row_names(self) -> tuple[str, ...]:
        return ()

    def __call__(self, group: dict[str, Any], layers: LayerTable, x: ChunkView) -> Sequence[Summand]:
        summands = {"w": squares(x.w), "g": squares(x.g)} if self.of is None else self.of.measure(x)
        return [summands[name] for name in self.names]
