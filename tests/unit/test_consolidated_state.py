"""The consolidated optimizer state on one process: what it keeps, what it refuses, and writes that are interrupted."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trustratio.integrations.checkpoints import consolidated as consolidated_state
from trustratio.integrations.checkpoints.consolidated import (
    OptimizerStateError,
    load_optimizer_state,
    save_optimizer_state,
)
from trustratio.integrations.checkpoints.safetensors_file import ReplacedFile
from trustratio.optimizers import LAMB, OPTIMIZERS, LayerwiseOptimizer, create_optimizer

SHAPES = {"dense": (4, 6), "conv": (3, 2, 5), "bias": (4,), "scale": ()}


def make(
    name: str = "lamb", shapes: dict[str, tuple[int, ...]] | None = None, seed: int = 0, **options: Any
) -> tuple[dict[str, torch.nn.Parameter], LayerwiseOptimizer]:
    generator = torch.Generator().manual_seed(seed)
    layers = {k: torch.nn.Parameter(torch.randn(s, generator=generator)) for k, s in (shapes or SHAPES).items()}
    wide = {"params": [(k, p) for k, p in layers.items() if p.dim() > 1], "weight_decay": 0.1}
    narrow = {"params": [(k, p) for k, p in layers.items() if p.dim() < 2], "weight_decay": 0.0}
    groups = [group for group in (wide, narrow) if group["params"]]
    return layers, create_optimizer(name, groups, **{"lr": 0.1, **options})


def train(layers: dict[str, torch.nn.Parameter], optimizer: LayerwiseOptimizer, steps: int, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in layers.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


WITHOUT_STATISTICS = [name for name, entry in OPTIMIZERS.items() if entry.group_statistics is None]


# What is kept -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [8, 100, 1 << 20])
@pytest.mark.parametrize("name", WITHOUT_STATISTICS)
def test_training_goes_on_bit_for_bit(name: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consolidated_state, "BATCH_BYTES", batch)
    layers, optimizer = make(name)
    train(layers, optimizer, 3)
    optimizer.param_groups[1]["lr"] = 0.03
    save_optimizer_state(optimizer, tmp_path / "new" / "state", extra={"epoch": 2})
    fresh, loaded = make(name, seed=1, lr=9.0)
    assert load_optimizer_state(loaded, tmp_path / "new" / "state") == {"epoch": 2}
    for layer, parameter in layers.items():
        assert torch.equal(fresh[layer], parameter)
    for pair in ((layers, optimizer), (fresh, loaded)):
        train(*pair, 2, seed=8)
    for layer, parameter in layers.items():
        assert torch.equal(fresh[layer], parameter)
    assert [group["lr"] for group in loaded.param_groups] == [0.1, 0.03]
    for group, other in zip(optimizer.param_groups, loaded.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    layers, optimizer = make("novograd", {"dense": (4, 6), "bias": (4,)})
    layers["bias"].data[0] = -0.0
    layers["bias"].data[1] = float("nan")
    train({"dense": layers["dense"]}, optimizer, 2)
    save_optimizer_state(optimizer, tmp_path / "state")
    stored = load_file(tmp_path / "state")
    assert set(stored) == {
        f"{what}/{layer}" for what in ("weight", "exp_avg", "exp_avg_sq", "step") for layer in ("dense", "bias")
    }
    assert stored["weight/bias"].view(torch.int32).tolist() == layers["bias"].detach().view(torch.int32).tolist()
    assert stored["exp_avg_sq/dense"].shape == ()
    assert [stored["step/dense"].item(), stored["step/bias"].item()] == [2.0, 0.0]
    assert torch.equal(stored["exp_avg/bias"], torch.zeros(4))
    with safe_open(tmp_path / "state", framework="pt") as file:
        groups = json.loads(file.metadata()["groups"])
    assert [group["layers"] for group in groups] == [["dense"], ["bias"]]
    assert groups[0]["options"]["weight_decay"] == 0.1


def test_dtypes(tmp_path: Path) -> None:
    layers, optimizer = make()
    layers["dense"].data = layers["dense"].data.double()
    layers["bias"].data = layers["bias"].data.bfloat16()
    train(layers, optimizer, 1)
    save_optimizer_state(optimizer, tmp_path / "state")
    found = {key: value.dtype for key, value in load_file(tmp_path / "state").items()}
    assert [found[f"{what}/dense"] for what in ("weight", "exp_avg", "step")] == [
        torch.double,
        torch.double,
        torch.float,
    ]
    assert [found[f"{what}/bias"] for what in ("weight", "exp_avg")] == [torch.bfloat16, torch.float]
    assert found["exp_avg_sq/conv"] == torch.float


def test_weights_may_be_left_alone(tmp_path: Path) -> None:
    layers, optimizer = make()
    train(layers, optimizer, 1)
    save_optimizer_state(optimizer, tmp_path / "state")
    fresh, loaded = make(seed=1)
    before = fresh["dense"].detach().clone()
    load_optimizer_state(loaded, tmp_path / "state", weights=False)
    assert torch.equal(fresh["dense"], before)
    state = [of.state[p["dense"]]["exp_avg"] for of, p in ((optimizer, layers), (loaded, fresh))]
    assert torch.equal(*state)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_scheduler_goes_on(as_tensor: bool, tmp_path: Path) -> None:
    def start(lr: float) -> tuple[LayerwiseOptimizer, torch.optim.lr_scheduler.LRScheduler]:
        _, optimizer = make(lr=torch.tensor(lr) if as_tensor else lr)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)

    optimizer, scheduler = start(0.25)
    optimizer.step()
    scheduler.step()
    save_optimizer_state(optimizer, tmp_path / "state", extra=scheduler.state_dict())
    loaded, again = start(1.0)
    lr = loaded.param_groups[0]["lr"]
    again.load_state_dict(load_optimizer_state(loaded, tmp_path / "state"))
    if as_tensor:
        assert loaded.param_groups[0]["lr"] is lr
    assert float(loaded.param_groups[0]["initial_lr"]) == 0.25
    for _ in range(3):
        assert [float(group["lr"]) for group in loaded.param_groups] == [
            float(group["lr"]) for group in optimizer.param_groups
        ]
        for each in (optimizer, scheduler, loaded, again):
            each.step()


def test_names_come_from_the_model_if_it_is_given(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    optimizer = LAMB(model.parameters())
    save_optimizer_state(optimizer, tmp_path / "state", model=model)
    assert "exp_avg/1.bias" in load_file(tmp_path / "state")
    reordered = LAMB(list(model.parameters())[::-1])
    with pytest.raises(OptimizerStateError, match=r"lacks: 0.0; 0.1; 0.2; 0.3\n.*only the file has: 0.weight; .*"):
        load_optimizer_state(reordered, tmp_path / "state")
    load_optimizer_state(reordered, tmp_path / "state", model=model)


def test_frozen_and_non_contiguous_layers(tmp_path: Path) -> None:
    layers, optimizer = make()
    layers["conv"].data = layers["conv"].data.transpose(0, 2).contiguous().transpose(0, 2)
    layers["bias"].requires_grad_(False)
    save_optimizer_state(optimizer, tmp_path / "state")
    assert "weight/bias" not in load_file(tmp_path / "state")
    fresh, loaded = make(seed=1)
    fresh["conv"].data = fresh["conv"].data.transpose(0, 2).contiguous().transpose(0, 2)
    fresh["bias"].requires_grad_(False)
    load_optimizer_state(loaded, tmp_path / "state")
    assert torch.equal(fresh["conv"], layers["conv"])
    assert not fresh["conv"].is_contiguous()
    assert not torch.equal(fresh["bias"], layers["bias"])


# Refusals: before anything is changed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("lars", {}, "the file is of LAMB, the optimizer is LARS: make that optimizer"),
        ("lamb", {"shapes": {"dense": (4, 6), "bias": (4,)}}, "layers that only the file has: conv; scale"),
        ("lamb", {"shapes": {**SHAPES, "head": (2, 2)}}, "layers that the file lacks: head"),
        ("lamb", {"shapes": {**SHAPES, "conv": (3, 5, 2)}}, r"conv \(3, 2, 5\) in the file, \(3, 5, 2\) in the model"),
    ],
)
def test_another_model_or_optimizer_is_refused(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_optimizer_state(make()[1], tmp_path / "state")
    layers, optimizer = make(name, seed=3, **changes)
    before = {layer: parameter.detach().clone() for layer, parameter in layers.items()}
    options = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(OptimizerStateError, match=message):
        load_optimizer_state(optimizer, tmp_path / "state")
    assert all(torch.equal(parameter, before[layer]) for layer, parameter in layers.items())
    assert [dict(group) for group in optimizer.param_groups] == options
    assert not optimizer.state


def test_options_that_change_the_state_are_named(tmp_path: Path) -> None:
    save_optimizer_state(make("lars")[1], tmp_path / "state")
    with pytest.raises(OptimizerStateError, match=r"file keeps momentum_buffer, step.*momentum=0.9 \(here 0.0\)"):
        load_optimizer_state(make("lars", momentum=0.0)[1], tmp_path / "state")


def test_groups_that_the_file_keeps_apart_cannot_be_one(tmp_path: Path) -> None:
    layers, optimizer = make()
    save_optimizer_state(optimizer, tmp_path / "state")
    with pytest.raises(OptimizerStateError, match="group 0 here holds layers of groups with different weight_decay"):
        load_optimizer_state(LAMB(layers.items()), tmp_path / "state")
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.2
    save_optimizer_state(optimizer, tmp_path / "state")
    merged = LAMB(layers.items())
    load_optimizer_state(merged, tmp_path / "state")
    assert merged.param_groups[0]["weight_decay"] == 0.2


class Trap:
    def __reduce__(self) -> Any:
        return os._exit, (13,)


@pytest.mark.parametrize("content", ["nothing", "pickle", "truncated", "other", "incomplete", "version"])
def test_files_that_are_not_a_state_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "state"
    _, optimizer = make()
    save_optimizer_state(optimizer, path)
    stored = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    if content == "nothing":
        path.unlink()
    elif content == "pickle":
        path.write_bytes(pickle.dumps(Trap()))
    elif content == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif content == "other":
        save_file(stored, path)
    elif content == "incomplete":
        save_file({key: value for key, value in stored.items() if key != "exp_avg/conv"}, path, metadata)
    else:
        save_file(stored, path, {**metadata, "version": "99"})
    with pytest.raises(OptimizerStateError, match="cannot be read as an optimizer's state"):
        load_optimizer_state(optimizer, path)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    _, optimizer = make()
    optimizer.param_groups[1]["rule"] = object()
    with pytest.raises(OptimizerStateError, match="options of group 1 cannot be written as JSON"):
        save_optimizer_state(optimizer, tmp_path / "state")
    with pytest.raises(TypeError, match="a object is neither a number"):
        save_optimizer_state(make()[1], tmp_path / "state", extra=object())
    with pytest.raises(TypeError, match=r"expected an optimizer of trustratio.optimizers .* got SGD"):
        save_optimizer_state(torch.optim.SGD([torch.ones(1)]), tmp_path / "state")
    assert not list(tmp_path.iterdir())


def test_a_schedule_goes_on_by_its_milestones(tmp_path: Path) -> None:
    def start() -> tuple[LayerwiseOptimizer, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = make(lr=1.0)[1]
        return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])

    optimizer, scheduler = start()
    save_optimizer_state(optimizer, tmp_path / "state", extra={"scheduler": scheduler.state_dict()})
    loaded, again = start()
    again.load_state_dict(load_optimizer_state(loaded, tmp_path / "state")["scheduler"])
    loaded.step()
    again.step()
    assert loaded.param_groups[0]["lr"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "extra",
    [{1: {2.5: [{None: "a"}]}, "1": 2}, {"of rank": {0: {"x": True}, 1: {}}}, {"trustratio: key and value": 1}],
)
def test_dicts_come_back_with_their_keys(extra: dict, tmp_path: Path) -> None:
    _, optimizer = make()
    optimizer.param_groups[1]["rule"] = extra
    save_optimizer_state(optimizer, tmp_path / "state", extra=extra)
    _, loaded = make()
    assert load_optimizer_state(loaded, tmp_path / "state") == extra
    assert loaded.param_groups[1]["rule"] == extra
    with pytest.raises(TypeError, match=r"a dict has the key \(1, 2\), which is neither text nor a number"):
        save_optimizer_state(optimizer, tmp_path / "state", extra={(1, 2): 3})


# Interrupted writes -------------------------------------------------------------------------------------------------


def _die_while_writing(path: Path, at: str) -> None:
    calls = []
    original = getattr(ReplacedFile, at)

    def dying(self: ReplacedFile, *args: Any) -> None:
        calls.append(at)
        if at == "commit" or len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, *args)

    setattr(ReplacedFile, at, dying)
    consolidated_state.BATCH_BYTES = 8
    save_optimizer_state(make(seed=4)[1], path)


@pytest.mark.parametrize("at", ["write", "commit"])
def test_a_killed_write_leaves_the_previous_file(at: str, tmp_path: Path) -> None:
    path = tmp_path / "state"
    save_optimizer_state(make()[1], path)
    before = path.read_bytes()
    process = multiprocessing.get_context("fork").Process(target=_die_while_writing, args=(path, at))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert path.read_bytes() == before
    layers, optimizer = make(seed=2)
    load_optimizer_state(optimizer, path)
    assert torch.equal(layers["dense"], make()[0]["dense"])
    save_optimizer_state(optimizer, path)  # over the remains
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    _, optimizer = make()
    save_optimizer_state(optimizer, path)
    before = path.read_bytes()
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (10, len(before) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, allowed[1]))
        try:
            with pytest.raises(OptimizerStateError, match=r"could not write .*File too large"):
                save_optimizer_state(make(seed=2)[1], path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]
