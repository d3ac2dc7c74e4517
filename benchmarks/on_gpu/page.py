"""Tables for the documentation, of the numbers in docs/results/gpu: `python -m benchmarks.on_gpu --page`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .batch64k.picture import draw
from .part import PARTS
from .runner.environment import ROOT
from .runner.results import read_json

__all__ = ["benchmarks_section", "evidence_section", "found_in", "write_pages"]

Found = dict[str, dict[str, Any]]

RESULTS = ROOT / "docs" / "results" / "gpu"
PICTURE = "batch64k.png"
NOT_MEASURED = "not measured"
TITLES = {
    "machine": "The device",
    "kernels": "The kernels' tests",
    "speed": "Steps on BERT's shapes",
    "sharded": "Sharded steps against float64",
    "job": "A run of the recipe",
    "throughput": "Pretraining speed",
    "batch64k": "65,536 and 131,072 sequences per update",
}
ELSEWHERE = {"batch64k": "evidence.md#on-a-gpu"}
"""Parts whose tables stand on another page."""


def write_pages(source: Path) -> int:
    """Take the numbers of `source`, unless they are there already, and write the pages made of them.

    Args:
        source: A folder of a run, its results.tar.gz, or docs/results/gpu.

    Returns:
        Exit status: 2 if `source` has no numbers that were measured.
    """
    if source.resolve() != RESULTS and not _take(source):
        return 2
    from benchmarks.__main__ import OUTPUT, write_page

    numbers = OUTPUT / "benchmarks.json"
    write_page(numbers, json.loads(numbers.read_text()))
    found = found_in(RESULTS)
    drawn = draw(found.get("batch64k", {}), RESULTS / PICTURE)
    _replace(ROOT / "docs" / "evidence.md", "batch64k", evidence_section(found, drawn=drawn))
    _replace(ROOT / "README.md", "on_gpu", readme_line(found))
    return 0


def found_in(folder: Path) -> Found:
    """Each part's numbers, of those that were measured."""
    files = {name: read_json(folder / f"{name}.json") for name in PARTS}
    return {name: numbers for name, numbers in files.items() if _was_measured(numbers)}


def benchmarks_section(found: Found) -> str:
    """What docs/benchmarks.md says under "On a GPU"."""
    if not found:
        return f"`python -m benchmarks.on_gpu`: {NOT_MEASURED}."
    sections = []
    for name in PARTS:
        tables = f"In [{ELSEWHERE[name]}]({ELSEWHERE[name]})." if name in ELSEWHERE else _tables(name, found)
        sections.append(f"### {TITLES[name]}\n\n{_line(name, found)}{tables}")
    head = "Made by `python -m benchmarks.on_gpu`; the numbers are in `docs/results/gpu/`."
    return "\n\n".join([head, *sections])


def evidence_section(found: Found, *, drawn: bool = False) -> str:
    """What docs/evidence.md says of the largest batches, with the curves where they are drawn."""
    picture = f"\n\n![Training loss at {TITLES['batch64k']}](results/gpu/{PICTURE})" if drawn else ""
    return f"{_line('batch64k', found)}{_tables('batch64k', found)}{picture}"


def readme_line(found: Found) -> str:
    """One line with device and numbers."""
    told = [_line(name, found).strip() for name in ("speed", "throughput") if name in found]
    return " ".join(told) or f"On a GPU: {NOT_MEASURED}."


def _line(name: str, found: Found) -> str:
    """Device, day and verdict of a part, and an empty line; nothing where it was not run."""
    if name not in found:
        return ""
    run = found[name]["run"]
    outcome = "" if run["outcome"] == "passed" else f"{run['outcome']}: "
    return f"{run['device']}, {run['when'][:10]}: {outcome}{run['verdict'].rstrip('.')}.\n\n"


def _tables(name: str, found: Found) -> str:
    """A part's own tables; of a part that was stopped they may be incomplete, or impossible."""
    if name not in found:
        return f"{NOT_MEASURED}."
    own = f"{__package__}.{name}"
    has_page = importlib.util.find_spec(own) is not None and importlib.util.find_spec(f"{own}.page") is not None
    tables = importlib.import_module(f"{own}.page" if has_page else f"{__package__}.parts.{name}").tables
    try:
        return str(tables(found[name])).strip()
    except (KeyError, IndexError, TypeError, ValueError) as error:
        return f"No table: {type(error).__name__} ({error}) in numbers of a part that did not come to its end."


def _was_measured(numbers: dict[str, Any]) -> bool:
    return "run" in numbers and not numbers["run"].get("rehearsal", True)


def _take(source: Path) -> bool:
    """Copy the parts' numbers to docs/results/gpu; whether there were any."""
    taken = []
    for name, text in _files_of(source):
        numbers = json.loads(text)
        if _was_measured(numbers):
            RESULTS.mkdir(parents=True, exist_ok=True)
            (RESULTS / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
            taken.append(name)
    print(f"taken from {source}: {', '.join(taken) or 'nothing that was measured on a GPU'}", file=sys.stderr)
    return bool(taken)


def _files_of(source: Path) -> Iterator[tuple[str, str]]:
    """Parts and their files' contents, of a folder or an archive."""
    if source.is_dir():
        yield from ((name, path.read_text()) for name in PARTS if (path := source / f"{name}.json").exists())
    elif source.exists():
        with tarfile.open(source) as archive:
            names = set(archive.getnames())
            for name in PARTS:
                file = archive.extractfile(f"{name}.json") if f"{name}.json" in names else None
                if file is not None:
                    yield name, file.read().decode()


def _replace(page: Path, name: str, content: str) -> None:
    """Put `content` between the page's comments of this name, if it has them."""
    pattern = re.compile(rf"(<!-- {name}: written by on_gpu/page.py -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    text = page.read_text()
    page.write_text(pattern.sub(lambda found: f"{found[1]}\n{content}\n\n{found[2]}", text))
