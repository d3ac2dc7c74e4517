"""What the files of tests here have in common."""

from __future__ import annotations

from collections.abc import Iterator

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
