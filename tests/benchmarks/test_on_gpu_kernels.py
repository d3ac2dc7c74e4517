"""The part `kernels` of `python -m benchmarks.on_gpu`: what is known of each test, whatever ends them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.on_gpu.kernels.journal import read_journal
from benchmarks.on_gpu.part import Failed, Part
from benchmarks.on_gpu.parts import kernels
from benchmarks.on_gpu.runner.environment import ROOT
from benchmarks.on_gpu.runner.processes import End

TESTS = """
import os, pytest

@pytest.mark.parametrize("number", range(3))
def test_passes(number):
    pass

def test_fails(ends_badly):
    assert 1 == 2, "not the same"

def test_fails_at_its_end(ends_badly):
    pass

@pytest.fixture
def ends_badly():
    yield
    raise ValueError("at the end")

@pytest.mark.skip(reason="needs two")
def test_is_skipped():
    pass
"""
DIES = "\ndef test_dies():\n    os._exit(3)\n"


def run_toys(folder: Path, text: str, *options: str) -> dict[str, Any]:
    (folder / "test_toys.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.on_gpu.kernels.journal", "--journal", "journal"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [*command, "-p", "no:cacheprovider", *options, "."], cwd=folder, env=environment, capture_output=True
    )
    return read_journal(folder / "journal")


def test_a_journal_has_each_test_once(tmp_path: Path) -> None:
    found = run_toys(tmp_path, TESTS)
    counts = {key: found[key] for key in ("tests", "passed", "failed", "skipped", "not_reached")}
    assert counts == {"tests": 6, "passed": 3, "failed": 2, "skipped": 1, "not_reached": 0}
    why = {failure["test"].partition("::")[2]: failure["why"] for failure in found["failures"]}
    assert why["test_fails"].startswith("AssertionError: not the same")
    assert why["test_fails_at_its_end"] == "ValueError: at the end"
    assert found["why_skipped"] == ["Skipped: needs two"]


@pytest.mark.parametrize("options", [("-p", "no:xdist"), ("-n", "1")])
def test_a_journal_says_where_the_tests_are(options: tuple[str, ...], tmp_path: Path) -> None:
    """At the end of a test too, which may hang."""
    if "-n" in options:
        pytest.importorskip("xdist")
    ends = "\n@pytest.fixture\ndef late():\n    yield\n    os._exit(3)\n\ndef test_ends_late(late):\n    pass\n"
    run_toys(tmp_path, TESTS + ends, *options)
    lines = [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()]
    until = next(index for index, line in enumerate(lines) if "ends_late" in line.get("began", ""))
    passed = "".join(json.dumps(line) + "\n" for line in lines[: until + 1])
    (tmp_path / "begun").write_text(passed)
    assert [test.partition("::")[2] for test in read_journal(tmp_path / "begun")["running"]] == ["test_ends_late"]


def test_a_process_that_dies_costs_its_test_alone(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    found = run_toys(tmp_path, TESTS + DIES, "-n", "1")
    assert (found["tests"], found["passed"], found["failed"], found["not_reached"]) == (7, 3, 3, 0)
    assert any("test_dies" in failure["test"] for failure in found["failures"])


def test_without_other_processes_what_ran_before_is_kept(tmp_path: Path) -> None:
    found = run_toys(tmp_path, TESTS + DIES, "-p", "no:xdist")
    assert (found["tests"], found["passed"], found["failed"], found["not_reached"]) == (7, 3, 2, 1)


LOSES = """
import os, pytest, torch
from tests.gpu import conftest
from tests.gpu.conftest import pytest_runtest_logfinish, pytest_runtest_makereport

def lose():
    raise RuntimeError("an illegal memory access was encountered")

conftest.HAS_GPU = True
torch.cuda.synchronize = lambda: None
"""
LOST = """
import pytest, torch
from conftest import lose

@pytest.mark.parametrize("number", range(4))
def test_goes_on(number):
    if number == 1:
        torch.cuda.synchronize = lose
    torch.cuda.synchronize()
"""


@pytest.mark.slow
@pytest.mark.parametrize("side_by_side", [True, False])
def test_a_device_that_answers_no_more_is_one_failure(side_by_side: bool, tmp_path: Path) -> None:
    """In other processes, the next one begins anew; alone, the tests end there."""
    (tmp_path / "conftest.py").write_text(LOSES)
    found = run_toys(tmp_path, LOST, *(("-n", "1") if side_by_side else ("-p", "no:xdist")))
    assert (found["failed"], found["passed"], found["not_reached"]) == ((1, 3, 0) if side_by_side else (1, 1, 2))
    assert "test_goes_on[1]" in found["failures"][0]["test"]


def test_files_that_cannot_be_imported_are_failures(tmp_path: Path) -> None:
    found = run_toys(tmp_path, "import nothing_like_this\n")
    assert (found["passed"], found["failed"]) == (0, 1)
    assert "nothing_like_this" in found["failures"][0]["why"]


def test_a_line_that_is_not_whole_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text('{"collected": 2}\n{"test": "a", "outcome": "passed"}\n{"test": "b", "outc')
    found = read_journal(tmp_path / "journal")
    assert (found["passed"], found["not_reached"]) == (1, 1)
    assert read_journal(tmp_path / "nothing")["tests"] == 0


PASSED, FAILED = {"test": "a", "outcome": "passed"}, {"test": "tests/gpu/b", "outcome": "failed", "why": "wrong\nmore"}


def run_part(
    folder: Path, monkeypatch: pytest.MonkeyPatch, end: End, entries: list[dict[str, Any]]
) -> tuple[Part, list[str]]:
    """The part with these lines in the journal, and pytest's command."""
    part, asked = Part("kernels", folder, 100.0, rehearse=True), []

    def pytest_runs(command: list[str], log: Path, limit: float, environment: Any, at: Path, meanwhile: Any) -> End:
        asked.extend(command)
        assert 80 < limit < 95  # time to write everything down
        assert environment[kernels.REHEARSAL] == "1"
        lines = [{"collected": 3}, *entries]
        (folder / "kernels-tests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        meanwhile()
        assert part.found["tests"] == 3  # at once
        return end

    monkeypatch.setattr(kernels, "run_until", pytest_runs)
    return part, asked


def test_the_verdict_of_tests_that_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = {"test": "c", "outcome": "skipped", "why": "needs two"}
    part, asked = run_part(tmp_path, monkeypatch, End(7.0, 0, False), [PASSED, {**PASSED, "test": "b"}, skipped])
    assert kernels.run(part) == "2 passed, 0 failed, 1 skipped, in 7 s"
    assert "tests/gpu" in asked
    assert asked[asked.index("-n") + 1] == "2"


def test_a_failure_fails_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part, _ = run_part(tmp_path, monkeypatch, End(7.0, 1, False), [PASSED, FAILED])
    with pytest.raises(Failed, match=r"^1 passed, 1 failed \(first: b: wrong\), 1 not reached, in 7 s$"):
        kernels.run(part)
    assert part.found["failures"] == [{"test": "tests/gpu/b", "why": "wrong\nmore"}]


def test_tests_that_there_was_no_time_for_are_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part, _ = run_part(tmp_path, monkeypatch, End(7.0, -15, True), [PASSED])
    assert kernels.run(part) == "1 passed, 0 failed, 2 not reached in time, in 7 s"


def begun(test: str, seconds: float) -> dict[str, Any]:
    return {"began": test, "at": time.time() - seconds}


def test_a_test_that_hangs_fails_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [begun("a", 80.0), PASSED, {"ended": "a"}, begun("tests/gpu/x.py::b", 96.5)]
    part, _ = run_part(tmp_path, monkeypatch, End(90.0, -15, True), entries)
    with pytest.raises(Failed, match=r"in 90 s; stopped in test x.py::b, running since 9\d s$"):
        kernels.run(part)
    assert list(part.found["running"]) == ["tests/gpu/x.py::b"]


def test_a_test_that_has_just_begun_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = [begun("a", 80.0), PASSED, {"ended": "a"}]
    part, _ = run_part(tmp_path, monkeypatch, End(90.0, -15, True), [*ended, begun("b", 5.0)])
    assert kernels.run(part) == "1 passed, 0 failed, 2 not reached in time, in 90 s"


@pytest.mark.parametrize(
    ("entries", "why"), [([], ": ImportError: libcuda.so"), ([begun("x.py::a", 1.0)], " in x.py::a")]
)
def test_where_pytest_ended_is_said(
    entries: list[dict[str, Any]], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, _ = run_part(tmp_path, monkeypatch, End(7.0, 4, False), entries)
    (tmp_path / "kernels-tests.log").write_text("loading conftest\nImportError: libcuda.so\n")
    with pytest.raises(Failed, match=f"pytest ended with status 4{why}$"):
        kernels.run(part)


@pytest.mark.parametrize(("status", "entries"), [(-11, [PASSED]), (4, [])])
def test_pytest_itself_may_fail(
    status: int, entries: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, _ = run_part(tmp_path, monkeypatch, End(7.0, status, False), entries)
    with pytest.raises(Failed, match=f"0 failed, .* not reached, in 7 s; pytest ended with status {status}"):
        kernels.run(part)
