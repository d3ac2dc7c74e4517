"""Where an exported model's weights come from: DeepSpeed's files, of which only tensors are unpickled."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.training.export import save_tokenizer, trained_weights


class Malicious:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def write_checkpoint(folder: Path, **more: Any) -> Path:
    """What DeepSpeed writes under ZeRO-1, with one parameter of two elements."""
    checkpoint = folder / "step"
    checkpoint.mkdir()
    shapes = {"weight": torch.Size([2])}
    model = {
        **{"module": {"weight": torch.ones(2)}, "buffer_names": [], "param_shapes": [shapes]},
        **{"shared_params": {}, "frozen_param_shapes": None, "frozen_param_fragments": None},
        "ds_version": deepspeed.__version__,
    }
    state = {
        **{"zero_stage": 1, "partition_count": [1], "loss_scaler": LossScaler(1.0)},
        "single_partition_of_fp32_groups": [torch.tensor([1.0, 2.0])],
        **more,
    }
    torch.save(model, checkpoint / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": state}, checkpoint / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return checkpoint


def test_weights_of_a_zero_checkpoint(tmp_path: Path) -> None:
    assert trained_weights(write_checkpoint(tmp_path))["weight"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("file", ["optimizer", "model"])
def test_nothing_else_is_unpickled(tmp_path: Path, file: str) -> None:
    trace = tmp_path / "it ran"
    if file == "optimizer":
        checkpoint = write_checkpoint(tmp_path, extra=Malicious(trace))
    else:
        checkpoint = tmp_path / "step"
        checkpoint.mkdir()
        torch.save({"module": {}, "extra": Malicious(trace)}, checkpoint / "mp_rank_00_model_states.pt")
    with pytest.raises(RecipeError, match="holds more than tensors"):
        trained_weights(checkpoint)
    assert not trace.exists()
    assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") is None


@pytest.mark.parametrize("token_types", [True, False])
def test_a_tokenizer_keeps_its_own_special_tokens(tmp_path: Path, token_types: bool) -> None:
    """Those of a hub's tokenizer need not be called [CLS] and [SEP]."""
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<mask>": 2, "a": 3, "b": 4}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data: Any = SimpleNamespace(
        folder=str(tmp_path), mask_id=2, special_tokens=lambda: {"cls": 0, "sep": 1, "mask": 2, "pad": None}
    )
    save_tokenizer(data, 8, tmp_path / "saved", token_types)
    saved = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    encoded = saved("a", "b")
    assert encoded["input_ids"] == [0, 3, 1, 4, 1]
    assert ("token_type_ids" in encoded) is token_types
    assert (saved.cls_token, saved.mask_token, saved.pad_token, saved.model_max_length) == ("<s>", "<mask>", None, 8)
