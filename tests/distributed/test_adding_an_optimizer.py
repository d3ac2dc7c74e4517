"""docs/adding-an-optimizer.md works word by word: its files, taken out as they stand, on two ranks."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trustratio.optimizers import OPTIMIZERS
from trustratio.recipes.configuration.config import OptimizerConfig
from trustratio.recipes.configuration.presets import get_preset
from trustratio.recipes.planning.memory import model_size

from ..reference import REFERENCES
from .pool import WorkerPool

PAGE = Path(__file__).parents[2] / "docs" / "adding-an-optimizer.md"
NAMES = ("layerwise_lion", "layerwise_lion_reference", "test_layerwise_lion", "who_knows_it")
STAGES = ["dense", "ddp", 1, 2, 3, "fsdp"]


def blocks() -> dict[str, str]:
    """The page's Python files by the names that it gives them; the last has none."""
    code = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return dict(zip(NAMES, code, strict=True))


def write(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return str(folder)


def look_in(folder: str) -> None:
    """Find modules there; runs on every rank too, which may have been started before the folder was made."""
    sys.path.insert(0, folder)


@pytest.fixture(autouse=True)
def forgotten_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", [*sys.path])
    tables: list[dict[str, Any]] = [OPTIMIZERS, REFERENCES]
    before = [{**table} for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


def run_test(pool: WorkerPool, folder: str, name: str, stage: str | int) -> None:
    """Run the page's test, found here and by the workers in the folder."""
    look_in(folder)
    pool.run(look_in, folder)
    module: Any = importlib.import_module(name)
    (stages,) = (mark.args[1] for mark in module.test_it_equals_its_reference.pytestmark if mark.args[0] == "stage")
    assert stages == STAGES
    module.test_it_equals_its_reference(pool, stage, pool.world_size)


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", STAGES)
def test_the_pages_optimizer_is_exact(pool: WorkerPool, stage: str | int, world_size: int, tmp_path: Path) -> None:
    run_test(pool, write(tmp_path, blocks()), "test_layerwise_lion", stage)


BREAKS = {
    "half_the_decay": ('alpha=group["weight_decay"]', 'alpha=0.5 * group["weight_decay"]', "relative error"),
    "another_ratio": ("= rule(layers)", "= 1.00001 * rule(layers)", "relative error"),
    "one_reduction_more": ("yield self.norms", "yield self.norms; yield self.norms", r"\{2\} == \{1\}"),
    "another_count": ("sums=(3,)", "sums=(3, 3)", r"\{1\} == \{2\}"),
}


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("name", BREAKS)
def test_a_mistake_is_caught(pool: WorkerPool, name: str, world_size: int, tmp_path: Path) -> None:
    right, wrong, message = BREAKS[name]
    files = blocks()
    assert files["layerwise_lion"].count(right) == 1
    files["layerwise_lion"] = files["layerwise_lion"].replace(right, wrong)
    # Under names of their own, as the workers know the page's modules by now.
    files = {key.replace("layerwise_lion", name): text.replace("layerwise_lion", name) for key, text in files.items()}
    with pytest.raises(AssertionError, match=message):
        run_test(pool, write(tmp_path, files), f"test_{name}", 2)


def test_who_knows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    look_in(write(tmp_path, blocks()))
    page: Any = importlib.import_module("who_knows_it")
    entry = OPTIMIZERS["layerwise_lion"]
    assert type(page.optimizer) is entry.optimizer_class
    assert page.rates[1] == entry.starting_rate
    assert "layerwise_lion, ZeRO-1" in capsys.readouterr().out
    config = dataclasses.replace(get_preset("lamb-tiny"), optimizer=OptimizerConfig(name="layerwise_lion"))
    size = model_size(config)
    assert (size.states, size.norm_sums) == (1, entry.sums)
