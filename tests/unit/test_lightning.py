"""Lightning: schedules that count updates, callbacks, and the forms of its programs in one process."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from trustratio.integrations.guards.replaced import ConflictingSettingsError, ReplacedOptimizerError
from trustratio.optimizers import CLARS, LAMB, VRLAMB
from trustratio.optimizers.sharding import backends
from trustratio.recipes.rules.schedules import WarmupPolynomial


class Trainer:
    """Has what Lightning's Trainer has of schedulers."""

    def __init__(self, automatic: bool, config: SimpleNamespace):
        self.callbacks, self.optimizers = [], [config.scheduler.optimizer]
        self.strategy = SimpleNamespace(model=None)
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


def in_a_sequence(optimizer: Any, schedule: Any) -> Any:
    constant = lr_scheduler.ConstantLR(optimizer, 1.0)
    return lr_scheduler.SequentialLR(optimizer, [schedule, constant], [6])


def in_a_chain(optimizer: Any, schedule: Any) -> Any:
    return lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(optimizer, 1.0), schedule], optimizer)


def in_both(optimizer: Any, schedule: Any) -> Any:
    return in_a_chain(optimizer, in_a_sequence(optimizer, schedule))


@pytest.mark.parametrize("kind", [lamb, lambda model: torch.optim.SGD(model.parameters(), lr=0.1)], ids=["ours", "SGD"])
@pytest.mark.parametrize("within", [in_a_sequence, in_a_chain, in_both])
def test_intervals_of_schedules_within_others(within: Any, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import trustratio.integrations.lightning  # noqa: F401

    standing_in: Any = ModuleType("pytorch_lightning")
    standing_in.Trainer = Trainer
    monkeypatch.setitem(sys.modules, "pytorch_lightning", standing_in)
    model = torch.nn.Linear(2, 2)
    optimizer = kind(model)
    scheduler = within(optimizer, WarmupPolynomial(optimizer, 2, 10))
    config = SimpleNamespace(scheduler=scheduler, interval="epoch", frequency=1)
    trainer = Trainer(True, config)
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ConflictingSettingsError, match=r"WarmupPolynomial counts updates, .* every 1 epoch"):
        optimizer.step()
    config.interval = "step"
    optimizer.step()
    assert trainer.lightning_module is not None


def test_a_schedule_has_steps_watched_without_an_optimizer_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.optim.Optimizer] = []

    class Asked(backends.Backend):
        def before_step(self, optimizer: torch.optim.Optimizer) -> None:
            asked.append(optimizer)

    fresh = backends._Known(registered=[Asked()], not_imported={})
    monkeypatch.setattr(backends, "_known", fresh)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    optimizer.step()
    assert asked == []
    WarmupPolynomial(optimizer, 2, 10)
    optimizer.step()
    assert asked == [optimizer]
    fresh.registered.clear()


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


# Trust ratios -------------------------------------------------------------------------------------------------------


@pytest.fixture
def ratio_callback(norms_callback: Any) -> Any:
    """The class, which can be made without Lightning here."""
    from trustratio.integrations.lightning import TrustRatioCallback

    return TrustRatioCallback


def ratio_loop(callback: Any, optimizers: list[Any], model: torch.nn.Module, accumulate: int = 1) -> Loop:
    loop: Any = Loop(callback, optimizers, model)
    loop.accumulate_grad_batches, loop.world_size, model.automatic_optimization = accumulate, 1, True  # type: ignore
    return loop


def test_trust_ratios_of_logged_steps(ratio_callback: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's names, and nobody asks for ratios in other steps."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    optimizer, asked = lamb(model), []
    read = LAMB.trust_ratio_vector
    monkeypatch.setattr(LAMB, "trust_ratio_vector", lambda self: asked.append(0) or read(self))
    loop = ratio_loop(ratio_callback(per_layer=True), [optimizer], model, 3)
    assert loop.fit(5, accumulate=3) == [2, 4]
    assert len(asked) == 2
    ratios = optimizer.trust_ratios()
    shown = loop.loggers[0].logged[-1][1]
    assert set(shown) == {f"trust_ratio/{name}" for name in ("min", "median", "max", "0.weight", "0.bias")}
    assert shown["trust_ratio/0.bias"] == 1.0 != shown["trust_ratio/max"] == shown["trust_ratio/0.weight"]
    assert set(ratios) == {"0.weight", "0.bias"}
    assert ratio_loop(ratio_callback(every=3), [lamb(model)], model).fit(4) == [3]


def test_gradient_noise_of_logged_steps(ratio_callback: Any) -> None:
    model = torch.nn.Linear(2, 2)
    loop = ratio_loop(ratio_callback(noise=1), [lamb(model)], model, 2)
    assert loop.fit(2, accumulate=2) == [2]
    assert loop.loggers[0].logged[0][1]["gradient_noise/noise"] == pytest.approx(0.0, abs=1e-5)  # the same sample twice
    assert loop.loggers[0].logged[0][1]["gradient_noise/signal"] > 0
    with pytest.raises(ValueError, match=r"there is 1 \(accumulate_grad_batches=1 x 1 rank\): halve the batch"):
        ratio_loop(ratio_callback(noise=1), [lamb(model)], model).fit(1)


def test_ratios_of_one_of_several_optimizers(ratio_callback: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    optimizers = [torch.optim.SGD(model[0].parameters(), lr=0.1), lamb(model[1])]
    loop = ratio_loop(ratio_callback(optimizer=1, per_layer=True), optimizers, model)
    assert loop.fit(4) == [2, 4]
    assert "trust_ratio/1.weight" in loop.loggers[0].logged[0][1]
    with pytest.raises(ReplacedOptimizerError, match="TrustRatioCallback logs an optimizer of trustratio, and SGD"):
        ratio_loop(ratio_callback(optimizer=0), optimizers, model).fit(1)
    with pytest.raises(ValueError, match="one of the module's 2 optimizers, and was given optimizer=None"):
        ratio_loop(ratio_callback(), optimizers, model).fit(1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be an integer of at least 1, got 0"),
        ({"noise": True}, ValueError, "noise must be the samples of one rank's batch, an integer of at least 1"),
        ({"noise": 0}, ValueError, "got 0"),
        ({"optimizer": "0"}, TypeError, "takes an optimizer's number, from 0, and was given '0'"),
        ({"optimizer": True}, TypeError, "was given True"),
    ],
)
def test_bad_arguments(ratio_callback: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ratio_callback(**arguments)


def test_other_ranks_log_no_ratios(ratio_callback: Any) -> None:
    model = torch.nn.Linear(2, 2)
    loop = ratio_loop(ratio_callback(), [lamb(model)], model)
    loop.is_global_zero = False
    assert loop.fit(4) == []


# Lightning itself, in one process -----------------------------------------------------------------------------------

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
each_name = pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])


def module_of(lightning: Any, configure: Any, skipped: tuple[int, ...] = (), made: Any = None) -> Any:
    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net, self.made = torch.nn.Linear(2, 2), made

        def training_step(self, batch: torch.Tensor, number: int) -> torch.Tensor | None:
            return None if number in skipped else self.net(batch).square().sum()

        def configure_optimizers(self) -> Any:
            return configure(self.net)

    return Module()


def trained(lightning: Any, module: Any, folder: Path, batches: int = 4, **arguments: Any) -> torch.Tensor:
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, default_root_dir=folder, **QUIET, **arguments
    )
    samples = torch.randn(batches, 2, generator=torch.Generator().manual_seed(1))
    trainer.fit(module, torch.utils.data.DataLoader(samples))
    weight: torch.Tensor = module.net.weight.detach()
    return weight


def plainly(make: Any, skipped: tuple[int, ...] = ()) -> torch.Tensor:
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 2)
    optimizer = make(net)
    for number, sample in enumerate(torch.randn(4, 2, generator=torch.Generator().manual_seed(1))):
        if number not in skipped:
            net(sample[None]).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return net.weight.detach()


def scheduled(net: torch.nn.Module) -> tuple[Any, dict[str, Any]]:
    optimizer = lamb(net)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return optimizer, {"scheduler": constant, "interval": "step"}


FORMS: dict[str, Any] = {
    "alone": lamb,
    "a list": lambda net: [lamb(net)],
    "a dict": lambda net: {"optimizer": lamb(net)},
    "a dict with a schedule": lambda net: dict(zip(("optimizer", "lr_scheduler"), scheduled(net), strict=True)),
    "two lists": lambda net: tuple([one] for one in scheduled(net)),
}


@each_name
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_configure_optimizers(form: str, name: str, tmp_path: Path) -> None:
    lightning = pytest.importorskip(name, minversion="2.5")
    assert torch.equal(trained(lightning, module_of(lightning, FORMS[form]), tmp_path), plainly(lamb))


@pytest.mark.parametrize("optimizer_class", [LAMB, CLARS, VRLAMB])
def test_a_batch_without_a_loss_is_no_step(optimizer_class: Any, tmp_path: Path) -> None:
    """Its closure makes no gradient; the next step has its own statistics alone."""
    lightning = pytest.importorskip("lightning.pytorch", minversion="2.5")

    def make(net: torch.nn.Module) -> Any:
        return optimizer_class(net.parameters(), lr=0.1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = trained(lightning, module_of(lightning, make, skipped=(0, 2)), tmp_path)
        assert torch.equal(found, plainly(make, skipped=(0, 2)))


def test_a_trainer_that_could_not_be_made(tmp_path: Path) -> None:
    """It lives on in whoever keeps the error, and is not asked for its schedules."""
    lightning = pytest.importorskip("lightning.pytorch", minversion="2.5")
    with pytest.raises(Exception, match="nonsense") as kept:
        lightning.Trainer(accelerator="cpu", strategy="nonsense", **QUIET)
    assert torch.equal(trained(lightning, module_of(lightning, lamb), tmp_path), plainly(lamb))
    assert kept.tb is not None


def test_an_optimizer_that_is_older_than_its_trainer(tmp_path: Path) -> None:
    """Is looked at when it steps, and its trainer guarded from then on."""
    lightning = pytest.importorskip("lightning.pytorch", minversion="2.5")
    module = module_of(lightning, lambda net: module.made)
    module.made = lamb(module.net)
    assert torch.equal(trained(lightning, module, tmp_path), plainly(lamb))
    guards = [one for one in module.trainer.callbacks if type(one).__name__ == "WindowGuard"]
    assert len(guards) == 1


def test_the_program_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning.pytorch", minversion="2.5")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).resolve().parents[2] / "docs" / "lightning.md").read_text()
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    assert names["trainer"].global_step == 100
    assert names["trainer"].callbacks[0]._steps == 100
