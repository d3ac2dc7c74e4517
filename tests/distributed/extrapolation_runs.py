"""Training at extrapolated weights in the workers, under every wrapper, and its float64 reference.

The loss is a quadratic of every layer, ½ c ‖w - t‖² with other targets t in each step and group of samples, so that
gradients depend on where they are taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import prod, sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from trustratio.optimizers import LAMB, Extrapolation
from trustratio.optimizers.displacements import layer_noise
from trustratio.optimizers.displacements.counter_noise import gaussian, uniform
from trustratio.optimizers.formulas.split_mix import key_of
from trustratio.optimizers.sharding.local_tensors import local_part

from ..reference import REFERENCES
from .cases import Case, Leaf, gathered, initial_weights
from .norms_runs import Run, Wrapped, counted, running

CURVATURE = 0.5
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """How weights are extrapolated.

    Attributes:
        direction: Of Extrapolation, as the other options.
        step_size: The same.
        noise: The same.
        contexts: "each" micro-batch has one, "all" of a step have one, or the model is "attached".
        named: Whether layers are named by the model, as those of an optimizer of torch's are.
    """

    direction: str = "gradient"
    step_size: float = 0.4
    noise: str = "gaussian"
    contexts: str = "each"
    named: bool = False


def targets(case: Case, step: int, groups: int) -> dict[str, torch.Tensor]:
    """Of each layer, shape (groups, *layer)."""
    generator = torch.Generator().manual_seed(77 + step)
    trained = [layer for layer in case.layers if layer.name not in case.skipped.get(step, ())]
    return {layer.name: 3 * torch.randn((groups, *layer.shape), generator=generator) for layer in trained}


# In the workers -----------------------------------------------------------------------------------------------------


@contextmanager
def quadratic() -> Iterator[None]:
    """The layers' losses, in place of linear ones."""
    linear = Leaf.forward

    def forward(leaf: Leaf, target: torch.Tensor) -> torch.Tensor:
        return (leaf.weight - target.to(leaf.weight.dtype)).square().sum() * (CURVATURE / 2)

    Leaf.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        Leaf.forward = linear  # type: ignore[method-assign]


class Training:
    """A run in which gradients are extrapolated."""

    def __init__(self, case: Case, wrapped: Wrapped, plan: Plan, run: Run):
        self.case, self.wrapped, self.plan, self.run = case, wrapped, plan, run
        self.engine = run.outermost if isinstance(case.stage, int) else None
        model = run.model if plan.named else None
        options = {"direction": plan.direction, "noise": plan.noise, "model": model}
        self.extrapolation = Extrapolation(run.outermost, plan.step_size, **options)
        if plan.contexts == "attached":
            self.extrapolation.attach(run.model)

    def context(self, wanted: str) -> AbstractContextManager[Any]:
        return self.extrapolation if self.plan.contexts == wanted else nullcontext()

    def train(self, first: int, last: int) -> None:
        world = 1 if self.case.stage == "dense" else dist.get_world_size()
        rank = 0 if self.case.stage == "dense" else dist.get_rank()
        micros = self.case.accumulation
        for step in range(first, last):
            given = targets(self.case, step, world * micros)
            factor = float("inf") if step in self.case.overflow else 1.0
            of_micros = [{n: factor * t[m * world + rank] for n, t in given.items()} for m in range(micros)]
            if self.wrapped.kind == "megatron":
                self.run.model.zero_grad_buffer()
                self.run.outermost.zero_grad()
            with self.context("all"):
                for index, of_micro in enumerate(of_micros):
                    is_last = index == micros - 1
                    with self.context("each"):
                        self._backward(of_micro, is_last)
                    if self.engine is not None and not is_last:
                        self.engine.step()
            self._step()

    def _backward(self, given: Weights, is_last: bool) -> None:
        model = self.run.model
        if self.engine is not None:
            self.engine.backward(self.engine(given))
        elif self.wrapped.kind == "megatron":
            self.run.outermost.scale_loss(model(given)).backward()
            model.finish_grad_sync()
        else:
            if self.wrapped.kind == "fsdp2":
                model.set_requires_gradient_sync(is_last)
            (model(given) / self.case.accumulation).backward()

    def _step(self) -> None:
        if self.engine is not None:
            self.engine.step()
        else:
            self.run.outermost.step()
            self.run.outermost.zero_grad()

    def weights(self) -> Weights:
        """The model's, whole."""
        module = self.run.model
        names = {layer.name: layer for layer in self.case.layers}
        if isinstance(module, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(module):
                return {name: leaf.weight.detach().clone() for name, leaf in self._leaves().items() if name in names}
        found = {}
        for name, leaf in self._leaves().items():
            with gathered([leaf.weight]):
                whole = leaf.weight.full_tensor() if hasattr(leaf.weight, "full_tensor") else leaf.weight
                found[name] = whole.detach().clone()
        return found

    def _leaves(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, module in self.run.model.named_modules():
            kept = name.rpartition("leaves.")[2].partition(".")[0]
            if isinstance(module, Leaf):
                found[kept] = module
        return found


@contextmanager
def training(case: Case, wrapped: Wrapped, plan: Plan) -> Iterator[Training]:
    with quadratic(), running(case, wrapped) as run:
        yield Training(case, wrapped, plan, run)


def train(case: Case, wrapped: Wrapped, plan: Plan) -> dict[str, Any]:
    """Train the case; return the weights, and whether contexts have left them as they were."""
    with training(case, wrapped, plan) as run:
        run.train(0, case.steps)
        return result(run)


def result(run: Training) -> dict[str, Any]:
    before, locals_before = run.weights(), local_weights(run)
    moved = before
    if run.plan.contexts != "attached":
        with run.extrapolation:
            moved = run.weights()
    after = run.weights()
    return {
        "weights": {name: w.float() for name, w in before.items()},
        "moved": moved,
        "comes_back": same(before, after) and same(locals_before, local_weights(run)),
    }


def all_reduces_of_a_context(case: Case, wrapped: Wrapped, plan: Plan) -> int:
    """After the first step, when the layout is known."""
    with training(case, wrapped, plan) as run:
        run.train(0, 1)
        counts: list[int] = []
        counted(counts, run.extrapolation.__enter__)
        counted(counts, lambda: run.extrapolation.__exit__(None))
        return sum(counts)


def train_with_overflow(case: Case, plan: Plan, overflow: tuple[int, ...]) -> dict[str, Any]:
    """Train the case under ZeRO, with a further step of infinite gradients before each of those."""
    with training(case, Wrapped(), plan) as run:
        for step in range(case.steps):
            if step in overflow:
                run.case = replace(case, overflow=overflow)
                run.train(step, step + 1)
                assert run.extrapolation.is_moved == (plan.contexts == "attached")
                run.case = case
            run.train(step, step + 1)
        assert run.engine.skipped_steps == len(overflow)
        return result(run)


def train_by_local_norms(case: Case, wrapped: Wrapped, plan: Plan) -> dict[str, Any]:
    """What everybody else does: noise as large as what is here of a layer."""
    exact = layer_noise._root_mean_squares
    layer_noise._root_mean_squares = lambda layout: exact(replace(layout, reductions=()))
    try:
        return train(case, wrapped, plan)
    finally:
        layer_noise._root_mean_squares = exact


EXAMPLE = (((0.1, -0.2), (0.0, 0.1), (-0.1, 0.0)), ((-0.1, 0.2), (0.2, -0.1), (0.1, 0.1)))
"""What is added to the gradient of each worker in each step."""


class Point(torch.nn.Module):
    """½ (w₁² + 10 w₂²), with noise in the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        curvature = torch.tensor([1.0, 10.0], dtype=torch.float64)
        return (curvature / 2 * self.w.square() + noise * self.w).sum()


def two_workers() -> dict[str, Any]:
    """Weights after each step of the worked example, and this worker's gradients."""
    model = Point()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    extrapolation = Extrapolation(optimizer, 0.03, "own_gradient")
    gradients: list[Any] = []
    model.w.register_hook(lambda gradient: gradients.append(gradient.tolist()))
    weights = []
    for noise in EXAMPLE[dist.get_rank()]:
        optimizer.zero_grad()
        with extrapolation:
            parallel(torch.tensor(noise, dtype=torch.float64)).backward()
        optimizer.step()
        weights.append(model.w.tolist())
    return {"gradients": gradients, "weights": weights}


def local_weights(run: Training) -> Weights:
    """What the optimizer steps, as far as it says between steps."""
    groups = run.run.optimizer.param_groups
    tensors = [tensor for group in groups for tensor in group["params"]]
    return {str(index): local_part(tensor).detach().clone() for index, tensor in enumerate(tensors)}


def same(one: Weights, other: Weights) -> bool:
    """Whether all bits are the same."""
    return all(torch.equal(one[name], other[name]) for name in one)


# The reference ------------------------------------------------------------------------------------------------------


class Stepper:
    """The optimizer of a case in float64, one whole layer at a time."""

    def __init__(self, case: Case):
        self.case = case
        self.states: dict[str, dict[str, Any]] = {layer.name: {} for layer in case.layers}

    def step(self, layer: Any, w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        options, state = self.case.groups[layer.group], self.states[layer.name]
        if not self.case.optimizer.startswith("torch."):
            state.update(group_gradients=g.unsqueeze(0), resolution=2.0**-23, model_gradient_norm=None)
            after, _ = REFERENCES[self.case.optimizer](w, g, state, **options)
            return after
        if "optimizer" not in state:
            state["weight"] = torch.nn.Parameter(w.clone())
            kind = getattr(torch.optim, self.case.optimizer.removeprefix("torch."))
            state["optimizer"] = kind([state["weight"]], **options, **self.case.constructor)
        state["weight"].grad = g
        state["optimizer"].step()
        return state["weight"].detach().clone()


def reference(case: Case, plan: Plan, ranks: int, seed: int = 0) -> tuple[Weights, Weights]:
    """The weights after training in float64, and where the next gradient would be taken (by rank 0)."""
    groups = ranks * case.accumulation
    weights = {name: w.double() for name, w in initial_weights(case).items()}
    previous: list[Weights] = [{} for _ in range(ranks)]
    stepper = Stepper(case)
    for step in range(case.steps):
        moved = [displaced(weights, previous[rank], plan, step, seed) for rank in range(ranks)]
        of_groups = {
            name: torch.stack([CURVATURE * (moved[i % ranks][name] - t[i].double()) for i in range(groups)])
            for name, t in targets(case, step, groups).items()
        }
        mean = {name: g.mean(dim=0) for name, g in of_groups.items()}
        if case.clipping:
            norm = sqrt(sum(float(g.square().sum()) for g in mean.values()))
            mean = {name: g / max(1.0, (norm + 1e-6) / case.clipping) for name, g in mean.items()}
        for layer in case.layers:
            if layer.name in mean:
                weights[layer.name] = stepper.step(layer, weights[layer.name], mean[layer.name])
        own = plan.direction == "own_gradient"
        previous = [{n: of_groups[n][k::ranks].mean(dim=0) if own else mean[n] for n in mean} for k in range(ranks)]
    return weights, displaced(weights, previous[0], plan, case.steps, seed)


def displaced(weights: Weights, previous: Weights, plan: Plan, number: int, seed: int) -> Weights:
    """Where gradients are taken."""
    if plan.direction != "noise":
        return {name: w - plan.step_size * previous.get(name, 0.0) for name, w in weights.items()}
    draw = {"gaussian": gaussian, "uniform": uniform}[plan.noise]
    found = {}
    for name, w in weights.items():
        key = key_of(seed, number, f"leaves.{name}.weight" if plan.named else name)
        z = draw(key, torch.arange(w.numel())).view(w.shape)
        found[name] = w - plan.step_size * w.norm() / sqrt(w.numel()) * z
    return found


def noise_of_dtensors(shape: tuple[int, ...], dimensions: tuple[int, ...]) -> torch.Tensor:
    """Where noise moves a layer that a mesh cuts along these dimensions."""
    mesh = init_device_mesh("cpu", (2,) * len(dimensions))
    whole = torch.arange(float(prod(shape))).view(shape)
    cut = distribute_tensor(whole, mesh, [Shard(dimension) for dimension in dimensions])
    weight: Any = torch.nn.Parameter(cut)
    with Extrapolation(LAMB([("weight", weight)], lr=0.1), 0.5, "noise"):
        found: torch.Tensor = weight.detach().full_tensor()
    assert torch.equal(weight.full_tensor(), whole)
    return found


def post_local_sgd(local: bool, direction: str) -> list[list[float]]:
    """PostLocalSGD of torch around an extrapolated optimizer: the first two steps synchronous, then two local ones."""
    model = Point()
    parallel = DistributedDataParallel(model)
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    if local:
        state = PostLocalSGDState(None, alone, start_localSGD_iter=2)
        parallel.register_comm_hook(state, post_localSGD_hook)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer: Any = PostLocalSGDOptimizer(inner, PeriodicModelAverager(period=2, warmup_steps=2)) if local else inner
    extrapolation = Extrapolation(optimizer, 0.03, direction)
    weights = []
    for noise in (*EXAMPLE[dist.get_rank()], (0.3, 0.1 * dist.get_rank())):
        optimizer.zero_grad()
        with extrapolation:
            parallel(torch.tensor(noise, dtype=torch.float64)).backward()
        optimizer.step()
        weights.append(model.w.tolist())
    return weights
