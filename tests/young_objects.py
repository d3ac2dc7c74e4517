"""Searches of living objects that leave out what lived before the first test: most of half a million objects.

A plan searches a dozen times, each time through all objects of the process. With every wrapper's package imported that
is half a second per plan, most of what a small test takes. What the imports made is frozen, which `gc.get_objects()`
leaves out, and only what is younger is searched, unless the test itself freezes or thaws objects.
"""

from __future__ import annotations

import gc
from typing import Any

from trustratio.optimizers.sharding import living

_search_all = living._all_objects
_youngest: list[Any] = []
_MANY = 15_000


def search_young_objects_alone() -> None:
    """Hide what lives now from searches.

    Called again, between tests, it does so only if many objects were made since, as by imports of what is used for the
    first time, or if objects were frozen or thawed.
    """
    global _youngest
    objects = gc.get_objects()
    # Not asked of gc.get_freeze_count(), which counts all that is frozen, one by one: a twentieth of a second.
    if len(objects) < _MANY and _is_listed(objects):
        return
    del objects
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    _youngest = [None]  # is listed until somebody freezes
    living._all_objects = _search_young


def _search_young() -> list[Any]:
    objects = gc.get_objects()
    return objects if _is_listed(objects) else _search_all()


def _is_listed(objects: list[Any]) -> bool:
    return any(one is _youngest for one in objects)
