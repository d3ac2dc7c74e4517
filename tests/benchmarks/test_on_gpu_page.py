"""The tables that `python -m benchmarks.on_gpu --page` makes of what was brought back."""

from __future__ import annotations

import json
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as benchmarks_command
from benchmarks.on_gpu import __main__ as command
from benchmarks.on_gpu import page
from benchmarks.on_gpu.part import PARTS

RUN = {"device": "NVIDIA T, 1.2", "when": "2030-01-02T03:04+00:00", "rehearsal": False, "outcome": "passed"}
MACHINE = {"device": "NVIDIA T", "torch": "2.11", "copy_bytes_per_second": 3e12, "bf16_operations_per_second": 7e14}
TESTS = {"tests": 9, "passed": 5, "failed": 1, "skipped": 2, "not_reached": 1, "seconds_of_tests": 12.0}
FAILURE = {"test": "tests/gpu/test_layers.py::test_x[lamb]", "why": "assert 1 == 2\n more"}


def numbers(verdict: str, values: dict[str, Any], **run: Any) -> dict[str, Any]:
    return {**values, "run": {**RUN, "verdict": verdict, **run}}


FOUND = {
    "machine": numbers("copies at 3000 GB/s.", MACHINE),
    "kernels": numbers("5 passed", {**TESTS, "failures": [FAILURE]}, outcome="failed"),
}


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A documentation of its own: pages with the comments that numbers go between."""
    folder = tmp_path / "docs"
    (folder / "results").mkdir(parents=True)
    for name, marker in {"docs/evidence.md": "batch64k", "README.md": "on_gpu"}.items():
        text = f"Before.\n\n<!-- {marker}: written by on_gpu/page.py -->\nold\n<!-- end of {marker} -->\n\nBehind.\n"
        (tmp_path / name).write_text(text)
    (folder / "results" / "benchmarks.json").write_text('{"machines": {}}')
    monkeypatch.setattr(page, "RESULTS", folder / "results" / "gpu")
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr(benchmarks_command, "OUTPUT", folder / "results")
    return folder


def test_without_numbers_pages_say_so_and_nothing_else() -> None:
    assert page.benchmarks_section({}) == "`python -m benchmarks.on_gpu`: not measured."
    assert page.evidence_section({}) == "not measured."
    assert page.readme_line({}) == "On a GPU: not measured."


def test_each_part_has_its_device_day_verdict_and_tables() -> None:
    section = page.benchmarks_section(FOUND)
    assert (
        "### The device\n\nNVIDIA T, 1.2, 2030-01-02: copies at 3000 GB/s.\n\nNVIDIA T; torch 2.11. It copies"
        in section
    )
    assert "3,000 GB/s, bytes read and written, and multiplies bf16 matrices at 700 TFLOP/s." in section
    assert "### The kernels' tests\n\nNVIDIA T, 1.2, 2030-01-02: failed: 5 passed.\n\n" in section
    assert (
        "5 passed, 1 failed (first: test_layers.py::test_x[lamb]: assert 1 == 2), 2 skipped, 1 not reached" in section
    )
    assert "- `tests/gpu/test_layers.py::test_x[lamb]`: assert 1 == 2" in section
    assert section.count("not measured.") == len(PARTS) - 3  # the largest batches are on another page


def test_numbers_of_a_part_that_was_stopped_do_not_cost_the_page() -> None:
    stopped = {"kernels": numbers("at its limit", {"passed": 3}, outcome="stopped")}
    assert "stopped: at its limit.\n\nNo table: KeyError ('failed')" in page.benchmarks_section(stopped)


@pytest.mark.parametrize("packed", [False, True])
def test_numbers_are_taken_from_a_folder_or_an_archive(packed: bool, docs: Path, tmp_path: Path) -> None:
    source = tmp_path / "brought"
    source.mkdir()
    for name, found in FOUND.items():
        (source / f"{name}.json").write_text(json.dumps(found))
    (source / "machine.log").write_text("told")
    if packed:
        with tarfile.open(tmp_path / "results.tar.gz", "w:gz") as archive:
            archive.add(source / "machine.json", "machine.json")
            archive.add(source / "kernels.json", "kernels.json")
    assert command.main(["--page", str(tmp_path / "results.tar.gz" if packed else source)]) == 0
    assert sorted(path.name for path in (docs / "results" / "gpu").iterdir()) == ["kernels.json", "machine.json"]
    assert page.benchmarks_section(FOUND) in (docs / "benchmarks.md").read_text()
    evidence = (docs / "evidence.md").read_text()
    assert evidence.startswith("Before.\n\n<!-- batch64k: written by on_gpu/page.py -->\n\nnot measured.\n\n<!-- end")
    assert evidence.endswith("-->\n\nBehind.\n")
    assert "\n\nOn a GPU: not measured.\n\n" in (tmp_path / "README.md").read_text()


def test_the_curves_of_the_largest_batches_are_drawn_for_the_page(docs: Path, tmp_path: Path) -> None:
    source = tmp_path / "brought"
    source.mkdir()
    whole = {"losses": [9.0, 5.0], "asked_updates": 2, "validation_loss": 5.0, "validation_accuracy": 0.1}
    runs = [{"optimizer": "lamb", "lr": 0.02, "batch": 65536, "sequences_per_second": 1e5, **whole}]
    sizes = {"model": "BERT", "training_sequences": 9, "sequence_length": 32, "vocabulary": 2048}
    values = {"runs": runs, "unigram_entropy": 6.6, **sizes}
    (source / "batch64k.json").write_text(json.dumps(numbers("lamb 5.000", values)))
    assert command.main(["--page", str(source)]) == 0
    assert (docs / "results" / "gpu" / "batch64k.png").read_bytes().startswith(b"\x89PNG")
    evidence = (docs / "evidence.md").read_text()
    assert "](results/gpu/batch64k.png)\n\n<!-- end of batch64k -->" in evidence
    assert evidence.index("| 65,536 | lamb |") < evidence.index("![Training loss at 65,536 and 131,072 sequences")


def test_a_rehearsal_measures_nothing(docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "rehearsed"
    source.mkdir()
    (source / "machine.json").write_text(json.dumps(numbers("fine", MACHINE, rehearsal=True)))
    assert command.main(["--page", str(source)]) == 2
    assert "nothing that was measured on a GPU" in capsys.readouterr().err
    assert not (docs / "results" / "gpu").exists()
    assert page.found_in(source) == {}


def source_of(folder: Path, **parts: Any) -> Path:
    folder.mkdir()
    for name, found in parts.items():
        (folder / f"{name}.json").write_text(found if isinstance(found, str) else json.dumps(found))
    return folder


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_numbers_are_not_replaced_by_none(docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--page", str(source_of(tmp_path / "good", machine=FOUND["machine"]))]) == 0
    killed = "by SIGKILL, out of memory?; recorded so far: nothing; last line: /some/where/x.py:3: | UserWarning"
    bad = {name: numbers(killed, {}, outcome="killed") for name in ("machine", "speed", "job")}
    bad["kernels"] = numbers("0 passed", {**TESTS, "passed": 0, "failed": 0, "failures": []}, outcome="failed")
    before = everything(docs)
    assert command.main(["--page", str(source_of(tmp_path / "bad", **bad))]) == 2
    assert "not taken, since they have no numbers: machine, kernels, speed, job" in capsys.readouterr().err
    assert everything(docs) == before
    told = {**bad, "machine": numbers(killed, MACHINE, outcome="killed")}
    assert command.main(["--page", str(source_of(tmp_path / "some", **told))]) == 0
    assert "2030-01-02: killed: by SIGKILL, out of memory?.\n\nNVIDIA T; torch" in (docs / "benchmarks.md").read_text()
    assert "UserWarning" not in (docs / "benchmarks.md").read_text() + (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "machine.json is no whole JSON"),
        ("[1]", "expected an object, got list"),
        ('{"run": null}', 'its "run" has no device, when, rehearsal, outcome, verdict'),
        ('{"run": {"device": "T", "when": "2030", "rehearsal": false, "outcome": "passed"}}', "has no verdict"),
    ],
)
def test_what_is_broken_is_said_and_nothing_is_written(
    content: str, said: str, docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = source_of(tmp_path / "brought", kernels=FOUND["kernels"], machine=content)
    before = everything(tmp_path)
    assert command.main(["--page", str(source)]) == 2
    assert said in capsys.readouterr().err
    assert everything(tmp_path) == before


def test_archives_that_are_none_are_said(docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = source_of(tmp_path / "brought", machine=FOUND["machine"])
    (source / "machine.log").write_bytes(random.Random(0).randbytes(1 << 16))
    whole = tmp_path / "results.tar.gz"
    with tarfile.open(whole, "w:gz") as archive:
        archive.add(source, ".")  # whose names are ./machine.json
    (tmp_path / "cut.tar.gz").write_bytes(whole.read_bytes()[:30_000])
    (tmp_path / "text").write_text("no archive")
    for name in ("cut.tar.gz", "text", "nowhere"):
        assert command.main(["--page", str(tmp_path / name)]) == 2
        assert f"{name} is no folder and no whole archive of a run: " in capsys.readouterr().err
    assert not (docs / "results" / "gpu").exists()
    assert command.main(["--page", str(whole)]) == 0
    assert (docs / "results" / "gpu" / "machine.json").exists()


def test_pages_have_no_paths_of_the_machine() -> None:
    failure = {"test": "tests/gpu/a.py::b", "why": "OSError: /tmp/x/y.so is missing"}
    found = {"kernels": numbers("it lacks /usr/lib/z.so", {**TESTS, "failures": [failure]}, outcome="failed")}
    section = page.benchmarks_section(found)
    assert "it lacks z.so" in section
    assert "`tests/gpu/a.py::b`: OSError: y.so is missing" in section
    assert not any(path in section for path in ("/tmp", "/usr"))


def test_the_readme_has_nothing_of_a_part_that_did_not_pass() -> None:
    found = {"speed": numbers("LAMB 1.5 ms", {}, outcome="stopped"), "throughput": numbers("900 sequences/s", {})}
    assert page.readme_line(found) == "NVIDIA T, 1.2, 2030-01-02: 900 sequences/s."


def test_the_readme_names_device_and_numbers() -> None:
    found = {"speed": numbers("LAMB 1.5 ms", {}), "throughput": numbers("900 sequences/s.", {})}
    assert page.readme_line(found) == (
        "NVIDIA T, 1.2, 2030-01-02: LAMB 1.5 ms. NVIDIA T, 1.2, 2030-01-02: 900 sequences/s."
    )


def test_pages_have_the_comments() -> None:
    assert "<!-- batch64k: written by on_gpu/page.py -->\n" in (command.ROOT / "docs" / "evidence.md").read_text()
