"""Folders: those that `datasets` saved, and what to say of others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from ..common.errors import RecipeError
from ..common.files import parse_json
from .compressed import is_compressed

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_INDEX = "index.json"  # of MosaicML's streaming


def saved_files(folder: Path) -> list[str] | None:
    """Return the Arrow files of a folder of `Dataset.save_to_disk` in order, None if it is none.

    Of a `DatasetDict` with a single split they are that split's.

    Raises:
        RecipeError: there are several splits; a file is missing; an old version saved it with an index of its rows.
    """
    if (folder / _SPLITS).is_file():
        splits = _read(folder / _SPLITS).get("splits")
        if not isinstance(splits, list) or not splits:
            raise RecipeError(f"{folder / _SPLITS} names no split; save the data set anew")
        if len(splits) > 1:
            raise RecipeError(
                f"--data {str(folder)!r} holds the splits {', '.join(map(str, splits))}; give one of them, e.g. "
                f"{folder / str(splits[0])}"
            )
        return saved_files(folder / str(splits[0]))
    if not (folder / _STATE).is_file():
        return None
    state = _read(folder / _STATE)
    if state.get("_indices_data_files"):
        raise RecipeError(
            f"{folder} was saved by an old version of datasets, with an index of its rows; load it with load_from_disk "
            "and save it anew"
        )
    try:
        return [str(folder / file["filename"]) for file in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise RecipeError(f"{folder / _STATE} names no files; save the data set anew") from error


def folder_refusal(source: str, hub_prefix: str) -> str:
    """Return why a folder is no source, and what to give instead."""
    folder = Path(source)
    if (folder / _INDEX).is_file() and list(folder.glob("*.mds*")):
        return (
            f"--data {source!r} is a folder of MosaicML's streaming, which is not read: read it with "
            'streaming.StreamingDataset and write the text as .jsonl, one {"text": "..."} per line'
        )
    example = f"{source.rstrip('/')}/*{_commonest_suffix(folder)}"
    return (
        f"--data {source!r} is a folder; give files or a glob, e.g. {example}, a folder that `prepare` or "
        f"Dataset.save_to_disk has written, or {hub_prefix}{source} if it is laid out as on the hub"
    )


def _commonest_suffix(folder: Path) -> str:
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix]
    suffixes = Counter("".join(path.suffixes[-2:]) if is_compressed(path) else path.suffix for path in files)
    return max(sorted(suffixes), key=suffixes.__getitem__, default=".txt")


def _read(path: Path) -> dict[str, Any]:
    try:
        values = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read {path}: {error}") from error
    return values if isinstance(values, dict) else {}
