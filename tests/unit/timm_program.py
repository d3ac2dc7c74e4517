"""A program that makes optimizers by timm's factory; prints what came of it as JSON. Run in a process of its own."""

from __future__ import annotations

import json
import warnings
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import CosineLRScheduler

from trustratio.integrations.timm import register_optimizers
from trustratio.optimizers import LAMB, OPTIMIZERS


def trained(optimizer: Any, model: torch.nn.Module) -> list[float]:
    """Three steps on known gradients, with timm's schedule; a number for each layer."""
    schedule = CosineLRScheduler(optimizer, t_initial=3, warmup_t=1, warmup_lr_init=1e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        schedule.step(step + 1)
    return [parameter.detach().double().norm().item() for parameter in model.parameters()]


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=3)


def by_hand(module: torch.nn.Module) -> LAMB:
    decayed = [p for p in module.parameters() if p.ndim > 1 and p is not module.pos_embed and p is not module.cls_token]
    others = [p for p in module.parameters() if not any(p is q for q in decayed)]
    return LAMB([{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.02}], lr=0.05)


names = register_optimizers()
assert register_optimizers() == names
assert set(names) <= set(list_optimizers())
answers: dict[str, Any] = {"names": names, "classes": {}}
for name in names:
    made = create_optimizer_v2(model(), name, lr=0.1, weight_decay=0.01, momentum=0.8)
    group = made.param_groups[0]
    answers["classes"][name] = [type(made).__name__, group.get("momentum"), len(made.param_groups)]
one, other = model(), model()
answers["factory"] = trained(create_optimizer_v2(one, "trustratio-lamb", lr=0.05, weight_decay=0.02), one)
answers["by hand"] = trained(by_hand(other), other)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    one = model()
    decayed = create_optimizer_v2(one, "trustratio-lars", lr=0.05, weight_decay=0.02, layer_decay=0.7)
    trained(decayed, one)
answers["scales"] = sorted({group["lr_scale"] for group in decayed.param_groups})
one = model()
answers["lookahead"] = type(create_optimizer_v2(one, "lookahead_trustratio-lamb", lr=0.05)).__name__
arguments = type("Arguments", (), {"opt": "trustratio-lars", "lr": 0.1, "weight_decay": 0.0, "momentum": 0.7})
answers["train.py"] = create_optimizer_v2(one, **optimizer_kwargs(cfg=arguments)).param_groups[0]["momentum"]
assert len(OPTIMIZERS) == len(names)
print(json.dumps(answers))
