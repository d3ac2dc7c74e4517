"""What runs inside the worker processes: one training case, from a description to the weights it ends with."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from ..base_optimizers import NaiveTrustRatio, create
from .collective_counter import CollectiveCounter

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LayerSpec:
    """One layer of a test model.

    Attributes:
        name: Unique name.
        shape: Its shape.
        group: Index of its parameter group.
        frozen: No gradient, and not handed to the optimizer's update (requires_grad=False).
        tied_to: Name of the layer whose parameter it shares.
    """

    name: str
    shape: tuple[int, ...]
    group: int = 0
    frozen: bool = False
    tied_to: str | None = None


@dataclass(frozen=True)
class Case:
    """One run: which model, which optimizer, how it is sharded, for how many steps.

    Attributes:
        optimizer: Registered name, one of `BASES`, "naive", "naive trust ratio", or one of torch's as "torch.AdamW".
        layers: The model.
        stage: "dense", "ddp", "by hand" (gradients averaged between backward and step) or a ZeRO stage 0 to 3.
        groups: Options of each parameter group, with at least the optimizer's lr.
        constructor: Further constructor options.
        steps: Optimizer steps.
        accumulation: Micro-batches per step.
        dtype: "fp32", "bf16" or "fp16".
        parameters: dtype of the model's parameters before it is wrapped.
        zero: Entries of the config's zero_optimization.
        config: Other entries of the DeepSpeed config.
        clipping: The config's gradient_clipping.
        zero_init: Build the model under deepspeed.zero.Init.
        skipped: Layer names by step that get no gradient in that step.
        overflow: Steps whose gradient is infinite.
        spread: Relative difference of the gradients of ranks and micro-batches; their mean is the injected one.
        noise: Difference of those gradients that has another pattern in every element, relative to the layer's size.
        whole_numbers: Inject gradients of few digits instead, another one in each rank and micro-batch; see
            `whole_numbers`.
        named: Hand named parameters to the optimizer.
        regroup: Move the last parameter of the first group to the front of the second after construction.
        poison: Fill everything outside the shards with NaN before the first step.
        seed: Of weights and gradients.
        save_after: Save a checkpoint after this many steps and go on from it in a new engine.
        folder: Where.
    """

    optimizer: str
    layers: tuple[LayerSpec, ...]
    stage: str | int
    groups: tuple[dict[str, Any], ...]
    constructor: dict[str, Any] = field(default_factory=dict)
    steps: int = 5
    accumulation: int = 1
    dtype: str = "fp32"
    parameters: str = "fp32"
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    clipping: float = 0.0
    zero_init: bool = False
    skipped: dict[int, tuple[str, ...]] = field(default_factory=dict)
    overflow: tuple[int, ...] = ()
    spread: float = 0.5
    noise: float = 0.0
    whole_numbers: bool = False
    named: bool = True
    regroup: bool = False
    poison: bool = False
    seed: int = 0
    save_after: int | None = None
    folder: str | None = None


def initial_weights(case: Case) -> dict[str, torch.Tensor]:
    """fp32 weights by name, representable in the case's dtype."""
    generator = torch.Generator().manual_seed(case.seed)
    return {
        layer.name: torch.randn(layer.shape, generator=generator)
        .to(DTYPES[case.dtype])
        .to(DTYPES[case.parameters])
        .float()
        for layer in case.layers
        if layer.tied_to is None
    }


def mean_gradients(case: Case) -> list[dict[str, torch.Tensor]]:
    """Per step, the gradient of every layer that has one; the sum over both users of a tied parameter."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    steps = []
    for step in range(case.steps):
        gradients: dict[str, torch.Tensor] = {}
        for layer in case.layers:
            scale = 10.0 ** torch.empty(()).uniform_(-2, 0, generator=generator).item()
            g = (scale * torch.randn(layer.shape, generator=generator)).to(DTYPES[case.dtype]).float()
            if not layer.frozen and layer.name not in case.skipped.get(step, ()):
                gradients[layer.name] = g
        steps.append(gradients)
    return steps


def group_gradients(case: Case, step: int, mean: dict[str, torch.Tensor], groups: int) -> dict[str, torch.Tensor]:
    """The gradients of all groups (micro-batch x rank) in a step, shape (groups, *layer), with this mean.

    Noise moves each element by levels that are spread evenly around zero, to a different group in every element. So no
    element's variance is nearly zero, where the ratio of mean to variance would magnify fp32's rounding.
    """
    if case.whole_numbers:
        return whole_numbers(case, step, mean, groups)
    levels = 2 * (torch.arange(groups) + 0.5) / groups - 1
    factors = 1.0 + case.spread * levels / 2
    gradients = {}
    for number, (name, g) in enumerate(mean.items()):
        generator = torch.Generator().manual_seed(1000 * case.seed + 100 * step + number)
        of_groups = factors.view(-1, *[1] * g.dim()) * g
        if case.noise:
            order = torch.rand(groups, *g.shape, generator=generator).argsort(dim=0)
            size = 0.5 + torch.rand(g.shape, generator=generator)
            rms = g.square().mean().sqrt()
            if case.dtype == "fp32":
                of_groups = of_groups + case.noise * rms * size * levels[order]
            else:
                of_groups = _small_integers(g / rms, size, (groups * levels)[order])
                of_groups = of_groups * 2.0 ** rms.log2().round()
        gradients[name] = of_groups
    return gradients


def whole_numbers(case: Case, step: int, like: dict[str, torch.Tensor], groups: int) -> dict[str, torch.Tensor]:
    """Gradients like `group_gradients`, of which up to six have a mean that is exact in 16 bits, in whatever order.

    They are multiples of 3, so that a third of one is exact too, times powers of two.
    """
    gradients = {}
    for number, (name, g) in enumerate(like.items()):
        generator = torch.Generator().manual_seed(1000 * case.seed + 100 * step + number)
        exponent = torch.randint(-7, -3, (), generator=generator)
        gradients[name] = 3 * torch.randint(-14, 15, (groups, *g.shape), generator=generator) * 2.0**exponent
    return gradients


def _small_integers(mean: torch.Tensor, size: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Noisy gradients in eighths, such that sums of up to four and products with powers of two are exact in 16 bits."""
    steps = (24 * size / max(1, len(levels) - 1)).floor().clamp(min=1)
    return ((8 * mean).round().clamp(-24, 24) + steps * levels) / 8


class Leaf(torch.nn.Module):
    """One layer whose gradient is exactly the tensor it is called with."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=dtype))

    def forward(self, gradient: torch.Tensor) -> torch.Tensor:
        return (self.weight * gradient.to(self.weight.device)).sum()


class Model(torch.nn.Module):
    """Leaves by name; the loss is linear in the weights, so gradients can be injected."""

    def __init__(self, case: Case):
        super().__init__()
        dtype = None if case.parameters == "fp32" else DTYPES[case.parameters]
        self.leaves = torch.nn.ModuleDict({layer.name: Leaf(layer.shape, dtype) for layer in case.layers})
        for layer in case.layers:
            if layer.tied_to is not None:
                self.leaves[layer.name].weight = self.leaves[layer.tied_to].weight
            self.leaves[layer.name].weight.requires_grad_(not layer.frozen)

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, value in weights.items():
                with gathered([self.leaves[name].weight], modify=True):
                    if self.leaves[name].weight.numel() == value.numel():
                        self.leaves[name].weight.copy_(value)

    def forward(self, gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum(
            (self.leaves[name](g) for name, g in gradients.items()),
            start=torch.zeros(()),
        )


def _sharded_from_the_start(case: Case, config: dict[str, Any]) -> AbstractContextManager[Any]:
    if not case.zero_init:
        return nullcontext()
    return deepspeed.zero.Init(config_dict_or_path=config)


@contextmanager
def gathered(parameters: list[torch.nn.Parameter], modify: bool = False) -> Iterator[None]:
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if modify else None, enabled=bool(sharded)):
        yield


class NaiveLAMB(torch.optim.Optimizer):
    """What everybody else does: LAMB over whatever tensors it is stepped with. The harness must catch it."""

    def __init__(self, params: Any, lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                t = state["step"] = state.get("step", 0) + 1
                m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * p.grad
                v = state["v"] = 0.999 * state.get("v", 0) + 0.001 * p.grad.square()
                u = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-6) + 0.01 * p
                p.sub_(group["lr"] * p.norm() / u.norm() * u)


def make_optimizer(case: Case, model: Model) -> torch.optim.Optimizer:
    groups = []
    for index, options in enumerate(case.groups):
        members = [
            (layer.name, model.leaves[layer.name].weight)
            for layer in case.layers
            if layer.group == index and layer.tied_to is None
        ]
        groups.append({"params": members if case.named else [p for _, p in members], **options})
    lr = case.groups[0]["lr"]
    if case.optimizer.startswith("naive"):
        kind = NaiveLAMB if case.optimizer == "naive" else NaiveTrustRatio
        return kind([{"params": [p for _, p in g["params"]], "lr": g["lr"]} for g in groups], lr=lr)
    if case.optimizer.startswith("torch."):
        torch_class = getattr(torch.optim, case.optimizer.removeprefix("torch."))
        return torch_class(groups, lr=lr, **case.constructor)  # type: ignore[no-any-return]
    optimizer = create(case.optimizer, groups, lr=lr, **case.constructor)
    if case.regroup:
        first, second = optimizer.param_groups
        second["params"].insert(0, first["params"].pop())
        for group in (first, second):
            group.pop("param_names", None)
    return optimizer


def deepspeed_config(case: Case) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": case.clipping,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": case.stage, **case.zero},
        **case.config,
    }
    if case.dtype == "bf16":
        config.setdefault("bf16", {"enabled": True})
    if case.optimizer.startswith(("naive", "torch.")):
        config["zero_allow_untested_optimizer"] = True
    return config


def run_case(case: Case) -> dict[str, Any]:
    """Train the case on this rank.

    Returns:
        weights: Final model weights by name, whole, as the model holds them.
        masters: This rank's shards of the optimizer's own weights: name -> [(offset, values)].
        ratios: `trust_ratios()` after each optimizer step.
        collectives: Collectives of each `optimizer.step()` call.
        all_reduces: The all-reduces among them.
        step_counts: The optimizer's `step` state by layer.
        padding_is_nan: Whether every element outside the shards is NaN, after `poison`.
        groups: The optimizer's group options.
    """
    run = CaseRun(case)
    try:
        run.train(0, case.save_after if case.save_after is not None else case.steps)
        if case.save_after is not None:
            run.engine.save_checkpoint(case.folder, tag="middle")
            before = run
            run = CaseRun(case, perturbed=True)
            before.close()
            path, _ = run.engine.load_checkpoint(case.folder, tag="middle")
            assert path is not None
            run.train(case.save_after, case.steps)
        return run.result()
    finally:
        run.close()


class CaseRun:
    def __init__(self, case: Case, perturbed: bool = False):
        self.case = case
        weights = initial_weights(case)
        if perturbed:
            # What a checkpoint fails to restore must show.
            weights = {name: w + 1.0 for name, w in weights.items()}
        config = deepspeed_config(case)
        init = (
            deepspeed.zero.Init(config_dict_or_path=config, dtype=DTYPES[case.dtype])
            if case.zero_init
            else nullcontext()
        )
        with init:
            self.model = Model(case)
        self.model.load(weights)
        self.optimizer = make_optimizer(case, self.model)
        self.config = config
        self.engine: Any = None
        self.trained: Any = self.model
        self._wrap()
        self.counter = CollectiveCounter(self.optimizer)
        self.ratios: list[dict[str, float]] = []
        self.gradients = mean_gradients(case)

    def _wrap(self) -> None:
        if isinstance(self.case.stage, int):
            self.engine, *_ = deepspeed.initialize(model=self.model, optimizer=self.optimizer, config=self.config)
            self.trained = self.engine
            assert self.engine.basic_optimizer is self.optimizer
        elif self.case.stage == "ddp":
            self.trained = torch.nn.parallel.DistributedDataParallel(self.model, find_unused_parameters=True)
        elif self.case.stage == "by hand":
            self.optimizer.data_parallel_group = dist.group.WORLD  # type: ignore[attr-defined]

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            for micro in range(self.case.accumulation):
                self._backward(step, micro)
            if self.case.stage == "by hand":
                average_by_hand(self.model)
            if self.engine is None:
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.case.poison and step == first:
                poison_padding(self.optimizer)
            if hasattr(self.optimizer, "trust_ratios"):
                self.ratios.append(self.optimizer.trust_ratios())

    def _backward(self, step: int, micro: int) -> None:
        case = self.case
        world = 1 if case.stage == "dense" else dist.get_world_size()
        index = micro * world + (0 if case.stage == "dense" else dist.get_rank())
        of_groups = group_gradients(case, step, self.gradients[step], world * case.accumulation)
        factor = float("inf") if step in case.overflow else 1.0
        gradients = {name: g[index] * factor for name, g in of_groups.items()}
        if self.engine is not None:
            loss = self.trained(gradients)
            self.engine.backward(loss)
            self.engine.step()
        else:
            (self.trained(gradients) / case.accumulation).backward()

    def result(self) -> dict[str, Any]:
        weights = {}
        for layer in self.case.layers:
            parameter = self.model.leaves[layer.name].weight
            with gathered([parameter]):
                weights[layer.name] = parameter.detach().float().clone()
        return {
            "weights": weights,
            "masters": masters(self.optimizer),
            "ratios": self.ratios,
            "collectives": self.counter.per_call,
            "all_reduces": self.counter.all_reduces,
            "step_counts": step_counts(self.optimizer),
            "padding_is_nan": padding_is_nan(self.optimizer),
            "groups": [
                {k: v for k, v in group.items() if k not in ("params", "param_names")}
                for group in self.optimizer.param_groups
            ],
        }

    def close(self) -> None:
        self.counter.close()
        if self.engine is not None:
            self.engine.destroy()
        self.engine = self.trained = None
        gc.collect()


def average_by_hand(model: torch.nn.Module, *, add: bool = False) -> None:
    """What DDP does, between backward and step; or only the sum."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= 1 if add else dist.get_world_size()


def masters(optimizer: Any) -> dict[str, list[tuple[int, torch.Tensor]]]:
    """Return this rank's shards of the tensors that the optimizer steps."""
    shards: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for plan in getattr(optimizer, "_plans", {}).values():
        for shard in plan.layout.shards:
            layer = plan.layout.layers[shard.layer]
            flat = plan.layout.tensors[layer.tensor].detach().reshape(-1)
            values = flat[shard.start : shard.start + shard.length].clone()
            shards.setdefault(layer.name, []).append((shard.offset, values))
    return shards


def _padding(optimizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (tensor, mask of the elements outside all shards) for the optimizer's tensors and their state."""
    for plan in optimizer._plans.values():
        for carrier, tensor in enumerate(plan.layout.tensors):
            outside = torch.ones(tensor.numel(), dtype=torch.bool)
            for shard in plan.layout.shards:
                if plan.layout.layers[shard.layer].tensor == carrier:
                    outside[shard.start : shard.start + shard.length] = False
            yield tensor.detach(), outside
            state = optimizer.state.get(tensor, {})
            for name in optimizer.element_state:
                if name in state:
                    yield state[name], outside


def poison_padding(optimizer: Any) -> None:
    for tensor, outside in _padding(optimizer):
        tensor.view(-1)[outside] = float("nan")


def padding_is_nan(optimizer: Any) -> bool:
    if not hasattr(optimizer, "_plans"):
        return False
    return all(bool(tensor.view(-1)[outside].isnan().all()) for tensor, outside in _padding(optimizer))


def step_counts(optimizer: Any) -> dict[str, float]:
    """The number of updates of each layer, as the optimizer's state has it."""
    counts: dict[str, float] = {}
    for plan in getattr(optimizer, "_plans", {}).values():
        for tensor, layers in zip(plan.layout.tensors, plan.tensor_layers, strict=True):
            state = optimizer.state.get(tensor, {})
            values = torch.as_tensor(state.get("layers", {}).get("step", state.get("step", 0.0)))
            for index, value in zip(layers, values.expand(len(layers)).tolist(), strict=True):
                counts[plan.layout.layers[index].name] = value
    return counts
