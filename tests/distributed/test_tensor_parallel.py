"""DeepSpeed's AutoTP with every ZeRO stage: real models cut over ranks against the float64 reference."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import deepspeed
import pytest
import torch

from trustratio.optimizers import OPTIMIZERS

from .cases import NaiveLAMB
from .pool import CaseFailed, WorkerPool
from .recorded import Recorder, assert_recorded_exact, fresh_deepspeed_groups, make_optimizer
from .test_exactness import BF16

EXACT = [name for name, entry in OPTIMIZERS.items() if entry.group_statistics is None]
STEPS = 4


def small_bert() -> torch.nn.Module:
    """Three heads on two ranks: attention is cut 2:1. The embeddings and the head stay whole on both."""
    from transformers import BertConfig, BertForMaskedLM

    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 30}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(vocab_size=50, max_position_embeddings=16, **shape, **dropout))


def small_llama() -> torch.nn.Module:
    """Its head is cut too, along the vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "num_key_value_heads": 3}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, intermediate_size=30, tie_word_embeddings=False, **shape))


def train(
    family: str,
    name: str,
    stage: int,
    *,
    config: dict[str, Any] | None = None,
    constructor: dict[str, Any] | None = None,
    zero_init: bool = False,
    accumulation: int = 1,
) -> dict[str, Any]:
    """Train with tensor parallelism over pairs of ranks."""
    from deepspeed.utils import groups

    full_config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "tensor_parallel": {"autotp_size": 2},
        "steps_per_print": 10**9,
        **(config or {}),
    }
    with fresh_deepspeed_groups():
        torch.manual_seed(0)
        with deepspeed.zero.Init(config_dict_or_path=full_config) if zero_init else nullcontext():
            model = {"bert": small_bert, "llama": small_llama}[family]()
        if name == "naive":
            full_config["zero_allow_untested_optimizer"] = True
            optimizer: Any = NaiveLAMB(model.parameters(), lr=0.05)
            optimizer.trust_ratios = dict
        else:
            optimizer = make_optimizer(name, model, **(constructor or {}))
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=full_config)
        recorder = Recorder(engine.module, optimizer)
        generator = torch.Generator().manual_seed(100 + groups.get_data_parallel_rank())
        for _ in range(STEPS):
            for _ in range(accumulation):
                tokens = torch.randint(50, (1, 9), generator=generator)
                engine.backward(engine(input_ids=tokens, labels=tokens).loss)
                engine.step()
            recorder.end_step()
        result = recorder.result()
        recorder.counter.close()
        engine.destroy()
        return result


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("world_size", [2])
def test_every_optimizer(pool: WorkerPool, name: str, world_size: int) -> None:
    answers = pool.run(train, "bert", name, 1)
    assert_recorded_exact(name, answers, 2)
    for answer in answers:
        # One data-parallel rank needs no reduction, so the tensor-parallel group's is all. In the first step its ranks
        # also compare what they know of the layers, in two, prove the layout and compare what they have done.
        collectives = OPTIMIZERS[name].collectives
        assert answer["collectives"] == [collectives + 4] + [collectives] * (STEPS - 1)
        assert answer["dimensions"]["bert.encoder.layer.0.output.dense.weight"] == 1
        heads = "bert.encoder.layer.0.attention.self.query.weight"
        assert [a["weights"][heads].shape[0] for a in answers] == [16, 8]


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world_size", [4])
def test_cut_by_tensor_and_data_parallelism(pool: WorkerPool, family: str, stage: int, world_size: int) -> None:
    answers = pool.run(train, family, "lamb", stage, accumulation=2 if family == "llama" else 1)
    assert_recorded_exact("lamb", answers, 2)
    for answer in answers:
        # One per process group: the data-parallel ranks among which ZeRO cuts, and the tensor-parallel ones.
        assert answer["all_reduces"][-STEPS + 1 :] == [2 if stage else 1] * (STEPS - 1)


@pytest.mark.parametrize("world_size", [2])
def test_16_bit_parameters(pool: WorkerPool, world_size: int) -> None:
    for stage in (0, 1, 2, 3):
        answers = pool.run(train, "bert", "lamb", stage, config=BF16)
        assert_recorded_exact("lamb", answers, 2)
    assert_recorded_exact("sngm", pool.run(train, "bert", "sngm", 0, config=BF16), 2)
    all_at_once = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
    assert_recorded_exact("sngm", pool.run(train, "bert", "sngm", 1, config=all_at_once), 2)


@pytest.mark.parametrize("world_size", [4])
def test_norm_of_the_whole_model(pool: WorkerPool, world_size: int) -> None:
    """Replicated layers count once in it, cut ones with all their parts; also where ZeRO clips by it."""
    for stage in (0, 1, 3):
        assert_recorded_exact("sngm", pool.run(train, "bert", "sngm", stage), 2)
    for stage in (1, 2, 3):
        clipped = pool.run(train, "bert", "sngm", stage, config={"gradient_clipping": 0.3})
        assert_recorded_exact("sngm", clipped, 2, clipping=0.3)
    own = pool.run(train, "bert", "lamb", 0, constructor={"max_grad_norm": 0.3})
    assert_recorded_exact("lamb", own, 2, clipping=0.3, bound=1e-5)


@pytest.mark.parametrize("world_size", [4])
def test_zero_init_before_tensor_parallelism(pool: WorkerPool, world_size: int) -> None:
    """Then ZeRO spreads whole layers over all ranks, and cut ones over the data-parallel ranks."""
    answers = pool.run(train, "llama", "lamb", 3, zero_init=True)
    assert_recorded_exact("lamb", answers, 2)


@pytest.mark.parametrize("world_size", [2])
def test_norms_of_parts_are_caught(pool: WorkerPool, world_size: int) -> None:
    answers = pool.run(train, "bert", "naive", 1)
    with pytest.raises(AssertionError, match="relative error"):
        assert_recorded_exact("lamb", answers, 2)


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_statistics_of_group_gradients_are_refused(pool: WorkerPool, stage: int, world_size: int) -> None:
    with pytest.raises(CaseFailed, match="tensor parallelism cuts") as failure:
        pool.run(train, "bert", "clars", stage)
    assert str(failure.value).count("LayoutError") >= world_size
