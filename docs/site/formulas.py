"""Renders formulas as MathML, which browsers draw themselves: no script, no network, one small font.

Few machines have a font that knows how fractions, roots and brackets are put together, so the site brings what it uses
of STIX Two Math (SIL Open Font License), which comes inside ziamath.
"""

from __future__ import annotations

import html
import re
from importlib.util import find_spec
from pathlib import Path

from fontTools import subset
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

# What pymdownx.arithmatex, with `generic: true`, makes of $...$ and $$...$$.
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
DISPLAYED = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
TEXT = re.compile(r"\\text(?:tt|rm|bf|it)?\{[^{}]*\}")
UNKNOWN = re.compile(r"\\[A-Za-z]*|(?<=<mtext>)\$")

FONT = Path(find_spec("ziamath").origin).parent / "fonts" / "STIXTwoMath-Regular.ttf"
FONT_ON_SITE = "assets/fonts/formulas.woff"
ITALIC = [*range(0x1D434, 0x1D468), 0x210E, *range(0x1D6E2, 0x1D71C)]
"""What browsers show single letters as, Latin and Greek."""

ROOT_SIGN = 0x221A
"""Browsers put it before what <msqrt> has in it."""

characters: set[int] = set()
"""Those of all formulas so far."""


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace the formulas of a page.

    Raises:
        PluginError: If one has a command that is not known.
    """
    try:
        content = DISPLAYED.sub(lambda match: f'<div class="formula">{mathml(match[1], "block")}</div>', content)
        return INLINE.sub(lambda match: mathml(match[1], "inline"), content)
    except ValueError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error


def mathml(formula: str, display: str) -> str:
    r"""Return a formula, TeX as it stands in HTML, as MathML.

    Args:
        formula: for example `\|w\| &lt; 1`.
        display: "inline" or "block".

    Raises:
        ValueError: If it has a command that is not known.
    """
    tex = html.unescape(formula).strip()
    drawn = convert(TEXT.sub(lambda text: text[0].replace(r"\_", "_"), tex), display=display)
    if unknown := UNKNOWN.search(html.unescape(drawn)):
        raise ValueError(f"{unknown[0]} is not known in the formula {tex}. Write it in another way.")
    characters.update(map(ord, html.unescape(re.sub(r"<[^>]*>", "", drawn))))
    return drawn


def on_post_build(config: MkDocsConfig) -> None:
    """Write the part of the font that formulas use."""
    write_font(Path(config.site_dir) / FONT_ON_SITE, characters)


def write_font(path: Path, wanted: set[int]) -> None:
    """Write the characters, and the pieces that larger ones are put together of, as a font for browsers."""
    options = subset.Options(flavor="woff", layout_features=["*"])
    font = subset.load_font(str(FONT), options)
    chosen = subset.Subsetter(options)
    chosen.populate(unicodes=[*wanted, *ITALIC, ROOT_SIGN, *range(0x20, 0x7F)])
    chosen.subset(font)
    path.parent.mkdir(parents=True, exist_ok=True)
    subset.save_font(font, str(path), options)
