"""Lightning steps a scheduler once per epoch unless told otherwise: refused for schedules that count updates."""

from __future__ import annotations

import json
import sys
from pathlib import Path
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
        self.callbacks, self.optimizers, self.strategy = [], [config.scheduler.optimizer], None
        self.accumulate_grad_batches = 1
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


# Layer norms --------------------------------------------------------------------------------------------------------


class Logger:
    """Takes what Lightning's loggers take."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, metrics))


class Loop:
    """Stands for Lightning's Trainer: its events, and two optimizers at most that it steps in turn."""

    def __init__(self, callback: Any, optimizers: list[torch.optim.Optimizer], model: torch.nn.Module, begin: int = 0):
        self.log_every_n_steps, self.is_global_zero, self.global_step = 2, True, begin * len(optimizers)
        self.loggers, self.optimizers, self.model, self.callback = [Logger()], optimizers, model, callback

    def fit(self, steps: int, accumulate: int = 1) -> list[int]:
        """Train; the steps that were logged."""
        self.callback.on_train_start(self, self.model)
        for batch in range(steps * accumulate):
            self.model(torch.ones(1, 2)).sum().backward()
            if (batch + 1) % accumulate == 0:
                for optimizer in self.optimizers:
                    optimizer.step(lambda: None)  # Lightning always gives a closure
                    self.global_step += 1
                self.model.zero_grad()
            self.callback.on_train_batch_end(self, self.model, None, None, batch)
        self.callback.on_train_end(self, self.model)
        return [step for step, _ in self.loggers[0].logged]


@pytest.fixture
def norms_callback(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class, which can be made without Lightning here."""
    from trustratio.integrations import lightning

    if lightning.Callback is object:
        monkeypatch.setattr(lightning, "Callback", type("Callback", (), {}))
    return lightning.LayerNormsCallback


def sgd(*layers: torch.nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in layers]


def test_layer_norms_of_logged_steps(norms_callback: Any, tmp_path: Path) -> None:
    model, file = torch.nn.Linear(2, 2), tmp_path / "norms.jsonl"
    callback = norms_callback(file=file, layers="weight", numbers="update")
    before = model.weight.detach().clone()
    loop = Loop(callback, sgd(model), model)
    assert loop.fit(5, accumulate=3) == [2, 4]
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4]
    moved = (model.weight.detach() - before).norm().item() / 5  # each step moves it alike
    shown = loop.loggers[0].logged[-1][1]
    assert shown["layer_norms/update/weight"] == pytest.approx(moved, rel=1e-5)
    assert len(shown) == 14
    assert Loop(norms_callback(file=file, every=3), sgd(model), model, begin=3).fit(4) == [6]
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [2, 6]


def test_other_ranks_log_nothing(norms_callback: Any) -> None:
    model = torch.nn.Linear(2, 2)
    loop = Loop(norms_callback(), sgd(model), model)
    loop.is_global_zero = False
    assert loop.fit(4) == []


def test_one_of_several_optimizers(norms_callback: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    loop = Loop(norms_callback(optimizer=1), sgd(*model), model)
    assert loop.fit(4) == [2, 4]  # of its own steps, though the Trainer counts those of both
    assert {name.rpartition("/")[2] for name in loop.loggers[0].logged[0][1] if "1." in name} == {"1.weight", "1.bias"}
    assert not any("0.weight" in name for name in loop.loggers[0].logged[0][1])
    for chosen in (None, 2, -1):
        with pytest.raises(ValueError, match=f"one of the module's 2 optimizers, and was given optimizer={chosen}"):
            Loop(norms_callback(optimizer=chosen), sgd(*model), model).fit(1)


def test_norms_of_a_training_that_was_broken_off(norms_callback: Any) -> None:
    model, callback = torch.nn.Linear(2, 2), norms_callback(every=1)
    optimizers = sgd(model)
    loop = Loop(callback, optimizers, model)
    callback.on_train_start(loop, model)
    callback.on_exception(loop, model, RuntimeError())
    assert not optimizers[0]._optimizer_step_pre_hooks
    assert loop.fit(2) == [1, 2]


def test_the_callback_needs_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    from trustratio.integrations import lightning

    monkeypatch.setattr(lightning, "Callback", object)
    with pytest.raises(ImportError, match="needs Lightning: pip install lightning"):
        lightning.LayerNormsCallback()


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_layer_norms_in_lightning_itself(name: str, tmp_path: Path) -> None:
    lightning = pytest.importorskip(name, minversion="2.5")
    from trustratio.integrations.lightning import LayerNormsCallback

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(2, 2)

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            return self.net(batch).square().sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.net.parameters(), lr=0.01)

    callback = LayerNormsCallback(every=2, file=tmp_path / "norms.jsonl")
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, default_root_dir=tmp_path, callbacks=[callback], **quiet
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(5, 2)))
    records = [json.loads(line) for line in (tmp_path / "norms.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4]
    assert all(record["layers"]["net.weight"]["gradient"] > 0 for record in records)
