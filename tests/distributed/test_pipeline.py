"""DeepSpeed's pipeline stages: each is exact by itself, and nothing is reduced between them."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

from .pool import CaseFailed, WorkerPool
from .recorded import Recorder, assert_trained_like, fresh_deepspeed_groups, make_optimizer

STAGES = 2
STEPS = 4
MICRO_BATCHES = 3


class Embedding(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(23, 8))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(tokens, self.weight)


def head(embedding: Embedding, x: torch.Tensor) -> torch.Tensor:
    return x @ embedding.weight.T


def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def layers() -> list[Any]:
    return [
        TiedLayerSpec("embedding", Embedding),
        LayerSpec(torch.nn.Linear, 8, 11),
        LayerSpec(torch.nn.Tanh),
        LayerSpec(torch.nn.Linear, 11, 8),
        LayerSpec(torch.nn.LayerNorm, 8),
        TiedLayerSpec("embedding", Embedding, forward_fn=head),
    ]


def train(
    name: str, stage: int, config: dict[str, Any] | None = None, constructor: dict[str, Any] | None = None
) -> dict[str, Any]:
    full_config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
        **(config or {}),
    }
    with fresh_deepspeed_groups():
        torch.manual_seed(0)
        model = PipelineModule(layers(), num_stages=STAGES, loss_fn=loss, partition_method="uniform")
        optimizer = make_optimizer(name, model, **(constructor or {}))
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=full_config)
        recorder = Recorder(engine.module, optimizer)
        generator = torch.Generator().manual_seed(100 + engine.mpu.get_data_parallel_rank())
        for _ in range(STEPS):
            tokens = [torch.randint(23, (1, 7), generator=generator) for _ in range(MICRO_BATCHES)]
            engine.train_batch(iter([(t, t) for t in tokens]))
            recorder.end_step()
        result = {**recorder.result(), "stage": engine.mpu.get_pipe_parallel_rank()}
        recorder.counter.close()
        engine.destroy()
        return result


def assert_exact(name: str, answers: list[dict[str, Any]], **options: Any) -> None:
    """A tied layer's gradient is the sum over the stages that have it."""
    replicas = [answers[rank :: len(answers) // STAGES] for rank in range(len(answers) // STAGES)]
    initial = {n: w for answer in replicas[0] for n, w in answer["initial"].items()}
    gradients = []
    for step in range(STEPS):
        of_replicas = []
        for replica in replicas:
            found: dict[str, torch.Tensor] = {}
            for answer in replica:
                for n, g in answer["gradients"][step].items():
                    found[n] = found[n] + g if n in found else g
            of_replicas.append(found)
        gradients.append({n: torch.stack([g[n] for g in of_replicas]) for n in initial})
    assert_trained_like(name, initial, gradients, answers, [answer["weights"] for answer in answers], **options)
    tied = [n for n in answers[0]["weights"] if n in answers[-1]["weights"]]
    assert tied == ["tied_modules.embedding.weight"]


def assert_nothing_crosses_stages(answers: list[dict[str, Any]]) -> None:
    replicas = len(answers) // STAGES
    for rank, answer in enumerate(answers):
        own_stage = list(range(rank // replicas * replicas, (rank // replicas + 1) * replicas))
        assert all(ranks == own_stage for call in answer["ranks"] for ranks in call)
        assert set(answer["all_reduces"][-STEPS + 1 :]) == {1 if answer["sharded"] and replicas > 1 else 0}


@pytest.mark.parametrize("name", ["lamb", "lars"])
@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("world_size", [2, 4])
def test_each_stage_is_exact(pool: WorkerPool, name: str, stage: int, world_size: int) -> None:
    answers = pool.run(train, name, stage)
    assert_exact(name, answers)
    assert_nothing_crosses_stages([{**answer, "sharded": stage > 0} for answer in answers])


@pytest.mark.parametrize("world_size", [4])
def test_norm_of_all_stages(pool: WorkerPool, world_size: int) -> None:
    """Under ZeRO-1 DeepSpeed knows it, and counts tied layers once."""
    assert_exact("sngm", pool.run(train, "sngm", 1))
    assert_exact("sngm", pool.run(train, "sngm", 1, {"gradient_clipping": 0.3}), clipping=0.3)


@pytest.mark.parametrize("world_size", [2])
def test_norm_of_one_stage_is_refused(pool: WorkerPool, world_size: int) -> None:
    with pytest.raises(CaseFailed, match="needs the norm of the whole model's gradient"):
        pool.run(train, "sngm", 0)
    for config in ({}, {"bf16": {"enabled": True}}):
        with pytest.raises(CaseFailed, match="set gradient_clipping in the DeepSpeed config"):
            pool.run(train, "lamb", 0, config, constructor={"max_grad_norm": 1.0})


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [0, 1])
def test_statistics_in_stages_are_refused(pool: WorkerPool, stage: int, world_size: int) -> None:
    with pytest.raises(CaseFailed, match="a pipeline stage sees only its own layers"):
        pool.run(train, "clars", stage)
