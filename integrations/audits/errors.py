"""The error of an audit that could not be made."""

from __future__ import annotations

__all__ = ["CannotAudit"]


class CannotAudit(RuntimeError):
    """There is no verdict: bad input, a wrapper that refuses, ranks that died. The message is one sentence or two."""
