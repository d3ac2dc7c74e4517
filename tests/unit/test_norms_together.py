"""What a measured step says that waits for other ranks."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch

from trustratio.integrations.layer_norms import LayerNorms
from trustratio.integrations.norms import together
from trustratio.integrations.norms.kept_layout import KeptLayout
from trustratio.optimizers import LayoutError

from .test_layer_norms import make_model, step_of


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "processes", lambda: 2)


def test_one_that_waits_long(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    is_said = threading.Event()

    def warn(message: str, stacklevel: int) -> None:
        said.append(message)
        is_said.set()

    monkeypatch.setattr(warnings, "warn", warn)
    monkeypatch.setattr(together, "SECONDS", 0.0)
    with together.together(7):
        assert is_said.wait(30)
    assert "waited for other ranks for 0 seconds, in its step 7: all ranks make LayerNorms" in said[0]


@pytest.mark.parametrize("where", ["resolve", "agree"])
def test_one_that_has_waited_in_vain(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norms = LayerNorms(optimizer, model, every=2)

    def fail(*_: object) -> None:
        raise RuntimeError("Timed out waiting")

    monkeypatch.setattr(KeptLayout, where, fail)
    step_of(model, optimizer)
    with pytest.raises(LayoutError, match=r"its step 2 with other ranks: all ranks make LayerNorms.*\(Timed out wait"):
        step_of(model, optimizer)
    assert norms.latest().step == 2 * (where == "agree")


@pytest.mark.parametrize("error", [LayoutError("what it is"), torch.OutOfMemoryError("of memory")])
def test_other_errors_stay_what_they_are(error: RuntimeError) -> None:
    with pytest.raises(type(error), match=f"^{error}$"), together.together(1):
        raise error
