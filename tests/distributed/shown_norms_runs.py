"""What runs inside the workers to test who shows layer norms: Trainer, accelerate."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator, DeepSpeedPlugin
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from transformers import BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments
from transformers.models.bert.modeling_bert import BertLayer

from trustratio.integrations.guards.replaced import innermost
from trustratio.integrations.layer_norms import LayerNorms
from trustratio.integrations.transformers import LayerNormsCallback, optimizer_for_trainer

from .cases import gathered
from .trainer_runs import arguments, config, rows

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optim": "adamw_torch"},
    "adafactor": {"optim": "adafactor"},
    "sgd": {"optim": "sgd"},
    "lamb": {},
}

SECTION = {"optimizer": {"type": "Adam", "params": {"lr": "auto", "torch_adam": True, "adam_w_mode": True}}}

SETTINGS: dict[str, dict[str, Any]] = {
    "ddp": {"stage": "ddp"},
    "zero-1": {"stage": 1},
    "zero-2": {"stage": 2},
    "zero-3": {"stage": 3},
    "zero-1, its optimizer": {"stage": 1, "config": SECTION},
    "zero-3, its optimizer": {"stage": 3, "config": SECTION},
    "fsdp1": {"stage": "fsdp1", "remove_unused_columns": False},  # the wrapper hides which the model knows
    "fsdp2": {"stage": "fsdp2"},
}


class _Weights(TrainerCallback):
    """Keeps all weights, whole, as they are after each step, and before the first."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(_whole(kwargs["model"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(_whole(kwargs["model"]))


def _whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    summon = contextlib.nullcontext()
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        summon = FullyShardedDataParallel.summon_full_params(model, writeback=False)
    found = {}
    with summon:
        for name, parameter in model.named_parameters():
            with gathered([parameter]):
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                found[name.replace("_fsdp_wrapped_module.", "")] = whole.detach().double().clone()
    return found


def _sharded(model: torch.nn.Module, stage: str | int) -> torch.nn.Module:
    if stage == "fsdp1":
        policy = ModuleWrapPolicy({BertLayer})
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=cpu, auto_wrap_policy=policy)
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),))) if stage == "fsdp2" else model


def _here(tensor: torch.Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel()


def show(setting: str, optimizer: str, folder: str, steps: int, resume: bool = False, **changes: Any) -> dict[str, Any]:
    """Train with the Trainer; all weights at each step, what was logged, and the file's records."""
    options = dict(SETTINGS[setting])
    stage = options.pop("stage")
    options |= {**OPTIMIZERS[optimizer], "max_steps": steps, "learning_rate": 0.01, **changes}
    callback = options.pop("callback", {})
    args: TrainingArguments = arguments(folder, stage, **options)
    torch.manual_seed(0)
    weights = _Weights()
    trainer = Trainer(
        model=_sharded(BertForMaskedLM(config()), stage),
        args=args,
        train_dataset=rows(),  # type: ignore[arg-type]
        optimizer_cls_and_kwargs=optimizer_for_trainer("lamb", lr=0.01) if optimizer == "lamb" else None,
        callbacks=[LayerNormsCallback(file=f"{folder}/norms.jsonl", **callback), weights],
    )
    if "fsdp" in str(stage):  # accelerate shards so on GPUs only; on a CPU it would put the model into DDP
        trainer.accelerator.prepare_model = lambda model, **options: model
    with contextlib.redirect_stdout(None):
        trainer.train(resume_from_checkpoint=resume or None)
    elements = sum(_here(p) for group in innermost(trainer.optimizer).param_groups for p in group["params"])
    found = {"weights": weights.steps, "log": trainer.state.log_history, "elements": elements}
    if isinstance(stage, int):
        trainer.model_wrapped.destroy()  # type: ignore[operator]
    lines = Path(folder, "norms.jsonl").read_text().splitlines() if dist.get_rank() == 0 else []
    return {**found, "records": [json.loads(line) for line in lines]}


def begin(folder: str) -> str:
    """Give a file that only the first rank opens, and cannot; the error of this rank."""
    Path(folder, "norms.jsonl").mkdir(exist_ok=True)
    try:
        show("ddp", "sgd", folder, 1)
    except ValueError as error:
        return str(error)
    return "none"


def log_with_accelerate(stage: str | int) -> dict[str, Any]:
    """`accelerator.log` as the place where norms go, with a tracker of our own; what it was given, and the weights."""
    from accelerate.tracking import GeneralTracker, on_main_process

    class Tracker(GeneralTracker):
        name, requires_logging_directory = "ours", False

        def __init__(self) -> None:
            super().__init__()
            self.logged: list[tuple[int, dict[str, float]]] = []

        @property
        def tracker(self) -> Any:
            return self.logged

        @on_main_process
        def store_init_configuration(self, values: dict[str, Any]) -> None:
            pass

        @on_main_process
        def log(self, values: dict[str, float], step: int | None = None, **options: Any) -> None:
            assert step is not None
            self.logged.append((step, values))

    tracker, options = Tracker(), {}
    if isinstance(stage, int):
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
        options = {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=settings)}
    accelerator = Accelerator(cpu=stage == "ddp", log_with=tracker, **options)
    accelerator.init_trackers("run")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.named_parameters(), lr=0.01))
    norms = LayerNorms(optimizer, every=2)
    norms.write_to(log=accelerator.log, layers="*.weight", numbers=("update",))
    weights = [_whole(model)]
    for step in range(4):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(accelerator.process_index + 2 * step))
        accelerator.backward(prepared(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        weights.append(_whole(model))
    if isinstance(stage, int):
        prepared.destroy()
    return {"logged": tracker.logged, "weights": weights}


transformers.logging.set_verbosity_error()
