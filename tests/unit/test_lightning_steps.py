"""Lightning's callbacks count the steps of their own optimizer: however often it steps, and where training goes on."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from trustratio.optimizers import LARS, LayerwiseOptimizer, TrustRatio

lightning = pytest.importorskip("lightning.pytorch", minversion="2.5")
loggers = pytest.importorskip("lightning.pytorch.loggers")
plugins = pytest.importorskip("lightning.pytorch.plugins")
callbacks = pytest.importorskip("trustratio.integrations.lightning")
LayerNormsCallback, TrustRatioCallback = callbacks.LayerNormsCallback, callbacks.TrustRatioCallback

QUIET = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
pytestmark = pytest.mark.filterwarnings("ignore")

Ratios = list[tuple[int, float]]
RATIO = "trust_ratio/min"
"""That of the weight: it alone is scaled."""


def ratio_of(optimizer: LayerwiseOptimizer) -> float:
    (name,) = optimizer.adapted_layers()
    return optimizer.trust_ratios()[name]


class Notes(loggers.CSVLogger):  # type: ignore[misc, name-defined]
    """Keeps what is logged of one number."""

    def __init__(self, folder: Path, key: str):
        super().__init__(str(folder))
        self.noted: Ratios = []
        self.key = key

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.noted.append((step, metrics[self.key]))


class Adversaries(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """The critic steps so often in each batch, and the generator in every so manieth."""

    def __init__(self, critics_steps: int = 1, generators_batches: int = 1, wrapped: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.critics_steps, self.generators_batches, self.wrapped = critics_steps, generators_batches, wrapped
        self.generator, self.critic = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)
        self.taken: tuple[list[float], list[float]] = ([], [])

    def configure_optimizers(self) -> Any:
        optimizers = [self._optimizer(part) for part in (self.generator, self.critic)]
        for optimizer, taken in zip(optimizers, self.taken, strict=True):
            optimizer.register_step_post_hook(lambda optimizer, *_, taken=taken: taken.append(ratio_of(optimizer)))
        return optimizers

    def _optimizer(self, part: torch.nn.Module) -> Any:
        if self.wrapped:
            return TrustRatio(torch.optim.SGD, [part.weight], lr=0.1)
        return LARS(part.parameters(), lr=0.1)

    def training_step(self, batch: torch.Tensor, number: int) -> None:
        generators, critics = self.optimizers()
        for _ in range(self.critics_steps):
            critics.zero_grad()
            self.manual_backward(self.critic(batch).square().mean())
            critics.step()
        if (number + 1) % self.generators_batches == 0:
            generators.zero_grad()
            self.manual_backward(self.critic(self.generator(batch)).square().mean())
            generators.step()


def fit(
    folder: Path, module: Any, *callbacks: Any, key: str = RATIO, batches: int = 6, **changes: Any
) -> tuple[Ratios, Any]:
    notes, checkpoint = Notes(folder, key), changes.pop("checkpoint", None)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, logger=notes, callbacks=[*callbacks], **QUIET, **{"max_epochs": 1, **changes}
    )
    samples = torch.randn(2 * batches, 4, generator=torch.Generator().manual_seed(1))
    trainer.fit(module, torch.utils.data.DataLoader(samples, batch_size=2), ckpt_path=checkpoint)
    return notes.noted, trainer


def every(n: int, taken: list[float]) -> Ratios:
    return [(step, pytest.approx(ratio)) for step, ratio in enumerate(taken, 1) if step % n == 0]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("critics_steps", "generators_batches"), [(1, 1), (3, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("n", [1, 2])
def test_ratios_of_optimizers_that_step_unequally_often(
    n: int, number: int, critics_steps: int, generators_batches: int, wrapped: bool, tmp_path: Path
) -> None:
    module = Adversaries(critics_steps, generators_batches, wrapped)
    noted, _ = fit(tmp_path, module, TrustRatioCallback(every=n, optimizer=number))
    assert len(module.taken[number]) == (6 // generators_batches, 6 * critics_steps)[number]
    assert noted == every(n, module.taken[number])


@pytest.mark.parametrize("number", [0, 1])
def test_norms_of_optimizers_that_step_unequally_often(number: int, tmp_path: Path) -> None:
    file, module = tmp_path / "norms.jsonl", Adversaries(3, 2)
    callback = LayerNormsCallback(every=2, optimizer=number, file=file)
    noted, _ = fit(tmp_path, module, callback, key="layer_norms/model/update")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    steps = list(range(2, len(module.taken[number]) + 1, 2))
    assert [step for step, _ in noted] == [record["step"] for record in records] == steps
    assert len({update for _, update in noted}) == len(steps)


@pytest.mark.parametrize("older", [False, True])
def test_counts_go_on_from_a_checkpoint(older: bool, tmp_path: Path) -> None:
    def made() -> list[Any]:
        norms = LayerNormsCallback(every=1000, optimizer=1)
        return [TrustRatioCallback(every=1, optimizer=0), norms, TrustRatioCallback(every=1000, optimizer=0)]

    saved = tmp_path / "one.ckpt"
    _, trainer = fit(tmp_path, Adversaries(3, 2), *made())
    trainer.save_checkpoint(saved)
    checkpoint = torch.load(saved, weights_only=True)
    assert checkpoint["trustratio_steps"] == {"TrustRatioCallback/0": 3, "LayerNormsCallback/1": 18}
    before = (3, 18)
    if older:  # the Trainer's count was shared out
        del checkpoint["trustratio_steps"]
        torch.save(checkpoint, saved)
        before = (10, 10)
    module, given = Adversaries(3, 2), made()
    noted, _ = fit(tmp_path, module, *given, checkpoint=saved, max_epochs=2)
    assert noted == [(before[0] + step, ratio) for step, ratio in every(1, module.taken[0])]
    assert [callback._steps for callback in given] == [before[0] + 3, before[1] + 18, before[0] + 3]


class Plain(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """Counts the steps that a loss scale has let through."""

    def __init__(self, without_loss: tuple[int, ...] = (), fused: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.without_loss, self.fused = torch.nn.Linear(4, 2), without_loss, fused
        self.taken: list[float] = []

    def configure_optimizers(self) -> Any:
        if self.fused:
            return torch.optim.SGD(self.net.parameters(), lr=1e-3, fused=True)
        optimizer = LARS(self.net.parameters(), lr=0.1)

        def note(*_: Any) -> None:
            self.taken += [ratio_of(optimizer)] if self.net.weight.grad is not None else []

        optimizer.register_step_post_hook(note)
        return optimizer

    def training_step(self, batch: torch.Tensor, number: int) -> torch.Tensor | None:
        return None if number in self.without_loss else self.net(batch).square().sum()


def half() -> Any:
    return plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**18))


def test_steps_that_a_loss_scale_skips_are_none(tmp_path: Path) -> None:
    module = Plain()
    noted, trainer = fit(tmp_path, module, TrustRatioCallback(every=1), plugins=[half()], batches=10)
    assert 0 < len(module.taken) < trainer.global_step
    assert noted == every(1, module.taken)


@pytest.mark.parametrize("fused", [False, True])
def test_norms_of_steps_that_a_loss_scale_skips_are_none(fused: bool, tmp_path: Path) -> None:
    callback = LayerNormsCallback(every=2)
    module = Plain(fused=fused)
    noted, trainer = fit(tmp_path, module, callback, plugins=[half()], batches=10, key="layer_norms/model/update")
    assert callback._steps is not None
    assert 0 < callback._steps < trainer.global_step
    assert [step for step, _ in noted] == list(range(2, callback._steps + 1, 2))
    assert all(update > 0 for _, update in noted)


def test_a_batch_without_a_loss_logs_nothing(tmp_path: Path) -> None:
    module = Plain(without_loss=(0, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        noted, _ = fit(tmp_path, module, TrustRatioCallback(every=1))
    assert len(module.taken) == 4
    assert noted == every(1, module.taken)


def test_a_second_training_goes_on_counting(tmp_path: Path) -> None:
    module, callback = Adversaries(2, 3), TrustRatioCallback(every=1, optimizer=0)
    notes, trainer = fit(tmp_path, module, callback)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(12, 4), batch_size=2))
    assert [step for step, _ in notes] == [1, 2, 3, 4]
    again, _ = fit(tmp_path, Adversaries(2, 3), callback)
    assert [step for step, _ in again] == [1, 2]  # of another Trainer


def guards_of(trainer: Any) -> int:
    return sum(type(callback).__name__ == "WindowGuard" for callback in trainer.callbacks)


def test_only_trainers_of_ours_are_guarded(tmp_path: Path) -> None:
    """Not one that has ended, nor one that waits while another trains; one that waited gets rid of it."""
    others, others_trainer = fit(tmp_path, Plain(fused=True), key="", batches=1)
    waiting = lightning.Trainer(accelerator="cpu", devices=1, logger=False, **QUIET, max_epochs=1)
    _, trainer = fit(tmp_path, Plain(), key="", batches=1)
    assert [guards_of(one) for one in (others_trainer, waiting, trainer)] == [0, 0, 1]
    LARS([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    waiting.fit(Plain(fused=True), torch.utils.data.DataLoader(torch.ones(2, 4)))
    assert others == []
    assert guards_of(waiting) == 0
