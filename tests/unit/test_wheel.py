"""What is installed: everything of the packages' folders, on every Python, and it runs from anywhere."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
TOPS = ("optimizers", "integrations", "recipes")
LIBRARY = "trustratio/optimizers/kernels/_cpu_kernels.so"
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"

needs_setuptools = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None or int(version("setuptools").partition(".")[0]) < 77,
    reason="needs setuptools 77 or newer",
)


def files_of_the_checkout() -> set[str]:
    """What has to travel: all but pages about the folders, and what is made of others."""
    names = {path.relative_to(ROOT) for top in TOPS for path in (ROOT / top).rglob("*") if path.is_file()}
    made = {".pyc", ".so", ".pyd"}
    return {f"trustratio/{name.as_posix()}" for name in names if name.suffix not in made and name.name != "README.md"}


def settings() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def missing_data(names: set[str]) -> list[str]:
    """Those which are no code and which no line of package-data carries."""
    patterns = {
        f"{package.replace('.', '/')}/{pattern}"
        for package, of_package in settings()["tool"]["setuptools"]["package-data"].items()
        for pattern in of_package
    }
    data = {name for name in names if not name.endswith(".py")}
    return sorted(name for name in data if not any(fnmatch(name, pattern) for pattern in patterns))


def test_all_files_beside_code_are_package_data() -> None:
    assert missing_data(files_of_the_checkout()) == []
    assert missing_data({"trustratio/recipes/configs/new.toml"}) == ["trustratio/recipes/configs/new.toml"]


def test_headers_are_where_the_build_looks_for_them() -> None:
    """A header that setup.py does not name is missing from the source distribution."""
    named = set(re.findall(r"optimizers/kernels/(\w+\.[ch])", (ROOT / "setup.py").read_text()))
    assert named == {path.name for path in (ROOT / "optimizers" / "kernels").glob("*.[ch]")}


def built(hook: str, source: Path, output: Path, **environment: str) -> Path:
    """Call a hook of the build backend, as pip and build do."""
    output.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, hook, str(output)],
        cwd=source,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output / done.stdout.splitlines()[-1]


def copied(folder: Path) -> Path:
    """A copy of what a distribution is made of, so that no build is left in the checkout."""
    for top in TOPS:
        shutil.copytree(ROOT / top, folder / top, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in (
        "pyproject.toml",
        "setup.py",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "constraints.txt",
    ):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution."""
    folder = tmp_path_factory.mktemp("source")
    archive = built("build_sdist", copied(folder), folder / "dist")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(unpacked: Path) -> Path:
    """A wheel that is built from nothing but the source distribution."""
    return built("build_wheel", unpacked, unpacked.parent / "wheels")


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that has the wheel; everything else is this one's. There is no compiler on its path."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("-packages")]
    (site / "others.pth").write_text("\n".join(others))
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([str(folder / "bin" / "python"), "-m", "pip", *install], check=True, capture_output=True)
    return folder


def run(environment: Path, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment."""
    variables = {**os.environ, "PATH": f"{environment / 'bin'}", "TRUSTRATIO_CACHE": str(environment / "cache")}
    for name in ("RANK", "WORLD_SIZE", "PYTHONPATH", "CC", "CXX", "VIRTUAL_ENV"):
        variables.pop(name, None)
    program = str(environment / "bin" / command[0])
    return subprocess.run(
        [program, *command[1:]], cwd=cwd, env=variables, capture_output=True, text=True, timeout=600
    )  # fmt: skip


@pytest.mark.slow
@needs_setuptools
def test_source_and_wheel_have_all_files(unpacked: Path, wheel: Path) -> None:
    wanted = files_of_the_checkout()
    found = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")}
    assert {f"trustratio/{name}" for name in found} >= wanted
    assert found >= {"LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "setup.py", "pyproject.toml"}
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    of_packages = {name for name in names if name.startswith("trustratio/")}
    assert of_packages - {LIBRARY} == wanted
    others = {re.sub(r"^trustratio-[\w.]+\.dist-info/", "", name) for name in names - of_packages}
    assert others == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}


@pytest.mark.slow
@needs_setuptools
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
def test_a_wheel_is_tagged_by_what_it_needs(wheel: Path, unpacked: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        has_library = LIBRARY in opened.namelist()
    tag = rf"manylinux_2_\d+_{platform.machine()}" if has_library else "any"
    assert re.fullmatch(rf"trustratio-[\w.]+-py3-none-{tag}\.whl", wheel.name)
    without = built("build_wheel", copied(tmp_path), tmp_path / "wheels", CC="/no/compiler")
    assert without.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(without) as opened:
        assert LIBRARY not in opened.namelist()


@pytest.mark.slow
@needs_setuptools
@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs the package ziglang")
@pytest.mark.parametrize(("target", "machine"), [("x86_64", 62), ("aarch64", 183)])
def test_wheels_for_any_processor_are_built_on_any(target: str, machine: int, unpacked: Path, tmp_path: Path) -> None:
    wheel = built("build_wheel", unpacked, tmp_path, TRUSTRATIO_TARGET=target)
    assert wheel.name.endswith(f"-py3-none-manylinux_2_17_{target}.whl")
    with zipfile.ZipFile(wheel) as opened:
        library = opened.read(LIBRARY)
    assert library[:4] == b"\x7fELF"
    assert int.from_bytes(library[18:20], "little") == machine
    for name in ("sweep", "step", "ratio", "best_level"):
        assert f"trustratio_{name}\0".encode() in library


@needs_setuptools
def test_a_target_that_is_none_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "TRUSTRATIO_TARGET": "riscv64"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == "TRUSTRATIO_TARGET must be x86_64 or aarch64, or not set; got 'riscv64'\n"


INSTALLED = """
import json, sys
import trustratio.optimizers, trustratio.integrations, trustratio.recipes
from importlib.metadata import version
from trustratio.optimizers.kernels import cpu
folders = {trustratio.optimizers.__file__, trustratio.integrations.__file__, trustratio.recipes.__file__}
print(json.dumps([version("trustratio"), cpu.KERNELS.missing(), sorted(folders), "deepspeed" in sys.modules]))
"""


@pytest.mark.slow
@needs_setuptools
def test_what_is_installed_is_imported_without_a_warning(environment: Path, wheel: Path, tmp_path: Path) -> None:
    done = run(environment, "python", "-W", "error", "-c", INSTALLED, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found, missing, folders, heavy = json.loads(done.stdout)
    assert found == settings()["project"]["version"]
    assert (missing is None) == (not wheel.name.endswith("-any.whl"))
    assert all(folder.startswith(str(environment)) for folder in folders)
    assert not heavy
    assert run(environment, "trustratio", "--version", cwd=tmp_path).stdout == f"trustratio {found}\n"


PROGRAM = """
import torch
from trustratio.optimizers import LAMB, create_optimizer
optimizer: LAMB = LAMB([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1)
ratios: dict[str, float] = optimizer.trust_ratios()
reveal_type(create_optimizer("lamb", [torch.ones(2, 2)], lr=0.1))
LAMB([torch.ones(2, 2)], lr="fast")
"""


@pytest.mark.slow
@needs_setuptools
def test_types_travel(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = run(environment, "python", "-m", "mypy", "--follow-imports=silent", "program.py", cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert "LayerwiseOptimizer" in lines[0], done.stdout
    assert 'Argument "lr" to "LAMB" has incompatible type "str"' in lines[1]
    assert lines[2] == "Found 1 error in 1 file (checked 1 source file)"


@pytest.mark.slow
@needs_setuptools
def test_recipes_run_from_any_folder(environment: Path, text_file: Path, tmp_path: Path) -> None:
    """From the wheel alone, without a compiler, in an empty folder."""
    data = ["--data", str(text_file), "data.vocabulary=300", "--global_batch", "8", "--micro_batch", "4"]
    planned = run(environment, "trustratio", "plan", "--preset", "lamb-64k-32k", "--gpus", "8", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert list(tmp_path.iterdir()) == []
    trained = run(
        environment, "python", "-m", "trustratio.recipes.bert", "--max_steps", "2", "--output", "a", *data, cwd=tmp_path
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "'eager'" not in trained.stdout + trained.stderr
    assert (tmp_path / "a" / "report.html").exists()
    assert run(environment, "trustratio", "report", "a", cwd=tmp_path).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.slow
@needs_setuptools
def test_the_launchers_start_what_is_installed(environment: Path, text_file: Path, tmp_path: Path) -> None:
    short = [*("--max_steps", "1", "--global_batch", "8", "--micro_batch", "4"), "--data", str(text_file)]
    short += ["data.vocabulary=300"]
    done = run(environment, "trustratio", "train", "--output", "t", *short, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lamb-tiny on 2 ranks" in done.stdout
    config = run(environment, "trustratio", "configs", "zero2", cwd=tmp_path).stdout.strip()
    launch = [*("python", "-m", "accelerate.commands.launch", "--num_processes", "2"), "--config_file", config]
    recipe = ["-m", "trustratio.recipes.bert_accelerate", "--output", "z", *short]
    done = run(environment, *launch, *recipe, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("t", "z"):
        assert (tmp_path / name / "report.html").exists()


@pytest.fixture
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ("layer", "wise", "large", "batch", "trust", "ratio", "norm", "weight", "gradient", "update", "shard")
    lines = [" ".join(words[(3 * line + k * k) % len(words)] for k in range(12)) for line in range(600)]
    path.write_text("\n\n".join(lines))
    return path


@pytest.mark.slow
@needs_setuptools
def test_nothing_is_left_of_what_is_removed(environment: Path, wheel: Path, tmp_path: Path) -> None:
    """The last test of this environment: installed twice, then removed."""
    (site,) = environment.glob("lib/python*/site-packages")
    python = str(environment / "bin" / "python")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", str(wheel)]
    subprocess.run([python, "-m", "pip", *install], check=True, capture_output=True)
    assert (site / LIBRARY).exists() == (not wheel.name.endswith("-any.whl"))
    subprocess.run([python, "-m", "pip", "uninstall", "--yes", "trustratio"], check=True, capture_output=True)
    assert not [path for path in site.rglob("trustratio*") if any(path.rglob("*"))]  # pip leaves the empty folder
    assert not (environment / "bin" / "trustratio").exists()
