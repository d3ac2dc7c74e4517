"""The Triton kernels as they are compiled for GPUs, which needs none: what they load at a time, registers, fp64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
SLOW = pytest.mark.slow


def compiled(*arguments: str) -> list[dict[str, Any]]:
    """In a process of its own, as other tests define the kernels for Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compiled_kernels", *arguments]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize(
    ("capability", "one_in", "least"),
    [(90, 7, 5), *(pytest.param(gpu, 1, 40, marks=SLOW) for gpu in (80, 86, 90, 100, 120))],
)
def test_kernels_compile_for_a_gpu(capability: int, one_in: int, least: int) -> None:
    kernels = compiled("--some", str(one_in), "--capability", str(capability))
    assert len(kernels) >= least
    for kernel in kernels:
        assert kernel["stack"] == 0, f"a thread's numbers do not fit into its registers: {kernel}"
        if kernel["kind"] == "FOLD":
            continue
        if kernel["aligned"]:
            assert kernel["vectors"] > 0 == kernel["singles"], f"loads less than 16 bytes at a time: {kernel}"
        if not kernel["wide"]:
            assert kernel["products"] <= 2 * 5, f"multiplies elements in fp64: {kernel}"
    assert {kernel["aligned"] for kernel in kernels} == {kernel["wide"] for kernel in kernels} == {True, False}


def test_the_table_of_the_page_is_that_of_the_file(tmp_path: Path) -> None:
    from benchmarks import compiled_kernels

    page = tmp_path / "kernels.md"
    page.write_text(written := compiled_kernels.PAGE.read_text())
    compiled_kernels.write_page(page=page)
    assert page.read_text() == written
    content = json.loads(compiled_kernels.FILE.read_text())
    stack = content["columns"].index("stack")
    assert not [row for version in set(content) - {"columns"} for row in content[version] if row[stack]]


@pytest.mark.parametrize(
    "arguments", [["--some", "0"], ["--some", "-1"], ["--capability", "9"], ["--capability", "10"], ["--ways", "0"]]
)
def test_what_cannot_be_compiled_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import compiled_kernels

    with pytest.raises(SystemExit):
        compiled_kernels.main(arguments)
    assert repr(arguments[1]) in capsys.readouterr().err


def test_capabilities_are_written_in_either_way() -> None:
    from benchmarks.compiled_kernels import _capability

    assert [_capability(text) for text in ("90", "9.0", "100", "12.0")] == [90, 90, 100, 120]
