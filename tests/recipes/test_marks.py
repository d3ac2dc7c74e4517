"""Whole-file checks: every byte counts, whoever reads which piece, and what earlier releases wrote still passes."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from trustratio.recipes.common import marks
from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.common.files import read_sealed, write_sealed
from trustratio.recipes.common.marks import (
    Share,
    differing_files,
    hash_of,
    mark_files,
    require_unchanged,
    write_checksums,
)


def together(count, work):
    """Run `work` in so many threads that collect from each other, as ranks do; return what each returned or raised."""
    values, barrier = [None] * count, threading.Barrier(count, timeout=30)

    def collect(number, value):
        values[number] = value
        barrier.wait()
        collected = list(values)
        barrier.wait()
        return collected

    def one(number):
        try:
            return work(Share(number, count, lambda value: collect(number, value), threads=2))
        except (OSError, RecipeError) as error:
            return error

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files of 0 to 1000 bytes, which are cut into pieces of 64."""
    monkeypatch.setattr(marks, "PIECE", 64)
    monkeypatch.setattr(marks, "_AT_ONCE", 24)
    for size in (0, 1, 63, 64, 65, 1000):
        (tmp_path / f"{size}").write_bytes(bytes(i % 251 for i in range(size)))
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("ranks", [2, 3, 50])
def test_the_marks_do_not_depend_on_who_reads(folder, ranks):
    alone = mark_files(folder, names(folder), Share())
    assert together(ranks, lambda share: mark_files(folder, names(folder), share)) == [alone] * ranks
    assert together(ranks, lambda share: differing_files(folder, alone, share)) == [[]] * ranks
    assert len(set(alone.values())) == len(alone)


def test_each_byte_of_a_file_is_read_once(folder, monkeypatch):
    read = []
    monkeypatch.setattr(marks, "hash_of", lambda *piece: read.append(piece) or hash_of(*piece))
    together(3, lambda share: mark_files(folder, names(folder), share))
    assert sorted(start for path, start, _ in read if path.name == "1000") == list(range(0, 1000, 64))


@pytest.mark.parametrize("position", [0, 63, 64, 500, 999])
def test_a_flipped_bit_anywhere_is_noticed_by_all(folder, position):
    written = mark_files(folder, names(folder), Share())
    content = bytearray((folder / "1000").read_bytes())
    content[position] ^= 1
    (folder / "1000").write_bytes(content)
    assert together(2, lambda share: differing_files(folder, written, share)) == [["1000"], ["1000"]]


def test_marks_of_an_earlier_release_are_compared_as_they_were(folder, monkeypatch):
    monkeypatch.setattr(marks, "_END", 100)
    content = (folder / "1000").read_bytes()
    old = {"1000": f"1000 {hashlib.sha256(content[-100:]).hexdigest()}"}
    assert differing_files(folder, old, Share()) == []
    (folder / "1000").write_bytes(b"?" + content[1:])
    assert differing_files(folder, old, Share()) == []
    for damaged in (content[:-1], content[:-1] + b"?", content + b"?"):
        (folder / "1000").write_bytes(damaged)
        assert together(2, lambda share: differing_files(folder, old, share)) == [["1000"], ["1000"]]


@pytest.mark.parametrize("where", [0, 1])
def test_what_one_cannot_read_all_are_told(folder, monkeypatch, where):
    def failing(path, start=0, length=None):
        if path.name == "1000" and (start // 64) % 2 == where:
            raise OSError(5, "Input/output error")
        return hash_of(path, start, length)

    monkeypatch.setattr(marks, "hash_of", failing)
    outcomes = together(2, lambda share: mark_files(folder, ["1000"], share))
    assert {str(outcome) for outcome in outcomes} == {f"{folder / '1000'} cannot be read (Input/output error)"}
    outcomes = together(2, lambda share: mark_files(folder, ["none"], share))
    assert all("No such file" in str(outcome) for outcome in outcomes)


def test_the_hash_of_a_file_is_what_sha256sum_prints(folder):
    assert hash_of(folder / "1000") == hashlib.sha256((folder / "1000").read_bytes()).hexdigest()
    assert hash_of(folder / "1000", 10, 30) == hashlib.sha256((folder / "1000").read_bytes()[10:40]).hexdigest()


def test_a_sealed_file_tells_every_changed_byte(tmp_path):
    path = tmp_path / "values.json"
    values = {"step": 12, "blank": "0" * 64, "text": "ä", "list": [1, {"a": None}]}
    write_sealed(path, values)
    assert read_sealed(path) == values
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in (1, 2, 4, 8, 16, 32, 64, 128):
            path.write_bytes(content[:position] + bytes([content[position] ^ bit]) + content[position + 1 :])
            with pytest.raises(ValueError, match=r"it is not JSON|content is not what was written|expected a JSON obj"):
                read_sealed(path)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"it is not JSON|content is not"):
            read_sealed(path)


def test_a_file_that_was_never_sealed_is_taken_as_it_is(tmp_path):
    path = tmp_path / "values.json"
    path.write_text('{"step": 1, "files": {"a": "' + "0" * 64 + '"}}')
    assert read_sealed(path) == {"step": 1, "files": {"a": "0" * 64}}


def test_the_folder_of_a_finished_model_tells_what_was_changed(folder):
    require_unchanged(folder)  # nothing is listed
    write_checksums(folder)
    require_unchanged(folder)
    (folder / "mine.txt").write_text("put there later")
    require_unchanged(folder)
    content = (folder / "1000").read_bytes()
    (folder / "1000").write_bytes(content[:500] + b"?" + content[501:])
    (folder / "64").unlink()
    with pytest.raises(RecipeError, match=r"64, 1000 in .* was changed, cut short or removed.*checksums\.json if the"):
        require_unchanged(folder)
    (folder / "checksums.json").write_text("{")
    with pytest.raises(RecipeError, match=r"cannot read .*checksums\.json: it is not JSON"):
        require_unchanged(folder)
