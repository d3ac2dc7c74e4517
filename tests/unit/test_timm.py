"""timm's factory makes the optimizers here by name, with its groups, its schedules and its wrappers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trustratio.optimizers import OPTIMIZERS

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    pytest.importorskip("trustratio.integrations.timm")
    program = f"import runpy, torchvision_stand_in; runpy.run_path({str(FOLDER / 'timm_program.py')!r})"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(FOLDER)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return dict(json.loads(run.stdout))


def test_each_is_known_by_a_name_that_timm_does_not_split(answers: dict[str, Any]) -> None:
    assert len(answers["names"]) == len(OPTIMIZERS)
    for name, entry in zip(answers["names"], OPTIMIZERS.values(), strict=True):
        assert "_" not in name
        kind, momentum, groups = answers["classes"][name]
        assert (kind, groups) == (entry.optimizer_class.__name__, 2)
        assert momentum == (0.8 if "momentum" in entry.defaults else None)


def test_the_factory_takes_the_steps_of_the_class(answers: dict[str, Any]) -> None:
    assert answers["factory"] == pytest.approx(answers["by hand"], rel=1e-6)


def test_layer_decay_lookahead_and_arguments_of_train_py(answers: dict[str, Any]) -> None:
    assert len(answers["scales"]) > 2
    assert answers["scales"][-1] == 1.0
    assert answers["lookahead"] == "Lookahead"
    assert answers["train.py"] == 0.7
