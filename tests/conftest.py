"""Settings that must stand before torch and DeepSpeed are imported, and what may run side by side."""

from __future__ import annotations

import os
import sys
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ranks", type=int, help="run only the tests of this many worker processes")


@pytest.hookimpl(trylast=True)  # after tests/distributed has brought its own in order
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests for `-n 2 --dist loadgroup`: a file stays together, and whatever shares pools of workers does."""
    for item in items:
        shares_pools = "distributed" in item.path.parts
        item.add_marker(pytest.mark.xdist_group("pools" if shares_pools else str(item.path)))
