"""The documentation says what the registry says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from trustratio.optimizers import OPTIMIZERS

DOCS = Path(__file__).parents[2] / "docs"


def load_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("optimizer_table", DOCS / "optimizer_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_the_registrys() -> None:
    page = (DOCS / "optimizers.md").read_text(encoding="utf-8")
    assert load_table().written(page) == page, "run: python docs/optimizer_table.py"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_a_section(name: str) -> None:
    pages = [(DOCS / f"{family}-family.md").read_text(encoding="utf-8") for family in ("momentum", "adam")]
    headings = [line for page in pages for line in page.splitlines() if line.startswith("## ")]
    title = OPTIMIZERS[name].optimizer_class.__name__
    assert any(title in heading.removeprefix("## ").split(": ")[0].split(", ") for heading in headings), title
