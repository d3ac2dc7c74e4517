"""The part `job`: what it reads of a run, what it says of it, and that nothing of a run outlives it."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.on_gpu.job import process
from benchmarks.on_gpu.job.page import is_good, tables, verdict
from benchmarks.on_gpu.job.process import numbers_of
from benchmarks.on_gpu.job.promise import promised_memory
from benchmarks.on_gpu.part import Failed, Part
from benchmarks.on_gpu.parts import job
from benchmarks.on_gpu.table import NOT_MEASURED
from trustratio.recipes.planning.plan import main as plan

from .leftovers import is_gone

STAND_IN = """
import json, subprocess, sys, time
from pathlib import Path
run = Path(sys.argv[sys.argv.index("--output") + 1])
run.mkdir()
with (run / "metrics.jsonl").open("w") as file:
    for step in range(1, {updates} + 1):
        peak = 1000 + step
        line = dict(kind="train", step=step, loss=7 - step / 10, sequences_per_second=100.0 * step, host_memory_bytes=9)
        file.write(json.dumps(line | dict(device_peak_memory_bytes=peak)) + "\\n")
    line = dict(kind="validation", step=step, validation_loss=6.5, validation_accuracy=0.1, unigram_entropy=6.6)
    file.write(json.dumps(line) + "\\n")
if {hangs}:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (run.parent.parent / "child").write_text(str(child.pid))
    time.sleep(600)
sys.exit({status})
"""


class PartWithoutClock(Part):
    """Its time is over as soon as the run has left something."""

    def left(self) -> float:
        return 0.0 if self.output.joinpath("child").exists() and self.found.get("losses") else 1000.0


def stood_in(
    monkeypatch: pytest.MonkeyPatch, folder: Path, updates: int = 6, hangs: bool = False, status: int = 0
) -> Part:
    """Put a stand-in in the place of the recipe."""
    recipe = folder / "recipes" / "bert.py"
    recipe.parent.mkdir()
    recipe.write_text(STAND_IN.format(updates=updates, hangs=hangs, status=status))
    monkeypatch.setattr(process, "ROOT", folder)
    return PartWithoutClock("job", folder, limit=1000.0, rehearse=True)


def found_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "job.json").read_text())
    return found


def train(part: Part) -> str:
    run = part.output / "scratch" / "run"
    run.parent.mkdir()
    return job.train(part, run)


def test_a_whole_run_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    part = stood_in(monkeypatch, tmp_path)
    line = train(part)
    found = found_of(tmp_path)
    assert found["losses"] == pytest.approx([6.9, 6.8, 6.7, 6.6, 6.5, 6.4])
    assert found["sequences_per_second"] == 450.0  # of updates 3 to 6
    assert found["validations"] == [{"step": 6, "validation_loss": 6.5, "validation_accuracy": 0.1}]
    assert found["device_peak_memory_bytes"] == 1006
    promised = found["promised"]["bytes"]
    assert line.startswith("loss 6.900 to 6.400 in 6 updates (unigram entropy 6.600); 450 sequences/s; peak memory")
    assert line.endswith(f"({1006 / promised:.0%})")


def test_a_run_that_hangs_is_ended_and_its_numbers_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    part = stood_in(monkeypatch, tmp_path, updates=3, hangs=True)
    assert train(part).startswith("stopped by the limit after 3 of 6 updates: loss 6.900 to 6.700")
    assert found_of(tmp_path)["updates"] == 3
    child = int((tmp_path / "child").read_text())
    assert is_gone(child)


def test_a_run_that_fails_fails_the_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    part = stood_in(monkeypatch, tmp_path, updates=2, status=3)
    (tmp_path / "job.log").write_text("began\nerror: no device\n")
    with pytest.raises(Failed, match=r"recipes/bert.py ended with exit status 3 after 2 updates: error: no device$"):
        train(part)
    assert len(found_of(tmp_path)["losses"]) == 2


@pytest.mark.parametrize(
    ("losses", "updates", "good"),
    [
        ([6.0, 5.0], 2, True),
        ([6.0], 1, True),  # stopped by the limit: too early to tell
        ([6.0, 5.5], 1, True),
        ([6.0, 6.5], 1, False),
        ([6.0, 6.5], 2, False),
        ([6.0, float("nan")], 1, False),
        ([], 0, False),
    ],
)
def test_a_run_without_sound_losses_fails_the_part(
    losses: list[float], updates: int, good: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    part = Part("job", tmp_path, limit=1000.0, rehearse=True)
    monkeypatch.setattr(job, "recipe_process", lambda *_, **__: nullcontext(SimpleNamespace(returncode=0)))
    monkeypatch.setattr(job, "promised_memory", lambda arguments: {"bytes": 1})
    monkeypatch.setattr(job, "follow", lambda part, *_: part.record(losses=losses, updates=updates, asked_updates=2))
    with nullcontext() if good else pytest.raises(Failed):
        job.train(part, tmp_path / "run")


def test_a_run_that_has_not_begun_has_no_numbers(tmp_path: Path) -> None:
    assert numbers_of(tmp_path, 0) == {}
    (tmp_path / "metrics.jsonl").write_text('{"kind":"train","st')
    assert numbers_of(tmp_path, 0) == {}


def test_the_promise_is_that_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    promised = promised_memory(["--precision", "bf16", "--zero_stage", "1", *job.sizes(toy=False)])
    plan(
        ["--gpus", "1", "--micro_batch", "32", "--precision", "bf16", "--zero_stage", "1", "--most_gpus", "1", "--json"]
    )
    (phase,) = json.loads(capsys.readouterr().out)["phases"]
    assert promised["with_reserve"] == int(phase["total"])
    assert promised["bytes"] == sum(promised["parts"].values())
    assert promised["bytes"] == pytest.approx(sum(part["bytes"] for part in phase["memory"]))


@pytest.mark.parametrize("found", [{}, {"asked_updates": 60, "command": "x"}, {"asked_updates": 60, "losses": []}])
def test_without_updates_nothing_is_said_to_be_measured(found: dict[str, Any]) -> None:
    assert tables(found) == NOT_MEASURED
    assert verdict(found) == "no update was done"


def test_a_loss_that_did_not_fall_is_said() -> None:
    found = {"asked_updates": 2, "updates": 2, "losses": [6.0, 6.5], "command": "x"}
    assert verdict(found) == "loss 6.000 to 6.500 in 2 updates, which did not fall"
    assert "| sequences/s, median | not measured |" in tables(found)


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "benchmarks.on_gpu.part", "job", "--output", str(tmp_path), "--limit", "900"]
    subprocess.run([*line, "--rehearse"], check=True)
    found = found_of(tmp_path)
    assert found["updates"] == 6
    assert found["losses"][-1] < found["losses"][0]
    assert found["promised"]["bytes"] > 0
    assert found["verdict"] in (verdict(found),)
    assert "| updates | 6 of 6 |" in tables(found)


@pytest.mark.parametrize(("updates", "good"), [(5, True), (10, True), (15, False), (60, False)])
def test_within_the_warm_up_a_loss_need_not_fall(updates: int, good: bool) -> None:
    assert is_good({"losses": [6.0, 6.1], "updates": updates, "asked_updates": 60}) == good
