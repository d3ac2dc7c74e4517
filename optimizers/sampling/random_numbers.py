"""Random numbers that are drawn twice, so that both passes of a sample have the same dropout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["RandomNumbers"]


class RandomNumbers:
    """Those that torch draws from here on, which can be had again."""

    def __init__(self, devices: Iterable[torch.device] = ()):
        """Note where the generators are: the CPU's, and those of devices."""
        self._devices = list(devices)
        self._before = self._states()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same numbers again inside.

        Raises:
            RuntimeError: At the end, if others were drawn than before.
        """
        after = self._states()
        self._go_to(self._before)
        yield
        drawn = self._states()
        self._go_to(after)
        if not all(map(torch.equal, drawn, after)):
            raise RuntimeError(
                "the two passes of a curvature sample drew different random numbers, so that their dropout differs "
                "and their gradients too: call wants_curvature() right before the first forward, with the batch at "
                "hand, and run the same forward in curvature()"
            )

    def _states(self) -> list[torch.Tensor]:
        of_devices = [torch.get_device_module(device).get_rng_state(device) for device in self._devices]
        return [torch.get_rng_state(), *of_devices]

    def _go_to(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)
