"""Disks that fill up, folders that vanish or cannot be written, and data that changes while a run reads it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from . import faulty_command
from .endings import require_resumable, require_said_once
from .faulty_runs import checkpoints, finished, losses, same, show, start, started, train_records, trained_state

RUN = "run"


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, of 24 MB, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def at(place: Path) -> dict[str, str]:
    """The environment that tells a fault what it befalls."""
    return {faulty_command.PLACE: str(place)}


def test_a_disk_that_fills_up_in_training_leaves_the_previous_checkpoint_whole(data, undisturbed, small_disk):
    """Metrics, checkpoint and report meet it; with space again the run goes on to the end of the undisturbed one."""
    folder = small_disk / RUN
    with started(data, folder, fault="full-disk 0 6", environment=at(small_disk)) as job:
        ending = job.end()
        left = job.left_behind()
    assert ending.statuses == (3, 3), show(ending)
    require_said_once(ending, "the (metrics|checkpoint of step .*) could not be written .*No space left", folder)
    assert checkpoints(folder) == ["step-00000004"]
    assert left == []
    (small_disk / faulty_command.FILLER).unlink()
    require_resumable(folder, data, undisturbed)


def test_a_full_disk_is_told_before_training(data, small_disk):
    """Of the run's folder, and of the cache that text would be prepared in."""
    faulty_command.fill(small_disk)
    with started(data, small_disk / RUN) as job:
        ending = job.end()
    assert ending.statuses == (2, 2), show(ending)
    assert "error: " in ending.printed
    assert "No space left on device; free some space, or choose a folder on another disk" in ending.printed


def test_a_full_disk_of_the_cache_is_told_before_training(data, small_disk, tmp_path):
    faulty_command.fill(small_disk)
    text, cache = data.parent / "text.txt", {"TRUSTRATIO_CACHE": str(small_disk)}
    with started(data, tmp_path / RUN, "--data", str(text), "data.vocabulary=200", environment=cache) as job:
        ending = job.end()
    assert ending.statuses == (2, 2), show(ending)
    assert f"the disk of {small_disk}" in ending.printed
    assert not (tmp_path / RUN).exists()


@pytest.mark.parametrize("what", ["run", "cache"])
def test_a_disk_that_cannot_be_written_is_told_before_training(data, small_disk, tmp_path, what):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    folder = small_disk / RUN if what == "run" else tmp_path / RUN
    text = ("--data", str(data.parent / "text.txt")) if what == "cache" else ()
    with started(data, folder, *text, environment={"TRUSTRATIO_CACHE": str(small_disk)}) as job:
        ending = job.end()
    assert ending.statuses == (2, 2), show(ending)
    assert ending.printed.count("error: ") == 1
    assert "Read-only file system" in ending.printed
    assert not folder.exists()


def test_a_checkpoint_folder_that_becomes_read_only_ends_the_run(data, undisturbed, tmp_path):
    place = tmp_path / RUN / "checkpoints"
    try:
        with started(data, tmp_path / RUN, fault="immutability 0 6", environment=at(place)) as job:
            ending = job.end()
    finally:
        subprocess.run(["chattr", "-i", str(place)], check=False)
    if "CalledProcessError" in ending.printed:
        pytest.skip("this disk has no immutable folders")
    assert ending.statuses == (3, 3), show(ending)
    require_said_once(ending, "the checkpoint of step 8 could not be written .*Operation not permitted", job.folder)
    require_resumable(job.folder, data, undisturbed)


@pytest.mark.parametrize("fault", ["removal", "renaming"])
def test_a_folder_that_vanishes_is_missed_at_the_next_checkpoint(data, undisturbed, tmp_path, fault):
    """And not made anew, without all that the run had written."""
    folder = tmp_path / RUN
    with started(data, folder, fault=f"{fault} 0 6", environment=at(folder)) as job:
        ending = job.end()
        left = job.left_behind()
    assert ending.statuses == (3, 3), show(ending)
    assert "the checkpoint of step 8 could not be written (rank 0: FileNotFoundError: " in ending.printed
    assert "the run's folder was removed, renamed or replaced" in ending.printed
    assert ending.printed.count("error: ") == 1
    assert "Traceback" not in ending.printed
    assert not folder.exists()
    assert left == []
    if fault == "renaming":
        require_resumable(tmp_path / "elsewhere", data, undisturbed)


@pytest.mark.parametrize("fault", ["removal", "replacement"])
def test_data_that_change_end_the_run_with_a_checkpoint(data, undisturbed, tmp_path, fault):
    """Once they are back, the run goes on to the end of the undisturbed one; before, it is refused."""
    own = tmp_path / "tokens"
    shutil.copytree(data, own)
    shards = [shard["files"]["train"]["name"] for shard in json.loads((own / "manifest.json").read_text())["shards"]]
    place = own if fault == "removal" else own / shards[0]
    with started(own, tmp_path / RUN, fault=f"{fault} 0 6", environment=at(place)) as job:
        ending = job.end()
        left = job.left_behind()
    assert ending.statuses == (3, 3), show(ending)
    saved = max(checkpoints(job.folder))
    assert "step-00000004" < saved < "step-00000008"
    require_said_once(ending, f".*the token file {own}", job.folder)
    assert left == []
    with started(own, job.folder, "--resume", str(job.folder)) as again:
        refused = again.end()
    assert refused.statuses == (2, 2), show(refused)
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(data, own)
    require_resumable(job.folder, own, undisturbed)


def test_of_two_runs_that_start_in_one_folder_at_once_one_is_refused(data, undisturbed, tmp_path):
    jobs = [start(data, tmp_path / RUN) for _ in range(2)]
    try:
        endings = [job.end() for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert sorted(ending.statuses for ending in endings) == [(0, 0), (2, 2)], "\n".join(map(show, endings))
    refused = next(ending for ending in endings if ending.status)
    assert "is writing into output folder" in refused.printed or "is not empty" in refused.printed
    assert losses(tmp_path / RUN) == losses(undisturbed)
    assert same(trained_state(tmp_path / RUN), trained_state(undisturbed))


def test_of_two_runs_that_continue_one_at_once_one_is_refused(data, undisturbed, tmp_path):
    folder = finished(data, tmp_path / RUN, "--max_steps", "4")
    jobs = [start(data, folder, "--resume", str(folder), "--max_steps", "12") for _ in range(2)]
    try:
        endings = [job.end() for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert sorted(ending.statuses for ending in endings) == [(0, 0), (2, 2)], "\n".join(map(show, endings))
    assert [record["step"] for record in train_records(folder)] == list(range(1, 13))
    assert same(trained_state(folder), trained_state(undisturbed))
