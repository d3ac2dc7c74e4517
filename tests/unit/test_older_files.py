"""What an earlier release wrote is read bit for bit, and training goes on from it bit for bit.

`older_files/` was written when every module lay directly in `optimizers/`, `integrations/` or `recipes/`:

    state_dicts.zip       `state_dict()` by torch.save, for every optimizer
    pickled.zip           whole optimizers by pickle.dumps
    consolidated.zip      `save_optimizer_state`
    weights.safetensors   the weights when those were written, and three steps later
    runs.zip              data of `prepare`, and with them a run of four steps on each wrapper

Gradients are given by whole numbers, so that no random generator has a part in them.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from trustratio.integrations.checkpoints import load_optimizer_state, save_optimizer_state
from trustratio.optimizers import LayerwiseOptimizer, create_optimizer
from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.training.export import export_checkpoint

FILES = Path(__file__).with_name("older_files")
RECIPES = Path(__file__).resolve().parents[2] / "recipes"

SHAPES = {
    **{"table.weight": (6, 3), "dense.weight": (4, 5), "half.weight": (3, 4), "double.weight": (2, 3)},
    "dense.bias": (4,),
}
DTYPES = {"half.weight": torch.bfloat16, "double.weight": torch.float64}
GROUPS = 8
"""Of samples, for the optimizers that take the gradient of each."""
SAVED_AFTER, CONTINUED = 3, 3
NEWER: dict[str, Any] = {
    **{"step": SAVED_AFTER, "maximize": False, "capturable": False, "differentiable": False},
    **{"foreach": None, "fused": None},
    **{"state_dtype": None, "master": None, "rounding_seed": 0},
}
"""Group keys that the files lack, as they are after reading them."""
CLIPPABLE = ("lamb", "lambc", "lans", "vradam", "vrlamb")
"""Optimizers whose groups lack `update_clip` in the files."""
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # optimizer, options, and options of the group of matrices
    **{name: (name, {}, {}) for name in ("lars", "lamb", "lambc", "lans", "novograd", "sngm", "tvlars", "mclr")},
    **{name: (name, {}, {}) for name in ("clars", "vrsgd", "vradam", "vrlars", "vrlamb")},
    "cowclip": ("cowclip", {}, {"cowclip": True}),
    "lamb in segments": ("lamb", {"max_grad_norm": 1.0}, {"segments": {"table.*": 3, "dense.weight": 2}}),
    "vrsgd with momentum": ("vrsgd", {"momentum": 0.9}, {}),
}
Layers = dict[str, torch.nn.Parameter]


def make(case: str) -> tuple[Layers, LayerwiseOptimizer]:
    """The case's layers, all zero, and its optimizer, with rates that a file has to put right."""
    name, options, of_matrices = CASES[case]
    layers = {n: torch.nn.Parameter(torch.zeros(s, dtype=DTYPES.get(n, torch.float32))) for n, s in SHAPES.items()}
    matrices = [(layer, parameter) for layer, parameter in layers.items() if parameter.dim() > 1]
    vectors = [(layer, parameter) for layer, parameter in layers.items() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.5, **of_matrices},
        {"params": vectors, "weight_decay": 0.5, "lr": 8.0},
    ]
    return layers, create_optimizer(name, groups, lr=9.0, implementation="eager", **options)


def go_on(layers: Layers, optimizer: LayerwiseOptimizer) -> None:
    """Take the steps that follow the saved ones."""
    for step in range(SAVED_AFTER, SAVED_AFTER + CONTINUED):
        optimizer.zero_grad()
        for group in range(GROUPS if optimizer.statistics is not None else 0):
            gradients = {layer: gradient(parameter, step, group) for layer, parameter in layers.items()}
            optimizer.statistics.add_group(gradients)  # type: ignore[union-attr]
        for layer, parameter in layers.items():
            parameter.grad = gradient(parameter, step)
            if optimizer.param_groups[0].get("cowclip") and parameter.dim() > 1:
                optimizer.count_ids(layer, torch.arange(9 + step).square() % len(parameter))  # type: ignore[attr-defined]
        optimizer.step()


def gradient(like: torch.Tensor, step: int, group: int | None = None) -> torch.Tensor:
    """The mean gradient of a step, or one group's; exact in bf16, so that the mean is that of the groups."""
    number = torch.arange(like.numel())
    values = ((number * 37 + step * 11 + like.numel()) % 64 - 31.5) / 64
    if group is not None:
        values = values + ((group * 5 + number * 3) % GROUPS - 3.5) / 8 * (number % 3)
    return values.view(like.shape).to(like.dtype)


def arithmetic() -> str:
    """A digest of what torch computes here; it depends on the processor."""
    digest = hashlib.sha256()
    for size in (*range(1, 40), 1024):
        x = (torch.arange(size) * 37 % 101 + 1) / 64
        double = x.double() / 3
        rows = (x.repeat(5).view(5, size) * torch.arange(1, 6).view(5, 1)) % 1.25
        results = [
            *(x.sqrt(), 1 / x, x.addcmul(x, x, value=0.1), x.exp(), x.log(), torch.nn.functional.gelu(x)),
            *(double.sqrt(), double.exp(), 0.9**double, torch.dot(double, double), x.sum(), x.sum(dtype=torch.float64)),
            *(rows @ rows.T, rows.T @ rows, rows.softmax(1), torch.nn.functional.layer_norm(rows, (size,))),
        ]
        for result in results:
            digest.update(result.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# Comparison ---------------------------------------------------------------------------------------------------------


@functools.cache
def same_arithmetic() -> bool:
    """Whether roots and sums come out here as where the files were written: steps are then equal, else only close."""
    with safe_open(FILES / "weights.safetensors", framework="pt") as file:
        return file.metadata()["arithmetic"] == arithmetic()


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    """By when, case and layer."""
    return load_file(FILES / "weights.safetensors")


def content(archive: str, name: str) -> bytes:
    with zipfile.ZipFile(FILES / archive) as file:
        return file.read(name)


def header(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, Any] = file.metadata()
    return {**metadata, "groups": json.loads(metadata["groups"])}


def saved_state(case: str) -> dict[str, Any]:
    return torch.load(io.BytesIO(content("state_dicts.zip", case)), weights_only=True)


def read_state(case: str) -> dict[str, Any]:
    """What is saved again after reading the file."""
    saved = saved_state(case)
    return {**saved, "param_groups": [in_todays_terms(case, group) for group in saved["param_groups"]]}


def in_todays_terms(case: str, group: dict[str, Any]) -> dict[str, Any]:
    if case == "lambc":
        _, clip = group["trust_bounds"]
        group = {"trust_clip": clip, **{key: value for key, value in group.items() if key != "trust_bounds"}}
    name, _, _ = CASES[case]
    return {**group, **NEWER, **({"update_clip": None} if name in CLIPPABLE else {})}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Types, keys in any order, dtypes, shapes and every bit."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), where
        assert bits(found) == bits(expected), where
    elif isinstance(expected, dict):
        assert set(found) == set(expected), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{where}[{index}]")
    else:
        assert found == expected, where


def assert_weights(layers: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], exact: bool) -> None:
    for layer, parameter in layers.items():
        if exact:
            assert_same(parameter.detach(), expected[layer], layer)
        else:
            torch.testing.assert_close(parameter.detach(), expected[layer])


def assert_read(case: str, layers: Layers, optimizer: LayerwiseOptimizer) -> None:
    """Weights and state are the saved ones, and lead to the same weights."""
    saved = {layer: weights()[f"saved/{case}/{layer}"] for layer in SHAPES}
    continued = {layer: weights()[f"continued/{case}/{layer}"] for layer in SHAPES}
    assert_weights(layers, saved, exact=True)
    assert_same(optimizer.state_dict(), read_state(case))
    go_on(layers, optimizer)
    assert_weights(layers, continued, exact=same_arithmetic())
    assert not any(torch.equal(saved[layer], continued[layer]) for layer in SHAPES)


# Optimizers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_state_dict(case: str) -> None:
    layers, optimizer = make(case)
    for layer, parameter in layers.items():
        parameter.data.copy_(weights()[f"saved/{case}/{layer}"])
    optimizer.load_state_dict(saved_state(case))
    assert_read(case, layers, optimizer)


@pytest.mark.parametrize("case", CASES)
def test_pickled_optimizer(case: str) -> None:
    optimizer = pickle.loads(content("pickled.zip", case))
    layers = {optimizer.parameter_name(p): p for group in optimizer.param_groups for p in group["params"]}
    assert list(layers) == list(SHAPES)
    assert optimizer.implementation == "eager"
    assert_read(case, layers, optimizer)


@pytest.mark.parametrize("case", CASES)
def test_consolidated_state(case: str, tmp_path: Path) -> None:
    older, newer = tmp_path / "older", tmp_path / "newer"
    older.write_bytes(content("consolidated.zip", case))
    layers, optimizer = make(case)
    assert load_optimizer_state(optimizer, older) == {"epoch": 2}
    save_optimizer_state(optimizer, newer, extra={"epoch": 2})
    # The earlier release reads it too: the same tensors, and no option that it knows has another value.
    assert_same(load_file(newer), load_file(older))
    new, old = header(newer), header(older)
    assert len(new.pop("digest")) == len(new.pop("content")) == 64
    for group in old["groups"]:
        group["options"] = in_todays_terms(case, group["options"])
    assert new == old
    assert_read(case, layers, optimizer)


# Runs of the recipe -------------------------------------------------------------------------------------------------

MIDDLE, END = "step-00000002", "step-00000004"
ON_CPU = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
# run: script, and what a launcher sets
RUNS: dict[str, tuple[str, dict[str, str]]] = {
    "data-parallel": ("bert_accelerate.py", ON_CPU),
    "zero-1": ("bert.py", {}),
    "trainer": ("bert_trainer.py", ON_CPU),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the runs were started in; their configurations name the data in it."""
    folder = tmp_path_factory.mktemp("older-runs")
    with zipfile.ZipFile(FILES / "runs.zip") as file:
        file.extractall(folder)
    return folder


def call(folder: Path, script: str, *arguments: str, status: int = 0, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, str(RECIPES / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        cwd=folder,
        # The files were written on one thread; sums of the model's products depend on that.
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRUSTRATIO_CACHE": str(folder / "cache"), **environment},
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by file and place."""

    def tensors(value: Any, where: str) -> dict[str, torch.Tensor]:
        if isinstance(value, torch.Tensor):
            return {where: value}
        inside = value if isinstance(value, dict) else dict(enumerate(value if isinstance(value, list | tuple) else ()))
        found = [tensors(inner, f"{where}/{key}") for key, inner in inside.items()]
        return {place: tensor for part in found for place, tensor in part.items()}

    found: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.suffix == ".safetensors":
            found |= tensors(load_file(path), path.name)
        elif path.suffix == ".pt" and path.name != "scheduler.pt":
            # DeepSpeed's files hold classes of its own.
            found |= tensors(torch.load(path, weights_only=False), path.name)
    return found


def computed(folder: Path) -> list[float]:
    """Losses, rates, norms and trust ratios of the second half of a run, and what it validated."""
    names = ("step", "loss", "lr", "gradient_norm", "trust_ratios", "validation_loss", "validation_accuracy")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [record for record in records if record["kind"] != "names" and record["step"] > 2]
    kept.sort(key=lambda record: (record["step"], record["kind"]))
    found = [record[name] for record in kept for name in names if name in record]
    return [number for value in found for number in (value if isinstance(value, list) else [value])]


@pytest.mark.parametrize(
    "run", ["zero-1", *(pytest.param(run, marks=pytest.mark.slow) for run in RUNS if run != "zero-1")]
)
def test_a_run_is_continued(run: str, runs: Path, tmp_path: Path) -> None:
    if run == "trainer" and np.lib.NumpyVersion(np.__version__) < "2.0.0":
        pytest.skip("the Trainer has kept the random state of NumPy 2, which 1 cannot read")
    script, environment = RUNS[run]
    call(runs, script, "--resume", f"{run}/checkpoints/{MIDDLE}", "--output", str(tmp_path / run), **environment)
    numbers = computed(runs / run)
    assert len(numbers) > 50
    assert computed(tmp_path / run) == (numbers if same_arithmetic() else pytest.approx(numbers, rel=1e-3))
    found, expected = (tensors_of(folder / run / "checkpoints" / END) for folder in (tmp_path, runs))
    assert set(found) >= set(expected)
    assert len(expected) > 2
    assert_weights({place: found[place] for place in expected}, expected, exact=same_arithmetic())


@pytest.mark.slow
def test_a_checkpoint_that_these_versions_cannot_read_is_named(runs: Path, tmp_path: Path) -> None:
    """As when the Trainer's random state is of a newer NumPy."""
    shutil.copytree(runs, tmp_path / "runs")
    (random_state,) = (tmp_path / "runs/trainer/checkpoints" / MIDDLE).rglob("rng_state.pth")
    torch.save({"python": Path("a")}, random_state)
    script, environment = RUNS["trainer"]
    line = ("--resume", f"trainer/checkpoints/{MIDDLE}", "--output", str(tmp_path / "out"))
    said = call(tmp_path / "runs", script, *line, status=2, **environment)
    assert f"{MIDDLE} holds more than tensors and DeepSpeed's own data (pathlib." in said
    assert "Traceback" not in said


@pytest.mark.parametrize("run", ["data-parallel", "zero-1"])
def test_a_checkpoint_is_exported(run: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    export_checkpoint(Path(run), tmp_path, Reporter(active=False))
    exported = load_file(tmp_path / "model.safetensors")
    tensors = tensors_of(runs / run / "checkpoints" / END)
    of_model = ("training_state.pt/model/", "mp_rank_00_model_states.pt/module/")
    trained = {place.split("/")[-1]: tensor for place, tensor in tensors.items() if place.startswith(of_model)}
    assert len(exported) > 20
    assert_weights(exported, trained, exact=True)


def test_a_report_is_made(runs: Path) -> None:
    call(runs, "report.py", "data-parallel")
    assert "BERT 1 × 4, lamb, 8 sequences per step" in (runs / "data-parallel" / "report.html").read_text()
    assert (runs / "data-parallel" / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["lamb", "lambc", "lans", "vradam", "vrlamb"])
def test_a_clip_that_a_file_is_too_old_to_know_stays(name: str) -> None:
    def make(**options: Any) -> torch.optim.Optimizer:
        return create_optimizer(name, [torch.nn.Parameter(torch.ones(3, 2))], lr=0.1, **options)

    older = make().state_dict()
    for group in older["param_groups"]:
        del group["update_clip"]
    for given in (0.5, None):
        optimizer = make(update_clip=given)
        optimizer.load_state_dict(older)
        assert optimizer.param_groups[0]["update_clip"] == given
    optimizer.load_state_dict(make(update_clip=2.0).state_dict())
    assert optimizer.param_groups[0]["update_clip"] == 2.0
