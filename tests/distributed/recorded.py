"""Exactness of real models that are cut by model parallelism, whose gradients cannot be injected.

A worker records what backward() makes of every parameter on its rank, before anything reduces it, and the weights
before and after. From the pieces of all ranks the whole layers' gradients are put together here, by what the test
knows about the cut and with nothing of the package; the float64 reference trains on those.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from trustratio.optimizers import create_optimizer

from ..reference import relative_error, run_reference
from .cases import masters
from .collective_counter import CollectiveCounter
from .exactness import BASE_OPTIONS

BOUND = 2e-6
Tensors = dict[str, torch.Tensor]


def options_of(name: str) -> dict[str, Any]:
    """One set of options for all layers of a recorded run."""
    return {"lr": 0.05, "weight_decay": 0.1, **BASE_OPTIONS.get(name, {})}


def make_optimizer(name: str, model: torch.nn.Module, **constructor: Any) -> Any:
    return create_optimizer(name, model.named_parameters(), **options_of(name), **constructor)


# Inside the workers -------------------------------------------------------------------------------------------------


class GroupCounter(CollectiveCounter):
    """Notes also the ranks that take part in each collective."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.ranks: list[list[list[int]]] = []
        super().__init__(optimizer)

    def count(self, name: str, process_group: Any) -> None:
        super().count(name, process_group)
        self.ranks[-1].append(dist.get_process_group_ranks(process_group or dist.group.WORLD))

    def _enter(self) -> None:
        super()._enter()
        self.ranks.append([])


class Recorder:
    """Records one rank's training.

    Args:
        model: As this rank holds it, after every wrapper has cut it.
        optimizer: Stepped in it.
    """

    def __init__(self, model: torch.nn.Module, optimizer: Any):
        self.parameters = dict(model.named_parameters())
        self.optimizer = optimizer
        self.counter = GroupCounter(optimizer)
        self.seen: Tensors = {}
        self.gradients: list[Tensors] = []
        self.ratios: list[dict[str, float]] = []
        self.dimensions = {name: cut_dimension(p) for name, p in self.parameters.items()}
        self.initial = self._weights()
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                parameter.register_hook(self._see(name))

    def _see(self, name: str) -> Any:
        def hook(gradient: torch.Tensor) -> None:
            added = gradient.detach().double()
            self.seen[name] = self.seen[name] + added if name in self.seen else added.clone()

        return hook

    def _weights(self) -> Tensors:
        weights = {}
        for name, parameter in self.parameters.items():
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                weights[name] = parameter.detach().float().clone()
        return weights

    def end_step(self) -> None:
        """Call after each step of the optimizer."""
        self.gradients.append(self.seen)
        self.seen = {}
        self.ratios.append(self.optimizer.trust_ratios())

    def result(self) -> dict[str, Any]:
        weights = self._weights()
        for name, shards in masters(self.optimizer).items():
            # Of 16-bit models what the optimizer holds, if that is all of this rank's part.
            values = torch.cat([values for _, values in shards])
            in_16_bits = name in weights and self.parameters[name].dtype != torch.float32
            if in_16_bits and values.numel() == weights[name].numel():
                weights[name] = values.reshape(weights[name].shape)
        return {
            "initial": self.initial,
            "gradients": self.gradients,
            "weights": weights,
            "ratios": self.ratios,
            "dimensions": self.dimensions,
            "collectives": self.counter.per_call,
            "all_reduces": self.counter.all_reduces,
            "ranks": self.counter.ranks,
        }


def cut_dimension(parameter: torch.Tensor) -> int | None:
    """The dimension that tensor parallelism cuts, by what the layers say."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    metadata = getattr(parameter, "ds_autotp_universal_checkpoint_meta", None)
    return metadata["partition_dim"] if metadata else parameter.partition_dim  # type: ignore[attr-defined]


@contextmanager
def fresh_deepspeed_groups() -> Iterator[None]:
    """DeepSpeed keeps its process groups in globals, which the next case must not find."""
    from deepspeed.utils import groups

    names = ("mpu", "mesh_device", "_TENSOR_MODEL_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP")
    before = {name: getattr(groups, name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(groups, name, value)


# In the test process ------------------------------------------------------------------------------------------------


def whole(pieces: list[Tensors], dimensions: dict[str, int | None], names: Any) -> Tensors:
    """Put layers together from the tensor-parallel ranks' pieces."""
    return {
        name: pieces[0][name]
        if dimensions[name] is None
        else torch.cat([piece[name] for piece in pieces], dim=dimensions[name])
        for name in names
    }


def assert_trained_like(
    name: str,
    initial: Tensors,
    gradients: list[Tensors],
    answers: list[dict[str, Any]],
    weights: list[Tensors],
    clipping: float | None = None,
    bound: float = BOUND,
    ratio_bound: float = 1e-6,
) -> None:
    """The weights and ratios equal those of the float64 reference.

    Args:
        name: The optimizer's.
        initial: Whole layers before training.
        gradients: Per step, whole gradients by layer, shape (ranks, *layer), whose mean the step takes.
        answers: Of the workers, for their ratios; layers that a rank does not have may be missing.
        weights: Whole layers after training, of which some may be missing, in any number.
        clipping: Norm of the whole model's gradient.
        bound: Of the relative error of a layer's change.
        ratio_bound: Of the relative error of the trust ratios.
    """
    options = dict.fromkeys(initial, options_of(name))
    reference, ratios = run_reference(name, initial, gradients, options, clipping)
    for found in weights:
        errors = {n: relative_error(w, reference[n], initial[n]) for n, w in found.items()}
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] <= bound, f"{worst}: relative error of the weight change {errors[worst]:.2e}"
    for answer in answers:
        assert answer["ratios"][-1]
        for step, wanted in zip(answer["ratios"], ratios, strict=True):
            for layer in wanted.keys() & step.keys():
                ratio = wanted[layer]
                assert abs(step[layer] / ratio - 1) <= ratio_bound, f"{layer}: ratio {step[layer]} for {ratio}"


def assert_recorded_exact(name: str, answers: list[dict[str, Any]], tensor_parallel: int, **options: Any) -> None:
    """The same for a model that is cut over groups of consecutive ranks, rank r having piece r mod `tensor_parallel`.

    All ranks with one piece are data-parallel.
    """
    replicas = [answers[first : first + tensor_parallel] for first in range(0, len(answers), tensor_parallel)]
    dimensions = answers[0]["dimensions"]
    names = list(dimensions)
    initial = whole([answer["initial"] for answer in replicas[0]], dimensions, names)
    gradients = []
    for step in range(len(answers[0]["gradients"])):
        of_replicas = [
            whole([a["gradients"][step] for a in replica], dimensions, replica[0]["gradients"][step])
            for replica in replicas
        ]
        gradients.append({n: torch.stack([g[n] for g in of_replicas]) for n in of_replicas[0]})
    weights = [whole([answer["weights"] for answer in replica], dimensions, names) for replica in replicas]
    assert_trained_like(name, initial, gradients, answers, weights, **options)
    for answer in answers:
        assert all(set(step) == set(names) for step in answer["ratios"])
        for layer in (layer for layer, dimension in dimensions.items() if dimension is None):
            same = torch.equal(answer["weights"][layer], answers[0]["weights"][layer])
            assert same, f"{layer}: ranks that all have it whole disagree"
