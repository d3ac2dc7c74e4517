"""Where these tests run, in which order, and how they go on when one of them has broken the device."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from benchmarks.on_gpu.parts.kernels import REHEARSAL

HAS_GPU = torch.cuda.is_available()
ASKED = "" if HAS_GPU else os.environ.get(REHEARSAL, "")
"""In a rehearsal "1" for one case of each test, "all" for all of them."""

IN_ORDER_OF_WORTH = (
    *("test_large", "test_optimizers", "test_waiting", "test_graphs", "test_layers", "test_rounding"),
    *("test_groups", "test_variants"),
)
"""For runs whose time is short. What is large comes first since it runs beside all others, in one process."""

EXPECTED_WARNINGS = (
    "ignore:.*group.* of samples per step.*",
    "ignore:.*sample of the curvature.*",
    "ignore:.*weights that have a gradient did not move.*",
    "ignore:.*invalid value encountered.*",
)
_lost: list[str] = []


@pytest.fixture(scope="session")
def device() -> str:
    """Where parameters lie. In a rehearsal the CPU, and Triton interprets."""
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture
def on_gpu() -> None:
    """For what only a device can do."""
    if not HAS_GPU:
        pytest.skip("needs a CUDA device")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip everything without a GPU; in a rehearsal keep one case of each test."""
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.gpu)
        for warning in EXPECTED_WARNINGS:
            item.add_marker(pytest.mark.filterwarnings(warning))
        if not (HAS_GPU or ASKED):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if len(here) == len(items):
        worth = {stem: index for index, stem in enumerate(IN_ORDER_OF_WORTH)}
        items.sort(key=lambda item: worth.get(item.path.stem, len(worth)))
    if ASKED == "1":
        first = {item.nodeid.partition("[")[0]: item for item in reversed(here)}
        others = [item for item in here if first[item.nodeid.partition("[")[0]] is not item]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> object:
    """After an illegal access every later call fails, whatever it does: notice it where it happens."""
    outcome = yield
    report = outcome.get_result()
    if report.failed and HAS_GPU:
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            _lost.append(f"{item.nodeid}: {error}")


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Once the failure is reported, end the process; pytest-xdist starts another one."""
    if _lost and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(70)
    if _lost:
        pytest.exit(f"the device answers no more after {_lost[0]}", returncode=70)
