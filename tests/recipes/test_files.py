"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os

import pytest

from trustratio.recipes.common import files
from trustratio.recipes.common.files import whole_file, write_json, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("mode", "pieces"), [("w", ["größer ", "als\n"]), ("wb", [b"\x00", b"\xff"])])
def test_a_file_appears_when_it_is_whole(tmp_path, mode, pieces):
    path = tmp_path / "file.bin"
    with whole_file(path, mode) as file:
        for piece in pieces:
            file.write(piece)
        assert not path.exists()
        assert all(name.startswith(files.WRITING) for name in names(tmp_path))
    whole = pieces[0] + pieces[1]
    assert path.read_bytes() == (whole if isinstance(whole, bytes) else whole.encode("utf-8"))
    assert names(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("stopped", [RuntimeError, KeyboardInterrupt])
def test_what_goes_wrong_leaves_the_old_file_and_nothing_else(tmp_path, stopped):
    path = tmp_path / "values.json"
    write_json(path, {"old": 1})

    def write_half():
        with whole_file(path) as file:
            file.write("{")
            raise stopped

    with pytest.raises(stopped):
        write_half()
    assert path.read_text() == '{\n  "old": 1\n}\n'
    assert names(tmp_path) == ["values.json"]


def test_a_file_that_the_disk_did_not_take_is_not_there(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "report.html", "page")
    assert names(tmp_path) == []


def test_several_writers_do_not_mix(tmp_path):
    path = tmp_path / "cache"
    with whole_file(path) as first, whole_file(path) as second:
        first.write("first")
        second.write("second")
    assert path.read_text() == "first"  # the block that ended last
    assert names(tmp_path) == ["cache"]


def test_others_may_read_what_the_user_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "shared", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o640
