"""Brings the repository's pages into the site under their own paths, so that every link works here as it does there.

MkDocs looks a link up among the files of the site. These are named by their paths in the repository, `README.md`,
`docs/sharding.md`, `recipes/README.md`, so nothing has to be rewritten; on the site `docs/` falls away. A file of
source that a page links to becomes a page, too, and so does a notebook, with the outputs that it is stored with.
"""

from __future__ import annotations

import functools
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[2]
CODE = ("optimizers", "integrations", "recipes", "benchmarks", "tests")
SHOWN = (".md", ".png", ".svg", ".json", ".csv", ".ipynb", ".css", ".js")
LANGUAGES = {".py": "python", ".c": "c", ".h": "c", ".sh": "bash", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}
LINK = re.compile(r"\]\(([^)\s#]+)")
CODE_OR_NAMED_BY_FILE = re.compile(
    r"```.*?```|`[^`\n]*`|\[`?[\w./-]+\.md`?\](?=\(([^)\s#]+\.md)(?:#[^)\s]*)?\))", re.DOTALL
)
HEADING = re.compile(r"^# +(.+?) *$", re.MULTILINE)

LESS_SOUGHT = {"CHANGELOG.md", "CONTRIBUTING.md"}
"""What every search would find first, since it speaks of everything, comes last."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Put the repository's files in the place of those of docs_dir; what the theme brings stays."""
    others = [file for file in files if file.src_dir != config.docs_dir]
    paths = list(documents(ROOT))
    notebooks = [NotebookFile(path, config) for path in paths if path.endswith(".ipynb")]
    own = [RepositoryFile(path, config) for path in paths if not path.endswith(".ipynb")]
    sources = [SourceFile(path, config) for path in linked_sources(ROOT, paths)]
    pictures = [picture for notebook in notebooks for picture in notebook.pictures(config)]
    return Files([*others, *own, *notebooks, *pictures, *sources])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rank what is about everything, and sources, below the pages in a search."""
    path = page.file.src_uri
    if path in LESS_SOUGHT or isinstance(page.file, SourceFile) or path.startswith("tests/"):
        page.meta.setdefault("search", {"boost": 0.2})
    return markdown if isinstance(page.file, SourceFile) else with_titles(markdown, posixpath.dirname(path))


def with_titles(markdown: str, folder: str) -> str:
    """Return a page of a folder with the titles of pages as the texts of links that have their files' names."""

    def titled(link: re.Match[str]) -> str:
        if link[1] is None:  # code
            return link[0]
        target = ROOT / posixpath.normpath(posixpath.join(folder, link[1]))
        heading = HEADING.search(target.read_text(encoding="utf-8")) if target.is_file() else None
        return f"[{heading[1]}]" if heading else link[0]

    return CODE_OR_NAMED_BY_FILE.sub(titled, markdown)


class RepositoryFile(File):
    """A file of the repository, named by its path there."""

    def __init__(self, path: str, config: MkDocsConfig, dest_uri: str | None = None):
        super().__init__(
            path, str(ROOT), config.site_dir, config.use_directory_urls, dest_uri=dest_uri or place_on_site(path)
        )
        self.inclusion = InclusionLevel.INCLUDED


class SourceFile(RepositoryFile):
    """A file of source that is shown as a page."""

    def __init__(self, path: str, config: MkDocsConfig):
        super().__init__(path, config, dest_uri=f"{path.removeprefix('docs/')}.html")
        self.inclusion = InclusionLevel.NOT_IN_NAV

    def is_documentation_page(self) -> bool:
        return True

    @property
    def content_string(self) -> str:  # type: ignore[override]
        text = (ROOT / self.src_uri).read_text(encoding="utf-8")
        language = LANGUAGES[posixpath.splitext(self.src_uri)[1]]
        fence = "`" * max(4, *(len(run) + 1 for run in re.findall(r"`+", text)), 4)  # longer than any inside
        return f"# `{self.src_uri}`\n\n{fence}{language}\n{text}{fence}\n"


class NotebookFile(RepositoryFile):
    """A notebook that is shown as a page, with its outputs; nothing is executed."""

    def is_documentation_page(self) -> bool:
        return True

    @functools.cached_property
    def converted(self) -> tuple[str, dict[str, bytes]]:
        """The page's Markdown, and the pictures in it by their paths beside the notebook."""
        notebook = nbformat.read(ROOT / self.src_uri, as_version=4)
        resources = {"output_files_dir": f"{self.name}_files", "unique_key": self.name}
        text, resources = MarkdownExporter().from_notebook_node(notebook, resources)
        return text, resources["outputs"]

    @property
    def content_string(self) -> str:  # type: ignore[override]
        return self.converted[0]

    def pictures(self, config: MkDocsConfig) -> Iterator[File]:
        """The pictures as files of the site."""
        for name, content in self.converted[1].items():
            path = posixpath.join(posixpath.dirname(self.src_uri), name)
            picture = RepositoryFile(path, config)
            picture.content_bytes = content
            yield picture


def place_on_site(path: str) -> str:
    """Where a file of the repository lies on the site: `docs/` falls away, and a README is its folder's index."""
    stem, suffix = posixpath.splitext(path.removeprefix("docs/"))
    if suffix not in (".md", ".ipynb"):
        return stem + suffix
    folder, name = posixpath.split(stem)
    return posixpath.join(folder, "index" if name == "README" else name) + ".html"


def documents(root: Path) -> Iterator[str]:
    """Paths of all pages and of what they show: at the top, in docs/, and the READMEs of folders of code."""
    yield from sorted(page.name for page in root.glob("*.md"))
    shown = (file for file in (root / "docs").rglob("*") if file.suffix in SHOWN)
    readmes = (page for folder in CODE for page in (root / folder).rglob("README.md"))
    found = (file.relative_to(root) for file in (*shown, *readmes))
    yield from sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


def linked_sources(root: Path, paths: list[str]) -> list[str]:
    """Paths of the files of source that pages link to."""
    linked = {
        posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        for path in paths
        if path.endswith((".md", ".ipynb"))
        for target in LINK.findall((root / path).read_text(encoding="utf-8"))
    }
    return sorted(path for path in linked if posixpath.splitext(path)[1] in LANGUAGES and (root / path).is_file())
