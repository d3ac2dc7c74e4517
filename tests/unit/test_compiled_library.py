"""The compiled library: what it needs, which instructions it chooses, and that it is right on other processors."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from trustratio.optimizers import LAMB
from trustratio.optimizers.kernels import cpu
from trustratio.optimizers.kernels.interface import ImplementationError

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "optimizers" / "kernels"
LIBRARY = KERNELS / "_cpu_kernels.so"
DRIVER = Path(__file__).with_name("cpu_sweeps_driver.c")
OPTIONS = ["-O3", "-fno-math-errno", "-ffp-contract=fast", "-pthread", "-Wno-psabi"]
COMPILERS = [found for found in map(shutil.which, ("cc", "gcc", "clang")) if found]
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="there was no C compiler at installation")


def setup_file() -> ModuleType:
    pytest.importorskip("setuptools.command.bdist_wheel")
    spec = importlib.util.spec_from_file_location("setup_file", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("asked_for", "oldest"),
    [
        ((), None),
        (("GLIBC_2.2.5",), (2, 2)),
        (("GLIBC_2.2.5", "GLIBC_2.14", "GLIBC_2.9"), (2, 14)),
        (("GLIBC_2.34", "GLIBC_PRIVATE", "XGLIBC_2.99", "GLIBCXX_3.4"), (2, 34)),
    ],
)
def test_the_oldest_glibc_is_the_newest_symbols(asked_for: tuple[str, ...], oldest: tuple[int, int] | None) -> None:
    library = b"\x7fELF" + b"\0".join([b"", *(name.encode() for name in asked_for), b"memcpy", b""])
    assert setup_file().oldest_glibc(library) == oldest


@needs_library
@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
def test_the_library_needs_glibc_alone() -> None:
    """And by the version that the wheel's tag names."""
    read = ["readelf", "--wide", "--dynamic", "--version-info", str(LIBRARY)]
    shown = subprocess.run(read, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"NEEDED.*\[(.+)\]", shown)) <= {"libc.so.6", "libm.so.6", "libpthread.so.0"}
    versions = {(int(major), int(minor)) for major, minor in re.findall(r"Name: GLIBC_(\d+)\.(\d+)", shown)}
    assert setup_file().oldest_glibc(LIBRARY.read_bytes()) == max(versions)


@needs_library
@pytest.mark.skipif(
    platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists(), reason="needs Linux on x86-64"
)
def test_the_best_instructions_are_those_that_the_system_names() -> None:
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())  # type: ignore[index]
    avx2 = {"avx2", "fma"} <= flags
    avx512 = avx2 and {"avx512f", "avx512dq", "avx512vl", "avx512bw"} <= flags
    assert cpu._best_level() == avx2 + avx512


def step() -> torch.Tensor:
    w = torch.nn.Parameter(torch.linspace(-1, 1, 40).view(5, 8))
    w.grad = torch.linspace(1, 2, 40).view(5, 8)
    LAMB([w], lr=0.1, implementation="cpu").step()
    return w.detach()


@needs_library
def test_instructions_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = []
    run = cpu.CpuSweeps.step
    monkeypatch.setattr(cpu.CpuSweeps, "step", lambda *arguments: levels.append(arguments[0].level) or run(*arguments))
    results = []
    for level, name in enumerate(cpu.LEVELS[: cpu._best_level() + 1]):
        monkeypatch.setenv("TRUSTRATIO_CPU_LEVEL", name)
        results.append(step())
        assert levels.pop() == level
    monkeypatch.setenv("TRUSTRATIO_CPU_LEVEL", "")
    results.append(step())
    assert levels == [cpu._best_level()]
    for result in results:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-7)


@needs_library
def test_instructions_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUSTRATIO_CPU_LEVEL", "sse9")
    with pytest.raises(ValueError, match=r"TRUSTRATIO_CPU_LEVEL must be one of baseline, avx2, avx512, got 'sse9'"):
        step()
    monkeypatch.setenv("TRUSTRATIO_CPU_LEVEL", "avx512")
    monkeypatch.setattr(cpu, "_best_level", lambda: 1)
    with pytest.raises(ImplementationError, match="this processor or this build has baseline, avx2 only"):
        step()


def test_a_library_of_another_processor_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_cpu_kernels.so").write_bytes(b"\x7fELF of another machine")
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    assert cpu._library.__wrapped__() is None
    (tmp_path / "_cpu_kernels.so").unlink()
    assert cpu._library.__wrapped__() is None


# The driver, which compares with plain loops -------------------------------------------------------------------------


def levels_of(program: list[str]) -> list[str]:
    """Run the driver; return its lines, one per level of instructions."""
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.skipif(not COMPILERS, reason="needs a C compiler")
def test_sweeps_are_plain_loops(tmp_path: Path) -> None:
    driver = tmp_path / "driver"
    subprocess.run([COMPILERS[0], *OPTIONS, f"-I{KERNELS}", DRIVER, "-o", driver, "-lm"], check=True)
    lines = levels_of([str(driver)])
    assert [line.partition(":")[0] for line in lines] == [f"level {level}" for level in range(cpu._best_level() + 1)]
    assert all(int(line.split()[2]) > 1_000_000 for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["sums", "momentum", "moments", "neighbours"])
@pytest.mark.skipif(not COMPILERS, reason="needs a C compiler")
def test_the_driver_sees_what_is_wrong(broken: str, tmp_path: Path) -> None:
    old, new = {
        "sums": ("NAME(add)(sums, 0, w, 1);\n    if (kind == SUM_W_G_D)", "if (kind == SUM_W_G_D)"),
        "momentum": ("F change = c->gradient_scale * g + c->weight_scale * w;", "F change = c->gradient_scale * g;"),
        "moments": ("c->gain1 * adapted, words, 0, type)", "c->gain1 * g, words, 0, type)"),
        "neighbours": ("store)(F x, float *to, int64_t count) { memcpy(to, &x, 4 * (size_t)count); }",
                       "store)(F x, float *to, int64_t count) { memcpy(to, &x, 4 * LANES); }"),
    }[broken]  # fmt: skip
    for name in ("cpu_kernels.c", "cpu_rounding.h", "cpu_sweeps.h"):
        shutil.copy(KERNELS / name, tmp_path)
    sweeps = tmp_path / "cpu_sweeps.h"
    assert sweeps.read_text().count(old) >= 1
    sweeps.write_text(sweeps.read_text().replace(old, new))
    driver = tmp_path / "driver"
    subprocess.run([COMPILERS[0], "-O1", *OPTIONS[1:], f"-I{tmp_path}", DRIVER, "-o", driver, "-lm"], check=True)
    done = subprocess.run([str(driver)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert ", element " in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs the package ziglang")
@pytest.mark.parametrize("processor", ["x86_64", "aarch64"])
def test_sweeps_for_another_processor_are_plain_loops(processor: str, tmp_path: Path) -> None:
    """Compiled by Zig as the wheels are, but without a shared library: there is no loader for one of them here."""
    if processor != platform.machine() and not (processor == "aarch64" and QEMU):
        pytest.skip(f"{processor} programs cannot be run here")
    driver = str(tmp_path / "driver")
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", f"{processor}-linux-musl", "-static"]
    subprocess.run([*zig, *OPTIONS, f"-I{KERNELS}", str(DRIVER), "-o", driver], check=True)
    lines = levels_of([driver] if processor == platform.machine() else [str(QEMU), driver])
    if processor == "x86_64":
        assert len(lines) == cpu._best_level() + 1
    else:
        assert [line.partition(":")[0] for line in lines] == ["level 0"]
