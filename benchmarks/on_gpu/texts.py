"""The text that parts train on in a rehearsal."""

from __future__ import annotations

from pathlib import Path

__all__ = ["toy_text"]

_PAGES = Path(__file__).resolve().parents[2] / "docs"


def toy_text() -> list[str]:
    """Some pages of this project's documentation: as many as are prepared in a moment."""
    return [str(_PAGES / "[a-d]*.md")]
