"""Real English text without a network: the docstrings of the installed Python packages.

Sources are read as text and never imported. The packages are those that the recipes themselves need, so the text
exists wherever a recipe can run, and it stays on the user's disk.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..common.errors import RecipeError

PACKAGES = (
    "numpy",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "pandas",
    "networkx",
    "matplotlib",
    "huggingface_hub",
    "datasets",
)
"""Installed with `trustratio[recipes]`, directly or as a dependency. The standard library is read besides."""

STANDARD_LIBRARY = "the standard library"
_SKIPPED_FOLDERS = {"test", "tests", "testing", "site-packages", "dist-packages", "__pycache__", "lib2to3", "idlelib"}
_SHORTEST_DOCSTRING = 60  # characters; shorter ones are titles and say little
_SHORTEST_DOCUMENT = 200
_FORMAT = 2  # part of the cache key: raise it when what is extracted changes

_QUOTED = re.compile(rb"(\"\"\"|''')(.*?)\1", re.DOTALL)
_PREFIXES = (b"", b"r", b"u")
_BEFORE = re.compile(rb"(:[ \t]*(#.*)?|[ \t]*#.*)\Z")  # the line above: it ends with a colon, or it is a comment
_LONGEST_LINE = 500  # bytes

Progress = Callable[[Iterable[Path], int, str], Iterable[Path]]


def package_folders() -> dict[str, Path]:
    """Return name -> source folder of the packages that can be imported, the standard library last."""
    found = {name: _folder_of(name) for name in PACKAGES}
    folders = {name: folder for name, folder in found.items() if folder is not None}
    return {**folders, STANDARD_LIBRARY: Path(sysconfig.get_paths()["stdlib"])}


def _folder_of(package: str) -> Path | None:
    # Wherever Python would import it from: an environment may borrow packages from others. Nothing is imported.
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module without a spec, put there by hand
        return None
    if spec is None or spec.origin is None:  # without an origin it is any folder of that name, say the user's datasets/
        return None
    return next((Path(folder) for folder in spec.submodule_search_locations or () if Path(folder).is_dir()), None)


def missing_packages(folders: dict[str, Path]) -> list[str]:
    """Return the packages that `package_folders` did not find."""
    return [name for name in PACKAGES if name not in folders]


def corpus_key(folders: dict[str, Path]) -> str:
    """Return a hash of what was found and of its versions: the harvest depends on nothing else."""
    versions = {name: _version(name) for name in folders}
    return hashlib.sha256(json.dumps([_FORMAT, versions], sort_keys=True).encode()).hexdigest()[:16]


def harvest(folders: dict[str, Path], progress: Progress) -> Iterator[str]:
    """Yield one document per source file: its docstrings in order, without those that an earlier file had.

    Large libraries repeat docstrings from class to class; kept, they would sit in the held-out documents and in the
    training text at once.

    Args:
        folders: from `package_folders`.
        progress: wraps (files, number of files, what they are) and yields the files, e.g. with a progress bar.
    """
    seen: set[bytes] = set()
    files = [file for folder in folders.values() for file in sorted(_source_files(folder))]
    for file in progress(files, len(files), "source files"):
        document = "\n\n".join(text for text in docstrings(file) if _is_new(text, seen))
        if len(document) >= _SHORTEST_DOCUMENT:
            yield document


def _is_new(text: str, seen: set[bytes]) -> bool:
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    if digest in seen:
        return False
    seen.add(digest)
    return True


def docstrings(path: Path) -> list[str]:
    """Return the cleaned docstrings of a source file in source order; [] for a file that cannot be read.

    They are found by their quotes: text in triple quotes that begins a line, at the top of the file or under a line
    that ends with a colon. Python's own parser finds the same but for one in a hundred, in sixteen times the time.
    """
    try:
        source = path.read_bytes()
    except OSError:
        return []
    found = (_docstring(source, quoted) for quoted in _QUOTED.finditer(source))
    return [text for text in found if text is not None and len(text) >= _SHORTEST_DOCSTRING]


def _docstring(source: bytes, quoted: re.Match[bytes]) -> str | None:
    """Return what stands in triple quotes, None if it is no docstring."""
    line = source.rfind(b"\n", 0, quoted.start()) + 1
    prefix = source[line : quoted.start()].strip().lower()
    if prefix not in _PREFIXES:
        return None
    above = source[max(0, line - _LONGEST_LINE) : line].rstrip()
    if above and not _BEFORE.search(above.rpartition(b"\n")[2]):
        return None
    try:
        text = quoted[2].decode() if prefix == b"r" or b"\\" not in quoted[2] else _evaluated(quoted[0].decode())
    except (SyntaxError, ValueError):  # not UTF-8, or quotes that did not belong together
        return None
    return inspect.cleandoc(text).strip()


def _evaluated(literal: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escape sequences
        return str(ast.literal_eval(literal))


def _source_files(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in _SKIPPED_FOLDERS)
        yield from (Path(parent, name) for name in files if name.endswith(".py"))


def _version(package: str) -> str:
    if package == STANDARD_LIBRARY:
        return platform.python_version()
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def require_text(folders: dict[str, Path], characters: int) -> None:
    """Check that a harvest found text at all (a stripped installation has sources without docstrings, or none).

    Raises:
        RecipeError: nearly nothing was found.
    """
    if characters < 100_000:
        raise RecipeError(
            f"the documentation of the installed packages ({', '.join(folders)}) gave only {characters:,} characters; "
            "are the .py files stripped? Give your own text with --data FILES"
        )
