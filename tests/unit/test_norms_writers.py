"""Where measured steps go: the file, TensorBoard, Weights & Biases, functions; what of them, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from trustratio.integrations.layer_norms import LayerNorm, LayerNorms, MeasuredNorms
from trustratio.integrations.norms.file import NormsFile
from trustratio.integrations.norms.scalars import NUMBERS, Scalars


class Training:
    """A model of two layers that AdamW trains, and its norms."""

    def __init__(self, every: Any = 1):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.norms = LayerNorms(self.optimizer, self.model, every)

    def take(self, steps: int) -> None:
        for _ in range(steps):
            self.model(torch.ones(1, 3)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


class Run:
    """Takes what a run of Weights & Biases takes."""

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}
        self.logged: list[dict[str, float]] = []

    def define_metric(self, name: str, **options: Any) -> None:
        self.metrics[name] = options

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def steps(path: Path) -> list[int]:
    return [line["step"] for line in lines(path)]


def norm(**numbers: float) -> LayerNorm:
    return LayerNorm(**{**dict.fromkeys(NUMBERS, 1.0), **numbers})


def measured(*layers: str, step: int = 1, **numbers: float) -> MeasuredNorms:
    return MeasuredNorms({layer: norm(**numbers) for layer in layers}, step=step, model=norm(**numbers))


# The file -----------------------------------------------------------------------------------------------------------


def test_each_measured_step_is_a_line_with_everything(tmp_path: Path) -> None:
    training, path = Training(every=2), tmp_path / "folder" / "norms.jsonl"
    training.norms.write_to(file=path)
    expected = []
    for _ in range(3):
        training.take(2)
        latest = training.norms.latest()
        assert latest.model is not None
        expected.append(
            (latest.step, asdict(latest.model), {name: asdict(of_layer) for name, of_layer in latest.items()})
        )
    found = lines(path)
    assert [(line["step"], line["model"], line["layers"]) for line in found] == expected
    assert steps(path) == [2, 4, 6]
    assert set(found[0]["layers"]) == {"weight", "bias"}


def test_a_function_says_which_steps_are_measured(tmp_path: Path) -> None:
    asked: list[int] = []
    training, path = Training(every=lambda step: bool(asked.append(step)) or step in (1, 4)), tmp_path / "norms.jsonl"
    training.norms.write_to(file=path)
    training.take(5)
    assert (steps(path), asked) == ([1, 4], [1, 2, 3, 4, 5])


@pytest.mark.parametrize("cut_off", [False, True])
def test_a_resumed_training_goes_on_with_its_file(cut_off: bool, tmp_path: Path) -> None:
    path = tmp_path / "norms.jsonl"
    training = Training()
    training.norms.write_to(file=path)
    training.take(6)
    if cut_off:
        path.write_bytes(path.read_bytes()[:-30])
    before = lines(path)[:4] if not cut_off else [json.loads(line) for line in path.read_text().splitlines()[:4]]
    training = Training()
    training.norms.write_to(file=path, steps_done=4)
    assert lines(path) == before
    training.take(3)
    assert steps(path) == [1, 2, 3, 4, 5, 6, 7]
    assert lines(path)[:4] == before


def test_a_new_training_keeps_the_file_of_the_last(tmp_path: Path) -> None:
    path = tmp_path / "norms.jsonl"
    for count in (3, 2):
        training = Training()
        training.norms.write_to(file=path)
        training.take(count)
    assert (steps(path), steps(tmp_path / "norms.jsonl.old")) == ([1, 2], [1, 2, 3])


def test_numbers_that_are_not_finite_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "norms.jsonl"
    NormsFile(path).write(measured("layer", weight=math.nan, gradient=math.inf, update=-math.inf), 1)
    NormsFile(path, steps_done=1).write(measured("layer"), 2)  # which has read them
    layer = lines(path)[0]["layers"]["layer"]
    assert [layer[name] for name in ("weight", "gradient", "update", "ratio")] == ["NaN", "Infinity", "-Infinity", 1.0]
    assert [math.isnan(float(layer["weight"])), float(layer["gradient"])] == [True, math.inf]


@pytest.mark.parametrize(
    "damage", ["text\n", '{"step": 2, "layers": 3}\n', '{"step": "2", "layers": {}}\n', "\0\0\0\n"]
)
def test_other_files_are_not_continued(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "norms.jsonl"
    line = '{"step": 1, "clipped": null, "model": null, "layers": {}}\n'
    path.write_text(f"{line}{damage}{line}")
    with pytest.raises(ValueError, match="cannot be continued: its line 2 is no measured step"):
        Training().norms.write_to(file=path, steps_done=5)
    assert path.read_text() == f"{line}{damage}{line}"


# Places that take numbers by name -----------------------------------------------------------------------------------


def test_what_is_shown_can_be_chosen() -> None:
    step = measured("a.weight", "a.bias", "b.weight")
    of_model = {f"layer_norms/model/{number}": 1.0 for number in NUMBERS}
    shown = Scalars().of(step)
    assert len(shown) == 13 + 4 * 3
    assert {"layer_norms/ratio/a.bias", "layer_norms/update/b.weight"} < set(shown)
    assert Scalars(layers=()).of(step) == of_model
    some = Scalars(layers=("a.*", "b.weight"), numbers=("zero_updates",)).of(step)
    assert set(some) - set(of_model) == {f"layer_norms/zero_updates/{name}" for name in step}
    assert Scalars(layers="a.weight", numbers="ratio").of(step) == {**of_model, "layer_norms/ratio/a.weight": 1.0}
    with pytest.warns(UserWarning, match=r"no layer has a name like 'c\.\*'; there are a\.weight, a\.bias, b\.weight"):
        assert Scalars(layers="c.*").of(step) == of_model


def test_tensorboard(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "given")) as writer:
        for place in (tmp_path / "folder", writer):
            training = Training(every=2)
            training.norms.write_to(tensorboard=place, layers="weight", numbers=("ratio",), steps_done=10)
            training.take(4)
    for folder in ("folder", "given"):
        found = events.EventAccumulator(str(tmp_path / folder))
        found.Reload()
        assert len(found.Tags()["scalars"]) == 14
        shown = found.Scalars("layer_norms/ratio/weight")
        assert [event.step for event in shown] == [12, 14]
        assert shown[-1].value == pytest.approx(training.norms.latest()["weight"].ratio)


def test_weights_and_biases_have_the_step_beside_their_own() -> None:
    run, training = Run(), Training()
    training.norms.write_to(wandb=run, layers=())
    training.take(2)
    assert run.metrics == {"layer_norms/step": {}, "layer_norms/*": {"step_metric": "layer_norms/step"}}
    assert [values["layer_norms/step"] for values in run.logged] == [1, 2]
    assert len(run.logged[0]) == 14


def test_weights_and_biases_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    training = Training()
    with wandb.init(mode="offline", dir=str(tmp_path), project="test") as run:
        training.norms.write_to(wandb=run)
        training.take(2)
        assert run.summary["layer_norms/step"] == 2
        assert run.summary["layer_norms/ratio/bias"] == pytest.approx(training.norms.latest()["bias"].ratio)


def test_several_places_at_once_of_which_one_fails(tmp_path: Path) -> None:
    path, logged = tmp_path / "norms.jsonl", []

    def log(values: dict[str, float], step: int) -> None:
        logged.append(step)
        if step == 2:
            raise OSError("no space left")

    training = Training()
    training.norms.write_to(file=path, log=log)
    with pytest.warns(UserWarning, match="layer norms no longer go to log=.*OSError: no space left"):
        training.take(4)
    assert (logged, steps(path)) == ([1, 2], [1, 2, 3, 4])


def test_nothing_is_written_after_remove(tmp_path: Path) -> None:
    training, path = Training(), tmp_path / "norms.jsonl"
    training.norms.write_to(file=path)
    training.take(1)
    training.norms.remove()
    training.take(1)
    assert steps(path) == [1]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({}, ValueError, "nowhere to go: give file=, tensorboard=, wandb= or log="),
        ({"log": 3}, TypeError, "log takes a function of a dict of numbers and the step, and was given int"),
        ({"wandb": "run"}, TypeError, r"wandb takes a run, which wandb.init\(\) returns, and was given str"),
        ({"tensorboard": 3}, TypeError, "tensorboard takes a folder or a SummaryWriter, and was given int"),
        ({"file": "f", "steps_done": -1}, ValueError, "steps_done must be an integer of at least 0, got -1"),
        ({"file": "f", "steps_done": True}, ValueError, "steps_done must be an integer of at least 0, got True"),
        (
            {"file": "f", "numbers": ("ratios",)},
            ValueError,
            "numbers has 'ratios'; there are: weight, gradient, update",
        ),
        ({"file": "f", "layers": [3]}, TypeError, 'layers takes names or patterns such as "encoder.*", .* given 3'),
    ],
)
def test_refusals(
    options: dict[str, Any], error: type[Exception], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=said):
        Training().norms.write_to(**options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("every", [0, -1, True, 1.5, "2"])
def test_every_is_a_positive_integer_or_a_function(every: Any) -> None:
    with pytest.raises(ValueError, match="every must be an integer of at least 1"):
        Training(every)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Training().norms.write_to(file=tmp_path / "file" / "norms.jsonl")
    with pytest.raises(IsADirectoryError, match="it is a folder: give the name of a file"):
        Training().norms.write_to(file=tmp_path)


def test_several_norms_that_have_not_stepped_yet() -> None:
    trainings = [Training() for _ in range(3)]
    for training in trainings:
        training.take(1)
    assert [training.norms.latest().step for training in trainings] == [1, 1, 1]


def test_two_writers_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one, other = Training(), Training()
    one.norms.write_to(file="norms.jsonl")
    for training in (one, other):
        with pytest.raises(ValueError, match=r"norms\.jsonl' is already written to by another LayerNorms"):
            training.norms.write_to(file=tmp_path / "norms.jsonl")
    one.take(1)
    assert steps(tmp_path / "norms.jsonl") == [1]
    one.norms.remove()
    other.norms.write_to(file="norms.jsonl")
    del other, training
    Training().norms.write_to(file="norms.jsonl")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (
            {"layers": 3},
            TypeError,
            r'layers takes names or patterns such as "encoder\.\*", one or several, and was given 3',
        ),
        ({"numbers": 3}, TypeError, 'numbers takes names such as "ratio", one or several, and was given 3'),
        ({"numbers": [3]}, TypeError, "was given 3"),
        ({"file": 3}, TypeError, "file takes a path, and was given 3"),
    ],
)
def test_arguments_of_other_kinds(options: dict[str, Any], error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        Training().norms.write_to(**{"log": print, **options})


def test_tensorboard_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'needs TensorBoard: pip install "trustratio\[loggers\]"'):
        Training().norms.write_to(tensorboard=tmp_path)
