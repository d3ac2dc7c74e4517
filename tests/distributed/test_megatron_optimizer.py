"""What `megatron_optimizer` makes: wrappers for groups that Megatron forms itself, and for experts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from trustratio.integrations.megatron.distributed_optimizer import megatron_optimizer
from trustratio.optimizers import LAMB, create_optimizer

from .cases import LayerSpec, Model, group_gradients, initial_weights, mean_gradients
from .exactness import MODEL, assert_exact
from .megatron_distributed_runs import data_parallel
from .megatron_on_cpu import without_cuda
from .pool import CaseFailed, WorkerPool
from .test_exactness import make_case
from .test_megatron import megatron


def train_experts(name: str) -> list[dict[str, float]]:
    """One expert per rank, beside layers that both have; returns ratios of the wrappers' and of plain optimizers."""
    from megatron.core import parallel_state
    from megatron.core.optimizer import OptimizerConfig

    case = make_case(name, "ddp", (LayerSpec("router", (37, 11)), LayerSpec("expert", (8, 16))))
    make = partial(create_optimizer, name)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    try:
        with without_cuda():
            rank = dist.get_rank()
            wrapped, plain = Model(case), Model(case)
            for model in (wrapped, plain):
                model.load(initial_weights(case))
                model.leaves["expert"].weight.data.mul_(1.0 + rank)
                model.leaves["expert"].weight.allreduce = False  # type: ignore[attr-defined]
            ddp = data_parallel(wrapped)
            config = OptimizerConfig(lr=0.1, weight_decay=0.1, clip_grad=0.0, use_distributed_optimizer=True)
            optimizer = megatron_optimizer(make, config, [ddp])
            reference: Any = make(plain.named_parameters(), lr=0.1, weight_decay=0.1)
            for step, means in enumerate(mean_gradients(case)):
                ddp.zero_grad_buffer()
                optimizer.zero_grad()
                own = {n: g[rank] for n, g in group_gradients(case, step, means, 2).items()}
                ddp(own).backward()
                ddp.finish_grad_sync()
                optimizer.step()
                # Megatron divides by the number of all data-parallel ranks, of which one has samples for the expert.
                plain({"router": means["router"], "expert": own["expert"] / 2}).backward()
                reference.step()
                reference.zero_grad()
            for name_, leaf in wrapped.leaves.items():
                torch.testing.assert_close(leaf.weight, plain.leaves[name_].weight, rtol=1e-5, atol=1e-6)
            ratios: dict[str, float] = {}
            for wrapper in optimizer.chained_optimizers:
                ratios |= wrapper.optimizer.trust_ratios()
            return [ratios, reference.trust_ratios()]
    finally:
        parallel_state.destroy_model_parallel()


@pytest.mark.parametrize("world_size", [2])
def test_experts(pool: WorkerPool, world_size: int) -> None:
    answers = pool.run(train_experts, "lamb")
    for found, wanted in answers:
        assert found == pytest.approx(wanted, rel=1e-6)
    assert answers[0][0]["leaves.expert.weight"] != answers[1][0]["leaves.expert.weight"]
    with pytest.raises(CaseFailed, match="pipeline stages and experts"):
        pool.run(train_experts, "sngm")


def train_as_a_user(name: str) -> dict[str, Any]:
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    case = make_case(name, "ddp", tuple(replace(layer, group=int(len(layer.shape) == 1)) for layer in MODEL))
    options = case.groups[0]
    with megatron(1) as state, without_cuda():
        model = Model(case)
        model.load(initial_weights(case))
        ddp = data_parallel(model)
        config = OptimizerConfig(
            lr=options["lr"], weight_decay=0.0, clip_grad=0.0, use_distributed_optimizer=True, min_lr=options["lr"]
        )
        others = {key: value for key, value in options.items() if key not in ("lr", "weight_decay")}
        optimizer = megatron_optimizer(partial(create_optimizer, name, **others), config, [ddp])
        wd = options["weight_decay"]
        OptimizerParamScheduler(
            optimizer, init_lr=0.0, max_lr=options["lr"], min_lr=options["lr"], lr_warmup_steps=0, lr_decay_steps=9,
            lr_decay_style="constant", start_wd=wd, end_wd=wd, wd_incr_steps=9, wd_incr_style="constant",
        )  # fmt: skip
        [wrapper] = optimizer.chained_optimizers
        ratios = []
        for step, means in enumerate(mean_gradients(case)):
            ddp.zero_grad_buffer()
            optimizer.zero_grad()
            of_groups = group_gradients(case, step, means, 2)
            ddp({n: g[state.get_data_parallel_rank()] for n, g in of_groups.items()}).backward()
            ddp.finish_grad_sync()
            optimizer.step()
            ratios.append(wrapper.optimizer.trust_ratios())
        names = {name.removeprefix("leaves.").removesuffix(".weight"): r for name, r in ratios[-1].items()}
        assert set(names) == {layer.name for layer in MODEL}
        return {
            "weights": {n: leaf.weight.detach() for n, leaf in model.leaves.items()},
            "ratios": [
                {n.removeprefix("leaves.").removesuffix(".weight"): r for n, r in of_step.items()} for of_step in ratios
            ],
        }


@pytest.mark.parametrize("name", ["lamb", "lars"])
@pytest.mark.parametrize("world_size", [2])
def test_made_by_get_megatron_optimizer(pool: WorkerPool, name: str, world_size: int) -> None:
    """Groups, decay and names are Megatron's: no decay for parameters of one dimension."""
    answers = pool.run(train_as_a_user, name)
    case = make_case(name, "ddp", tuple(replace(layer, group=int(len(layer.shape) == 1)) for layer in MODEL))
    assert_exact(case, answers)


def test_options_that_need_megatrons_own_adam() -> None:
    from megatron.core.optimizer import OptimizerConfig

    with pytest.raises(ValueError, match="optimizer_cpu_offload must be False"):
        megatron_optimizer(LAMB, OptimizerConfig(lr=1.0, optimizer_cpu_offload=True), [])
