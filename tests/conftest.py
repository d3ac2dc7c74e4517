"""Settings that must stand before torch and DeepSpeed are imported, and what may run side by side."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# DeepSpeed compiles a small extension at its first run. A build folder per environment keeps an interrupted build's
# lock file from hanging another environment.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja, deepspeed
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, which whoever imports them first does


from .tiers import leave_the_fewest_quick
from .young_objects import search_young_objects_alone


@pytest.fixture(scope="session", autouse=True)
def _young_objects() -> Iterator[None]:
    search_young_objects_alone()
    yield
    gc.unfreeze()  # else the end of the process reports what stays frozen as leaks


@pytest.fixture(autouse=True)
def _young_objects_again() -> None:
    search_young_objects_alone()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Let `-n` alone mean the groups too; without them every worker process would start pools of its own."""
    if getattr(config.option, "numprocesses", None) and config.option.dist in ("no", "load"):
        config.option.dist = "loadgroup"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ranks", type=int, help="run only the tests of this many worker processes")


@pytest.hookimpl(tryfirst=True)  # before `-m` takes its choice
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Divide tests into quick and slow, and into groups for `-n 2 --dist loadgroup`.

    A file stays together, and so does whatever shares pools of workers.
    """
    leave_the_fewest_quick(items)
    for item in items:
        shares_pools = "distributed" in item.path.parts
        item.add_marker(pytest.mark.xdist_group("pools" if shares_pools else str(item.path)))
