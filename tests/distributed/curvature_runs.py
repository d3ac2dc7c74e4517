"""Training with samples of the curvature in the workers, on a loss that is quadratic in the weights of all layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from trustratio.integrations.accelerate import layerwise_optimizer
from trustratio.integrations.curvature_trainer import CurvatureTrainer
from trustratio.integrations.transformers import masked_language_modeling_loss, optimizer_for_trainer
from trustratio.optimizers import CurvatureAdamW
from trustratio.optimizers.sampling.sample import Sample

from ..references.curvature import CurvatureReference
from . import fsdp_runs, megatron_distributed_runs, norms_runs, test_fsdp1, trainer_runs
from .cases import Case, CaseRun, Leaf, Model, gathered, group_gradients, initial_weights, masters, mean_gradients
from .collective_counter import CollectiveCounter
from .norms_runs import counted

CURVATURES = (0.5, 1.0, 2.0, 0.25, 3.0, 1.5)
COUPLING = 0.05


def quadratic_leaf(self: Leaf, x: torch.Tensor) -> torch.Tensor:
    return torch.stack([(self.weight.float() * x).sum(), 0.5 * self.weight.float().square().sum()])


def quadratic_model(self: Model, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """½ COUPLING (Σ⟨x_l, w_l⟩)² + ½ Σ a_l ‖w_l‖²: the layers' blocks are a_l + COUPLING x_l x_lᵀ."""
    parts = {name: self.leaves[name](x) for name, x in given.items()}
    together: Any = sum(part[0] for part in parts.values())
    curvature = dict(zip(self.leaves, CURVATURES, strict=False))
    return 0.5 * COUPLING * together**2 + sum(curvature[name] * part[1] for name, part in parts.items())


@contextmanager
def quadratic() -> Iterator[None]:
    linear = Leaf.forward, Model.forward
    Leaf.forward, Model.forward = quadratic_leaf, quadratic_model  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Leaf.forward, Model.forward = linear  # type: ignore[method-assign]


@dataclass(frozen=True)
class Sampled:
    """How a case is trained.

    Attributes:
        kind: "case" (dense, DDP, ZeRO: what the case says), "fsdp2", "fsdp1" or "megatron".
        setup: Options of that kind.
        clipping: The loop's own clip_grad_norm_, where gradients are on the parameters.
        scheduled: Have the engine's scheduler halve the rate after every step.
        sampled: Whether the loop takes samples at all.
        resume: Save after three steps, and go on from this folder.
    """

    kind: str = "case"
    setup: dict[str, Any] = field(default_factory=dict)
    clipping: float | None = None
    scheduled: bool = False
    sampled: bool = True
    resume: str | None = None


class Loop:
    """A loop over a wrapped model: micro-batches, and a step."""

    def __init__(self, case: Case, sampled: Sampled):
        self.case, self.sampled = case, sampled
        self.stack = ExitStack()
        self.stack.enter_context(quadratic())
        options, kind = sampled.setup, sampled.kind
        self.engine: Any = None
        if kind == "case":
            run: Any = CaseRun(case)
            self.stack.callback(run.close)
            self.model, self.engine = run.trained, run.engine
        elif kind == "fsdp2":
            run = self.stack.enter_context(fsdp_runs.running(case, fsdp_runs.Setup(**options)))
            self.model = run.model
        elif kind == "fsdp1":
            run = self.stack.enter_context(test_fsdp1.running(case, test_fsdp1.Setup(**options)))
            self.model = run.wrapped
        else:
            run = self.stack.enter_context(megatron_distributed_runs.running(case, **options))
            self.model = run.ddp
        self.run = run
        self.optimizer: Any = run.inner if kind == "megatron" else run.optimizer
        self.counter = CollectiveCounter(self.optimizer)
        self.stack.callback(self.counter.close)
        if sampled.scheduled:
            self.engine.lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
        self.ratios: list[dict[str, float]] = []
        self.reduces_in_samples: list[int] = []

    def backward(self, step: int) -> None:
        """All micro-batches of a step."""
        world, rank = (1, 0) if self.case.stage == "dense" else (dist.get_world_size(), dist.get_rank())
        of_groups = group_gradients(self.case, step, mean_gradients(self.case)[step], world * self.case.accumulation)
        factor = float("inf") if step in self.case.overflow else 1.0
        if self.sampled.kind == "megatron":
            self.model.zero_grad_buffer()
            self.run.wrapper.zero_grad()
        for micro in range(self.case.accumulation):
            loss = factor * self.model({name: g[micro * world + rank] for name, g in of_groups.items()})
            if self.engine is not None:
                self.engine.backward(loss)
                self.engine.step()
            elif self.sampled.kind == "megatron":
                self.run.wrapper.scale_loss(loss).sum().backward()
                self.model.finish_grad_sync()
                self.run.wrapper.step()
            else:
                (loss / self.case.accumulation).backward()

    def train(self, first: int, last: int) -> None:
        optimizer = self.optimizer
        in_step_alone = self.engine is not None or self.sampled.kind == "megatron"
        for step in range(first, last):
            wanted = self.sampled.sampled and optimizer.wants_curvature()
            self.backward(step)
            if wanted:
                counted(self.reduces_in_samples, partial(self.second_pass, step))
            if not in_step_alone:
                if self.sampled.clipping is not None:
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.sampled.clipping)
                optimizer.step()
                optimizer.zero_grad()
            self.ratios.append(optimizer.trust_ratios())

    def second_pass(self, step: int) -> None:
        with self.optimizer.curvature():
            self.backward(step)

    def weights(self) -> dict[str, torch.Tensor]:
        if self.sampled.kind == "fsdp2":  # whose result() needs state
            return {name: leaf.weight.full_tensor().detach().clone() for name, leaf in self.model.leaves.items()}
        weights: dict[str, torch.Tensor] = self.run.result()["weights"]
        return weights


def train(case: Case, sampled: Sampled) -> dict[str, Any]:
    """Runs on every rank.

    Returns:
        weights: Whole, as the model holds them.
        masters: This rank's shards of the optimizer's own weights.
        ratios: After each step.
        all_reduces: Of each call of the optimizer's step().
        reduces_in_samples: All-reduces in each second pass, DDP's own left out.
        rate: The first group's learning rate at the end.
        steps: The engine's count of steps, and of samples.
    """
    loop = Loop(case, sampled)
    with loop.stack:
        if sampled.resume is None:
            loop.train(0, case.steps)
        else:
            loop.train(0, 3)
            loop.engine.save_checkpoint(sampled.resume, tag="middle")
            loop.stack.close()
            loop = Loop(replace(case, seed=case.seed + 7), sampled)  # what a checkpoint fails to restore must show
            loop.engine.load_checkpoint(sampled.resume, tag="middle")
            loop.case = case
            loop.train(3, case.steps)
        with loop.stack:
            return {
                "masters": {} if loop.engine is None else masters(loop.optimizer),
                "ratios": loop.ratios,
                "all_reduces": loop.counter.all_reduces,
                "reduces_in_samples": loop.reduces_in_samples,
                "rate": loop.optimizer.param_groups[0]["lr"],
                "steps": None if loop.engine is None else (loop.engine.global_steps, loop.engine.global_samples),
                "weights": loop.weights(),
            }


# The reference ------------------------------------------------------------------------------------------------------


def gradient_of(case: Case, ranks: int) -> Callable[[int, dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """The mean gradient over all groups of samples, at any weights, in float64."""
    groups = case.accumulation * (1 if case.stage == "dense" else ranks)
    curvature = {layer.name: a for layer, a in zip(case.layers, CURVATURES, strict=False)}

    def gradient(step: int, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        of_groups = {
            name: x.double() for name, x in group_gradients(case, step, mean_gradients(case)[step], groups).items()
        }
        total = {name: curvature[name] * weights[name] for name in of_groups}
        for group in range(groups):
            together = sum((x[group] * weights[name]).sum() for name, x in of_groups.items())
            for name, x in of_groups.items():
                total[name] = total[name] + COUPLING * together * x[group] / groups
        return total

    return gradient


def expected(
    case: Case, ranks: int, clip: float | None = None
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The weights, and the ratios of those steps that are not skipped for an overflow."""
    interval = case.groups[0]["interval"]
    options = {
        layer.name: {k: v for k, v in {**case.groups[layer.group], **case.constructor}.items() if k != "interval"}
        for layer in case.layers
    }
    reference = CurvatureReference(case.optimizer, initial_weights(case), options, interval=interval)
    gradient, ratios = gradient_of(case, ranks), []
    for step in range(case.steps):
        if step not in case.overflow:
            ratios += reference.train(gradient, step, step + 1, clip)
    return reference.weights, ratios


# What goes wrong ----------------------------------------------------------------------------------------------------


def train_with_local_sums(case: Case, sampled: Sampled) -> dict[str, Any]:
    """What everybody else does: products of what is here."""
    whole = Sample._sums

    def local(self: Sample, step: Any, stage: Any) -> torch.Tensor:
        own, self._plan.layout = self._plan.layout, replace(self._plan.layout, reductions=())
        try:
            return whole(self, step, stage)
        finally:
            self._plan.layout = own

    Sample._sums = local  # type: ignore[method-assign]
    try:
        return train(case, sampled)
    finally:
        Sample._sums = whole  # type: ignore[method-assign]


def forget_the_second_pass(case: Case, sampled: Sampled) -> str:
    """The message; training is not to go on with moved weights."""
    loop = Loop(case, sampled)
    with loop.stack:
        before = loop.weights()
        assert loop.optimizer.wants_curvature()
        loop.backward(0)
        moved = loop.weights()
        assert not all(torch.equal(moved[name], w) for name, w in before.items())
        for call in (loop.optimizer.state_dict, loop.optimizer.wants_curvature):
            with pytest.raises(RuntimeError, match="moved for a sample"):
                call()
        with pytest.raises(RuntimeError) as refused:
            loop.backward(1)
        after = loop.weights()
        assert all(torch.equal(after[name], w) for name, w in before.items())
        return str(refused.value)


def leave_the_second_pass(case: Case, sampled: Sampled) -> dict[str, Any]:
    """An exception in it, after which weights are restored and training goes on as if there had been no step."""
    loop = Loop(case, sampled)
    with loop.stack:
        before = loop.weights()
        assert loop.optimizer.wants_curvature()
        loop.backward(0)
        with pytest.raises(KeyError), loop.optimizer.curvature():
            raise KeyError("out of data")
        after = loop.weights()
        assert all(torch.equal(after[name], w) for name, w in before.items())
        loop.train(0, case.steps)
        return {"ratios": loop.ratios, "weights": loop.weights()}


def overflow_in_the_second_pass(case: Case, sampled: Sampled) -> dict[str, Any]:
    """The wrapper leaves the step out; weights are back, and training goes on with a sample in the next step."""
    loop = Loop(case, sampled)
    with loop.stack:
        before = loop.weights()
        assert loop.optimizer.wants_curvature()
        loop.backward(0)
        loop.case = replace(case, overflow=(0,))
        loop.second_pass(0)
        loop.case = case
        after = loop.weights()
        assert all(torch.equal(after[name], w) for name, w in before.items())
        loop.train(0, case.steps)
        return {"ratios": loop.ratios, "weights": loop.weights(), "masters": masters(loop.optimizer)}


def sample_with_zero_redundancy(case: Case) -> None:
    run = norms_runs.redundancy(case)
    run.train(0, 1)
    assert run.optimizer.wants_curvature()
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with run.optimizer.curvature():
        pass


# The Trainer --------------------------------------------------------------------------------------------------------

OF_TRAINER = {"lr": 0.5, "cap": 0.1, "interval": 2, "weight_decay": 0.1}


def train_with_trainer(stage: str | int, folder: str, name: str = "curvature_adamw") -> dict[str, Any]:
    """Three steps of two micro-batches on each rank, clipped."""
    model = trainer_runs._model()
    trainer = CurvatureTrainer(
        model=model,
        args=trainer_runs.arguments(folder, stage, max_grad_norm=1.0),
        train_dataset=trainer_runs.rows(),  # type: ignore[arg-type]
        optimizer_cls_and_kwargs=optimizer_for_trainer(name, **(OF_TRAINER if name != "lamb" else {})),
        compute_loss_func=masked_language_modeling_loss,
    )
    with redirect_stdout(None):
        trainer.train()
    optimizer: Any = layerwise_optimizer(trainer.optimizer)
    states = [state.get("layers", state) for state in optimizer.state.values()]
    answer = {
        "steps": optimizer.param_groups[0]["step"],
        "samples": {number for state in states for number in state["samples"].reshape(-1).tolist()},
        "ratios": optimizer.trust_ratios(),
        "weights": whole_weights(model),
    }
    if isinstance(stage, int):
        trainer.model_wrapped.destroy()  # type: ignore[operator]
    return answer


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    weights = {}
    for layer, parameter in model.named_parameters():
        with gathered([parameter]):
            weights[layer] = parameter.detach().clone()
    return weights


def train_plainly() -> dict[str, Any]:
    """The same steps in one process, in a loop of one's own."""
    model = trainer_runs._model()
    start = {layer: p.detach().clone() for layer, p in model.named_parameters()}
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [item for item in named if item[1].dim() > 1]},
        {"params": [item for item in named if item[1].dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = CurvatureAdamW(groups, **OF_TRAINER)
    of_step = trainer_runs.ACCUMULATION * trainer_runs.MICRO * dist.get_world_size()
    for step in range(trainer_runs.STEPS):
        batch = trainer_runs.rows()[step * of_step : (step + 1) * of_step]
        wanted = optimizer.wants_curvature()
        backward(model, batch)
        if wanted:
            with optimizer.curvature():
                backward(model, batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    weights = {layer: p.detach().clone() for layer, p in model.named_parameters()}
    return {"start": start, "weights": weights, "ratios": optimizer.trust_ratios()}


def backward(model: torch.nn.Module, batch: list[dict[str, torch.Tensor]]) -> None:
    ids, labels = (torch.stack([row[name] for row in batch]) for name in ("input_ids", "labels"))
    torch.nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten()).backward()
