"""What is measured with on a GPU, and its twin for a rehearsal on the CPU: clocks, launches, captured steps."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .launches import count_on_cpu

__all__ = ["Cpu", "Cuda", "Device", "device_of", "is_annotation"]

Work = Callable[[], object]
SPIN = 1_000_000
"""Cycles that the device is kept busy for, to see how long a cycle takes."""


class Device(Protocol):
    """Where steps are measured. Times are in seconds."""

    def alone(self, work: Work) -> float:
        """From an idle device to the end of the work: what the host is late with counts."""
        ...

    def queued(self, work: Work, ahead: float) -> float:
        """What the work takes on a device that is busy for `ahead` seconds first, as in training: it waits for nobody.

        Unless the work itself waits for the device.
        """
        ...

    def host(self, work: Work) -> float:
        """Until the call returns, whatever the device still has to do."""
        ...

    def launches(self, work: Work) -> dict[str, Any]:
        """What the work sends to the device."""
        ...

    def capture(self, work: Work) -> Work:
        """The work as a graph: what replays it."""
        ...


class Cuda:
    """Measures by events in the stream.

    Attributes:
        api: `torch.cuda`, or what stands in for it in a test.
    """

    def __init__(self, api: Any = torch.cuda) -> None:
        self.api = api
        self._cycle = 0.0

    def alone(self, work: Work) -> float:
        self.api.synchronize()
        return self._between_events(work)

    def queued(self, work: Work, ahead: float) -> float:
        cycles = int(ahead / self._seconds_of_a_cycle())
        self.api.synchronize()
        self.api._sleep(cycles)
        return self._between_events(work)

    def host(self, work: Work) -> float:
        self.api.synchronize()
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def launches(self, work: Work) -> dict[str, Any]:
        """Kernels, copies and fills, and the names of the kernels; nothing where the profiler sees no device."""
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            work()
            self.api.synchronize()
        return count_on_device(profiled.events())

    def capture(self, work: Work) -> Work:
        side = self.api.Stream()
        side.wait_stream(self.api.current_stream())
        with self.api.stream(side):
            for _ in range(3):
                work()
        self.api.current_stream().wait_stream(side)
        graph = self.api.CUDAGraph()
        with self.api.graph(graph):
            work()
        replay: Work = graph.replay
        return replay

    def _between_events(self, work: Work) -> float:
        begin, end = (self.api.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        self.api.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def _seconds_of_a_cycle(self) -> float:
        if not self._cycle:
            taken = [self.alone(lambda: self.api._sleep(SPIN)) for _ in range(3)]
            self._cycle = statistics.median(taken) / SPIN
        return self._cycle


class Cpu:
    """The same where work is finished when it returns."""

    def alone(self, work: Work) -> float:
        return self.host(work)

    def queued(self, work: Work, ahead: float) -> float:
        return self.host(work)

    def host(self, work: Work) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def launches(self, work: Work) -> dict[str, Any]:
        return count_on_cpu(work)

    def capture(self, work: Work) -> Work:
        return work


def device_of(kind: str) -> Device:
    """The one of torch's name "cpu" or "cuda"."""
    return Cuda() if kind == "cuda" else Cpu()


def count_on_device(events: Any) -> dict[str, Any]:
    """What ran on the device, of a profile's events."""
    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    names = [event.name for event in on_device if not is_annotation(event, event.name)]
    copies = [name for name in names if name.startswith(("Memcpy", "Memset"))]
    kernels = Counter(name for name in names if not name.startswith(("Memcpy", "Memset")))
    if not names:
        return {"missing": "the profiler saw nothing on the device"}
    return {
        "kernels": kernels.total(),
        "copies_and_fills": len(copies),
        "by_name": {name[:80]: count for name, count in kernels.most_common(12)},
    }


def is_annotation(event: Any, name: str) -> bool:
    """Whether it is a range, such as torch's around `Optimizer.step`, which a profile shows on the device too."""
    return getattr(event, "is_user_annotation", False) or name.startswith(("Optimizer.", "ProfilerStep"))
