"""Whether the files of a prepared folder hold what was written, byte by byte, before a run reads them."""

from __future__ import annotations

from pathlib import Path

from ..common.files import WRITING
from ..common.marks import Share, hash_of, hashed
from .prepared import FILES, read_manifest, rows_of
from .shards import MANIFEST, SPLITS


def hash_files(folder: Path) -> dict[str, str]:
    """Return the hashes of a folder's files other than tokens, for its manifest, by name."""
    token_files = tuple(f"{split}-" for split in SPLITS)
    others = (MANIFEST, WRITING, ".", "hub-", *token_files)
    return {path.name: hash_of(path) for path in sorted(folder.iterdir()) if not path.name.startswith(others)}


def expected_hashes(folder: Path) -> dict[str, str]:
    """Return the hashes that a folder's manifest gives of its files, by name; of earlier releases, of tokens alone.

    Raises:
        RecipeError: the manifest is missing or damaged.
    """
    manifest = read_manifest(folder)
    tokens = {file.name: file.sha256 for split in SPLITS for file in rows_of(folder, manifest, split, 3).files}
    return {**tokens, **manifest.get(FILES, {})}


def damaged_files(folder: Path, expected: dict[str, str], share: Share) -> list[str]:
    """Return the names of the files that do not have these hashes, or cannot be read (collective over the share)."""
    found = hashed(list(expected), lambda name: hash_of(folder / name), share)
    return [name for name, actual in zip(expected, found, strict=True) if actual != expected[name]]
