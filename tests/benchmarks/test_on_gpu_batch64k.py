"""The part `batch64k`: runs begin the same, the second batch reads the same text, and what does not fit is said."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks.on_gpu.batch64k import runs as training
from benchmarks.on_gpu.batch64k.corpus import Corpus
from benchmarks.on_gpu.batch64k.page import best_runs, is_good, tables, verdict
from benchmarks.on_gpu.batch64k.picture import draw
from benchmarks.on_gpu.batch64k.runs import Trainer
from benchmarks.on_gpu.batch64k.settings import REAL, TOY, scaled_rate, updates_that_fit
from benchmarks.on_gpu.part import Failed, Part
from benchmarks.on_gpu.parts import batch64k
from benchmarks.on_gpu.table import NOT_MEASURED
from trustratio.recipes.configuration.config import RecipeConfig
from trustratio.recipes.configuration.overrides import apply_overrides
from trustratio.recipes.data.masking import MaskedBatch, Vocabulary
from trustratio.recipes.model.build import build_parts
from trustratio.recipes.rules.global_batch import BatchPlan

CPU = torch.device("cpu")
ROWS = np.random.default_rng(0).integers(5, 100, size=(50, 16)).astype(np.uint16)
TINY = ("model.layers=1", "model.hidden=16", "model.intermediate=32", "training.global_batch=16")


class Text:
    """In the place of prepared text."""

    train_rows, vocabulary_size, unigram_entropy = len(ROWS), 100, 4.5

    def rows(self, split: str) -> np.ndarray:
        return ROWS if split == "train" else ROWS[:10]

    def vocabulary(self) -> Vocabulary:
        return Vocabulary(4, np.arange(5), np.arange(5, 100))

    def special_tokens(self) -> dict[str, int | None]:
        return {"pad": 0}


def config_of(*overrides: str) -> RecipeConfig:
    sizes = ("training.micro_batch=8", "data.sequence_length=16", "training.precision=bf16")
    return apply_overrides(RecipeConfig(), [*TINY, *sizes, *overrides])


def corpus_of(config: RecipeConfig, updates: int = 4) -> Corpus:
    text: Any = Text()
    return Corpus(text, config, updates, CPU)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """One on this process alone, where nothing is compiled and no group is made."""
    for name, value in (("get_rank", 0), ("get_world_size", 1), ("all_reduce", None)):
        monkeypatch.setattr(dist, name, lambda *_, value=value: value)
    config, text = config_of(), Text()
    unwrapped = lambda parts, *_: SimpleNamespace(model=parts.model, device=CPU)  # noqa: E731
    monkeypatch.setattr(training, "AccelerateLauncher", lambda environment: SimpleNamespace(engine=unwrapped))
    monkeypatch.setattr(training, "compile_regions", lambda model, backend: None)
    found = Trainer(config, text, "eager")  # type: ignore[arg-type]
    found.corpus = corpus_of(config)
    return found


class PartWithTime(Part):
    """Says that so much time is left."""

    seconds = 1000.0

    def left(self) -> float:
        return self.seconds


def equal(one: list[MaskedBatch], other: list[MaskedBatch]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(getattr(a, name), getattr(b, name)) for a, b in pairs for name in vars(a))


def run_of(name: str = "lamb", lr: float = 0.02, loss: float = 5.0, batch: int = 65536, **more: Any) -> dict[str, Any]:
    run = {"optimizer": name, "lr": lr, "batch": batch, "losses": [9.0, loss], "asked_updates": 2, "seconds": 1.0}
    return run | {"validation_loss": loss, "validation_accuracy": 0.1, "sequences_per_second": 1e5, **more}


def test_updates_are_those_of_the_recipe() -> None:
    config = config_of()
    corpus = corpus_of(config, 4)
    rows = training_rows(config)
    for number in range(4):
        assert equal(corpus.of_update(number, 1), rows.step_batches(number, BatchPlan(8, 2, 1), 0))
    assert sum(len(batch.input_ids) for batch in corpus.validation) == 10


def training_rows(config: RecipeConfig) -> Any:
    from trustratio.recipes.data.rows import MaskedRows

    return MaskedRows(ROWS, Text().vocabulary(), config.data.mask_probability, config.training.seed)


def test_twice_the_batch_is_the_same_text_in_the_same_order() -> None:
    config = config_of()
    corpus = corpus_of(config, 4)
    assert equal(corpus.of_update(1, 2), corpus.of_update(2, 1) + corpus.of_update(3, 1))
    assert len(corpus.of_update(1, 2)) == 4


def test_every_run_begins_with_the_same_weights(trainer: Trainer) -> None:
    first = trainer.train("lamb", 0.02, 3, 1)
    other = trainer.train("adamw", 0.002, 3, 1)
    again = trainer.train("lamb", 0.02, 3, 1)
    assert first["losses"] == again["losses"]
    assert first["validation_loss"] == again["validation_loss"]
    assert first["losses"][0] == other["losses"][0]
    assert first["losses"][-1] != other["losses"][-1]


def test_a_run_is_what_the_recipe_would_train(trainer: Trainer) -> None:
    """Its first loss is that of the model which the seed makes, its rate that of a schedule of so many updates."""
    parts = build_parts(trainer.config, 100, {"pad": 0})
    batches = trainer.corpus.of_update(0, 1)
    with torch.no_grad():
        total = sum(parts.model(**vars(batch))[0].item() for batch in batches)
    found = trainer.train("lamb", 0.02, 2, 1)
    assert found["losses"][0] == pytest.approx(total / sum(len(batch.labels) for batch in batches), rel=1e-6)
    assert (found["batch"], found["asked_updates"], len(found["losses"])) == (16, 2, 2)
    assert trainer.train("lamb", 0.02, 2, 2)["batch"] == 32


def test_runs_are_the_same_in_a_wrapper_for_one_rank(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate makes one on a GPU, and none on a CPU."""
    first = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    alone = trainer.train("lamb", 0.02, 3, 1)
    trainer.model.load_state_dict(first)
    monkeypatch.undo()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        trainer.wrap(torch.nn.parallel.DistributedDataParallel(trainer.model), CPU)
        wrapped = [trainer.train(name, 0.02, 3, 1) for name in ("lamb", "adamw", "lamb")]
    finally:
        dist.destroy_process_group()
    assert wrapped[0]["losses"] == wrapped[2]["losses"] == pytest.approx(alone["losses"], rel=1e-6)


def test_a_run_is_noted_while_it_goes_on_and_ended_with_its_time(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "FETCH_EVERY", 1)
    noted: list[int] = []
    over = iter([False, True])
    found = trainer.train("lans", 0.02, 4, 1, lambda run: noted.append(len(run["losses"])), lambda: next(over))
    assert noted == [1, 2, 2]
    assert len(found["losses"]) == 2
    assert "validation_loss" in found


def test_a_run_that_diverges_is_ended(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "FETCH_EVERY", 1)
    found = trainer.train("adamw", 1e30, 4, 1)
    assert not math.isfinite(found["losses"][-1])
    assert len(found["losses"]) < 4
    assert best_runs([found]) == []


@pytest.mark.parametrize(
    ("seconds", "update", "updates"),
    [(1000.0, 0.1, 60), (72.1, 0.1, 60), (60.1, 0.1, 50), (20.0, 0.1, 16), (1.0, 0.1, 10)],
)
def test_updates_are_as_many_as_all_runs_have_time_for(seconds: float, update: float, updates: int) -> None:
    assert updates_that_fit(seconds, update, REAL.updates) == updates


def test_a_toy_has_its_few_updates() -> None:
    assert updates_that_fit(1.0, 10.0, TOY.updates) == TOY.updates


def test_twice_the_batch_has_the_rate_times_the_square_root_of_two() -> None:
    assert scaled_rate(0.02) == 0.0283


@pytest.mark.parametrize("gib", [80, 140])
def test_the_micro_batch_is_the_plans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gib: int) -> None:
    monkeypatch.setattr(batch64k, "memory_for", lambda device: gib * 2**30)
    config = batch64k.configuration(REAL, Part("batch64k", tmp_path, 60.0))
    assert config.training.global_batch == 65536
    assert config.data.sources == ()
    micro = config.training.micro_batch
    assert 65536 % micro == 0
    assert 4096 <= micro <= REAL.micro_batch
    assert micro * config.data.sequence_length * 0.15 * config.data.vocabulary < 2**31


def test_a_micro_batch_of_one_is_the_least(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(batch64k, "memory_for", lambda device: 0)
    assert batch64k.configuration(REAL, Part("batch64k", tmp_path, 60.0)).training.micro_batch == 1


def test_what_has_no_time_is_left_out_and_named(trainer: Trainer, tmp_path: Path) -> None:
    part = PartWithTime("batch64k", tmp_path, 100.0)
    runs = batch64k.Runs(part, trainer, seconds=1e-9)
    runs.train("lamb", 0.02, 2, 1)
    part.seconds = 0.0
    runs.train("lans", 0.02, 2, 1)
    found = json.loads((tmp_path / "batch64k.json").read_text())
    assert [run["optimizer"] for run in found["runs"]] == ["lamb"]
    assert found["skipped"] == ["lans 0.02 at 16"]
    assert verdict(found).endswith("no time for lans 0.02 at 16")


def test_a_run_that_fails_takes_nothing_from_the_next(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = batch64k.Runs(PartWithTime("batch64k", tmp_path, 100.0), trainer, seconds=1e-9)
    runs.train("no optimizer", 0.02, 2, 1)
    runs.train("lamb", 0.02, 2, 1)
    found = json.loads((tmp_path / "batch64k.json").read_text())
    assert [run["optimizer"] for run in found["runs"]] == ["lamb"]
    assert found["failed"][0].startswith("no optimizer 0.02 at 16: RecipeError: unknown optimizer")
    assert "failed: no optimizer 0.02 at 16" in verdict(found)


def test_runs_of_which_none_is_whole_are_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, begun = [run_of(), run_of("lans")], run_of(asked_updates=60)
    assert is_good({"runs": [begun, *whole], "skipped": ["adamw"]})
    for found in ({}, {"runs": [], "skipped": ["lamb"]}, {"runs": [begun]}, {"runs": whole, "failed": ["adamw"]}):
        assert not is_good(found)
    monkeypatch.setattr(batch64k, "start", lambda: None)
    monkeypatch.setattr(batch64k.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(batch64k, "train_all", lambda part, settings: part.record(skipped=["lamb 0.02 at 65,536"]))
    with pytest.raises(Failed, match="no time for lamb"):
        batch64k.run(Part("batch64k", tmp_path, 60.0))


def test_a_toy_is_called_one() -> None:
    assert (
        verdict({"toy": True, "runs": [run_of(batch=32)]})
        == "toy of 32 sequences x 2 updates: held-out loss lamb 5.000 (lr 0.02)"
    )


def test_the_best_run_is_whole_and_finite() -> None:
    runs = [
        run_of(loss=5.0),
        run_of(lr=0.06, loss=math.nan, validation_loss=math.nan),
        run_of(lr=0.007, loss=4.0, asked_updates=60),  # ended by the limit
        run_of("adamw", 0.002, 5.5),
        run_of("adamw", 0.006, 5.25),
        run_of("adamw", 0.008, 5.0, batch=131072),
    ]
    best = [(run["optimizer"], run["lr"], run["batch"]) for run in best_runs(runs)]
    assert best == [("lamb", 0.02, 65536), ("adamw", 0.006, 65536), ("adamw", 0.008, 131072)]
    line = verdict({"runs": runs, "unigram_entropy": 6.6})
    assert line == (
        "65,536 sequences x 2 updates: held-out loss lamb 5.000 (lr 0.02), adamw 5.250 (lr 0.006); "
        "131,072 sequences x 2 updates: held-out loss adamw 5.000 (lr 0.008); "
        "1 of 6 runs diverged (lamb 0.06 at 65,536); unigram entropy 6.600"
    )


def nan_run(name: str, **more: Any) -> dict[str, Any]:
    return run_of(name, losses=[9.0, math.nan], validation_loss=math.nan, **more)


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([nan_run(name) for name in ("lamb", "lans", "adamw")], "3 of 3 runs diverged (lamb 0.02 at 65,536, lans"),
        ([nan_run("lamb"), nan_run("lans"), run_of("adamw")], "2 of 3 runs diverged"),
        ([run_of("lamb"), nan_run("lans"), run_of("adamw")], "1 of 3 runs diverged (lans 0.02 at 65,536)"),
        ([run_of(), run_of("lans", validation_loss=math.inf)], "1 of 2 runs diverged (lans 0.02 at 65,536)"),
        ([run_of(), run_of("lans", loss=50.0)], "1 of 2 runs did not fall (lans 0.02 at 65,536)"),
        ([run_of(), run_of("lans", loss=9.0)], "1 of 2 runs did not fall"),
    ],
)
def test_runs_that_learned_nothing_do_not_pass(runs: list[dict[str, Any]], said: str) -> None:
    """Whatever AdamW does beside them."""
    assert not is_good({"runs": runs})
    assert said in verdict({"runs": runs})


def test_what_there_was_no_time_for_fails_nothing() -> None:
    cut = {**run_of("lans"), "asked_updates": 60}
    assert is_good({"runs": [run_of("lamb")], "skipped": ["lans 0.02 at 65,536"]})
    assert is_good({"runs": [run_of("lamb"), cut]})
    assert not is_good({"runs": [cut, run_of("adamw")]})


def test_a_rate_that_is_too_high_fails_nothing() -> None:
    assert is_good({"runs": [run_of(), nan_run("lamb", lr=0.06), run_of("lans"), nan_run("adamw")]})
    toy = {"toy": True, "runs": [run_of(loss=9.5), run_of("lans")]}
    assert is_good(toy)
    assert "did not fall" not in verdict(toy)
    assert not is_good({"toy": True, "runs": [run_of(), nan_run("lans")]})


def test_tables_have_every_run_and_the_curves_of_the_best() -> None:
    sizes = {"model": "BERT 2 x 128", "training_sequences": 9, "sequence_length": 32, "vocabulary": 2048}
    long = run_of("lans", losses=[9.0 - n / 10 for n in range(25)], asked_updates=25, validation_loss=4.0)
    begun = {name: value for name, value in run_of("adamw").items() if not name.startswith(("valid", "sequences"))}
    page = tables({"runs": [run_of(), long, begun], "unigram_entropy": 6.6, **sizes})
    assert "| 65,536 | lamb | 0.02 | 2 | 5.000 | 5.000 | 10.0% | 100,000 |" in page
    assert "| 65,536 | adamw | 0.02 | 2 (ended by the limit) | 5.000 |  |  |  |" in page
    assert "| batch | optimizer | rate | update 1 | update 10 | update 20 | update 25 |" in page
    assert "| 65,536 | lans | 0.02 | 9.000 | 8.100 | 7.100 | 6.600 |" in page
    assert tables({}) == tables({"runs": [], "unigram_entropy": 1.0}) == NOT_MEASURED
    assert verdict({}) == "no update was done"


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    runs = [run_of(), run_of("lans"), run_of("adamw", batch=131072), run_of(lr=0.06, losses=[9.0, math.nan])]
    assert draw({"runs": runs, "unigram_entropy": 6.6}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not draw({}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_real_runs_are_what_they_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch64k, "memory_for", lambda device: 80 * 2**30)
    config = batch64k.configuration(REAL, Part("batch64k", tmp_path, 60.0))
    assert (REAL.batch, 2 * REAL.batch, REAL.updates) == (65_536, 131_072, 60)
    assert (config.data.sequence_length, config.model.layers, config.model.hidden) == (32, 2, 128)
    assert dataclasses.asdict(config.schedule) == dataclasses.asdict(RecipeConfig().schedule)


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "benchmarks.on_gpu.part", "batch64k", "--output", str(tmp_path), "--limit", "900"]
    subprocess.run([*line, "--rehearse"], check=True)
    found = json.loads((tmp_path / "batch64k.json").read_text())
    batches = [(run["optimizer"], run["batch"]) for run in found["runs"]]
    assert len(batches) == len({(run["optimizer"], run["lr"]) for run in found["runs"]}) == 12
    assert batches[-3:] == [("lamb", 64), ("lans", 64), ("adamw", 64)]
    assert all(len(run["losses"]) == run["asked_updates"] for run in found["runs"])
    assert "skipped" not in found
    assert "131,072" not in tables(found)
