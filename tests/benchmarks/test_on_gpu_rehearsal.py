"""`python -m benchmarks.on_gpu --rehearse` runs all parts on the CPU at toy size: files, verdicts, tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.on_gpu import page
from benchmarks.on_gpu.part import PARTS
from benchmarks.on_gpu.runner.environment import ROOT

pytestmark = pytest.mark.slow


def test_a_rehearsal_runs_every_part(tmp_path: Path) -> None:
    # On a busy machine parts take longer than on one that has them alone: no limit is to end one here.
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--rehearse", "--minutes", "40", "--output", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, env={**os.environ, "OUT": ""}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert ran.stdout.splitlines()[: len(lines)] == lines
    assert lines[0].startswith("CPU, a rehearsal; ")
    assert [line.split(": ")[0] for line in lines[1:-1]] == list(PARTS)
    for name in PARTS:
        numbers = json.loads((tmp_path / f"{name}.json").read_text())
        run = numbers["run"]
        assert (run["outcome"], run["rehearsal"]) == ("passed", True), name
        assert run["verdict"], name
        assert len(numbers) > 3, name  # what was measured, beside the verdict
        assert (tmp_path / f"{name}.log").exists(), name
        assert "not measured" not in page._tables(name, {name: numbers})[:20], name
    assert page.found_in(tmp_path) == {}  # nothing of it is a measurement
    kernels = json.loads((tmp_path / "kernels.json").read_text())
    assert kernels["passed"] >= 12
    assert not any("No table" in page._tables(name, {name: numbers}) for name, numbers in _all(tmp_path).items())


def _all(folder: Path) -> dict[str, dict[str, object]]:
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in PARTS}
