"""Write a safetensors file piece by piece, and never damage the file that it replaces.

The format is an 8-byte little-endian length, a JSON header of that length with each tensor's dtype, shape and byte
range, and the bytes: https://huggingface.co/docs/safetensors. The library's own writer wants all tensors at once; a
header needs only their names, dtypes and shapes.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from .content import ContentHash

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["DTYPE_NAMES", "ReplacedFile", "StoredTensor", "header_of", "refuse_damaged_header"]

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


METADATA, DIGEST = "__metadata__", "digest"
KNOWN = {"format", "version", "optimizer", "element_state", "layer_state", "groups", "extra"}
"""The metadata of files without a digest."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file, known before its values are."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def header_of(tensors: Iterable[StoredTensor], metadata: dict[str, str]) -> bytes:
    """The file's first bytes. The tensors' bytes must follow in this order, wider dtypes first, so that all align.

    The last entry of the metadata is a digest of all the rest of the header.
    """
    entries: dict[str, Any] = {}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        entries[tensor.key] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    entries = {METADATA: {**metadata, DIGEST: _digest({METADATA: metadata, **entries})}, **entries}
    encoded = json.dumps(entries).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def refuse_damaged_header(path: str | os.PathLike[str]) -> None:
    """Raise ValueError if the header of a file, which is a safetensors file, is not what was written.

    Files of releases before the digest pass.
    """
    with Path(path).open("rb") as file:
        entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    written = entries[METADATA].pop(DIGEST, None)
    unknown = entries[METADATA].keys() - KNOWN if written is None else ()
    if unknown or (written is not None and written != _digest(entries)):
        raise ValueError("its header is damaged: the digest in it is not that of the rest")


def _digest(entries: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


class ReplacedFile:
    """A file that is written beside `path` and takes its place only when it is complete on disk.

    If the process dies on the way, or the disk is full, what was at `path` stays; the next write to the same path
    overwrites the remains. Every method may raise OSError.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._file: IO[bytes] | None = None
        self.content = ContentHash()

    def open(self) -> None:
        """Begin the new file; makes the folder if need be."""
        if self.path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder: give the file to write", str(self.path))
        if self.path.exists() and not self.path.is_file():
            raise OSError(errno.EINVAL, "it is a device or a pipe: give the file to write", str(self.path))
        self.path = Path(os.path.realpath(self.path))  # a link stays one, and what it points to is replaced
        self.partial = self.path.with_name(f".{self.path.name}.partial")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.partial.open("wb", buffering=0)

    def write_header(self, header: bytes) -> None:
        """Write the file's first bytes, or write them again: always as many."""
        assert self._file is not None
        self._file.seek(0)
        self._append(memoryview(header))

    def write(self, tensor: torch.Tensor) -> None:
        """Append the elements of a contiguous tensor on the CPU."""
        content = memoryview(_bytes_of(tensor)).cast("B")
        self.content.update(content)
        self._append(content)

    def _append(self, rest: memoryview) -> None:
        assert self._file is not None
        while rest:
            rest = rest[self._file.write(rest) :]

    def commit(self) -> None:
        """Put the new file, complete and on disk, into the place of the old one."""
        assert self._file is not None
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self.partial, self.path)
        _sync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove the new file if it was not committed."""
        if self._file is not None:
            self._file.close()
            self.partial.unlink(missing_ok=True)


def _bytes_of(tensor: torch.Tensor) -> Buffer:
    """The memory of a contiguous tensor on the CPU."""
    size = tensor.numel() * tensor.element_size()
    return (ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b""


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself durable, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
