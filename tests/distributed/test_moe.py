"""DeepSpeed's mixture-of-experts layer: an expert is added up over the ranks that have it, and over no others."""

from __future__ import annotations

import re
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

from trustratio.optimizers import OPTIMIZERS, create_optimizer

from .pool import CaseFailed, WorkerPool
from .recorded import Recorder, assert_trained_like, fresh_deepspeed_groups, options_of

EXPERTS = 4
STEPS = 4
OF_EXPERT = re.compile(r"(.*deepspeed_experts\.)(\d+)(\..*)")
STATISTICS = [name for name, entry in OPTIMIZERS.items() if entry.group_statistics is not None]


class Sparse(torch.nn.Module):
    def __init__(self, expert_parallel: int):
        super().__init__()
        self.embedding = torch.nn.Embedding(23, 8)
        expert = torch.nn.Sequential(torch.nn.Linear(8, 11), torch.nn.Tanh(), torch.nn.Linear(11, 8))
        self.moe = MoE(8, expert, EXPERTS, expert_parallel, min_capacity=0, drop_tokens=False, use_rts=False)
        # Experts start as copies of one; a rank's own must differ from its neighbours'.
        for parameter in self.moe.deepspeed_moe.experts.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        self.head = torch.nn.Linear(8, 23)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        routed, auxiliary, _ = self.moe(x)
        logits = self.head(x + routed)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()) + 0.01 * auxiliary


def train(
    name: str, stage: int, expert_parallel: int, config: dict[str, Any] | None = None, **constructor: Any
) -> dict[str, Any]:
    with fresh_deepspeed_groups():
        torch.manual_seed(dist.get_rank())
        model = Sparse(expert_parallel)
        groups = split_params_into_different_moe_groups_for_optimizer(
            {"params": list(model.parameters()), "name": "dense", **options_of(name)}
        )
        optimizer = create_optimizer(name, groups, **options_of(name), **constructor)
        full_config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage},
            "steps_per_print": 10**9,
            **(config or {}),
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=full_config)
        recorder = Recorder(engine.module, optimizer)
        generator = torch.Generator().manual_seed(100 + dist.get_rank())
        for step in range(STEPS):
            for _ in range(2):
                # Few tokens, so that some experts get none in some steps.
                tokens = torch.randint(23, (1, 2 if step == 1 else 9), generator=generator)
                engine.backward(engine(tokens))
                engine.step()
            recorder.end_step()
        result = recorder.result()
        recorder.counter.close()
        engine.destroy()
        return result


def global_name(name: str, rank: int, expert_parallel: int) -> str:
    match = OF_EXPERT.fullmatch(name)
    if match is None:
        return name
    first = rank % expert_parallel * (EXPERTS // expert_parallel)
    return f"{match[1]}{first + int(match[2])}{match[3]}"


def assert_exact(name: str, answers: list[dict[str, Any]], expert_parallel: int, clipping: float | None = None) -> None:
    """An expert's gradient is what all ranks that have it saw, divided by the number of all ranks.

    A rank's micro-batch reaches each expert once, on whichever rank that is.
    """

    def renamed(tensors: dict[str, Any], rank: int) -> dict[str, Any]:
        return {global_name(n, rank, expert_parallel): value for n, value in tensors.items()}

    ranks = range(len(answers))
    initial: dict[str, torch.Tensor] = {}
    for rank in ranks:
        initial.update(renamed(answers[rank]["initial"], rank))
    gradients = []
    for step in range(STEPS):
        seen = [renamed(answers[rank]["gradients"][step], rank) for rank in ranks]
        gradients.append(
            {
                n: sum(g[n] for g in seen if n in g).unsqueeze(0) / len(ranks)
                for n in initial
                if any(n in g for g in seen)
            }
        )
    weights = [renamed(answers[rank]["weights"], rank) for rank in ranks]
    assert_trained_like(name, initial, gradients, answers, weights, clipping)
    for rank in ranks:
        assert set(answers[rank]["ratios"][-1]) == set(weights[rank])


@pytest.mark.parametrize(("world_size", "expert_parallel"), [(2, 1), (2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_experts(pool: WorkerPool, stage: int, expert_parallel: int, world_size: int) -> None:
    for name in ("lamb", "lars") if stage == 1 else ("lamb",):
        answers = pool.run(train, name, stage, expert_parallel)
        assert_exact(name, answers, expert_parallel)
        have_it = world_size // expert_parallel
        for rank, answer in enumerate(answers):
            if stage == 0:
                assert set(answer["collectives"][1:]) == {0}  # in the first step, ranks compare what they have done
                continue
            # Two groups of parameters per step, each in a call of its own.
            everyone, owners = answer["ranks"][-2:]
            assert everyone == [list(range(world_size))]
            assert owners == ([list(range(rank % expert_parallel, world_size, expert_parallel))] if have_it > 1 else [])


@pytest.mark.parametrize("world_size", [4])
def test_bf16_optimizer_with_experts(pool: WorkerPool, world_size: int) -> None:
    """One call for all groups: still one all-reduce per process group."""
    config = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    answers = pool.run(train, "lamb", 1, 2, config)
    for rank, answer in enumerate(answers):
        assert answer["ranks"][-1] == [list(range(4)), [rank % 2, rank % 2 + 2]]
        assert len(answer["ratios"][-1]) == 4 + 4 * EXPERTS // 2


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("world_size", [2])
def test_statistics_of_mixed_samples_are_refused(pool: WorkerPool, name: str, world_size: int) -> None:
    with pytest.raises(CaseFailed, match="made of the samples of several"):
        pool.run(train, name, 1, 2)


@pytest.mark.parametrize("world_size", [2])
def test_the_norm_of_a_model_with_experts_is_refused(pool: WorkerPool, world_size: int) -> None:
    for stage in (0, 1):
        with pytest.raises(CaseFailed, match="needs the norm of the whole model's gradient"):
            pool.run(train, "sngm", stage, 2)
    for config in ({}, {"bf16": {"enabled": True}}):
        with pytest.raises(CaseFailed, match="set gradient_clipping in the DeepSpeed config"):
            pool.run(train, "lamb", 0, 2, config, max_grad_norm=1.0)


@pytest.mark.parametrize("world_size", [2])
def test_deepspeed_refuses_experts_under_zero_3(pool: WorkerPool, world_size: int) -> None:
    with pytest.raises(CaseFailed, match="Native DeepSpeed MoE is not supported with ZeRO Stage 3"):
        pool.run(train, "lamb", 3, 1)
