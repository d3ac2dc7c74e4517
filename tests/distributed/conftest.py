"""One pool of worker processes at a time; tests are ordered by world size so that each is started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .pool import WorkerPool


class _Pools:
    def __init__(self) -> None:
        self.current: WorkerPool | None = None

    def get(self, world_size: int) -> WorkerPool:
        if self.current is None or self.current.world_size != world_size:
            self.close()
            self.current = WorkerPool(world_size)
        return self.current

    def close(self) -> None:
        if self.current is not None:
            self.current.close()
            self.current = None


@pytest.fixture(scope="session")
def pools() -> Iterator[_Pools]:
    pools = _Pools()
    yield pools
    pools.close()


@pytest.fixture
def pool(pools: _Pools, world_size: int) -> WorkerPool:
    """The pool for the test's `world_size` parameter."""
    return pools.get(world_size)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def world_size(item: pytest.Item) -> int:
        callspec = getattr(item, "callspec", None)
        return callspec.params.get("world_size", 0) if callspec else 0

    items.sort(key=world_size)
