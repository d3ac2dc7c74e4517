"""What runs inside the workers to test the Hugging Face Trainer on a tiny BERT."""

from __future__ import annotations

import contextlib
import copy
import os
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM, Trainer, TrainingArguments
from transformers.models.bert.modeling_bert import BertLayer

from trustratio.integrations.accelerate import layerwise_optimizer
from trustratio.integrations.transformers import (
    OptimizerFactory,
    TrustRatioCallback,
    masked_language_modeling_loss,
    optimizer_for_trainer,
)
from trustratio.optimizers import create_optimizer

from .accelerate_runs import unbuilt_cpu_adam
from .cases import gathered

SHAPE = {"vocab_size": 31, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 8}
STEPS, ACCUMULATION, MICRO, RANKS = 3, 2, 2, 2
ZERO_3 = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}

transformers.logging.set_verbosity_error()


def config() -> BertConfig:
    return BertConfig(**SHAPE, **DROPOUT)


def rows() -> list[dict[str, torch.Tensor]]:
    """Rows for all steps; how many positions of a row are predicted differs between rows."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for number in range(STEPS * ACCUMULATION * MICRO * RANKS):
        ids = torch.randint(31, (8,), generator=generator)
        predicted = torch.rand(8, generator=generator) < (0.3 if number % 3 else 0.8)
        predicted[number % 8] = True
        found.append({"input_ids": ids, "labels": ids.flip(0).where(predicted, -100)})
    return found


def arguments(folder: str, stage: str | int, **changes: Any) -> TrainingArguments:
    settings = None
    if isinstance(stage, int):
        settings = {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": stage, **changes.pop("zero", {})},
            **changes.pop("config", {}),
        }
        settings = {key: value for key, value in settings.items() if value is not None}
    given: dict[str, Any] = {
        "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "deepspeed": settings,
        **changes,
    }
    return TrainingArguments(folder, **given)


OWN_OPTIONS: dict[str, dict[str, Any]] = {
    "cowclip": {"cowclip": True},
    "adabelief": {"adapt": None},
    "fastadabelief": {"adapt": None},
    "adashift": {"adapt": None, "keep": 1},
}


def options_of(name: str) -> dict[str, Any]:
    return {"lr": 0.05, "weight_decay": 0.1, **OWN_OPTIONS.get(name, {})}


def train(name: str, stage: str | int, folder: str, zero_init: bool = False, noise: bool = False) -> dict[str, Any]:
    """Train with the Trainer; the weights, the last ratios and what was logged."""
    args = arguments(folder, stage)
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config()) if zero_init else _model()
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows(),  # type: ignore[arg-type]
        optimizer_cls_and_kwargs=optimizer_for_trainer(name, **options_of(name)),
        compute_loss_func=masked_language_modeling_loss,
    )
    trainer.add_callback(TrustRatioCallback(trainer, per_layer=True, noise=noise))
    with contextlib.redirect_stdout(None):
        trainer.train()
    optimizer = layerwise_optimizer(trainer.optimizer)
    weights = {}
    for layer, parameter in model.named_parameters():
        with gathered([parameter]):
            weights[layer] = parameter.detach().clone()
    found = {"weights": weights, "ratios": optimizer.trust_ratios(), "log": trainer.state.log_history}
    if isinstance(stage, int):
        trainer.model_wrapped.destroy()  # type: ignore[operator]
    return found


def _model() -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(config())


def train_plainly(name: str, ranks: int) -> dict[str, Any]:
    """The same steps in one process, without Trainer or accelerate."""
    model = _model()
    start = {layer: p.detach().clone() for layer, p in model.named_parameters()}
    options = options_of(name)
    named = list(model.named_parameters())
    embeddings = [item for item in named if "_embeddings" in item[0]] if options.pop("cowclip", False) else []
    others = [item for item in named if item not in embeddings]
    groups: list[dict[str, Any]] = [
        {"params": [item for item in others if item[1].dim() > 1]},
        {"params": [item for item in others if item[1].dim() == 1], "weight_decay": 0.0},
    ]
    if embeddings:
        groups.append({"params": embeddings, "cowclip": True})
    optimizer = create_optimizer(name, groups, **options)
    # Each rank of the pool trains this model for itself.
    optimizer.data_parallel_group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    if embeddings:
        optimizer.count_lookups(model)  # type: ignore[attr-defined]
    of_step = ACCUMULATION * MICRO * ranks
    data = rows()[: STEPS * of_step]
    for step in range(STEPS):
        batch = data[step * of_step : (step + 1) * of_step]
        labelled = sum(int((row["labels"] >= 0).sum()) for row in batch)
        for first in range(0, of_step, MICRO):
            ids = torch.stack([row["input_ids"] for row in batch[first : first + MICRO]])
            labels = torch.stack([row["labels"] for row in batch[first : first + MICRO]])
            logits = model(input_ids=ids).logits
            (F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / labelled).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {layer: p.detach().clone() for layer, p in model.named_parameters()}
    return {"start": start, "weights": weights, "ratios": optimizer.trust_ratios()}


DECAYING = {"type": "WarmupDecayLR", "params": dict.fromkeys(("total_num_steps", "warmup_max_lr"), "auto")}

CHANGES: dict[str, dict[str, Any]] = {
    "offload": {"zero": {"offload_optimizer": {"device": "cpu"}}},
    "optimizer section": {"config": {"optimizer": {"type": "Adam", "params": {"lr": "auto", "torch_adam": True}}}},
    "scheduler section": {"config": {"scheduler": DECAYING}},
    # With this size in the config DeepSpeed itself would notice.
    "one process": {"use_cpu": False, "config": {"train_batch_size": None}},
}


def dropped(folder: str, stage: str | int, way: str) -> str:
    """Give LAMB to the Trainer in a way that DeepSpeed may drop or re-rate; the name of what steps, or the error."""
    with unbuilt_cpu_adam(), mock.patch.dict(os.environ):
        changes = copy.deepcopy(CHANGES.get(way, {}))
        if way == "accelerate's CPU":
            os.environ["ACCELERATE_USE_CPU"] = "true"
        args = arguments(folder, stage, **changes)
        model = _model()
        given: dict[str, Any] = {"optimizer_cls_and_kwargs": optimizer_for_trainer("lamb", lr=0.05)}
        if way == "optimizers":
            given = {"optimizers": (create_optimizer("lamb", model.parameters(), lr=0.05), None)}
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=rows(),  # type: ignore[arg-type]
            compute_loss_func=masked_language_modeling_loss,
            **given,
        )
        try:
            with contextlib.redirect_stdout(None):
                trainer.train()
        except RuntimeError as error:
            assert trainer.state.global_step == 0
            return f"{type(error).__name__}: {error}"
        finally:
            getattr(trainer.model_wrapped, "destroy", lambda: None)()
        return type(layerwise_optimizer(trainer.optimizer)).__name__


def grouped(wrapper: str) -> dict[str, tuple[float, bool]]:
    """Make CowClip over a wrapped model; each layer's weight decay, and whether its rows are clipped."""
    model: torch.nn.Module = _model()
    if wrapper == "zero.Init":
        deepspeed.zero.Init(module=model, config_dict_or_path=ZERO_3)
    elif "fsdp1" in wrapper:
        model = FullyShardedDataParallel(
            model,
            use_orig_params=True,
            device_id=torch.device("cpu"),
            auto_wrap_policy=ModuleWrapPolicy({BertLayer}) if "each" in wrapper else None,
            sharding_strategy=ShardingStrategy.NO_SHARD if "no shard" in wrapper else ShardingStrategy.FULL_SHARD,
        )
    elif wrapper == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    optimizer = OptimizerFactory()(model, name="cowclip", lr=0.1, weight_decay=0.1, cowclip=True)
    return {
        name: (group["weight_decay"], group["cowclip"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
