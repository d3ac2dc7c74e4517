"""A small repository whose site is built with the real configuration and hooks."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the extra [docs] is not installed")

from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).resolve().parents[2]
HOOKS = ROOT / "docs" / "site"

OUTSIDE = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|object|embed|link)\b[^>]*?\b(?:src|href|data)=["']?(?:https?:)?//"""
)
"""What a page would load from elsewhere."""


@pytest.fixture(autouse=True)
def hooks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    monkeypatch.setattr(sys, "path", [str(HOOKS), *sys.path])


Build = Callable[..., Path]


@pytest.fixture
def build_small(tmp_path: Path) -> Build:
    """Returns a function that takes pages by path, builds them strictly, and returns the site's folder."""

    def build_pages(pages: dict[str, str], nav: list[str] | None = None) -> Path:
        folder = tmp_path / "repository"
        shutil.copytree(HOOKS, folder / "docs" / "site", ignore=shutil.ignore_patterns("*.md", "__pycache__"))
        for path, text in {"README.md": "# Overview\n", **pages}.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
        (folder / "mkdocs.yml").write_text(small_configuration(), encoding="utf-8")
        shown = [path for path in pages if path.endswith((".md", ".ipynb"))] if nav is None else nav
        config = load_config(str(folder / "mkdocs.yml"), strict=True, nav=["README.md", *shown])
        config.plugins.run_event("startup", command="build", dirty=False)
        build(config)
        return folder / "site"

    return build_pages


def small_configuration() -> str:
    """The site's own configuration without the reference, which is made of the whole package."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    text = text[: text.index("\nnav:")].replace("  - docs/site/reference.py\n", "")
    text = re.sub(r"^watch:.*\n", "", text, flags=re.MULTILINE)
    begin, end = text.index("  - mkdocstrings:"), text.index("\nvalidation:")
    return text[:begin] + text[end:]
