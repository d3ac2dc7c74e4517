"""Training steps on several ranks: DeepSpeed ZeRO, and the other ways to shard a LAMB exactly.

All train the same BERT on random tokens. An update is all micro-batches of the accumulation and the optimizer's step;
the step is also timed alone, since beside the gradients it hardly shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.contenders import ADAM_DECAY, LARS_DECAY, timm_optimizer
from benchmarks.ranks import run_on_ranks
from benchmarks.timing import alternate
from trustratio.integrations.audits.collectives import CollectiveCount

__all__ = [
    "BERT",
    "TINY_BERT",
    "ZERO",
    "measure_growth_with_ranks",
    "measure_rivals",
    "measure_statistics",
    "measure_zero",
]

RANKS = 2
LR = 1e-4
SEQUENCES = 4  # per rank and micro-batch, of 64 tokens
# 5.4 million parameters, and as few as a smoke run wants.
BERT = {"vocab_size": 8192, "hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 1024}
TINY_BERT = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 64}
Size = Mapping[str, Any]
ZERO: dict[str, dict[str, Any]] = {
    "ZeRO-1": {"stage": 1},
    "ZeRO-2": {"stage": 2},
    "ZeRO-3": {"stage": 3},
    "ZeRO-2, CPU offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}


# Work ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Update:
    """One training update as two functions; called, it runs both."""

    gradients: Callable[[], None]
    step: Callable[[], object]
    close: Callable[[], object] = lambda: None

    def __call__(self) -> None:
        self.gradients()
        self.step()


def bert(size: Size) -> nn.Module:
    """A BERT for masked language modelling."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(num_attention_heads=4, **size))


def random_tokens(model: Any, sequences: int, length: int = 64) -> torch.Tensor:
    """Token ids, another set on every rank, shape (sequences, length)."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randint(model.config.vocab_size, (sequences, length), generator=generator)


def engine_update(
    make: Callable[[Any], torch.optim.Optimizer], zero: dict[str, Any], size: Size, accumulation: int, sequences: int
) -> Update:
    """An update through `deepspeed.initialize`."""
    import deepspeed

    model = bert(size)
    config = {
        "train_micro_batch_size_per_gpu": sequences,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    tokens = random_tokens(model, sequences)
    engine, *_ = deepspeed.initialize(model=model, optimizer=make(model.named_parameters()), config=config)
    tokens = tokens.to(engine.device)

    def gradients() -> None:
        for number in range(accumulation):
            if number:
                engine.step()  # the one before was no boundary: it only counts
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)

    return Update(gradients, engine.step, engine.destroy)


def torch_update(model: nn.Module, tokens: torch.Tensor, optimizer: torch.optim.Optimizer) -> Update:
    """An update in plain torch."""

    def gradients() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()

    return Update(gradients, optimizer.step)


# On all ranks -------------------------------------------------------------------------------------------------------


def _zero_rows(rounds: int, size: Size, shardings: Sequence[str]) -> dict[str, Any]:
    from trustratio.optimizers import LAMB, LARS

    # Fused: the fastest that torch has on a flat shard.
    makers = {
        "torch AdamW fused": lambda p: torch.optim.AdamW(p, LR, weight_decay=ADAM_DECAY, fused=True),
        "trustratio LAMB": lambda p: LAMB(p, LR, weight_decay=ADAM_DECAY),
        "trustratio LARS": lambda p: LARS(p, LR, weight_decay=LARS_DECAY),
    }
    rows = {}
    for name in shardings:
        updates = {optimizer: engine_update(make, ZERO[name], size, 1, SEQUENCES) for optimizer, make in makers.items()}
        rows[name] = _update_rows(updates, "torch AdamW fused", rounds)
        _add_step_rows(rows[name], updates, "torch AdamW fused", rounds)
        _close(updates)
    return rows


def _statistics_rows(accumulation: int, sequences: int, rounds: int, size: Size) -> dict[str, Any]:
    from trustratio.optimizers import LAMB, VRLAMB

    makers = {
        "LAMB": lambda p: LAMB(p, LR, weight_decay=ADAM_DECAY),
        "VRLAMB": lambda p: VRLAMB(p, LR, weight_decay=ADAM_DECAY),
    }
    rows = {}
    for name in ("ZeRO-1", "ZeRO-2"):
        updates = {
            optimizer: engine_update(make, ZERO[name], size, accumulation, sequences)
            for optimizer, make in makers.items()
        }
        rows[name] = _update_rows(updates, "LAMB", rounds, warmup=1)
        _close(updates)
    return rows


def _rival_rows(rounds: int, size: Size) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    from trustratio.optimizers import LAMB

    lamb = timm_optimizer("lamb", "Lamb")
    timm_options: dict[str, Any] = {"lr": LR, "weight_decay": ADAM_DECAY, "max_grad_norm": None}

    def sharded(make: Callable[[Any], torch.optim.Optimizer]) -> Update:
        model = bert(size)
        for layer in model.bert.encoder.layer:  # type: ignore[union-attr]
            fully_shard(layer)
        fully_shard(model)
        return torch_update(model, random_tokens(model, SEQUENCES), make(list(model.parameters())))

    def replicated(make: Callable[[Any], torch.optim.Optimizer]) -> Update:
        model = bert(size)
        parallel = DistributedDataParallel(model)
        return torch_update(parallel, random_tokens(model, SEQUENCES), make(list(parallel.parameters())))

    updates = {
        "FSDP2 + torch AdamW": sharded(lambda p: torch.optim.AdamW(p, LR, weight_decay=ADAM_DECAY, foreach=True)),
        "FSDP2 + trustratio LAMB": sharded(lambda p: LAMB(p, LR, weight_decay=ADAM_DECAY)),
        "FSDP2 + timm Lamb": sharded(lambda p: lamb(p, **timm_options)),
        "DDP + trustratio LAMB": replicated(lambda p: LAMB(p, LR, weight_decay=ADAM_DECAY)),
        "ZeroRedundancyOptimizer + timm Lamb": replicated(
            lambda p: ZeroRedundancyOptimizer(p, optimizer_class=lamb, **timm_options)
        ),
    }
    rows = _update_rows(updates, "FSDP2 + torch AdamW", rounds)
    _add_step_rows(rows, updates, "FSDP2 + torch AdamW", rounds)
    return rows


def _update_rows(updates: dict[str, Update], baseline: str, rounds: int, warmup: int = 2) -> dict[str, Any]:
    """Times of whole updates, and the collectives of one more update."""
    timings = alternate(updates, baseline, rounds, warmup)
    rows: dict[str, Any] = {name: timing.summary() for name, timing in timings.items()}
    for name, update in updates.items():
        with CollectiveCount() as count:
            update()
        rows[name].update(collectives=count.total, bytes=count.bytes)
    return rows


def _add_step_rows(rows: dict[str, Any], updates: dict[str, Update], baseline: str, rounds: int) -> None:
    """Times and collectives of the steps alone, each after new gradients."""
    steps = {name: update.step for name, update in updates.items()}
    timings = alternate(steps, baseline, rounds, prepare=lambda name: updates[name].gradients())
    for name, update in updates.items():
        update.gradients()
        with CollectiveCount() as count:
            update.step()
        rows[name].update(
            optimizer_step=timings[name].summary(), optimizer_collectives=count.total, optimizer_bytes=count.bytes
        )


def _close(updates: dict[str, Update]) -> None:
    for update in updates.values():
        update.close()


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


def measure_zero(rounds: int, size: Size = BERT, shardings: Sequence[str] = tuple(ZERO)) -> dict[str, Any]:
    """Updates on two ranks under ZeRO: this package's LAMB and LARS against torch's AdamW."""
    return run_on_ranks(_zero_rows, RANKS, rounds, size, shardings, deepspeed=True)


def measure_statistics(rounds: int, accumulation: int = 8, sequences: int = 16, size: Size = BERT) -> dict[str, Any]:
    """What gradient statistics cost: whole updates of VRLAMB over LAMB's, two ranks."""
    rows = run_on_ranks(_statistics_rows, RANKS, accumulation, sequences, rounds, size, deepspeed=True)
    return {"accumulation": accumulation, "sequences_per_micro_batch": sequences, "rows": rows}


def measure_rivals(rounds: int, size: Size = BERT) -> dict[str, Any]:
    """Exact sharded LAMBs on two ranks: FSDP2 with this package's and timm's, and ZeroRedundancyOptimizer."""
    return run_on_ranks(_rival_rows, RANKS, rounds, size)


def measure_growth_with_ranks(rank_counts: list[int], layer_counts: list[int]) -> dict[str, Any]:
    """Collectives and bytes of one LAMB step under FSDP2, by ranks and by layers."""
    return {str(ranks): run_on_ranks(_vector_rows, ranks, layer_counts) for ranks in rank_counts}
