"""The state of an optimizer in Megatron-core's DistributedOptimizer: the consolidated file, and Megatron's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from trustratio.integrations.checkpoints.consolidated import load_optimizer_state, save_optimizer_state

from .cases import Case, Model, initial_weights, make_optimizer, mean_gradients
from .exactness import assert_exact, worst_error
from .megatron_distributed_runs import CUT_MODEL, running
from .pool import CaseFailed, WorkerPool
from .test_exactness import make_case


def save(case: Case, tensor_parallel: int, path: str) -> dict[str, Any]:
    with running(case, tensor_parallel) as run:
        run.train(0, 3)
        save_optimizer_state(run.wrapper, path)
        run.train(3, case.steps)
        return run.result()


def load(case: Case, tensor_parallel: int, path: str, started: bool) -> dict[str, Any]:
    with running(case, tensor_parallel, perturbed=True) as run:
        if started:
            run.train(0, 1)
            run.ratios.clear()
        load_optimizer_state(run.wrapper, path)
        run.train(3, case.steps)
        return run.result()


def load_in_one_process(case: Case, path: str) -> None:
    model = Model(case)
    model.load({name: w + 1.0 for name, w in initial_weights(case).items()})
    optimizer: Any = make_optimizer(case, model)
    load_optimizer_state(optimizer, path)
    for gradients in mean_gradients(case)[3:]:
        model(gradients).backward()
        optimizer.step()
        optimizer.zero_grad()
    error, layer = worst_error(case, {name: leaf.weight.detach() for name, leaf in model.leaves.items()})
    assert error <= 2e-6, f"{layer}: {error:.2e}"


@pytest.mark.parametrize("name", ["lamb", "novograd"])
@pytest.mark.parametrize(("world_size", "tensor_parallel"), [(2, 1), (2, 2), (4, 2)])
def test_consolidated_state(pool: WorkerPool, name: str, world_size: int, tensor_parallel: int, tmp_path: Path) -> None:
    case, path = make_case(name, "ddp", CUT_MODEL), str(tmp_path / "state.safetensors")
    saved = pool.run(save, case, tensor_parallel, path)
    assert_exact(case, saved)
    for started in (False, True):
        continued = pool.run(load, case, tensor_parallel, path, started)
        for one, other in zip(saved, continued, strict=True):
            assert one["ratios"][3:] == other["ratios"]
            for layer, weights in one["weights"].items():
                assert torch.equal(weights, other["weights"][layer]), layer
    load_in_one_process(case, path)


def save_with_megatron(case: Case, path: str) -> None:
    with running(case) as run:
        run.train(0, 2)
        run.wrapper.state_dict()
        run.wrapper.save_parameter_state(path)
        with torch.no_grad():
            run.wrapper.load_parameter_state(path)


@pytest.mark.parametrize("world_size", [2])
def test_parameter_state_of_megatron_fails_aloud(pool: WorkerPool, world_size: int, tmp_path: Path) -> None:
    with pytest.raises(CaseFailed, match="KeyError: 'step'"):
        pool.run(save_with_megatron, make_case("lamb", "ddp"), str(tmp_path / "state.pt"))
    with pytest.raises(CaseFailed, match="KeyError: 'exp_avg'"):
        pool.run(save_with_megatron, make_case("lars", "ddp"), str(tmp_path / "state.pt"))


def load_with_megatron(case: Case) -> None:
    with running(case) as run:
        for number, group in enumerate(run.inner.param_groups):
            group.update(wd_mult=number, lr_mult=1.0, is_expert_parallel=False, is_decoupled_lr=False)
        # As where Transformer Engine is installed, whose Adam counts steps by group.
        with mock.patch("megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE", True):
            run.wrapper.load_state_dict(run.wrapper.state_dict())
        run.train(0, 1)


def step_with_the_state_of_adam(case: Case) -> None:
    with running(case) as run:
        for group in run.inner.param_groups:
            for tensor in group["params"]:
                run.inner.state[tensor] = {name: torch.empty_like(tensor) for name in ("exp_avg", "exp_avg_sq")}
        run.train(0, 1)


@pytest.mark.parametrize("world_size", [2])
def test_state_made_for_adam_is_refused(pool: WorkerPool, world_size: int) -> None:
    with pytest.raises(CaseFailed, match="lacks the state step"):
        pool.run(load_with_megatron, make_case("lamb", "ddp"))
    with pytest.raises(CaseFailed, match=r"the state of LAMB lacks step: .*load_optimizer_state"):
        pool.run(step_with_the_state_of_adam, make_case("lamb", "ddp"))
