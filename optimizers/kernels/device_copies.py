"""Numbers of the host that lie on a device from step to step: sent when they change, and kept for captured graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .interface import Recent

__all__ = ["DeviceCopies", "is_capturing"]


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured of what is asked of a device, which need not be the current one."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class DeviceCopies:
    """Copies of what the host knows, on one device.

    A CUDA graph reads at every replay what it was captured with, and nobody tells when a graph is gone. So that stays
    as long as this object.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._captured: dict[int, Any] = {}
        self._senders: set[Any] = set()  # streams

    def send(self, on_host: torch.Tensor) -> torch.Tensor:
        """A copy on the device, which nobody waits for; torch keeps the pinned memory until it has been read."""
        if self.device.type == "cuda":
            self._senders.add(torch.cuda.current_stream(self.device))
            on_host = on_host.pin_memory()  # or the copy would wait
        return on_host.to(self.device, non_blocking=True)

    def find(self, known: Recent, content: Any, make: Callable[[], Any], refusal: Callable[[], str]) -> Any:
        """What was made of this content in one of the last steps, or is made now.

        Args:
            known: Where it is kept.
            content: Comparable.
            make: Makes it, by `send`.
            refusal: Says what is wrong if it would have to be made while a graph is captured.

        Raises:
            RuntimeError: If it would have to be.
        """
        capturing = is_capturing(self.device)
        if capturing and content not in known:
            raise RuntimeError(refusal())
        found = known.find(content, make)
        if capturing:
            self._captured[id(found)] = found
        return found

    def used(self, *tensors: torch.Tensor) -> None:
        """Say what the current stream is about to read: if another one has sent it, that would reuse the memory."""
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        for tensor in tensors if self._senders - {stream} else ():
            tensor.record_stream(stream)
