"""The one search for wrappers and modules that leave no reference to themselves where an optimizer could find it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any, TypeVar

__all__ = ["living"]

T = TypeVar("T")


def living(*kinds: type[T]) -> Iterator[T]:
    """Yield every object of this process that is of one of the classes.

    The garbage collector knows them all, those under construction and those nobody uses any more among them. A walk
    over all objects takes a second in a large process, so it is for what is looked up once per layout, or seldom.
    """
    for candidate in _all_objects():
        # type() rather than isinstance(), which would run the __class__ property of foreign proxy objects.
        if issubclass(type(candidate), kinds):
            yield candidate


def _all_objects() -> list[Any]:
    """Every object that the garbage collector knows, those too that `gc.freeze()` has hidden.

    It lists no frozen objects, and gives them back only all together. So they are thawed for the time of the listing,
    and then everything is frozen that lives by now, as the program would have it if it called `gc.freeze()` again: no
    collection goes through it, but what of it becomes a cycle of garbage later stays. What is such garbage already is
    collected before. A program that never froze anything is left alone.
    """
    if not gc.get_freeze_count():
        return gc.get_objects()
    collects = gc.isenabled()
    gc.collect()  # of what is not frozen alone
    gc.disable()  # a collection in between would go through all that was frozen
    try:
        gc.unfreeze()
        return gc.get_objects()
    finally:
        gc.freeze()
        if collects:
            gc.enable()
