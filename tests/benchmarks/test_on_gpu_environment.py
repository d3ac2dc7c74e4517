"""What the parts of `python -m benchmarks.on_gpu` are given: this checkout's package, wheels, variables, a device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.on_gpu.runner import environment, processes
from benchmarks.on_gpu.runner.environment import ROOT


def test_a_package_that_is_not_installed_is_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    here = [str(ROOT / name / "__init__.py") for name in environment.FOLDERS]
    answers = iter([["none"] * 3, here])
    monkeypatch.setattr(environment, "_origins", lambda environment: next(answers))
    found = environment.prepare(tmp_path, tmp_path / "log", said.append, seconds=0)
    look = "from importlib.util import find_spec; print(find_spec('trustratio.recipes').origin)"
    ran = subprocess.run(
        [sys.executable, "-S", "-c", look], env=found, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert Path(ran.stdout.strip()) == tmp_path / "site" / "trustratio" / "recipes" / "__init__.py"
    assert said == ["trustratio is not installed: its folders are linked, without compiled sweeps on the CPU"]


def test_the_package_of_another_checkout_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old wheel or an editable install that Python would find first, or in whose place links stand."""
    other = tmp_path / "other"
    for name in environment.FOLDERS:
        (other / "trustratio" / name).mkdir(parents=True)
        (other / "trustratio" / name / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(other))
    said: list[str] = []
    found = environment.prepare(tmp_path / "scratch", tmp_path / "log", said.append, seconds=0)
    assert environment._are_here(environment._origins(found))
    assert said[0].startswith(f"trustratio is installed from elsewhere ({other}")
    (other / "trustratio" / "__init__.py").write_text("")  # a package of its own, which no link stands before
    with pytest.raises(environment.Unusable, match="would not import trustratio from"):
        environment.prepare(tmp_path / "again", tmp_path / "log", said.append, seconds=0)


def test_one_bad_wheel_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("bad-1-py3-none-any.whl", "good-1-py3-none-any.whl"):
        (wheels / name).write_bytes(b"")
    asked: list[list[str]] = []

    def install(command: list[str], log: Path, limit: float, *others: Any) -> processes.End:
        asked.append([Path(argument).name for argument in command if argument.endswith((".whl", str(ROOT)))])
        log.write_text("told\n")
        return processes.End(1.0, int(any("bad" in name for name in asked[-1])), False)

    said: list[str] = []
    monkeypatch.setattr(environment, "run_until", install)
    environment.prepare(tmp_path, tmp_path / "log", said.append, seconds=60, wheels=wheels)
    assert (tmp_path / "log").read_text() == "told\n" * 4
    assert asked == [
        ["bad-1-py3-none-any.whl", "good-1-py3-none-any.whl"],
        ["bad-1-py3-none-any.whl"],
        ["good-1-py3-none-any.whl"],
        [ROOT.name],
    ]
    assert said == ["wheels: bad-1-py3-none-any.whl could not be installed, see log"]


def test_installing_does_not_take_the_time_of_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "run_until", lambda *arguments: pytest.fail("was begun"))
    (tmp_path / "late-1-py3-none-any.whl").write_bytes(b"")
    said: list[str] = []
    environment.prepare(tmp_path, tmp_path / "log", said.append, seconds=0, wheels=tmp_path)
    assert said == ["wheels: late-1-py3-none-any.whl could not be installed, see log"]


def test_a_rehearsal_is_on_the_cpu_even_beside_a_gpu(tmp_path: Path) -> None:
    found = environment.prepare(tmp_path, tmp_path / "log", pytest.fail, seconds=0, rehearse=True)
    assert (found["CUDA_VISIBLE_DEVICES"], found["TRITON_INTERPRET"]) == ("", "1")


def test_nothing_of_a_rehearsal_leaks_into_a_run_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.ON_CPU.items():
        monkeypatch.setenv(name, value)
    found = environment._variables(tmp_path, rehearse=False)
    assert not environment.ON_CPU.keys() & found.keys()
    for name in environment.LEFT_OUT:
        monkeypatch.setenv(name, "1")
        assert name not in environment._variables(tmp_path, rehearse=False)
        assert name not in environment._variables(tmp_path, rehearse=True)
    assert {"PYTHONOPTIMIZE", "PYTEST_ADDOPTS"} <= set(environment.LEFT_OUT)
    for value in ("true", "on", "YES", "0"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert "TRITON_INTERPRET" not in environment._variables(tmp_path, rehearse=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert environment._variables(tmp_path, rehearse=False)["CUDA_VISIBLE_DEVICES"] == "1"


def test_without_torch_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("import no_such_library\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert environment.missing_device(tmp_path) == (
        "torch cannot be imported (ModuleNotFoundError: No module named 'no_such_library')"
    )
    (tmp_path / "torch.py").write_text("import time; time.sleep(60)\n")
    monkeypatch.setattr(environment, "ASKING", 0.2)
    assert environment.missing_device(tmp_path) is None  # a slow disk, perhaps: the parts will tell
