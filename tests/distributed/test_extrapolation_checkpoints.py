"""Evaluations and checkpoints have the original weights, and a resumed run goes on bit for bit."""

from __future__ import annotations

import io
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from trustratio.integrations.layer_norms import LayerNorms

from .cases import Case
from .extrapolation_runs import Plan, Training, result, same, targets, training
from .norms_runs import Wrapped
from .pool import CaseFailed, WorkerPool
from .test_extrapolation import SHARDINGS
from .test_layer_norms import make_case

SAVED = 2


def stray_forward(run: Training) -> None:
    """A forward in training mode with which no step follows, so that weights are away."""
    world, rank = (1, 0) if run.case.stage == "dense" else (dist.get_world_size(), dist.get_rank())
    run.run.model({name: t[rank] for name, t in targets(run.case, 0, world).items()})
    assert run.extrapolation.is_moved


def save(run: Training, folder: str) -> dict[str, Any]:
    answer = io.BytesIO()
    torch.save(run.extrapolation.state_dict(), answer)
    if run.engine is not None:
        run.engine.save_checkpoint(folder, tag="middle")
        return {"extrapolation": answer.getvalue()}
    model, optimizer = get_state_dict(run.run.model, run.run.optimizer)
    return {"extrapolation": answer.getvalue(), "model": deepcopy(model), "optimizer": deepcopy(optimizer)}


def load(run: Training, folder: str, saved: dict[str, Any]) -> None:
    if run.engine is not None:
        path, _ = run.engine.load_checkpoint(folder, tag="middle")
        assert path is not None
    else:
        set_state_dict(
            run.run.model,
            run.run.optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
        )
    run.extrapolation.load_state_dict(torch.load(io.BytesIO(saved["extrapolation"]), weights_only=True))


def resume(case: Case, wrapped: Wrapped, plan: Plan, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train without a break, and with one: weights are away when the checkpoint is written."""
    with training(case, wrapped, plan) as run:
        run.train(0, case.steps)
        straight = result(run)
    with training(case, wrapped, plan) as run:
        run.train(0, SAVED)
        if plan.contexts == "attached":
            stray_forward(run)
        saved = save(run, folder)
        assert not run.extrapolation.is_moved
    with training(replace(case, seed=case.seed + 7), wrapped, plan) as run:
        load(run, folder, saved)
        run.case = case
        run.train(SAVED, case.steps)
        return straight, result(run)


@pytest.mark.parametrize(
    ("sharding", "direction"),
    [
        *((sharding, "gradient") for sharding in ("dense", "ddp", "ZeRO-1", "ZeRO-2", "ZeRO-3", "fsdp2")),
        *((sharding, "noise") for sharding in ("ddp", "ZeRO-3", "fsdp2")),
        *((sharding, "own_gradient") for sharding in ("ddp", "ZeRO-1")),
    ],
)
@pytest.mark.parametrize("contexts", ["each", "attached"])
@pytest.mark.parametrize("world_size", [2])
def test_a_resumed_run_goes_on_bit_for_bit(
    pool: WorkerPool, sharding: str, direction: str, contexts: str, world_size: int, tmp_path: Any
) -> None:
    wrapped, stage, changes = SHARDINGS[sharding]
    case = make_case("lamb", stage, **{"steps": 4, **changes})
    for straight, resumed in pool.run(resume, case, wrapped, Plan(direction, contexts=contexts), str(tmp_path)):
        assert same(straight["weights"], resumed["weights"])
        assert same(straight["moved"], resumed["moved"])


def evaluate(case: Case, wrapped: Wrapped, plan: Plan, how: str) -> bool:
    """Whether what is looked at while weights are away is the same as before."""
    with training(case, wrapped, plan) as run:
        run.train(0, 2)
        before = run.weights()
        stray_forward(run)
        model = run.run.model
        if how == "eval":
            model.eval()
            with torch.no_grad():
                model({})
        elif how == "no_grad":
            with torch.no_grad():
                model({})
        elif how == "state_dict":
            (model.module if hasattr(model, "module") else model).state_dict()
        else:
            with run.extrapolation.original():
                return same(before, run.weights())
        assert not run.extrapolation.is_moved
        return same(before, run.weights())


@pytest.mark.parametrize("how", ["eval", "no_grad", "state_dict", "original"])
@pytest.mark.parametrize("sharding", ["ddp", "ZeRO-1", "ZeRO-2", "ZeRO-3", "fsdp1", "fsdp2"])
@pytest.mark.parametrize("world_size", [2])
def test_who_looks_at_an_attached_model_sees_the_original_weights(
    pool: WorkerPool, sharding: str, how: str, world_size: int
) -> None:
    wrapped, stage, changes = SHARDINGS[sharding]
    assert all(pool.run(evaluate, make_case("lamb", stage, **changes), wrapped, Plan(contexts="attached"), how))


def load_of_another_rank(case: Case, wrapped: Wrapped) -> None:
    with training(case, wrapped, Plan()) as run:
        run.train(0, 2)
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, run.extrapolation.state_dict())
        run.extrapolation.load_state_dict(states[0])


@pytest.mark.parametrize("world_size", [2])
def test_the_state_of_another_rank_is_refused(pool: WorkerPool, world_size: int) -> None:
    with pytest.raises(CaseFailed, match="is of rank 0 of 2, and this is rank 1 of 2: each rank saves its own"):
        pool.run(load_of_another_rank, make_case("lamb", 2), Wrapped())
    pool.run(load_of_another_rank, make_case("lamb", "ddp"), Wrapped())


def measure_norms(case: Case, plan: Plan | None) -> list[float]:
    """The norm of one layer's weights before each step, in LayerNorms that was made first."""
    plan = plan or Plan(step_size=0.0)
    with training(case, Wrapped(), replace(plan, step_size=0.0)) as run:
        norms = LayerNorms(run.run.optimizer, run.run.model)
        run.extrapolation.remove()
        again = Training(case, Wrapped(), plan, run.run)
        found = []
        for step in range(case.steps):
            again.train(step, step + 1)
            found.append(norms.latest()["leaves.dense.weight"].weight)
        return found


@pytest.mark.parametrize("stage", ["ddp", 2])
@pytest.mark.parametrize("world_size", [2])
def test_what_is_measured_at_a_step_is_of_the_original_weights(
    pool: WorkerPool, stage: str | int, world_size: int
) -> None:
    """The first step's gradients are those of the original weights; so are the second step's weights."""
    case = make_case("torch.AdamW", stage)
    plan = Plan(contexts="attached")
    assert pool.run(measure_norms, case, plan)[0][:2] == pool.run(measure_norms, case, None)[0][:2]
