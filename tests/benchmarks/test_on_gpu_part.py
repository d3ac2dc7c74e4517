"""`python -m benchmarks.on_gpu.part`: one part by itself, whatever it raises or leaves."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.on_gpu.part import Failed, Part
from benchmarks.on_gpu.part import main as part_main
from benchmarks.on_gpu.runner.environment import ROOT


def numbers(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def test_a_part_that_finds_something_wrong_has_a_verdict_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(part: Part) -> str:
        part.record(number=1)
        raise Failed("1 of 3 is wrong")

    monkeypatch.setattr("benchmarks.on_gpu.parts.machine.run", find)
    assert part_main(["machine", "--output", str(tmp_path), "--limit", "10", "--rehearse"]) == 1
    assert numbers(tmp_path, "machine")["verdict"] == "1 of 3 is wrong"
    assert numbers(tmp_path, "machine")["number"] == 1


def test_an_error_is_called_a_failure_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.on_gpu.parts.machine.run", lambda part: 1 / 0)
    assert part_main(["machine", "--output", str(tmp_path), "--limit", "10", "--rehearse"]) == 1
    assert numbers(tmp_path, "machine")["verdict"] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(("name", "lacking"), [("kernels", "pytest"), ("kernels", "torch"), ("job", "deepspeed")])
def test_what_a_part_lacks_is_named(name: str, lacking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda one, *rest: None if one == lacking else find(one, *rest))
    part_main([name, "--output", str(tmp_path), "--limit", "10", "--rehearse"])
    assert numbers(tmp_path, name)["verdict"].startswith(lacking)


def run_as_a_program(folder: Path, part: str) -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks.on_gpu.part machine`, whose module `machine` is these lines."""
    program = (
        "import runpy, sys, types\n"
        "machine = sys.modules['benchmarks.on_gpu.parts.machine'] = types.ModuleType('machine')\n"
        f"exec({part!r}, machine.__dict__)\n"
        f"sys.argv = ['part', 'machine', '--output', {str(folder)!r}, '--limit', '10', '--rehearse']\n"
        "runpy.run_module('benchmarks.on_gpu.part', run_name='__main__')\n"
    )
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30)


def test_what_keeps_an_interpreter_from_ending_costs_no_time(tmp_path: Path) -> None:
    """Threads of a communicator or a compiler; the numbers are on disk."""
    ran = run_as_a_program(
        tmp_path,
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(99,)).start()\n"
        "def run(part):\n    print('told')\n    return 'fine'\n",
    )
    assert (ran.returncode, ran.stdout) == (0, "told\n")
    assert numbers(tmp_path, "machine")["verdict"] == "fine"


def test_a_program_knows_the_error_of_its_part(tmp_path: Path) -> None:
    """As a program, this module is there twice, and so would its error be."""
    body = "    from benchmarks.on_gpu.part import Failed\n    raise Failed('1 of 3 is wrong')\n"
    ran = run_as_a_program(tmp_path, f"def run(part):\n{body}")
    assert (ran.returncode, ran.stderr) == (1, "")
    assert numbers(tmp_path, "machine")["verdict"] == "1 of 3 is wrong"
