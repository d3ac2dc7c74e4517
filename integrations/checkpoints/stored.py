"""A saved optimizer state as it is read: options and numbers, and tensors by layer name."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors import safe_open

from trustratio.optimizers.formulas.chunk_view import COMPENSATION
from trustratio.optimizers.formulas.rounding import rest_of, sum_of
from trustratio.optimizers.options.common import STORAGE_OPTIONS

from .content import CONTENT, has_content
from .local_state import WEIGHT
from .pieces import ReadBlock
from .plain import from_json
from .safetensors_file import DTYPE_NAMES, refuse_damaged_header

__all__ = ["DAMAGED", "FORMAT", "VERSION", "StoredFile", "key_of"]

FORMAT = "trustratio optimizer state"
VERSION = "1"
DAMAGED = "its tensors are not what was written, as the hash in its header tells: copy the file anew"


def key_of(name: str, what: str) -> str:
    """Under which key a file has a layer's weight or state."""
    return f"{what}/{name}"


class StoredFile:
    """A file of `save_optimizer_state`: weights, state and options by layer name.

    Raises:
        OSError, SafetensorError, KeyError, TypeError, ValueError: If it is none, or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = path
        self._file = safe_open(os.fspath(path), framework="pt", device="cpu")
        metadata = self._file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"not written by save_optimizer_state: its format is {metadata.get('format')!r}")
        if metadata["version"] != VERSION:
            raise ValueError(f"version {metadata['version']} of the format; this release reads version {VERSION}")
        refuse_damaged_header(path)
        self.fingerprint = json.dumps(metadata, sort_keys=True)
        self.class_name = metadata["optimizer"]
        self.element_state: list[str] = json.loads(metadata["element_state"])
        self.layer_state: list[str] = json.loads(metadata["layer_state"])
        self.groups: list[dict[str, Any]] = from_json(metadata["groups"])
        self.extra = from_json(metadata["extra"])
        self._content = metadata.get(CONTENT)
        self.shapes = {name: self._shape(name, WEIGHT) for group in self.groups for name in group["layers"]}
        keys = set(self._file.keys())
        self.compensated = {name for name in self.shapes if key_of(name, COMPENSATION) in keys}
        """Layers whose weight is a sum of two bf16 numbers: master="kahan"."""
        for name, shape in self.shapes.items():
            compensation = [COMPENSATION] if name in self.compensated else []
            for what in (*self.element_state, *compensation, *self.layer_state):
                wanted = () if what in self.layer_state else shape
                if self._shape(name, what) != wanted:
                    raise ValueError(f"{what} of {name} has shape {self._shape(name, what)} instead of {wanted}")

    def is_whole(self) -> bool:
        """Whether the tensors' bytes are those that were written; True of a file of releases before their hash.

        All ranks of a machine must call it.
        """
        return self._content is None or has_content(self._path, self._content)

    def _shape(self, name: str, what: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(key_of(name, what)).get_shape())

    def reader(self, name: str, what: str) -> ReadBlock:
        """Read the part of a layer's weight or element-wise state that slices select."""
        key = key_of(name, what)

        def read(slices: tuple[slice, ...]) -> torch.Tensor:
            with torch.device("cpu"):  # whatever the default device is
                return self._file.get_slice(key)[slices] if slices else self._file.get_tensor(key)

        return read

    def sum_reader(self, name: str) -> ReadBlock:
        """The same of a layer's weight with all that the file has of it, where it is a sum in fp32."""
        parts = [self.reader(name, what) for what in (WEIGHT, COMPENSATION)]
        return lambda slices: sum_of(*(part(slices) for part in parts))

    def rest_reader(self, name: str) -> ReadBlock:
        """The same of what bf16 weights lack of the file's, whatever dtype those are in."""
        if name in self.compensated:
            return self.reader(name, COMPENSATION)
        weight = self.reader(name, WEIGHT)

        return lambda slices: rest_of(weight(slices).float())

    def dtype(self, name: str, what: str) -> torch.dtype:
        """The dtype of a layer's weight or state."""
        kept = self._file.get_slice(key_of(name, what)).get_dtype()
        return next(dtype for dtype, known in DTYPE_NAMES.items() if known == kept)

    def number(self, name: str, what: str) -> float:
        """A layer's per-layer state."""
        with torch.device("cpu"):
            return self._file.get_tensor(key_of(name, what)).item()

    def options_of(self, names: list[str]) -> list[dict[str, Any]]:
        """The different options that these layers have, but for how numbers are kept, which is each run's own."""
        options: list[dict[str, Any]] = []
        for group in self.groups:
            restored = {key: value for key, value in group["options"].items() if key not in STORAGE_OPTIONS}
            if restored not in options and not set(names).isdisjoint(group["layers"]):
                options.append(restored)
        return options
