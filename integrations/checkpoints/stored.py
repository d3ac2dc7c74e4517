"""A saved optimizer state as it is read, wherever it lies: options and numbers, and tensors by layer name."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from typing import Any

import torch
from safetensors import safe_open

from .local_state import WEIGHT
from .pieces import ReadBlock

__all__ = ["FORMAT", "VERSION", "StoredFile", "StoredState", "key_of"]

FORMAT = "trustratio optimizer state"
VERSION = "1"


def key_of(name: str, what: str) -> str:
    """Under which key a file has a layer's weight or state."""
    return f"{what}/{name}"


class StoredState(ABC):
    """Weights, state and options by layer name.

    Args:
        metadata: As `save_optimizer_state` puts it into the file's header.

    Raises:
        ValueError: If it is not what it should be.
    """

    def __init__(self, metadata: dict[str, str]):
        if metadata.get("format") != FORMAT:
            raise ValueError(f"not written by save_optimizer_state: its format is {metadata.get('format')!r}")
        if metadata["version"] != VERSION:
            raise ValueError(f"version {metadata['version']} of the format; this release reads version {VERSION}")
        self.metadata = metadata
        self.fingerprint = json.dumps(metadata, sort_keys=True)
        self.class_name = metadata["optimizer"]
        self.element_state: list[str] = json.loads(metadata["element_state"])
        self.layer_state: list[str] = json.loads(metadata["layer_state"])
        self.groups: list[dict[str, Any]] = json.loads(metadata["groups"])
        self.extra = json.loads(metadata["extra"])
        self.shapes = {name: self.shape(name, WEIGHT) for group in self.groups for name in group["layers"]}
        for name, shape in self.shapes.items():
            for what in self.element_state:
                if self.shape(name, what) != shape:
                    raise ValueError(f"{what} of {name} has shape {self.shape(name, what)} instead of {shape}")

    @abstractmethod
    def shape(self, name: str, what: str) -> tuple[int, ...]:
        """The shape of a layer's weight or element-wise state."""

    @abstractmethod
    def reader(self, name: str, what: str) -> ReadBlock:
        """Read the part of a layer's weight or element-wise state that slices select."""

    @abstractmethod
    def number(self, name: str, what: str) -> float:
        """A layer's per-layer state."""

    def options_of(self, names: list[str]) -> list[dict[str, Any]]:
        """The different options that these layers have."""
        options: list[dict[str, Any]] = []
        for group in self.groups:
            if group["options"] not in options and not set(names).isdisjoint(group["layers"]):
                options.append(group["options"])
        return options


class StoredFile(StoredState):
    """A file of `save_optimizer_state`. Raises OSError, SafetensorError, KeyError or ValueError if it is none."""

    def __init__(self, path: str | os.PathLike[str]):
        self._file = safe_open(os.fspath(path), framework="pt", device="cpu")
        super().__init__(self._file.metadata() or {})
        for name in self.shapes:
            for what in self.layer_state:
                if self.shape(name, what) != ():
                    raise ValueError(f"{key_of(name, what)} has shape {self.shape(name, what)} instead of ()")

    def shape(self, name: str, what: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(key_of(name, what)).get_shape())

    def reader(self, name: str, what: str) -> ReadBlock:
        key = key_of(name, what)
        return lambda slices: self._file.get_slice(key)[slices] if slices else self._file.get_tensor(key)

    def number(self, name: str, what: str) -> float:
        return self.whole(name, what).item()

    def whole(self, name: str, what: str) -> torch.Tensor:
        """A tensor of the file."""
        return self._file.get_tensor(key_of(name, what))
