"""DeepSpeed's universal checkpoint, written for optimizers that its converter does not know."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from trustratio.integrations.checkpoints.consolidated import OptimizerStateError, restore, save_optimizer_state
from trustratio.integrations.checkpoints.deepspeed_universal import _UniversalFolder, universal_from_engine_state
from trustratio.optimizers import LAMB

from .checkpoint_runs import Files, assert_continued, make_case, read

NAMES = ["lamb", "lars", "novograd", "vrlamb"]
UNIVERSAL: dict[str, Any] = {"config": {"checkpoint": {"load_universal": True}}}


@pytest.mark.parametrize("world_size", [2])
def test_write(files: Files, world_size: int) -> None:
    for name in NAMES:
        files.get("universal", name, world_size, 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("stage", "world_size"), [(2, 3), (3, 3)])
def test_other_stage_and_number_of_ranks(files: Files, name: str, stage: int, world_size: int) -> None:
    path = files.get("universal", name, 2, 1)
    case = make_case(name, world_size, stage)
    assert_continued(case, files.run(world_size, read, "universal", case, path))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("stage", "world_size"), [(1, 3), (2, 3)])
def test_after_deepspeeds_own_loader(files: Files, name: str, stage: int, world_size: int) -> None:
    path = files.get("universal", name, 2, 1)
    case = make_case(name, world_size, stage, **UNIVERSAL)
    assert_continued(case, files.run(world_size, read, "universal with DeepSpeed", case, path))


@pytest.mark.parametrize("name", ["lamb", "vrlamb"])
@pytest.mark.parametrize("world_size", [3])
def test_after_deepspeeds_own_loader_for_zero_3(files: Files, name: str, world_size: int) -> None:
    """It gives every group the first one's options, which the second loader repairs."""
    path = files.get("universal", name, 2, 1)
    case = make_case(name, world_size, 3, **UNIVERSAL)
    assert_continued(case, files.run(world_size, read, "universal with DeepSpeed", case, path))


# In one process, from a file ----------------------------------------------------------------------------------------

EXTRA = {"counters": {"global_steps": 3}, "scheduler": None, "loss_scale": {}, "extra": None}


def lamb(weight: float, **options: Any) -> LAMB:
    return LAMB([{"params": [("weight", torch.nn.Parameter(torch.full((4, 3), weight)))], **options}])


def convert(folder: Path, extra: Any = EXTRA, **options: Any) -> None:
    save_optimizer_state(lamb(1.0, **options), folder / "file", extra=extra)
    universal_from_engine_state(folder / "file", folder, "tag")


def load(folder: Path, tag: str | None = None) -> LAMB:
    optimizer = lamb(2.0)
    try:
        restore(optimizer, lambda path: _UniversalFolder(path, tag), folder, model=None)
    except OptimizerStateError:
        assert optimizer.param_groups[0]["params"][0].eq(2.0).all()
        raise
    return optimizer


def test_from_a_file(tmp_path: Path) -> None:
    convert(tmp_path, lr=0.25)
    loaded = load(tmp_path)
    assert loaded.param_groups[0]["lr"] == 0.25
    assert loaded.param_groups[0]["params"][0].eq(1.0).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "latest_universal", "tag"]


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="write it with save_engine_state"):
        convert(tmp_path, extra=None)
    with pytest.raises(ValueError, match="DeepSpeed knows no segments"):
        convert(tmp_path, segments=2)
    convert(tmp_path)
    with pytest.raises(ValueError, match="tag exists: give each checkpoint a tag of its own"):
        convert(tmp_path)


class Malicious:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    convert(tmp_path)
    file, trace = tmp_path / "tag/zero/weight/exp_avg.pt", tmp_path / "it ran"
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        write({"param": Malicious(trace)}, file)
        with pytest.raises(OptimizerStateError, match="cannot be read as an optimizer's state"):
            load(tmp_path)
        assert not trace.exists()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptimizerStateError, match="latest_universal"):
        load(tmp_path)
    convert(tmp_path)
    (tmp_path / "tag/zero/weight/fp32.pt").unlink()
    with pytest.raises(OptimizerStateError, match=r"fp32\.pt"):
        load(tmp_path, "tag")
