"""The whole site: it builds strictly, lacks no page and no public name, loads nothing from elsewhere, fits a screen."""

from __future__ import annotations

import html
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from mkdocs.config import load_config

from .conftest import OUTSIDE, ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom")

LEFT_OUT: dict[str, str] = {}
"""Pages of docs/ that are not in the navigation, and why."""

NOT_MARKDOWN_ANY_MORE = re.compile(r"^\s*(?:[-*] |\d+\. |\|.*\|\s*$)|\*\*|\$|\]\(|```|^#+ |^:::", re.MULTILINE)


def entries(nav: Any) -> Iterator[str]:
    """The pages of a navigation."""
    if isinstance(nav, str):
        yield nav
    for entry in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from entries(entry)


def test_every_page_has_its_place() -> None:
    nav = list(entries(load_config(str(ROOT / "mkdocs.yml")).nav))
    assert len(nav) == len(set(nav))
    pages = {p.relative_to(ROOT).as_posix() for s in ("md", "ipynb") for p in (ROOT / "docs").rglob(f"*.{s}")}
    pages = {page for page in pages if "/." not in page}
    assert pages - set(nav) == set(LEFT_OUT)
    assert not set(nav) & set(LEFT_OUT)
    assert {"README.md", "recipes/README.md", "CONTRIBUTING.md", "CHANGELOG.md"} <= set(nav)


def test_every_public_module_and_command_has_its_page() -> None:
    import reference

    modules = {reference.dotted(module): set(reference.names_of(module)) for module in reference.modules()}
    for folder in ("optimizers", "integrations"):
        for file in (ROOT / folder).glob("*.py"):
            if "__all__ = " in file.read_text() and file.name != "__init__.py":
                assert f"trustratio.{folder}.{file.stem}" in modules
    named = set().union(*modules.values())
    assert set(importlib.import_module("trustratio.optimizers").__all__) <= named
    recipes = {f"recipes/{file.name}" for file in (ROOT / "recipes").glob("*.py")} - {"recipes/__init__.py"}
    of_modules = {f"-m trustratio.integrations.{name}" for name in ("audit", "layer_norms")}
    assert set(reference.commands()) == recipes | of_modules


# The site as it is built ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def pages_of(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


def inventory(site: Path) -> set[str]:
    """The names that the reference explains."""
    packed = (site / "objects.inv").read_bytes()
    lines = zlib.decompress(packed.split(b"\n", 4)[4]).decode().splitlines()
    return {line.split(" ")[0] for line in lines if " py:" in line}


@pytest.mark.slow
def test_every_public_name_is_explained(site: Path) -> None:
    import reference

    wanted = {f"{reference.dotted(m)}.{name}" for m in reference.modules() for name in reference.names_of(m)}
    assert wanted - inventory(site) == set()
    for command in reference.commands():
        page = site / reference.command_page(command).replace(".md", ".html")
        assert "--help" in page.read_text(), command


@pytest.mark.slow
def test_nothing_comes_from_elsewhere(site: Path) -> None:
    assert len(pages_of(site)) > 100
    for page in pages_of(site):
        assert OUTSIDE.findall(page.read_text()) == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"""@import|url\(\s*["']?(?:https?:)?//""", style.read_text()), style


def test_what_comes_from_elsewhere_is_seen() -> None:
    assert OUTSIDE.search('<script defer src="https://cdn.example.org/x.js">')
    assert OUTSIDE.search("<link rel=stylesheet href='//fonts.example.org/css'>")
    assert OUTSIDE.search('<img alt="x" src="http://example.org/x.png">')
    assert not OUTSIDE.search('<a href="https://arxiv.org/abs/1904.00962">')
    assert not OUTSIDE.search('<img src="results/audit.png">')


@pytest.mark.slow
def test_no_markdown_and_no_formula_is_left_as_it_was_written(site: Path) -> None:
    formulas = 0
    for page in pages_of(site):
        text = page.read_text()
        formulas += text.count("<math")
        found = re.search(r"<article.*?</article>", text, re.DOTALL)
        shown = re.sub(r"<(pre|code|math|script|style)\b.*?</\1>", "x", found[0] if found else "", flags=re.DOTALL)
        shown = html.unescape(re.sub(r"<[^>]+>", "", shown))
        assert NOT_MARKDOWN_ANY_MORE.findall(shown) == [], page
    written = 0
    for page in (ROOT / "docs").glob("*.md"):
        prose = re.sub(r"^ *```.*?^ *```|`[^`]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        written += len(re.findall(r"\$\$.+?\$\$|\$[^$]+\$", prose, re.DOTALL))
    assert formulas == written > 300


@pytest.mark.slow
def test_pages_and_files_that_are_linked_are_there(site: Path) -> None:
    for page in pages_of(site):
        if page.name == "404.html":
            continue
        for link in re.findall(r'(?:href|src)="([^"#?:]+)["#?]', page.read_text()):
            assert (page.parent / unquote(html.unescape(link))).exists(), (page, link)


# In a browser --------------------------------------------------------------------------------------------------------


def browse(page: Path, folder: Path, probe: str, width: int, query: str = "") -> Any:
    """Open a page in Chromium and return what the probe, a JavaScript expression, says two seconds later."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install --no-install-recommends chromium)")
    script = f"""<script>setTimeout(() => {{
        const shown = document.createElement("pre")
        shown.textContent = JSON.stringify({probe})
        shown.id = "probe"
        document.body.replaceChildren(shown)
    }}, 2000)</script></body>"""
    probed = page.with_name(f"probed-{page.name}")
    probed.write_text(page.read_text().replace("</body>", script))
    profile = f"--user-data-dir={folder / 'profile'}"
    window = (f"--window-size={width},1200", "--virtual-time-budget=6000")
    command = [CHROMIUM, *FLAGS, *window, profile, probed.as_uri() + query]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    finally:
        probed.unlink()
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr
    return json.loads(html.unescape(found[1]))


@pytest.mark.slow
def test_the_search_works_in_a_folder_without_a_server(site: Path, tmp_path: Path) -> None:
    probe = "[...document.querySelectorAll('.md-search-result__link')].map(a => a.getAttribute('href'))"
    found = browse(site / "index.html", tmp_path, probe, 1200, "?q=NovoGrad")
    assert any("adam-family.html" in link for link in found), found
    assert any("reference/optimizers/novograd.html" in link for link in found), found


@pytest.mark.slow
@pytest.mark.parametrize("page", ["index", "optimizers", "adam-family", "start", "notebooks/trust_ratios"])
def test_a_page_is_no_wider_than_a_narrow_screen(site: Path, tmp_path: Path, page: str) -> None:
    wider = "document.scrollingElement.scrollWidth - innerWidth"
    assert browse(site / f"{page}.html", tmp_path, wider, 500) <= 0


@pytest.mark.slow
def test_the_button_that_copies_covers_no_code_on_a_narrow_screen(site: Path, tmp_path: Path) -> None:
    probe = """[...document.querySelectorAll("pre")].flatMap(pre => {
        const button = pre.querySelector(".md-code__nav, .md-clipboard"), code = pre.querySelector("code")
        if (!button) return []
        const first = code.getBoundingClientRect().top + parseFloat(getComputedStyle(code).paddingTop)
        return [first - button.getBoundingClientRect().bottom]
    })"""
    room = browse(site / "installation.html", tmp_path, probe, 500)
    assert room
    assert min(room) >= 0
