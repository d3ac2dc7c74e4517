"""The site's pages: what is linked is there, what is broken fails, and lists and formulas look as they are meant."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from mkdocs.exceptions import Abort, PluginError

from .conftest import OUTSIDE, Build


def article(site: Path, page: str) -> str:
    found = re.search(r"<article.*?</article>", (site / page).read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[0]


def test_links_lead_to_pages_whatever_folder_they_lie_in(build_small: Build) -> None:
    site = build_small(
        {
            "docs/page.md": "# Page\n\n[over](../README.md#overview) [recipe](../recipes/README.md) "
            "[source](../recipes/run.py) [number](results/one.json) [example](examples/one.py)\n\n"
            "![drawn](results/one.png)\n",
            "recipes/README.md": "# Recipes\n\n[page](../docs/page.md#page)\n",
            "recipes/run.py": '"""Runs `this` and ````that````."""\n',
            "docs/examples/one.py": "print(1)\n",
            "docs/results/one.json": "{}",
            "docs/results/one.png": "",
        }
    )
    links = re.findall(r'(?:href|src)="([^"]+)"', article(site, "page.html"))
    assert {"index.html#overview", "recipes/index.html", "recipes/run.py.html", "results/one.json"} <= set(links)
    assert {"examples/one.py.html", "results/one.png"} <= set(links)
    assert all((site / link.partition("#")[0]).exists() for link in links if not link.startswith("#"))
    shown = html.unescape(re.sub(r"<[^>]+>", "", article(site, "recipes/run.py.html")))
    assert '"""Runs `this` and ````that````."""' in shown
    assert 'href="../page.html#page"' in article(site, "recipes/index.html")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[x](gone.md)", id="page"),
        pytest.param("[x](../gone/README.md)", id="folder"),
        pytest.param("[x](page.md#gone)", id="anchor"),
        pytest.param("[x](#gone)", id="own-anchor"),
        pytest.param("[x](/page.md)", id="absolute"),
        pytest.param("[x](../LICENSE)", id="no-page"),
        pytest.param("![x](gone.png)", id="picture"),
    ],
)
def test_a_link_that_leads_nowhere_fails(build_small: Build, text: str) -> None:
    with pytest.raises(Abort):
        build_small({"docs/page.md": f"# Page\n\n{text}\n", "LICENSE": ""})


def test_a_page_that_is_in_no_place_fails(build_small: Build) -> None:
    with pytest.raises(Abort):
        build_small({"docs/page.md": "# Page\n"}, nav=[])


def test_a_formula_with_an_unknown_command_fails(build_small: Build) -> None:
    with pytest.raises((Abort, PluginError)):
        build_small({"docs/page.md": "# Page\n\n$\\gone{w}$\n"})


def test_formulas_are_mathml_with_a_font_that_has_them(build_small: Build) -> None:
    from fontTools.ttLib import TTFont

    text = (
        "# Page\n\n$\\|w\\| < 1$ costs `$HOME`, | $3 and $4\n\n- $$\\frac{a}{\\sqrt{\\hat v}} \\ge \\texttt{a\\_b}$$\n"
    )
    site = build_small({"docs/page.md": text})
    page = article(site, "page.html")
    assert page.count("<math") == 2
    assert page.count('display="block"') == 1
    assert "<msqrt>" in page
    assert "<mtext" in page
    assert "a_b" in page
    assert "<code>$HOME</code>" in page
    font = TTFont(site / "assets" / "fonts" / "formulas.woff")
    assert set(map(ord, "‖<≥√^1")) | {ord("𝑤"), ord("𝛽")} <= set(font.getBestCmap())
    assert "MATH" in font
    style = (site / "site" / "look.css").read_text()
    assert "../assets/fonts/formulas.woff" in style


def test_lists_are_those_of_other_readers(build_small: Build) -> None:
    text = (
        "# Page\n\nText:\n- one\n  goes on\n  - below\n\n    ```python\n    def f():\n        - 1\n    ```\n\n"
        "  of one\n- two\n\n1. first\n\n   ```\n   inside\n   ```\n\n   more\n2. second\nlazy\n\n"
        "A sum is\n12. not a list.\n\n```\n- code\n  - code\n```\n\n    - indented\n      - code\n"
    )
    page = article(build_small({"docs/page.md": text}), "page.html")
    assert page.count("<ul>") == 2
    assert page.count("<ol>") == 1
    assert page.count("<li>") == 5
    plain = html.unescape(re.sub(r"<[^>]+>", "", page))
    assert "def f():\n    - 1" in plain
    assert re.search(r"second\s+lazy", plain)
    assert "12. not a list" in plain
    assert "- code\n  - code" in plain
    assert "- indented\n  - code" in plain


def test_a_notebook_is_shown_with_its_outputs(build_small: Build) -> None:
    picture = {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"}
    cells = [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# Shown\n\n[page](../page.md)"},
        {
            "cell_type": "code",
            "execution_count": 1,
            "id": "b",
            "metadata": {},
            "outputs": [
                {"output_type": "stream", "name": "stdout", "text": "printed 7\n"},
                {"output_type": "display_data", "data": picture, "metadata": {}},
            ],
            "source": "print(7)",
        },
    ]
    notebook = {"cells": cells, "metadata": {"language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5}
    linking = "# Page\n\n[n](notebooks/one.ipynb)\n"
    site = build_small({"docs/notebooks/one.ipynb": json.dumps(notebook), "docs/page.md": linking})
    page = article(site, "notebooks/one.html")
    assert 'href="../page.html"' in page
    assert "printed 7" in page
    source = re.search(r'<img[^>]* src="([^"]+)"', page)
    assert source is not None
    assert (site / "notebooks" / source[1]).read_bytes().startswith(b"\x89PNG")
    assert 'href="notebooks/one.html"' in article(site, "page.html")


def test_a_page_loads_nothing_from_elsewhere_and_names_no_repository(build_small: Build) -> None:
    page = (build_small({}) / "index.html").read_text()
    assert OUTSIDE.findall(page) == []
    assert "iframe-worker.js" in page
    assert "md-source" not in page


def test_the_named_repository_is_linked_and_no_edit_links_are_made(
    build_small: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUSTRATIO_REPOSITORY", "https://git.example.org/one")
    page = (build_small({}) / "index.html").read_text()
    assert 'href="https://git.example.org/one"' in page
    assert "/edit/" not in page


def test_links_that_are_named_by_files_have_the_titles_of_pages(build_small: Build) -> None:
    text = (
        "# Page\n\n[docs/other.md](other.md#more), [`other.md`](other.md), [../README.md](../README.md), "
        "[mine](other.md), `[other.md](other.md)`\n"
    )
    site = build_small({"docs/page.md": text, "docs/other.md": "# The other one\n\n## More\n"})
    page = article(site, "page.html")
    assert re.findall(r'<a href="([^"]+)">([^<]+)</a>', page) == [
        ("other.html#more", "The other one"),
        ("other.html", "The other one"),
        ("index.html", "Overview"),
        ("other.html", "mine"),
    ]
    assert "<code>[other.md](other.md)</code>" in page
