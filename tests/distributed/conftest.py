"""Two pools of worker processes at most; tests are ordered by world size so that each is started once.

Tests with a parameter `after` come last: they read what pools of that many ranks write.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .pool import Pools, WorkerPool


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    pools = Pools(at_once=2)  # one that writes files and one that reads them
    yield pools
    pools.close()


@pytest.fixture
def pool(pools: Pools, world_size: int) -> WorkerPool:
    """The pool for the test's `world_size` parameter."""
    return pools.get(world_size)


@pytest.fixture(scope="session")
def files(pools: Pools, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from .checkpoint_runs import Files

    return Files(tmp_path_factory.mktemp("states"), pools)


def _ranks(item: pytest.Item) -> int | None:
    callspec = getattr(item, "callspec", None)
    return None if callspec is None or "after" in callspec.params else callspec.params.get("world_size")


@pytest.hookimpl(trylast=True)  # after whoever shuffles tests
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--ranks")
    if wanted is not None:
        config.hook.pytest_deselected(items=[item for item in items if _ranks(item) != wanted])
        items[:] = [item for item in items if _ranks(item) == wanted]

    def order(item: pytest.Item) -> tuple[bool, int]:
        callspec = getattr(item, "callspec", None)
        params = callspec.params if callspec else {}
        # What reads the files of larger pools runs after them, in smaller and smaller pools.
        after = "after" in params
        return after, (-1 if after else 1) * params.get("world_size", 0)

    items.sort(key=order)
