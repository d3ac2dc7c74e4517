"""The command for GPUs, its tests and the recipes need no package but those that such a machine has or is brought."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from . import without_packages

ROOT = Path(__file__).resolve().parents[2]

IMPORT_ALL = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(f"{name} needs {error.name}")
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return without_packages.environment(tmp_path_factory.mktemp("bare"))


def run(environment: dict[str, str], *arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def modules(folder: str, prefix: str = "") -> list[str]:
    """Names of the modules of a folder, for an import."""
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in sorted((ROOT / folder).rglob("*.py"))]
    return [prefix + ".".join(names[:-1] if names[-1] == "__init__" else names) for names in parts]


def test_what_is_not_there_is_not_found(bare: dict[str, str]) -> None:
    assert importlib.util.find_spec("datasets")
    found = run(
        bare, "-c", "from importlib.util import find_spec; print(find_spec('datasets'), find_spec('torch').name)"
    )
    assert found.split() == ["None", "torch"]


def test_a_module_that_needs_more_is_told(bare: dict[str, str]) -> None:
    assert run(bare, "-c", IMPORT_ALL, json.dumps(["torch", "datasets"])) == "datasets needs datasets\n"


def test_all_is_imported_without_other_packages(bare: dict[str, str]) -> None:
    names = [*modules("benchmarks/on_gpu"), *modules("tests/gpu"), *modules("recipes", "trustratio.")]
    names = [name for name in names if ".studies." not in name]  # of tables, which pyarrow reads
    assert {"benchmarks.on_gpu.part", "tests.gpu", "trustratio.recipes.training.bert"} <= set(names)
    assert run(bare, "-c", IMPORT_ALL, json.dumps(names)) == ""


def test_a_part_runs_without_other_packages(bare: dict[str, str], tmp_path: Path) -> None:
    part = ("-m", "benchmarks.on_gpu.part", "machine", "--output", tmp_path, "--limit", "60", "--rehearse")
    run(bare, *part)
    assert "copies at" in json.loads((tmp_path / "machine.json").read_text())["verdict"]


def test_device_tests_are_collected_without_other_packages(bare: dict[str, str]) -> None:
    journal = ("-p", "benchmarks.on_gpu.kernels.journal", "-p", "no:cacheprovider")
    assert "tests/gpu/" in run(bare, "-m", "pytest", *journal, "--collect-only", "-q", "tests/gpu")


@pytest.mark.slow
def test_the_recipe_trains_without_other_packages(bare: dict[str, str], tmp_path: Path) -> None:
    small = ("--steps", 2, "--sequence_length", 16, "--global_batch", 32, "data.vocabulary=200", "model.hidden=32")
    data = tmp_path / "text.txt"
    data.write_text("".join(f"Line {number} of a text, {number * number} words long.\n\n" for number in range(2000)))
    folder = tmp_path / "run"
    environment = {**bare, "TRUSTRATIO_CACHE": str(tmp_path / "cache")}
    recipe = (ROOT / "recipes" / "bert.py", *small, "model.intermediate=64", "--data", data, "--output", folder)
    run(environment, "-m", "deepspeed.launcher.runner", "--num_gpus", 1, *recipe)
    assert (folder / "metrics.jsonl").read_text().count('"loss"') >= 2
