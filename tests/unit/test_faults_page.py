"""docs/faults.md: every fault has a message, something that is kept, and a test that exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "faults.md"
HEAD = ["what happens", "what the user sees", "what is kept", "the test"]
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def rows(text: str) -> list[list[str]]:
    """Return the cells of the rows of the tables of faults."""
    found, inside = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        inside = cells == HEAD or (inside and bool(cells))
        if inside and cells != HEAD and set("".join(cells)) != {"-"}:
            found.append(cells)
    return found


def flaws(text: str, root: Path) -> list[str]:
    """Return what is wrong with the tables: cells that are missing, and tests that are."""
    wrong = []
    for cells in rows(text):
        named = _TEST.findall(cells[-1])
        if len(cells) != len(HEAD) or not all(cells) or not named:
            wrong.append(f"incomplete: {' | '.join(cells)}")
        for file, test in named:
            path = root / file
            tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
            if test not in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}:
                wrong.append(f"no such test: {file}::{test}")
    return wrong


def test_every_fault_has_a_test() -> None:
    assert len(rows(PAGE.read_text())) > 20
    assert flaws(PAGE.read_text(), ROOT) == []


@pytest.mark.parametrize(
    "row",
    [
        "| a fault | | a checkpoint | `tests/unit/test_faults_page.py::test_every_fault_has_a_test` |",
        "| a fault | words | a checkpoint | none yet |",
        "| a fault | words | a checkpoint | `tests/unit/test_faults_page.py::test_of_nothing` |",
        "| a fault | words | a checkpoint | `tests/unit/test_of_nothing.py::test_of_nothing` |",
    ],
)
def test_a_row_that_lacks_something_is_seen(row: str) -> None:
    table = f"| {' | '.join(HEAD)} |\n|---|---|---|---|\n"
    assert len(flaws(f"{table}{row}\n", ROOT)) == 1
