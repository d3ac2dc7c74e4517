"""What a run needs before it is started: memory by part, bytes on the wire, collectives and time of a step.

Memory and traffic follow from what DeepSpeed 0.19 and the optimizers allocate and send, read off the tensors of real
engines and the collectives of real steps (tests/recipes/test_plan.py). Activations follow from what autograd keeps of
one encoder layer with fused attention. Times are an estimate from the assumptions that are printed with them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..common.errors import RecipeError
from ..configuration.config import RecipeConfig
from ..configuration.phases import Phase, phases_of
from ..model.flops import ModelFlops
from ..model.sixteen_bits import state_bytes
from ..rules.global_batch import plan_batch
from .memory import BF16, FP32, GIB, MemoryPart, ModelSize, memory_parts, model_size, planned_precision
from .traffic import Traffic, traffic


@dataclass(frozen=True)
class Machine:
    """The machine and what is assumed of it.

    Attributes:
        memory: bytes per GPU.
        gpus_per_node: GPUs joined by the fast links.
        peak: peak FLOP/s per GPU in the precision of training.
        utilization: share of the peak that forward and backward reach (MFU).
        link: bytes/s per GPU inside a node, one direction.
        network: bytes/s per GPU between nodes, one direction.
        memory_rate: bytes/s of a GPU's memory, which bounds the optimizer's step.
        latency: seconds per collective and hop of log2(ranks).
        overlap: share of the communication that hides behind the computation.
        reserve: bytes per GPU for the context, the allocator's gaps and the libraries' work space.
    """

    memory: float = 80 * GIB
    gpus_per_node: int = 8
    peak: float = 312e12
    utilization: float = 0.4
    link: float = 200e9
    network: float = 20e9
    memory_rate: float = 1.5e12
    latency: float = 20e-6
    overlap: float = 0.0
    reserve: float = 2 * GIB


@dataclass(frozen=True)
class PhasePlan:
    """The plan of one phase at one number of GPUs.

    Attributes:
        gpus, micro, accumulation: the division of the global batch; micro 0 if nothing fits.
        memory: bytes per rank by part, at this micro-batch (at 1 if nothing fits).
        total: their sum with the machine's reserve.
        fits: whether the total is at most the machine's memory.
        traffic: of one update.
        compute, communication, update, step: estimated seconds of one update.
        sequences_per_second: estimated.
        hours: estimated time of the whole phase.
        problem: why there is no plan, or "".
    """

    phase: Phase
    gpus: int
    micro: int
    accumulation: int
    memory: tuple[MemoryPart, ...]
    total: float
    fits: bool
    traffic: Traffic
    compute: float
    communication: float
    update: float
    step: float
    sequences_per_second: float
    hours: float
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)


def plan_phase(
    size: ModelSize, config: RecipeConfig, phase: Phase, gpus: int, machine: Machine, micro: int | None = None
) -> PhasePlan:
    """Plan one phase: the largest micro-batch that fits and divides the global batch, and what follows.

    Args:
        size: see `model_size`.
        config: ZeRO stage, precision, checkpointing.
        phase: global batch and sequence length.
        gpus: data-parallel ranks.
        machine: memory and assumptions.
        micro: plan this micro-batch instead of looking for one.
    """
    per_rank = max(1, phase.global_batch // gpus)

    def parts_of(candidate: int) -> tuple[MemoryPart, ...]:
        return tuple(memory_parts(size, config, phase, candidate, gpus))

    def total(parts: tuple[MemoryPart, ...]) -> float:
        return sum(part.bytes for part in parts) + machine.reserve

    chosen = micro
    if chosen is None:
        fitting = [n for n in divisors(per_rank) if total(parts_of(n)) <= machine.memory]
        chosen = max(fitting, default=0)
    parts = parts_of(max(1, chosen))
    accumulation = per_rank // max(1, chosen)
    sent = traffic(size, config, accumulation, gpus)

    operations = flops_per_sequence(size, config, phase, recomputed=config.training.activation_checkpointing)
    compute = phase.global_batch / gpus * operations / (machine.peak * machine.utilization)
    communication = size.passes * _sending_seconds(sent, gpus, machine)
    update = _update_seconds(size, config, gpus, machine)
    step = compute + (1 - machine.overlap) * communication + update
    return PhasePlan(
        phase=phase,
        gpus=gpus,
        micro=chosen,
        accumulation=accumulation,
        memory=parts,
        total=total(parts),
        fits=total(parts) <= machine.memory and chosen > 0,
        traffic=sent,
        compute=compute,
        communication=communication,
        update=update,
        step=step,
        sequences_per_second=phase.global_batch / step,
        hours=phase.steps * step / 3600,
        problem=_undivided(phase.global_batch, micro, gpus),
    )


def flops_per_sequence(size: ModelSize, config: RecipeConfig, phase: Phase, recomputed: bool = False) -> float:
    """Return the FLOPs of one sequence of a phase, forward and backward; see `ModelFlops.update` for `recomputed`."""
    length = phase.sequence_length
    predicted = config.data.mask_probability * length
    flops, discarded = ModelFlops.of(size.shape, size.vocabulary), config.data.discard_smallest
    # Which predictions have the smallest losses takes a forward pass of its own.
    first = flops.forward(length, predicted, length) if discarded else 0.0
    return first + size.passes * flops.update(length, (1 - discarded) * predicted, length, recomputed)


def _sending_seconds(sent: Traffic, gpus: int, machine: Machine) -> float:
    rate = machine.link if gpus <= machine.gpus_per_node else machine.network
    hops = math.ceil(math.log2(gpus)) if gpus > 1 else 0
    return sum(sent.bytes.values()) / rate + sum(sent.collectives.values()) * machine.latency * hops


def _update_seconds(size: ModelSize, config: RecipeConfig, gpus: int, machine: Machine) -> float:
    elements = size.elements / gpus if config.training.zero_stage else size.elements
    master = config.training.master
    gradient = FP32 if master is None else BF16
    weights = gradient + (BF16 if master == "kahan" else 0)
    kept = weights + size.states * state_bytes(config.training)
    # Measuring and applying both read weights, gradient and state; applying writes weights and state.
    return elements * (2 * (gradient + kept) + kept) / machine.memory_rate


def _undivided(global_batch: int, micro: int | None, gpus: int) -> str:
    """Return why the GPUs, or the micro-batch if one is given, do not divide a global batch; "" if they do."""
    if global_batch % gpus:
        below = global_batch // gpus * gpus
        nearest = " and ".join(f"{batch:,}" for batch in (below, below + gpus) if batch)
        return f"{global_batch:,} sequences are not divisible by {gpus} GPUs; nearest: {nearest}"
    if not micro:
        return ""
    try:
        plan_batch(global_batch, micro, gpus)
    except RecipeError as error:  # the recipe's own complaint
        return str(error)
    return ""


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def growth(size: ModelSize, config: RecipeConfig, phase: Phase, machine: Machine, most: int = 1024) -> list[PhasePlan]:
    """Return the plans of a phase at 1, 2, 4, ... `most` GPUs."""
    return [
        plan_phase(size, config, phase, 2**power, machine) for power in range(most.bit_length()) if 2**power <= most
    ]


def check_fits(
    config: RecipeConfig,
    vocabulary_size: int | None,
    ranks: int,
    memory: float,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Check that every phase's micro-batch fits into a GPU, before anything is built.

    Args:
        config: resolved, with the micro-batches to train with.
        vocabulary_size: of the prepared data; None: the configuration's.
        ranks: data-parallel processes.
        memory: bytes of one GPU.
        settings: DeepSpeed settings, for offload and bucket sizes.

    Raises:
        RecipeError: it does not; the message has the parts and what would fit.
    """
    size = model_size(config, vocabulary_size)
    for phase in phases_of(config):
        parts = memory_parts(size, config, phase, phase.micro_batch, ranks, settings)
        parts.append(MemoryPart("reserved", Machine().reserve, True))  # as much as plan.py leaves
        needed = sum(part.bytes for part in parts)
        if needed > memory:
            raise RecipeError(_does_not_fit(size, config, phase, ranks, memory, parts, needed))


def _does_not_fit(
    size: ModelSize,
    config: RecipeConfig,
    phase: Phase,
    ranks: int,
    memory: float,
    parts: list[MemoryPart],
    needed: float,
) -> str:
    listed = ", ".join(f"{part.name} {_gib(part.bytes)}" for part in sorted(parts, key=lambda part: -part.bytes))
    option = "--micro_batch" if phase.number == 1 else "phase_two.micro_batch="
    plan = plan_phase(size, config, phase, ranks, Machine(memory=memory))
    checkpointed = dataclasses.replace(config.training, activation_checkpointing=True)
    again = plan_phase(size, dataclasses.replace(config, training=checkpointed), phase, ranks, Machine(memory=memory))
    advice = [f"{option} {plan.micro} fits".replace("= ", "=")] if plan.fits else []
    if again.fits and again.micro > plan.micro:
        advice.append(f"with training.activation_checkpointing=true, {option} {again.micro}".replace("= ", "="))
    if config.training.zero_stage < 3:
        advice.append("a higher --zero_stage or more GPUs divide weights and state further")
    gpus = f"{ranks} GPU{'s' * (ranks > 1)} (ZeRO-{config.training.zero_stage}, {planned_precision(config)})"
    return (
        f"phase {phase.number} of {config.preset} needs {_gib(needed)} per GPU with {phase.micro_batch} sequences of "
        f"{phase.sequence_length} on {gpus}, and a GPU here has {_gib(memory)}: {listed}; "
        f"{'; '.join(advice) or 'use more GPUs or a smaller model'}"
    )


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"
