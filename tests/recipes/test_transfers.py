"""What would hold the device up between micro-batches: nothing waits, and nothing is computed that nobody needs."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.pool import Pools
from trustratio.recipes.configuration.config import RecipeConfig
from trustratio.recipes.configuration.overrides import apply_overrides
from trustratio.recipes.configuration.phases import phases_of
from trustratio.recipes.data.masking import MaskedBatch, Vocabulary
from trustratio.recipes.data.rows import MaskedRows
from trustratio.recipes.model.build import build_parts
from trustratio.recipes.rules.global_batch import BatchPlan
from trustratio.recipes.training.deepspeed_settings import merge
from trustratio.recipes.training.engines import DeepSpeedTraining
from trustratio.recipes.training.launchers import AccelerateLauncher
from trustratio.recipes.training.loop import accumulate_step
from trustratio.recipes.training.phase_data import PhaseData

VOCABULARY = 104
PLAN = BatchPlan(4, 3, 1)
TINY = ("model.hidden=16", "model.intermediate=32", "model.max_positions=32", "training.precision=bf16")
TO_HOST = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.masked_select", "aten.unique")
"""Operations whose result the host waits for."""


class Waits(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).rpartition(".")[0]
        self.found[name] += any(name.startswith(one) for one in TO_HOST)
        return function(*args, **(kwargs or {}))


def config_of(*overrides: str) -> RecipeConfig:
    return apply_overrides(RecipeConfig(), [*TINY, *overrides])


def micro_batches(count: int) -> list[MaskedBatch]:
    rows = np.random.default_rng(0).integers(5, 100, size=(64, 16)).astype(np.uint16)
    masked = MaskedRows(rows, Vocabulary(4, np.arange(5), np.arange(5, 100)), 0.3, seed=7)
    return masked.step_batches(0, BatchPlan(PLAN.micro, count, 1), 0)


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count what waits for the device: results on the host, and synchronizations by DeepSpeed."""
    with monkeypatch.context() as patched, Waits() as waits:
        kind = type(get_accelerator())
        patched.setattr(kind, "synchronize", lambda self, index=None: waits.found.update(["synchronize"]))
        yield waits.found


def deepspeed_engine(stage: int) -> Any:
    config = config_of(f"training.zero_stage={stage}")
    parts = build_parts(config, VOCABULARY)
    settings = merge({}, PLAN, stage, "bf16", 1.0, elementwise=False)
    return DeepSpeedTraining.initialize(parts.model, parts.optimizer, parts.schedule, settings)


def accelerate_engine() -> Any:
    config = config_of()
    return AccelerateLauncher({}).engine(build_parts(config, VOCABULARY), config.training, PLAN, None)


def waits_of_an_update(make_engine: Any, *arguments: Any) -> list[dict[str, int]]:
    """Of the fourth update, when DeepSpeed's own clocks run, with three micro-batches and with six."""
    found = []
    for accumulation in (3, 6):
        engine = make_engine(*arguments)
        engine.set_batch_plan(BatchPlan(PLAN.micro, accumulation, 1))
        for _ in range(3):
            accumulate_step(engine, micro_batches(accumulation), False)
        with pytest.MonkeyPatch.context() as patched, counted(patched) as waits:
            accumulate_step(engine, micro_batches(accumulation), False)
        found.append({name: count for name, count in waits.items() if count})
    return found


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed_waits_no_more_often_for_more_micro_batches(pools: Pools, stage: int) -> None:
    (found,) = pools.get(1).run(waits_of_an_update, deepspeed_engine, stage)
    assert found[0] == found[1]
    assert "synchronize" not in found[0]


def test_without_deepspeed_nothing_is_waited_for(pools: Pools) -> None:
    (found,) = pools.get(1).run(waits_of_an_update, accelerate_engine)
    assert found[0] == found[1]


def test_a_value_asked_for_between_micro_batches_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above can fail."""
    with counted(monkeypatch) as waits:
        torch.ones(()).item()
        get_accelerator().synchronize()
        torch.ones(2) + 1
    assert {name: count for name, count in waits.items() if count} == {"aten._local_scalar_dense": 1, "synchronize": 1}


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_logits_have_as_many_rows_as_masked_tokens(architecture: str) -> None:
    seen: list[torch.Size] = []
    model = build_parts(config_of(f"model.architecture={architecture}"), VOCABULARY).model
    decoder = model.cls.predictions.decoder if architecture == "bert" else model.decoder
    decoder.register_forward_hook(lambda module, given, logits: seen.append(logits.shape))
    (batch,) = micro_batches(1)
    model(**vars(batch))
    assert seen == [(len(batch.labels), model.config.vocab_size)]
    assert len(batch.labels) < batch.input_ids.numel() / 2


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_rows_without_padding_attend_without_a_mask(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    attention = F.scaled_dot_product_attention

    def spied(*args: Any, **options: Any) -> torch.Tensor:
        seen.append((options.get("attn_mask"), options.get("dropout_p"), options.get("is_causal")))
        return attention(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spied)
    model = build_parts(config_of(f"model.dropout={dropout}"), VOCABULARY).model.train()
    model(**vars(micro_batches(1)[0]))
    assert seen == [(None, dropout, False)] * model.config.num_hidden_layers


def test_token_types_are_looked_up_once() -> None:
    model = build_parts(config_of(), VOCABULARY).model
    shapes = []
    model.bert.embeddings.token_type_embeddings.register_forward_pre_hook(
        lambda _, given: shapes.append(given[0].shape)
    )
    model(**vars(micro_batches(1)[0]))
    assert shapes == [(1, 16)]


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cpu", False)])
def test_micro_batches_are_page_locked_for_a_gpu(device: str, pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[torch.Size] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: locked.append(self.shape) or self)
    rows = np.random.default_rng(0).integers(5, 100, size=(64, 16)).astype(np.uint16)
    masked = MaskedRows(rows, Vocabulary(4, np.arange(5), np.arange(5, 100)), 0.3, seed=7)
    (phase,) = phases_of(config_of("training.global_batch=12", "training.micro_batch=4"))
    data = PhaseData(phase, PLAN, masked, [], 4.0)
    with contextlib.closing(data.feed(0, 1, 0, torch.device(device))) as feed:
        batches = feed.take()
    assert len(batches) == PLAN.accumulation
    assert locked == ([tensor.shape for batch in batches for tensor in vars(batch).values()] if pinned else [])


def test_transfers_to_the_device_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    options: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **given: options.append(given) or self)
    micro_batches(1)[0].to(torch.device("cuda"))
    assert options == [{"non_blocking": True}] * 3
