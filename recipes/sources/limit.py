"""How much of the sources is read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """At most so many documents, and no further one once there are so many characters; None: no bound.

    Empty documents do not count, repeated ones do: what is read does not depend on what was read before.
    """

    documents: int | None = None
    characters: int | None = None

    def after(self, documents: int, characters: int) -> Limit:
        """Return what is left of it."""
        return Limit(
            None if self.documents is None else max(0, self.documents - documents),
            None if self.characters is None else max(0, self.characters - characters),
        )

    @property
    def is_reached(self) -> bool:
        """Whether nothing is left of it."""
        return self.documents == 0 or self.characters == 0


UNLIMITED = Limit()
