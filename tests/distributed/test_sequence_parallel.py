"""Sequence parallelism (Ulysses) and hpZ: ZeRO cuts over other ranks or keeps copies, and norms stay the layers'."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.sequence.layer import DistributedAttention

from .cases import Case, run_case
from .exactness import assert_exact
from .pool import CaseFailed, WorkerPool
from .recorded import Recorder, assert_trained_like, fresh_deepspeed_groups, make_optimizer
from .test_exactness import make_case

STEPS = 4
TOKENS = 6
"""Of one sample, on one rank."""


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention over (batch, sequence, heads, width)."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Transformer(torch.nn.Module):
    """Every rank has a part of the sequence; attention exchanges it for a part of the heads."""

    def __init__(self, group: dist.ProcessGroup):
        super().__init__()
        self.embedding = torch.nn.Embedding(23, 8)
        # Without a bias: softmax ignores that of the keys, whose gradient would be rounding alone.
        self.projection = torch.nn.Linear(8, 24, bias=False)
        self.attention = DistributedAttention(attention, group)
        self.head = torch.nn.Linear(8, 23)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        q, k, v = self.projection(x).view(*tokens.shape, 3, 4, 2).unbind(dim=2)
        x = x + self.attention(q.contiguous(), k.contiguous(), v.contiguous(), 0).flatten(2)
        return torch.nn.functional.cross_entropy(self.head(x).flatten(0, 1), tokens.flatten())


def train(name: str, stage: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    with fresh_deepspeed_groups():
        parallel_state_sp.initialize_sequence_parallel(2)
        try:
            torch.manual_seed(0)
            model = Transformer(parallel_state_sp.get_sequence_parallel_group())
            optimizer = make_optimizer(name, model)
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=parallel_state_sp)
            recorder = Recorder(engine.module, optimizer)
            generator = torch.Generator().manual_seed(100 + dist.get_rank())
            for _ in range(STEPS):
                engine.backward(engine(torch.randint(23, (1, TOKENS), generator=generator)))
                engine.step()
                recorder.end_step()
            result = recorder.result()
            recorder.counter.close()
            engine.destroy()
            return result
        finally:
            parallel_state_sp._release_sequence_parallel_groups()


@pytest.mark.parametrize("name", ["lamb", "sngm"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [4])
def test_ulysses(pool: WorkerPool, name: str, stage: int, world_size: int) -> None:
    """ZeRO cuts over all ranks. Gradients of the parts of a sample are added up, but in stage 3 of 0.19.8 averaged."""
    parts = 1 if stage == 3 else 2
    answers = pool.run(train, name, stage)
    gradients = [
        {n: torch.stack([parts * a["gradients"][step][n] for a in answers]) for n in answers[0]["initial"]}
        for step in range(STEPS)
    ]
    weights = [answer["weights"] for answer in answers]
    assert_trained_like(name, answers[0]["initial"], gradients, answers, weights)
    for answer in answers:
        assert answer["ranks"][-1] == ([list(range(4))] if stage else [])


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [0, 1])
def test_statistics_of_parts_of_samples_are_refused(pool: WorkerPool, stage: int, world_size: int) -> None:
    with pytest.raises(CaseFailed, match="of a part of each sample"):
        pool.run(train, "clars", stage)


def run_on_a_mesh(case: Case) -> dict[str, Any]:
    with fresh_deepspeed_groups():
        return run_case(case)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("world_size", [4])
def test_a_mesh_of_data_and_sequence_ranks(pool: WorkerPool, stage: int, world_size: int) -> None:
    """DeepSpeed's other way to form the groups: ZeRO cuts over the data-parallel dimension.

    It multiplies gradients by the sequence ranks in stages 1 and 2, which LAMB does not notice without eps.
    """
    config = {"data_parallel_size": 2, "sequence_parallel_size": 2}
    case = make_case("lamb", stage, spread=0.0, config=config, options={"eps": 0.0})
    answers = pool.run(run_on_a_mesh, case)
    assert_exact(case, answers)


def weights_of_adamw_on_a_mesh() -> torch.Tensor:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 1},
        "steps_per_print": 10**9,
        "data_parallel_size": 2,
        "sequence_parallel_size": 2,
    }
    with fresh_deepspeed_groups():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.AdamW(model.parameters())
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        torch.manual_seed(dist.get_rank())
        engine.backward(engine(torch.randn(3, 4)).sum())
        engine.step()
        weights = model.weight.detach().clone()
        engine.destroy()
        return weights


@pytest.mark.parametrize("world_size", [4])
def test_deepspeed_leaves_the_gradients_of_a_mesh_apart(pool: WorkerPool, world_size: int) -> None:
    """With any optimizer, DeepSpeed 0.19.8 adds up no gradients over a mesh's sequence ranks, whose weights drift."""
    one, other, *_ = pool.run(weights_of_adamw_on_a_mesh)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("world_size", [4])
def test_hpz(pool: WorkerPool, world_size: int) -> None:
    """A second copy of the 16-bit weights on each pair of ranks; the optimizer's partitions stay as they are."""
    case = make_case("lamb", 3, zero={"zero_hpz_partition_size": 2}, dtype="bf16", spread=0.0)
    assert_exact(case, pool.run(run_case, case))
