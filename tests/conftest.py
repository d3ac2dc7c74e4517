"""Settings that must stand before torch and DeepSpeed are imported, and what may run side by side."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

try:
    from xdist.scheduler import LoadScopeScheduling
except ImportError:  # a machine that is borrowed for tests/gpu may have pytest alone
    LoadScopeScheduling = object

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# DeepSpeed compiles a small extension at its first run. A build folder per environment keeps an interrupted build's
# lock file from hanging another environment.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja, deepspeed
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun by a shell in the background: programs would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, which whoever imports them first does


from .fresh_libraries import fresh_libraries
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


@pytest.fixture(autouse=True)
def _fresh_libraries() -> Iterator[None]:
    with fresh_libraries():
        yield


class _ByPools(LoadScopeScheduling):
    """Of `-n 2`, one process runs all that shares pools of workers, and the other one beside it file by file.

    On a GPU test by test, since most of the time goes into compiling; but one after another what takes its memory.
    """

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith("tests/gpu/") and "test_large" not in nodeid:
            return nodeid
        return "pools" if nodeid.startswith("tests/distributed/") else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)  # with -p no:xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _ByPools:
    """Whatever `--dist` says: otherwise every process would start pools of its own."""
    return _ByPools(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ranks", type=int, help="run only the tests of this many worker processes")


@pytest.hookimpl(tryfirst=True)  # before `-m` takes its choice
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    leave_the_fewest_quick(items)
