"""LAMB in the Trainer, on two GPUs or without one: torchrun --nproc_per_node 2 docs/examples/with_trainer.py."""

import torch
from transformers import Trainer, TrainingArguments

from trustratio.integrations.transformers import TrustRatioCallback, optimizer_for_trainer

COMMON = {"per_device_train_batch_size": 256, "max_steps": 20, "lr_scheduler_type": "constant", "max_grad_norm": 1.0}
QUIET = {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "report_to": "none"}


def samples() -> list[dict[str, torch.Tensor]]:
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0))
    return [{"input": row, "labels": row.sin().sum(0, keepdim=True)} for row in x]


def loss_of(outputs: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.mse_loss(outputs, labels, reduction="sum") / num_items_in_batch  # of all ranks


torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
on_cpu = not torch.cuda.is_available()
args = TrainingArguments("runs/trainer", **COMMON, **QUIET, label_names=["labels"], use_cpu=on_cpu)
lamb = optimizer_for_trainer("lamb", lr=0.02, weight_decay=0.0)
trainer = Trainer(model, args, train_dataset=samples(), optimizer_cls_and_kwargs=lamb, compute_loss_func=loss_of)
trainer.add_callback(TrustRatioCallback(trainer, per_layer=True))  # logs each layer's beside the loss
trainer.train()
trainer.accelerator.wait_for_everyone()  # a rank that leaves while others still talk to it may abort
trainer.accelerator.end_training()
