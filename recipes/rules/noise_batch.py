"""Batches that follow the gradient noise scale: they double as long as the noise says that a larger one still pays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from trustratio.optimizers.noise_scale import NoiseScale, RunningNoise

NO_NOISE = NoiseScale(math.nan, math.nan)
"""Of an update that says nothing: one that was skipped, or had a single micro-batch."""


class BatchFromNoise:
    """Chooses the global batch of the next updates by the gradient noise scale of those so far.

    Signal and noise are averaged over the updates (`RunningNoise`). Every so many updates the batch doubles if

        averaged noise scale >= noise_per_batch * batch,

    up to the largest one; it never shrinks. With the default of 2 the doubled batch is no larger than the noise scale.
    An average whose noise scale is not a positive number says nothing and changes nothing.

        rule = BatchFromNoise(smallest=256, largest=8192, unit=micro_batch * ranks)
        ...
        batch = rule.update(gradient_noise(optimizer, micro_batch).model)  # after every update
        set_global_batch(engine, batch)

    McCandlish et al. 2018 (arXiv 1812.06162) give the noise scale as the batch to train with; that the batch starts
    small and only doubles is this package's choice. All ranks see the same estimates, and so choose the same batch.

    Attributes:
        doublings: how often the batch has doubled.
        updates: taken note of so far.
    """

    def __init__(
        self,
        smallest: int,
        largest: int,
        unit: int = 1,
        every: int = 20,
        noise_per_batch: float = 2.0,
        beta: float = 0.95,
    ) -> None:
        """Begin with the smallest batch.

        Args:
            smallest: samples per update to begin with, over all ranks.
            largest: samples per update to end at, at most; the last step up to it may be less than a doubling.
            unit: samples of which every batch is a multiple: micro-batch x ranks.
            every: updates between two decisions.
            noise_per_batch: how many batches the noise scale has to be for the batch to double.
            beta: weight of the past in the averages, in [0, 1).

        Raises:
            ValueError: out of range, or a batch that is no multiple of `unit`.
        """
        for name, count in {"smallest": smallest, "largest": largest, "unit": unit, "every": every}.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {count!r}")
        if smallest > largest:
            raise ValueError(f"smallest must be at most largest, got {smallest} and {largest}")
        if smallest % unit or largest % unit:
            raise ValueError(f"smallest and largest must be multiples of unit={unit}, got {smallest} and {largest}")
        if not _is_finite(noise_per_batch) or noise_per_batch <= 0:
            raise ValueError(f"noise_per_batch must be finite and above 0, got {noise_per_batch!r}")
        self.smallest, self.largest = smallest, largest
        self.every, self.noise_per_batch = every, noise_per_batch
        self.doublings = self.updates = 0
        self._running = RunningNoise(beta)
        self._average = NO_NOISE

    @property
    def batch(self) -> int:
        """Samples of the next update, over all ranks."""
        return self.batch_after(self.doublings)

    @property
    def most_next(self) -> int:
        """The batch after one more doubling."""
        return self.batch_after(self.doublings + 1)

    @property
    def noise_scale(self) -> float:
        """The averaged noise scale, in samples; NaN before the first estimate."""
        return self._average.scale

    def batch_after(self, doublings: int) -> int:
        """Return the smallest batch doubled so often, at most the largest."""
        return min(self.smallest << doublings, self.largest)

    def update(self, noise: NoiseScale = NO_NOISE) -> int:
        """Take note of one update, and return the batch of the next.

        Args:
            noise: signal and noise of the update, in samples; estimates that are not finite are left out.

        Raises:
            TypeError: anything else; the update is not counted.
        """
        if not isinstance(noise, NoiseScale):
            raise TypeError(
                f"update takes a NoiseScale, as gradient_noise(...).model, got {type(noise).__name__}; call it without "
                "one after an update whose noise is not known"
            )
        self._average = self._running.update(noise)
        self.updates += 1
        if self.updates % self.every == 0 and self.batch < self.largest and self._is_large(self.noise_scale):
            self.doublings += 1
        return self.batch

    def _is_large(self, scale: float) -> bool:
        return self._average.signal > 0 and scale >= self.noise_per_batch * self.batch

    @property
    def _arguments(self) -> dict[str, float]:
        """What decides the batches; `unit` only says which ones may be asked for."""
        return {
            "smallest": self.smallest,
            "largest": self.largest,
            "every": self.every,
            "noise_per_batch": self.noise_per_batch,
            "beta": self._running.beta,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` goes on from, as plain numbers, with the arguments of this rule."""
        noise = self._running.state_dict()
        return {**self._arguments, "doublings": self.doublings, "updates": self.updates, "noise": noise}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` of a rule with the same arguments returned; `unit` alone may be another.

        Raises:
            ValueError: a rule with other arguments, or a damaged state. Nothing was changed then.
        """
        self._check(state)
        self.doublings, self.updates = state["doublings"], state["updates"]
        self._running.load_state_dict(state["noise"])
        self._average = self._running.average

    def _check(self, state: Mapping[str, Any]) -> None:
        noise_names = self._running.state_dict().keys()
        _require_keys("the state", state, (*self._arguments, "doublings", "updates", "noise"))
        _require_keys("its noise", state["noise"], noise_names)
        for name, own in self._arguments.items():
            if state[name] != own:
                raise ValueError(
                    f"the state is of a BatchFromNoise with {name}={state[name]!r}, and this one has {own!r}: make it "
                    "with the arguments of the one that was saved"
                )
        _require_count("updates", state["updates"], math.inf)
        _require_count("doublings", state["doublings"], ((self.largest - 1) // self.smallest).bit_length())
        for name in noise_names:
            if not _is_finite(state["noise"][name]):
                raise ValueError(
                    f"the state's {name} must be a finite number, got {state['noise'][name]!r}: {_DAMAGED}"
                )
        if not 0 <= state["noise"]["weight"] <= 1 + _ROUNDING:
            raise ValueError(f"the state's weight must be from 0 to 1, got {state['noise']['weight']!r}: {_DAMAGED}")


_DAMAGED = "it is damaged, so load another one"
_ROUNDING = 1e-9  # of a sum of weights that is 1


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require_keys(what: str, state: Any, names: Iterable[str]) -> None:
    if not isinstance(state, Mapping):
        raise ValueError(f"{what} must be a mapping, got {type(state).__name__}: {_DAMAGED}")
    if missing := [name for name in names if name not in state]:
        raise ValueError(f"{what} has no {', '.join(missing)}: it is damaged, or not a BatchFromNoise's")


def _require_count(name: str, value: Any, most: float) -> None:
    if type(value) is not int or not 0 <= value <= most:
        upper = f"from 0 to {most}" if most < math.inf else "from 0"
        raise ValueError(f"the state's {name} must be a whole number {upper}, got {value!r}: {_DAMAGED}")


def fewest_updates(samples: int, rule: BatchFromNoise) -> tuple[int, int]:
    """Return in how many updates a rule can use up samples at the earliest, and how often the batch has doubled then.

    Args:
        samples: to train on; the last update takes what is left.
        rule: its batch doubles at every decision.
    """
    updates, doublings = 0, rule.doublings
    while samples > 0:
        batch = rule.batch_after(doublings)
        left = math.ceil(samples / batch)
        count = left if batch == rule.largest else min(left, rule.every)
        updates += count
        samples -= count * batch
        doublings += batch < rule.largest and count == rule.every
    return updates, doublings
