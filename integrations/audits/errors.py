"""What keeps an audit from being made."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CannotAudit", "Failure"]


class CannotAudit(RuntimeError):
    """There is no verdict: bad input, a wrapper that refuses, ranks that died. The message is one sentence or two."""


@dataclass(frozen=True)
class Failure:
    """The answer of a rank on which something was raised.

    Attributes:
        reason: The error, in one line.
        stage: What the rank was at.
    """

    reason: str
    stage: str
