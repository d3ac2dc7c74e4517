"""Lightning steps a scheduler once per epoch unless told otherwise: refused for schedules that count updates."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from trustratio.integrations.guards.replaced import ConflictingSettingsError
from trustratio.optimizers import LAMB
from trustratio.recipes.rules.schedules import WarmupPolynomial


class Trainer:
    """Has what Lightning's Trainer has of schedulers."""

    def __init__(self, automatic: bool, config: SimpleNamespace):
        self.lightning_module = SimpleNamespace(automatic_optimization=automatic)
        self.lr_scheduler_configs = [config]


def lamb(model: torch.nn.Module) -> LAMB:
    return LAMB(model.parameters(), lr=0.1)


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize(
    ("interval", "frequency", "automatic", "ours", "refused"),
    [
        ("epoch", 1, True, True, "every 1 epoch"),
        ("step", 2, True, True, "every 2 step"),
        ("step", 1, True, True, None),
        ("epoch", 1, False, True, None),  # the module steps it itself
        ("epoch", 1, True, False, None),  # torch's may count epochs
    ],
)
def test_intervals(
    name: str,
    interval: str,
    frequency: int,
    automatic: bool,
    ours: bool,
    refused: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import trustratio.integrations.lightning  # noqa: F401

    standing_in: Any = ModuleType(name)
    standing_in.Trainer = Trainer
    monkeypatch.setitem(sys.modules, name, standing_in)
    model = torch.nn.Linear(2, 2)
    optimizer = lamb(model)
    scheduler: Any = WarmupPolynomial(optimizer, 2, 10)
    if not ours:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = Trainer(automatic, SimpleNamespace(scheduler=scheduler, interval=interval, frequency=frequency))
    model(torch.ones(1, 2)).sum().backward()
    before = model.weight.detach().clone()
    if refused is None:
        optimizer.step()
        assert trainer.lightning_module is not None
        return
    with pytest.raises(ConflictingSettingsError, match=f'{refused}: return from .*"interval": "step"'):
        optimizer.step()
    assert torch.equal(before, model.weight)


def test_lightning_itself(tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning.pytorch", minversion="2.5")

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self, interval: str | None):
            super().__init__()
            self.net, self.interval, self.rates = torch.nn.Linear(2, 2), interval, []

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            return self.net(batch).square().sum()

        def configure_optimizers(self) -> Any:
            optimizer = lamb(self.net)
            scheduler = WarmupPolynomial(optimizer, 2, 10)
            if self.interval is None:
                return [optimizer], [scheduler]
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}

    def rates(interval: str | None) -> list[float]:
        module = Module(interval)
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = lightning.Trainer(
            accelerator="cpu", devices=1, max_epochs=1, accumulate_grad_batches=2, default_root_dir=tmp_path, **quiet
        )
        trainer.fit(module, torch.utils.data.DataLoader(torch.ones(6, 2)))
        return module.rates

    assert rates("step") == pytest.approx([0.05, 0.05, 0.1, 0.1, 0.1, 0.1])
    with pytest.raises(ConflictingSettingsError, match="every 1 epoch"):
        rates(None)
