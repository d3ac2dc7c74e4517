"""A file of `save_optimizer_state` that is damaged, or holds other layers: refused by name, or restored in part."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from trustratio.integrations.checkpoints import content as content_file
from trustratio.integrations.checkpoints import load_optimizer_state, save_optimizer_state
from trustratio.integrations.checkpoints.consolidated import OptimizerStateError, _open

from .test_consolidated_state import SHAPES, make, train


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("file") / "state"
    layers, optimizer = make(shapes={"dense": (4, 6), "bias": (4,)})
    train(layers, optimizer, 1)
    save_optimizer_state(optimizer, path, extra={"epoch": 3})
    return path.read_bytes()


def assert_refused(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    layers, optimizer = make(shapes={"dense": (4, 6), "bias": (4,)}, seed=4)
    before = {name: parameter.detach().clone() for name, parameter in layers.items()}
    with pytest.raises(OptimizerStateError, match=f"{path} cannot be read as an optimizer's state: "):
        load_optimizer_state(optimizer, path)
    assert all(torch.equal(parameter, before[name]) for name, parameter in layers.items())
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.1


def flipped(content: bytes, position: int, bit: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


def is_noticed(path: Path) -> bool:
    """Whether a file is refused before any of its tensors is used."""
    stored, problems = _open(path)
    return bool(problems) or (stored is not None and not stored.is_whole())


@pytest.mark.parametrize("bit", range(8))
def test_every_damaged_byte_is_noticed(content: bytes, tmp_path: Path, bit: int) -> None:
    path = tmp_path / "damaged"
    end = 8 + int.from_bytes(content[:8], "little")
    padding = range(len(content[:end].rstrip(b" ")), end)  # means nothing, whatever of it JSON takes
    path.write_bytes(content)
    assert not is_noticed(path)
    for position in range(len(content)):
        if position not in padding:
            path.write_bytes(flipped(content, position, bit))
            assert is_noticed(path), position


@pytest.mark.parametrize("length", [64, 100, 1 << 20])
def test_the_pieces_of_a_large_file_are_each_read(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr(content_file, "PIECE", length)
    monkeypatch.setattr(content_file, "READ_AT_ONCE", 48)
    layers, optimizer = make(shapes={"dense": (4, 6), "bias": (4,)})
    train(layers, optimizer, 1)
    path = tmp_path / "state"
    save_optimizer_state(optimizer, path)
    written = path.read_bytes()
    assert not is_noticed(path)
    for position in range(8 + int.from_bytes(written[:8], "little"), len(written), 7):
        path.write_bytes(flipped(written, position, 4))
        assert is_noticed(path)


def test_a_damaged_file_changes_nothing(content: bytes, tmp_path: Path) -> None:
    for position in (0, 20, len(content) // 2, len(content) - 1):
        assert_refused(flipped(content, position, 2), tmp_path / "damaged")


def test_a_damaged_tensor_is_loaded_if_that_is_asked_for(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    path.write_bytes(flipped(content, len(content) - 1, 2))
    _, optimizer = make(shapes={"dense": (4, 6), "bias": (4,)}, seed=4)
    assert load_optimizer_state(optimizer, path, verify=False) == {"epoch": 3}


def test_a_file_that_was_cut_is_noticed(content: bytes, tmp_path: Path) -> None:
    for length in (0, 1, 7, 8, 100, len(content) // 2, len(content) - 1):
        assert_refused(content[:length], tmp_path / "cut")
    assert_refused(content + b"x", tmp_path / "longer")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OptimizerStateError, match="folder is a folder: give the file that save_optimizer_state wrote"):
        load_optimizer_state(make()[1], tmp_path / "folder")


def test_a_folder_is_not_written_as_a_file(tmp_path: Path) -> None:
    for folder in (tmp_path, "", "."):
        with pytest.raises(OptimizerStateError, match=r"could not write .*it is a folder: give the file to write"):
            save_optimizer_state(make()[1], folder)


def test_what_a_link_points_to_is_replaced_and_a_pipe_refused(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "state").symlink_to("disk/state")
    for _ in range(2):
        save_optimizer_state(make()[1], tmp_path / "state", extra=3)
        assert (tmp_path / "state").is_symlink()
        assert load_optimizer_state(make()[1], tmp_path / "disk" / "state") == 3
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OptimizerStateError, match=r"pipe: .*it is a device or a pipe: give the file to write"):
        save_optimizer_state(make()[1], tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


# In part ------------------------------------------------------------------------------------------------------------


def saved(tmp_path: Path, **options: Any) -> dict[str, torch.nn.Parameter]:
    layers, optimizer = make(**options)
    train(layers, optimizer, 2)
    save_optimizer_state(optimizer, tmp_path / "state", extra=7)
    return layers


def test_layers_of_both_are_restored_and_the_others_listed(tmp_path: Path) -> None:
    before = saved(tmp_path)
    shapes = {"dense": SHAPES["dense"], "renamed": SHAPES["conv"], "bias": SHAPES["bias"]}
    layers, optimizer = make(shapes=shapes, seed=1, lr=9.0)
    own = layers["renamed"].detach().clone()
    with pytest.raises(OptimizerStateError, match=r"file lacks: renamed\n.*file has: conv; scale\n.*strict=False"):
        load_optimizer_state(optimizer, tmp_path / "state")
    with pytest.warns(UserWarning, match="file lacks: renamed; layers that only the file has: conv; scale"):
        assert load_optimizer_state(optimizer, tmp_path / "state", strict=False) == 7
    assert torch.equal(layers["dense"], before["dense"])
    assert torch.equal(layers["renamed"], own)
    assert layers["renamed"] not in optimizer.state
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
    train(layers, optimizer, 1)
    assert [int(optimizer.state[layers[name]]["step"]) for name in shapes] == [3, 1, 3]


def test_a_group_of_new_layers_alone_keeps_its_options(tmp_path: Path) -> None:
    saved(tmp_path, shapes={"dense": (4, 6)})
    _, optimizer = make(lr=9.0)
    with pytest.warns(UserWarning, match="file lacks: conv; bias; scale"):
        load_optimizer_state(optimizer, tmp_path / "state", strict=False)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 9.0]
    assert [group["step"] for group in optimizer.param_groups] == [2, 2]


def test_what_is_not_a_matter_of_layers_is_refused_all_the_same(tmp_path: Path) -> None:
    saved(tmp_path)
    for name, changes in (("lars", {}), ("lamb", {"shapes": {**SHAPES, "conv": (3, 5, 2)}})):
        with pytest.raises(OptimizerStateError, match=r"the file is of LAMB|layers of another shape: conv"):
            load_optimizer_state(make(name, **changes)[1], tmp_path / "state", strict=False)


def test_the_same_layers_need_no_warning(tmp_path: Path) -> None:
    saved(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_optimizer_state(make(seed=1)[1], tmp_path / "state", strict=False)


def test_state_of_others_is_not_left_behind_in_silence(tmp_path: Path) -> None:
    layers, optimizer = make()
    train(layers, optimizer, 1)
    for name in ("dense", "conv"):
        optimizer.state[layers[name]]["lookahead_slow_buff"] = torch.ones(SHAPES[name])
    with pytest.warns(UserWarning, match="not in the file: the state lookahead_slow_buff, which is not LAMB's own"):
        save_optimizer_state(optimizer, tmp_path / "state")
    load_optimizer_state(optimizer, tmp_path / "state")
    assert "lookahead_slow_buff" in optimizer.state[layers["dense"]]


def test_a_rank_that_cannot_read_the_tensors_tells_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of leaving them waiting for its hashes; what it gives them is recorded."""
    layers, optimizer = make()
    train(layers, optimizer, 1)
    save_optimizer_state(optimizer, tmp_path / "state")
    given: list[Any] = []

    def of_all_ranks(mine: Any) -> list[Any]:
        given.append(mine)
        return [mine]

    def broken(file: Path, start: int) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(content_file, "of_all_ranks", of_all_ranks)
    monkeypatch.setattr(content_file, "_hash", broken)
    with pytest.raises(OptimizerStateError, match=r"cannot be read as an optimizer's state: .*Input/output error"):
        load_optimizer_state(make()[1], tmp_path / "state")
    assert isinstance(given[-1], OSError)
