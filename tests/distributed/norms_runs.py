"""Measured training in the workers, under every wrapper, and the float64 reference of what is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from trustratio.integrations.layer_norms import LayerNorms, clip_grad_norm_
from trustratio.integrations.norms.kept_layout import KeptLayout
from trustratio.integrations.norms.measured_step import MeasuredStep
from trustratio.integrations.norms.shard_sums import Slots

from . import fsdp_runs, megatron_distributed_runs, test_fsdp1
from .cases import Case, CaseRun, group_gradients, initial_weights, make_optimizer, mean_gradients
from .collective_counter import CollectiveCounter
from .exactness import expected
from .megatron_distributed_runs import CUT, Part
from .test_megatron import megatron

QUANTITIES = ("weight", "gradient", "update")
ROUNDING = 2.0**-23


@dataclass(frozen=True)
class Wrapped:
    """How the model of a case is trained.

    Attributes:
        kind: "case" (dense, DDP, ZeRO: what the case says), "fsdp2", "fsdp1", "megatron" (DistributedOptimizer),
            "tensor" (Megatron's tensor parallelism alone) or "redundancy" (ZeroRedundancyOptimizer).
        options: Of that kind.
        outermost: Whether the outermost wrapper is measured, or the optimizer in it.
        with_model: Whether the model is given.
    """

    kind: str = "case"
    options: dict[str, Any] = field(default_factory=dict)
    outermost: bool = False
    with_model: bool = True


class Run:
    """What all runs have: the optimizer, what wraps it, the model, and steps."""

    def __init__(self, case: Case, model: Any, optimizer: Any, outermost: Any, train: Callable[[int, int], None]):
        self.case, self.model, self.optimizer, self.outermost, self.train = case, model, optimizer, outermost, train


@contextmanager
def running(case: Case, wrapped: Wrapped) -> Iterator[Run]:
    options = wrapped.options
    if wrapped.kind == "case":
        run = CaseRun(case)
        try:
            yield Run(case, run.trained, run.optimizer, run.engine or run.optimizer, run.train)
        finally:
            run.close()
    elif wrapped.kind == "fsdp2":
        with fsdp_runs.running(case, fsdp_runs.Setup(**options)) as fsdp2:
            yield Run(case, fsdp2.model, fsdp2.optimizer, fsdp2.optimizer, fsdp2.train)
    elif wrapped.kind == "fsdp1":
        with test_fsdp1.running(case, test_fsdp1.Setup(**options)) as fsdp1:
            yield Run(case, fsdp1.wrapped, fsdp1.optimizer, fsdp1.optimizer, fsdp1.train)
    elif wrapped.kind == "megatron":
        with megatron_distributed_runs.running(case, **options) as core:
            yield Run(case, core.ddp, core.inner, core.wrapper, core.train)
    elif wrapped.kind == "tensor":
        with megatron(dist.get_world_size()):
            yield tensor_parallel(case)
    else:
        yield redundancy(case)


def tensor_parallel(case: Case) -> Run:
    """Each rank has its parts of the layers that are cut, and steps them itself."""
    part = Part(dist.get_rank(), dist.get_world_size())
    parts = {name: part.of(name, w) for name, w in initial_weights(case).items()}
    layers = tuple(replace(layer, shape=tuple(parts[layer.name].shape)) for layer in case.layers)
    model = megatron_distributed_runs.Model(replace(case, layers=layers))
    model.load(parts)
    for name, leaf in model.leaves.items():
        if CUT[name] is not None:
            weight: Any = leaf.weight
            weight.tensor_model_parallel, weight.partition_dim = True, CUT[name]
            weight.partition_stride = megatron_distributed_runs.STRIDES.get(name, 1)
    optimizer = make_optimizer(case, model)

    def train(first: int, last: int) -> None:
        for step in range(first, last):
            optimizer.zero_grad()
            model({name: part.of(name, g) for name, g in mean_gradients(case)[step].items()}).backward()
            optimizer.step()

    return Run(case, model, optimizer, optimizer, train)


def redundancy(case: Case) -> Run:
    """Every rank steps some of the layers, whole."""
    model = megatron_distributed_runs.Model(case)
    model.load(initial_weights(case))
    parallel = DistributedDataParallel(model)
    plain = make_optimizer(case, model)
    groups = [{k: v for k, v in group.items() if k != "param_names"} for group in plain.param_groups]
    optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=type(plain), lr=case.groups[0]["lr"])

    def train(first: int, last: int) -> None:
        for step in range(first, last):
            optimizer.zero_grad()
            ranks = dist.get_world_size()
            of_groups = group_gradients(case, step, mean_gradients(case)[step], ranks)
            parallel({name: g[dist.get_rank()] for name, g in of_groups.items()}).backward()
            optimizer.step()

    return Run(case, parallel, optimizer.optim, optimizer, train)


def measure(
    case: Case, wrapped: Wrapped, every: int = 1, clip: dict[str, Any] | None = None, clips_until: int = 99
) -> dict[str, Any]:
    """Train the case, and measure its steps.

    Args:
        case: The case.
        wrapped: How it is trained.
        every: Of LayerNorms.
        clip: Arguments of clip_grad_norm_, which is called before each step of the wrapper, or where the gradients are
            on the model's parameters, when the optimizer's own step begins.

        clips_until: The first step before which it is not called, of those of a wrapper.

    Returns:
        records: What `latest()` had after each step.
        collectives: In each step, those of the inner optimizer's calls and of what is measured.
        norms: What clip_grad_norm_ returned.
        clips: Collectives of each clip that was made at once.
        weights: The model's weights around each step, where every rank has whole layers.
    """
    with running(case, wrapped) as run:
        optimizer = run.outermost if wrapped.outermost else run.optimizer
        model = run.model if wrapped.with_model else None
        returned: list[torch.Tensor] = []
        clips: list[int] = []
        held_back = wrapped.kind == "megatron" or (isinstance(case.stage, int) and bool(case.stage))
        if clip is not None and not held_back:
            run.optimizer.register_step_pre_hook(
                lambda *_: returned.append(counted(clips, lambda: clip_grad_norm_(optimizer, model=model, **clip)))
            )
        norms = LayerNorms(optimizer, model, every=every)
        seen: list[int] = []
        norms.on_measure(lambda measured: seen.append(measured.latest().step))
        counter = CollectiveCounter(run.optimizer)
        answer: dict[str, Any] = {"records": [], "collectives": [], "weights": [whole_weights(run)]}
        try:
            for step in range(case.steps):
                begun = len(counter.per_call)
                if clip is not None and held_back and step < clips_until:
                    returned.append(clip_grad_norm_(optimizer, model=model, **clip))
                    assert returned[-1].isnan().all()
                run.train(step, step + 1)
                answer["records"].append(norms.latest().record())
                answer["collectives"].append(sum(counter.per_call[begun:]))
                answer["weights"].append(whole_weights(run))
        finally:
            counter.close()
        return {**answer, "norms": [norm.tolist() for norm in returned], "clips": clips, "measured": seen}


def counted(into: list[int], call: Callable[[], Any]) -> Any:
    """Note how many all-reduces a call makes."""
    all_reduce, count = dist.all_reduce, 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counting
    try:
        return call()
    finally:
        dist.all_reduce = all_reduce
        into.append(count)


def measure_local_parts(case: Case, wrapped: Wrapped) -> dict[str, Any]:
    """What everybody else does: norms of what is here."""
    reduce = MeasuredStep.reduce

    def local(step: Any, *args: Any) -> Any:
        step.layout = replace(step.layout, reductions=())
        return reduce(step, Slots(step.layout), *args[1:])

    agree = KeptLayout.agree
    MeasuredStep.reduce = local  # type: ignore[method-assign]
    KeptLayout.agree = lambda *_: None  # type: ignore[method-assign]
    try:
        return measure(case, wrapped)
    finally:
        MeasuredStep.reduce = reduce  # type: ignore[method-assign]
        KeptLayout.agree = agree  # type: ignore[method-assign]


def whole_weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if not hasattr(p, "ds_id")}


# The reference ------------------------------------------------------------------------------------------------------


def combined_gradients(case: Case) -> list[dict[str, torch.Tensor]]:
    """The mean gradient of each parameter in each step that is taken, in float64."""
    steps = []
    for step, given in enumerate(mean_gradients(case)):
        if step in case.overflow:
            continue
        combined: dict[str, torch.Tensor] = {}
        for layer in case.layers:
            if layer.name in given:
                owner = layer.tied_to or layer.name
                combined[owner] = combined.get(owner, torch.zeros(())) + given[layer.name].double()
        steps.append(combined)
    return steps


Clip = Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], None]
"""Clips gradients in place, given the weights before the step and the gradients."""


def weights_of_steps(case: Case, gradients: list[dict[str, torch.Tensor]], clip: Clip) -> list[dict[str, torch.Tensor]]:
    """The weights before each step, and after the last one, in float64."""
    if not case.optimizer.startswith("torch."):
        return [expected(replace(case, steps=steps, overflow=()))[0] for steps in range(case.steps + 1)]
    weights = {name: torch.nn.Parameter(w.double()) for name, w in initial_weights(case).items()}
    members = [
        {"params": [weights[x.name] for x in case.layers if x.group == number and x.tied_to is None], **options}
        for number, options in enumerate(case.groups)
    ]
    torch_class = getattr(torch.optim, case.optimizer.removeprefix("torch."))
    optimizer = torch_class(members, lr=case.groups[0]["lr"], **case.constructor)
    steps = [{name: w.detach().clone() for name, w in weights.items()}]
    for of_step in gradients:
        clip(steps[-1], of_step)
        for name, w in weights.items():
            w.grad = of_step.get(name)
        optimizer.step()
        steps.append({name: w.detach().clone() for name, w in weights.items()})
    return steps


def numbers_of(w: torch.Tensor, g: torch.Tensor, change: torch.Tensor) -> dict[str, float]:
    """What a LayerNorm has of one layer, as its definition says."""
    norm, moved = w.norm().item(), change.norm().item()
    numbers = {"ratio": moved / norm if norm else float("inf") if moved else 0.0}
    for name, values in zip(QUANTITIES, (w, g, change), strict=True):
        numbers[name] = values.norm().item()
        numbers[f"{name}_rms"] = values.square().mean().sqrt().item()
        numbers[f"largest_{name}"] = values.abs().max().item()
        numbers[f"zero_{name}s"] = (values == 0).double().mean().item()
    return numbers


def expected_norms(case: Case, clip: Clip = lambda w, g: None) -> list[dict[str, Any]]:
    """Per step, the numbers of each layer that is trained, and of the model under ""."""
    gradients = combined_gradients(case)
    weights = weights_of_steps(case, gradients, clip)
    trained = [x.name for x in case.layers if not x.frozen and x.tied_to is None and 0 not in x.shape]
    expected_steps = []
    for (before, after), of_step in zip(pairwise(weights), gradients, strict=False):
        triples = {}
        for name in trained:
            w = before[name].double()
            triples[name] = w, of_step.get(name, torch.zeros_like(w)).double(), after[name].double() - w
        whole = [torch.cat([triple[index].reshape(-1) for triple in triples.values()]) for index in range(3)]
        expected_steps.append({name: numbers_of(*of_layer) for name, of_layer in {**triples, "": whole}.items()})
    return expected_steps


def assert_measured(found: dict[str, Any], expected_step: dict[str, Any], bound: float = 2e-6) -> None:
    """One step's record, as `MeasuredNorms.record` makes it, is within the bound of the reference.

    An update is a difference of weights that have been rounded to fp32, which adds a fraction of the weights.
    """
    layers = {
        name.removeprefix("leaves.").removesuffix(".weight"): numbers for name, numbers in found["layers"].items()
    }
    assert set(layers) == set(expected_step) - {""}
    for name, numbers in {**layers, "": found["model"]}.items():
        for which, value in numbers.items():
            wanted = expected_step[name][which]
            of_weights = expected_step[name][which.replace("update", "weight")] if "update" in which else 1.0
            rounding = ROUNDING * of_weights if "update" in which or which == "ratio" else 0.0
            assert abs(value - wanted) <= bound * abs(wanted) + rounding, f"{name} {which}: {value} for {wanted}"
