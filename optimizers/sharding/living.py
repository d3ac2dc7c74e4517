"""The one search for wrappers and modules that leave no reference to themselves where an optimizer could find it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import TypeVar

__all__ = ["living"]

T = TypeVar("T")


def living(*kinds: type[T]) -> Iterator[T]:
    """Yield every object of this process that is of one of the classes.

    The garbage collector knows them all, those under construction and those nobody uses any more among them. A walk
    over all objects takes a second in a large process, so it is for what is looked up once per layout, or seldom.
    """
    for candidate in gc.get_objects():
        # type() rather than isinstance(), which would run the __class__ property of foreign proxy objects.
        if issubclass(type(candidate), kinds):
            yield candidate
