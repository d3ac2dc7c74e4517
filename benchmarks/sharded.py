"""Whole training steps on several ranks: DeepSpeed ZeRO, and the other ways to shard a LAMB exactly.

All train the same BERT (4 layers x 256, vocabulary 8192) on random tokens. Timed is one update: all micro-batches of
the accumulation, and the optimizer's step.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.collectives import CollectiveCount
from benchmarks.contenders import timm_optimizer
from benchmarks.ranks import run_on_ranks
from benchmarks.timing import alternate

__all__ = ["measure_growth_with_ranks", "measure_rivals", "measure_statistics", "measure_zero"]

RANKS = 2
LR = 1e-4
ZERO = {
    "ZeRO-1": {"stage": 1},
    "ZeRO-2": {"stage": 2},
    "ZeRO-3": {"stage": 3},
    "ZeRO-2, CPU offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}


# Work ---------------------------------------------------------------------------------------------------------------


def small_bert() -> nn.Module:
    """A BERT for masked language modelling with 5.4 million parameters."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8192, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024
    )
    return BertForMaskedLM(config)


def random_tokens(sequences: int, length: int = 64) -> torch.Tensor:
    """Token ids, another set on every rank, shape (sequences, length)."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randint(8192, (sequences, length), generator=generator)


def engine_step(optimizer_class: Any, zero: dict[str, Any], accumulation: int, sequences: int) -> Callable[[], None]:
    """One update through `deepspeed.initialize` as a function."""
    import deepspeed

    model = small_bert()
    config = {
        "train_micro_batch_size_per_gpu": sequences,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    optimizer = optimizer_class(model.named_parameters(), lr=LR)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    tokens = random_tokens(sequences).to(engine.device)

    def update() -> None:
        for _ in range(accumulation):
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()

    update.engine = engine  # type: ignore[attr-defined]
    return update


def torch_step(model: nn.Module, optimizer: torch.optim.Optimizer, sequences: int = 4) -> Callable[[], None]:
    """One update in plain torch as a function; its `optimizer_step` is the step alone."""
    tokens = random_tokens(sequences)

    def update() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    update.optimizer_step = optimizer.step  # type: ignore[attr-defined]
    return update


# On all ranks -------------------------------------------------------------------------------------------------------


def _zero_rows(rounds: int) -> dict[str, Any]:
    from trustratio.optimizers import LAMB, LARS

    rows = {}
    for name, zero in ZERO.items():
        contenders = {
            "torch AdamW": engine_step(torch.optim.AdamW, zero, 1, 8),
            "trustratio LAMB": engine_step(LAMB, zero, 1, 8),
            "trustratio LARS": engine_step(LARS, zero, 1, 8),
        }
        rows[name] = _with_counts(contenders, "torch AdamW", rounds)
        for update in contenders.values():
            update.engine.destroy()  # type: ignore[attr-defined]
    return rows


def _statistics_rows(accumulation: int, sequences: int, rounds: int) -> dict[str, Any]:
    from trustratio.optimizers import LAMB, VRLAMB

    rows = {}
    for name in ("ZeRO-1", "ZeRO-2"):
        contenders = {
            "LAMB": engine_step(LAMB, ZERO[name], accumulation, sequences),
            "VRLAMB": engine_step(VRLAMB, ZERO[name], accumulation, sequences),
        }
        rows[name] = _with_counts(contenders, "LAMB", rounds)
        for update in contenders.values():
            update.engine.destroy()  # type: ignore[attr-defined]
    return rows


def _rival_rows(rounds: int) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    from trustratio.optimizers import LAMB

    timm_lamb = timm_optimizer("lamb", "Lamb")

    def sharded(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[], None]:
        model = small_bert()
        for layer in model.bert.encoder.layer:  # type: ignore[union-attr]
            fully_shard(layer)
        fully_shard(model)
        return torch_step(model, make(list(model.parameters())))

    def replicated(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[], None]:
        model = DistributedDataParallel(small_bert())
        return torch_step(model, make(list(model.parameters())))

    contenders = {
        "FSDP2 + torch AdamW": sharded(lambda p: torch.optim.AdamW(p, lr=LR, foreach=True)),
        "FSDP2 + trustratio LAMB": sharded(lambda p: LAMB(p, lr=LR)),
        "FSDP2 + timm Lamb": sharded(lambda p: timm_lamb(p, lr=LR, max_grad_norm=None)),
        "DDP + trustratio LAMB": replicated(lambda p: LAMB(p, lr=LR)),
        "ZeroRedundancyOptimizer + timm Lamb": replicated(
            lambda p: ZeroRedundancyOptimizer(p, optimizer_class=timm_lamb, lr=LR, max_grad_norm=None)
        ),
    }
    rows = _with_counts(contenders, "FSDP2 + torch AdamW", rounds)
    steps = {name: update.optimizer_step for name, update in contenders.items()}  # type: ignore[attr-defined]
    for name, timing in alternate(steps, "FSDP2 + torch AdamW", rounds).items():
        rows[name]["optimizer_step"] = timing.summary()
        with CollectiveCount() as count:
            steps[name]()
        rows[name]["optimizer_collectives"], rows[name]["optimizer_bytes"] = count.total, count.bytes
    return rows


def _with_counts(contenders: dict[str, Callable[[], None]], baseline: str, rounds: int) -> dict[str, Any]:
    """Times of whole updates, and the collectives of one more update."""
    rows: dict[str, Any] = {name: t.summary() for name, t in alternate(contenders, baseline, rounds).items()}
    for name, update in contenders.items():
        with CollectiveCount() as count:
            update()
        rows[name].update(collectives=count.total, bytes=count.bytes)
    return rows


def _vector_rows(layer_counts: list[int]) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    from trustratio.optimizers import LAMB

    rows = {}
    for layers in layer_counts:
        model = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(layers)])
        fully_shard(model)
        optimizer = LAMB(model.parameters(), lr=LR)
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        with CollectiveCount() as count:
            optimizer.step()
        rows[str(layers)] = {"collectives": count.total, "bytes": count.bytes}
    return rows


# From outside -------------------------------------------------------------------------------------------------------


def measure_zero(rounds: int) -> dict[str, Any]:
    """Whole updates on two ranks under every ZeRO stage: this package's LAMB and LARS against torch's AdamW."""
    return run_on_ranks(_zero_rows, RANKS, rounds, deepspeed=True)


def measure_statistics(rounds: int, accumulation: int = 8, sequences: int = 16) -> dict[str, Any]:
    """What gradient statistics cost: whole updates of VRLAMB over LAMB's, two ranks."""
    rows = run_on_ranks(_statistics_rows, RANKS, accumulation, sequences, rounds, deepspeed=True)
    return {"accumulation": accumulation, "sequences_per_micro_batch": sequences, "rows": rows}


def measure_rivals(rounds: int) -> dict[str, Any]:
    """Exact sharded LAMBs on two ranks: FSDP2 with this package's and timm's, and ZeroRedundancyOptimizer."""
    return run_on_ranks(_rival_rows, RANKS, rounds)


def measure_growth_with_ranks(rank_counts: list[int], layer_counts: list[int]) -> dict[str, Any]:
    """Collectives and bytes of one LAMB step under FSDP2, by ranks and by layers."""
    return {str(ranks): run_on_ranks(_vector_rows, ranks, layer_counts) for ranks in rank_counts}
