"""The documentation says what the code says: tables, links, files and names that it mentions exist."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from trustratio.optimizers import OPTIMIZERS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FOLDERS = ("docs", "optimizers", "integrations", "recipes", "benchmarks", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
TODAYS = [page for page in PAGES if page.name != "CHANGELOG.md"]
"""Pages that speak of the code as it is; the change log names what is gone."""

FILES = ["/" + path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]
FILES += [f"/{path.name}" for path in ROOT.iterdir()]
FILES_ELSEWHERE = {
    "opt/tvlars.py",  # TVLARS in its authors' repository
    *("layerwise_lion.py", "layerwise_lion_reference.py"),  # the reader's own, in docs/adding-an-optimizer.md
    *("test_layerwise_lion.py", "tests/distributed/test_layerwise_lion.py"),
}

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
PATH = re.compile(
    rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]*(?:\.(?:py|md|c|h|html|js|yaml|json|png|csv)\b|/(?!\w))"
)
SOURCE_FILE = re.compile(r"`([\w./-]+\.(?:py|c|h|md))`")
NAME_IN_FILE = re.compile(r"`(\w+)`\s+in\s+`([\w./-]+\.py)`")
DOTTED_NAME = re.compile(r"(?<![\w/.\"-])trustratio(?:\.\w+)+")

RESOLVE = """
import pkgutil, sys
for name in sys.argv[1:]:
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError) as error:
        print(f"{name}: {error}")
"""


def pages(which: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", [pytest.param(p, id=p.relative_to(ROOT).as_posix()) for p in which])


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
    family_pages = [(DOCS / f"{family}-family.md").read_text(encoding="utf-8") for family in ("momentum", "adam")]
    headings = [line for page in family_pages for line in page.splitlines() if line.startswith("## ")]
    title = OPTIMIZERS[name].optimizer_class.__name__
    assert any(title in heading.removeprefix("## ").split(": ")[0].split(", ") for heading in headings), title


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path) -> list[str]:
    dead = []
    for link in LINK.findall(prose(page)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


def missing_files(page: Path) -> list[str]:
    """Paths from a top-level folder, anywhere in the page, and names of source files in code spans.

    A path with a word in capitals is a pattern. A source file may be named from any folder on, as in `lamb.py`.
    """
    text = page.read_text(encoding="utf-8")
    paths = {path for path in PATH.findall(text) if not re.search(r"[A-Z]{4}(?!.*\.md)", path)} - FILES_ELSEWHERE
    sources = set(SOURCE_FILE.findall(text)) - FILES_ELSEWHERE
    missing = {path for path in paths if not (ROOT / path).exists() and not (page.parent / path).exists()}
    missing |= {source for source in sources if not any(file.endswith(f"/{source}") for file in FILES)}
    return sorted(missing)


def misplaced_names(page: Path) -> list[str]:
    """Of "`name` in `file.py`" those whose file has no such name."""
    wrong = []
    for name, file in NAME_IN_FILE.findall(page.read_text(encoding="utf-8")):
        homes = [path for path in FILES if path.endswith(f"/{file}")]
        if not any(re.search(rf"\b{name}\b", (ROOT / home[1:]).read_text(encoding="utf-8")) for home in homes):
            wrong.append(f"{name} in {file}")
    return wrong


def names(page: Path) -> Iterator[str]:
    """Yield the package's dotted names in a page, and what its blocks of Python import from the package."""
    text = page.read_text(encoding="utf-8")
    yield from set(DOTTED_NAME.findall(text))
    for language, block in FENCED.findall(text):
        if language == "python":
            for node in ast.walk(ast.parse(textwrap.dedent(block))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trustratio"):
                    yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pages(PAGES)
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page) == []


@pages(TODAYS)
def test_files_that_are_named_exist(page: Path) -> None:
    assert missing_files(page) == []
    assert misplaced_names(page) == []


def test_names_of_the_package_exist() -> None:
    """In a process of its own: what is imported here would stay for the other tests."""
    named = sorted({name for page in TODAYS for name in names(page)})
    run = subprocess.run([sys.executable, "-c", RESOLVE, *named], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == []


def test_what_is_stale_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading\n\n[here](#a-heading) [not](#another) ![picture](gone.png) [page](https://example.org/gone.md)\n\n"
        "`optimizers/gone.py`, `optimizers/gone/`, `gone.py`, `lamb.py`, `docs/results/gpu_NAME.json`, "
        "`Gone` in `lamb.py`, `LAMB` in\n`lamb.py`, `trustratio.optimizers.gone`\n\n"
        "    python recipes/gone.py\n\n```python\nfrom trustratio.optimizers import LAMB, Gone\n```\n"
    )
    assert dead_links(page) == ["#another", "gone.png"]
    assert missing_files(page) == ["gone.py", "optimizers/gone.py", "optimizers/gone/", "recipes/gone.py"]
    assert misplaced_names(page) == ["Gone in lamb.py"]
    assert sorted(names(page)) == [
        *("trustratio.optimizers", "trustratio.optimizers.Gone"),
        *("trustratio.optimizers.LAMB", "trustratio.optimizers.gone"),
    ]
