"""What is read of wrappers that they do not document: one sentence wherever a version lacks it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .layout import LayoutError

__all__ = ["Internals"]


@dataclass(frozen=True)
class Internals:
    """The undocumented attributes of one wrapper, which every release may rename.

    Each wrapper's integration reads them in one place, through one of these, and lists there which versions have them.

    Attributes:
        wrapper: Its name for messages.
        package: The distribution that has it.
        versions: Those that have all that is read, e.g. "2.6 to 2.14".
    """

    wrapper: str
    package: str
    versions: str

    def read(self, owner: Any, *names: str) -> Any:
        """Return the first of these attributes that the owner has: names of one thing, the newest first.

        Raises:
            LayoutError: If it has none of them.
        """
        for name in names:
            try:
                return getattr(owner, name)
            except AttributeError:
                continue
        of = getattr(owner, "__name__", type(owner).__name__)  # a module's, or an object's class
        raise LayoutError(self.lacks(f"{of}.{names[0]}"))

    def lacks(self, what: str) -> str:
        """Return the sentence about something that is not there."""
        try:
            found = version(self.package)
        except PackageNotFoundError:
            found = "of an unknown version"
        return (
            f"{self.package} {found} has no {what}, which trustratio needs to follow {self.wrapper}: known to work are "
            f"{self.package} {self.versions}. Install one of these, or a newer trustratio"
        )
