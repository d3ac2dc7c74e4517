"""What was measured in one step: numbers of each layer and of the whole model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["LayerNorm", "MeasuredNorms"]


@dataclass(frozen=True)
class LayerNorm:
    """Norms of one layer, or of the whole model, in one step; over all of its elements, wherever they lie.

    Attributes:
        weight: ‖w‖ (L2) before the step.
        gradient: ‖g‖ as the optimizer saw it: averaged, unscaled and clipped.
        update: ‖Δw‖, of what the step has changed.
        ratio: ‖Δw‖ / ‖w‖; 0 where nothing changed, infinite where only the weights were zero.
        weight_rms: √(mean of w²); the next two likewise.
        gradient_rms: Of g.
        update_rms: Of Δw.
        largest_weight: max |w|; the next two likewise.
        largest_gradient: Of g.
        largest_update: Of Δw.
        zero_weights: Share of the elements that are exactly zero, in [0, 1]; the next two likewise.
        zero_gradients: Of g; 1 where the layer has no gradient.
        zero_updates: Of Δw: elements that the step did not move.
    """

    weight: float
    gradient: float
    update: float
    ratio: float
    weight_rms: float
    gradient_rms: float
    update_rms: float
    largest_weight: float
    largest_gradient: float
    largest_update: float
    zero_weights: float
    zero_gradients: float
    zero_updates: float


class MeasuredNorms(dict[str, LayerNorm]):
    """The numbers of every layer by its name, of one step.

    Attributes:
        step: Number of the step since the measuring began, counted from 1; 0 where none was measured so far.
        model: The numbers of all layers together; None where none was measured.
        clipped: Whether any clip has made the step's gradients smaller, of `clip_grad_norm_` of this package, DeepSpeed
            and our own optimizer; others are not seen. None where nobody knows.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerNorm] | None = None,
        *,
        step: int = 0,
        model: LayerNorm | None = None,
        clipped: bool | None = None,
    ):
        super().__init__(layers or {})
        self.step = step
        self.model = model
        self.clipped = clipped

    def __missing__(self, name: str) -> LayerNorm:
        if not self.step:
            raise KeyError(f"{name!r}: no step was measured so far; see LayerNorms(every=) and latest().step")
        close = difflib.get_close_matches(name, self, n=1, cutoff=0.0)
        nearest = f"; the nearest is {close[0]!r}" if close else ""
        raise KeyError(
            f"{name!r} is no layer that was measured, as those are that are trained and have elements{nearest}"
        )

    def record(self) -> dict[str, Any]:
        """As one JSON object: step, clipped, model, and layers by name."""
        model = None if self.model is None else asdict(self.model)
        layers = {name: asdict(layer) for name, layer in self.items()}
        return {"step": self.step, "clipped": self.clipped, "model": model, "layers": layers}
