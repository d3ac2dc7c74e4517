"""Tables for the documentation, of the numbers in docs/results/gpu: `python -m benchmarks.on_gpu --page`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import posixpath
import re
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import Any

from .batch64k.picture import draw
from .part import PARTS
from .runner.environment import ROOT, Unusable
from .runner.results import RECORDED

__all__ = ["benchmarks_section", "evidence_section", "found_in", "write_pages"]

Found = dict[str, dict[str, Any]]

RESULTS = ROOT / "docs" / "results" / "gpu"
RUN = ("device", "when", "rehearsal", "outcome", "verdict")
"""What is known of the run of a part."""
NO_TABLE = "No table"
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

    Everything is read and made before anything is written.

    Args:
        source: A folder of a run, its results.tar.gz, or docs/results/gpu.

    Returns:
        Exit status: 2 if `source` has no numbers that were measured.

    Raises:
        Unusable: With a sentence, if `source` is not there or broken.
    """
    taken = {} if source.resolve() == RESULTS.resolve() else _usable_in(source)
    if not taken and source.resolve() != RESULTS.resolve():
        return 2
    found = {**found_in(RESULTS), **taken}
    files = {RESULTS / f"{name}.json": f"{json.dumps(numbers, indent=1)}\n".encode() for name, numbers in taken.items()}
    files |= _pages(found)
    try:
        RESULTS.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            path.write_bytes(content)
    except OSError as error:
        raise Unusable(f"The pages cannot be written: {error}.") from error
    return 0


def found_in(folder: Path) -> Found:
    """Each part's numbers, of those that were measured; raises `Unusable` if a file is broken."""
    paths = {name: folder / f"{name}.json" for name in PARTS}
    files = {name: _read(path.read_bytes(), path) for name, path in paths.items() if path.exists()}
    return {name: numbers for name, numbers in files.items() if _was_measured(numbers)}


def _pages(found: Found) -> dict[Path, bytes]:
    """What is written into the documentation, by file."""
    from benchmarks.__main__ import OUTPUT, page_of

    numbers, evidence, readme = OUTPUT / "benchmarks.json", ROOT / "docs" / "evidence.md", ROOT / "README.md"
    page, text = page_of(numbers, json.loads(numbers.read_text()), benchmarks_section(found))
    picture = _picture(found.get("batch64k", {}))
    files = {page: text.encode(), **({RESULTS / PICTURE: picture} if picture else {})}
    files[evidence] = _replaced(evidence, "batch64k", evidence_section(found, drawn=bool(picture))).encode()
    files[readme] = _replaced(readme, "on_gpu", readme_line(found)).encode()
    return files


def _picture(found: dict[str, Any]) -> bytes | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PICTURE
        try:
            return path.read_bytes() if draw(found, path) else None
        except ImportError as error:
            raise Unusable(f"The curves cannot be drawn: {error}. Install matplotlib.") from error


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
    passed = [name for name in ("speed", "throughput") if name in found and found[name]["run"]["outcome"] == "passed"]
    told = [_line(name, found).strip() for name in passed]
    return " ".join(told) or f"On a GPU: {NOT_MEASURED}."


def _line(name: str, found: Found) -> str:
    """Device, day and verdict of a part, and an empty line; nothing where it was not run."""
    if name not in found:
        return ""
    run = found[name]["run"]
    outcome = "" if run["outcome"] == "passed" else f"{run['outcome']}: "
    verdict = _without_paths(run["verdict"].partition(RECORDED)[0]).rstrip(".")
    return f"{run['device']}, {run['when'][:10]}: {outcome}{verdict}.\n\n"


def _without_paths(text: str) -> str:
    """Errors name files of the machine that they happened on: of those the last part is kept."""
    return re.sub(r"(?<![\w.:/])(?:/[\w.+@-]+)+/([\w.+@-]+)", r"\1", text)


def _tables(name: str, found: Found) -> str:
    """A part's own tables; of a part that was stopped they may be incomplete, or impossible."""
    if name not in found:
        return f"{NOT_MEASURED}."
    own = f"{__package__}.{name}"
    has_page = importlib.util.find_spec(own) is not None and importlib.util.find_spec(f"{own}.page") is not None
    tables = importlib.import_module(f"{own}.page" if has_page else f"{__package__}.parts.{name}").tables
    try:
        return _without_paths(str(tables(found[name])).strip())
    except (KeyError, IndexError, TypeError, ValueError) as error:
        return f"{NO_TABLE}: {type(error).__name__} ({error}) in numbers of a part that did not come to its end."


def _was_measured(numbers: dict[str, Any]) -> bool:
    return "run" in numbers and not numbers["run"]["rehearsal"]


def _usable_in(source: Path) -> Found:
    """The parts' numbers of a folder or an archive, of those that were measured and that a page has a use for."""
    measured = {name: numbers for name, numbers in _files_of(source).items() if _was_measured(numbers)}
    taken = {name: numbers for name, numbers in measured.items() if _is_usable(name, numbers)}
    print(f"taken from {source}: {', '.join(taken) or 'nothing that was measured on a GPU'}", file=sys.stderr)
    if left := [name for name in measured if name not in taken]:
        print(f"not taken, since they have no numbers: {', '.join(left)}", file=sys.stderr)
    return taken


def _is_usable(name: str, numbers: dict[str, Any]) -> bool:
    """Whether the part passed, or has left enough for a table."""
    unusable = _tables(name, {name: numbers}).startswith((NOT_MEASURED, NO_TABLE))
    return numbers["run"]["outcome"] == "passed" or not unusable


def _files_of(source: Path) -> Found:
    """What parts have left, measured or not."""
    try:
        if source.is_dir():
            paths = {name: source / f"{name}.json" for name in PARTS}
            texts = {name: path.read_bytes() for name, path in paths.items() if path.exists()}
        else:
            texts = _files_of_archive(source)
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise Unusable(f"{source} is no folder and no whole archive of a run: {error}.") from error
    return {name: _read(text, source / f"{name}.json") for name, text in texts.items()}


def _files_of_archive(source: Path) -> dict[str, bytes]:
    texts = {}
    with tarfile.open(source) as archive:
        for member in archive.getmembers():
            name, kind = posixpath.splitext(posixpath.normpath(member.name))
            file = archive.extractfile(member) if name in PARTS and kind == ".json" and member.isfile() else None
            if file is not None:
                texts[name] = file.read()
    return texts


def _read(text: bytes, path: Path) -> dict[str, Any]:
    """A part's numbers; raises `Unusable` if they are none."""
    try:
        numbers = json.loads(text)
    except ValueError as error:
        raise Unusable(f"{path} is no whole JSON: {error}.") from error
    if not isinstance(numbers, dict):
        raise Unusable(f"{path} has no numbers of a part: expected an object, got {type(numbers).__name__}.")
    run = numbers.get("run", dict.fromkeys(RUN, ""))
    lacking = [name for name in RUN if name not in run] if isinstance(run, dict) else RUN
    if lacking:
        raise Unusable(f'{path} does not say what ran: its "run" has no {", ".join(lacking)}.')
    return numbers


def _replaced(page: Path, name: str, content: str) -> str:
    """The page with `content` between its comments of this name, if it has them."""
    pattern = re.compile(rf"(<!-- {name}: written by on_gpu/page.py -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}\n{content}\n\n{found[2]}", page.read_text())
