"""FSDP2 through torch.distributed.checkpoint, to another number of ranks."""

from __future__ import annotations

import pytest

from .checkpoint_runs import WITHOUT_STATISTICS, Files, assert_continued, make_case, read


@pytest.mark.parametrize("name", WITHOUT_STATISTICS)
@pytest.mark.parametrize(("after", "world_size"), [(4, 3), (2, 1)])
def test_to_fewer_ranks(files: Files, name: str, after: int, world_size: int) -> None:
    path = files.get("dcp", name, after, "fsdp")
    case = make_case(name, world_size, "fsdp")
    assert_continued(case, files.run(world_size, read, "dcp", case, path))


@pytest.mark.parametrize("world_size", [3])
def test_to_more_ranks(files: Files, world_size: int) -> None:
    for name in ("lamb", "novograd"):
        path = files.get("dcp", name, 2, "fsdp")
        case = make_case(name, world_size, "fsdp")
        assert_continued(case, files.run(world_size, read, "dcp", case, path))
