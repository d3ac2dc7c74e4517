"""Set-ups whose norms would be wrong are refused by name, on every rank."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch

from trustratio.optimizers import LAMB

from .pool import CaseFailed, WorkerPool


def step_with_tensor_parallelism(stage: int) -> None:
    """One step of a BERT whose matrices DeepSpeed cuts over both ranks."""
    from transformers import BertConfig, BertForMaskedLM

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForMaskedLM(BertConfig(vocab_size=50, **shape))
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "tensor_parallel": {"autotp_size": 2},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=LAMB(model.named_parameters()), config=config)
    tokens = torch.arange(8).view(1, 8)
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()


@pytest.mark.parametrize("world_size", [2])
@pytest.mark.parametrize("stage", [1, 2])
def test_tensor_parallelism_is_refused(pool: WorkerPool, stage: int, world_size: int) -> None:
    with pytest.raises(CaseFailed, match="cut by tensor parallelism") as failure:
        pool.run(step_with_tensor_parallelism, stage)
    assert str(failure.value).count("LayoutError") >= world_size
