"""What the files of tests here have in common."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trustratio.optimizers.kernels import cpu


@pytest.fixture
def many_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tensors are shared among threads too."""
    monkeypatch.setattr(cpu, "ELEMENTS_PER_THREAD", 1000)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def timm_optim() -> Iterator[dict[str, Any]]:
    """Some files of timm/optim alone, since importing the package needs torchvision."""
    spec = importlib.util.find_spec("timm")
    assert spec is not None, "install timm with: pip install --no-deps timm"
    for name in ("timm", "timm.optim"):
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = [str(Path(spec.submodule_search_locations[0]).joinpath(*name.split(".")[1:]))]
    yield {name: importlib.import_module(f"timm.optim.{name}") for name in ("lamb", "lars", "lookahead")}
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        del sys.modules[name]
