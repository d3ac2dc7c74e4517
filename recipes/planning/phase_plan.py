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

from trustratio.optimizers.gradient_statistics.squares import BUCKET_ELEMENTS

from ..common.errors import RecipeError
from ..configuration.config import ModelConfig, RecipeConfig
from ..configuration.phases import Phase, phases_of
from ..model.build import outline
from ..model.optimizer import is_baseline
from ..rules.global_batch import plan_batch

GIB = 2**30
_FP32, _FP64 = 4, 8

NORM_SUMS: dict[str, tuple[int, ...]] = {
    "lars": (2,),
    "lamb": (3,),
    "lambc": (3,),
    "lans": (1, 4),
    "novograd": (1,),
    "sngm": (1,),
    "tvlars": (3,),
    "cowclip": (1,),
    "clars": (6,),
    "vrsgd": (6,),
    "vradam": (6,),
    "vrlars": (6, 2),
    "vrlamb": (6, 3),
}
"""fp64 numbers per layer in each reduction of one sharded `step()` call, with the default options."""

_GROUP_SUMS = 5
"""fp64 numbers per layer that statistics of group gradients add up in the step where nothing is sharded."""

_BUCKET = 5 * 10**8  # DeepSpeed's reduce_bucket_size, in elements
_PERSISTENT = 10**5  # DeepSpeed's stage3_param_persistence_threshold, in elements
_REUSE = 10**9  # DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance, in elements


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
class ModelSize:
    """What matters of a model and its optimizer.

    Attributes:
        shape: of the configuration.
        vocabulary: rows of the embedding.
        layers: elements of each.
        states: numbers per element that the optimizer keeps.
        statistics: of group gradients that it needs: "", "norms" or "squares".
        norm_sums: see `NORM_SUMS`; None where the number is not known.
    """

    shape: ModelConfig
    vocabulary: int
    layers: tuple[int, ...]
    states: int
    statistics: str
    norm_sums: tuple[int, ...] | None

    @property
    def elements(self) -> int:
        """Number of parameters."""
        return sum(self.layers)


def model_size(config: RecipeConfig, vocabulary_size: int | None = None) -> ModelSize:
    """Measure a configuration's model and optimizer without allocating them."""
    model, optimizer = outline(config, vocabulary_size)
    return ModelSize(
        shape=config.model,
        vocabulary=model.config.vocab_size,
        layers=tuple(p.numel() for p in model.parameters()),
        states=_element_states(config, optimizer),
        statistics=getattr(optimizer, "group_statistics", None) or "",
        norm_sums=() if is_baseline(config.optimizer.name) else _norm_sums(config),
    )


def _norm_sums(config: RecipeConfig) -> tuple[int, ...] | None:
    return (
        NORM_SUMS.get(config.optimizer.name.lower()) if config.optimizer.options.get("max_grad_norm") is None else None
    )


def _element_states(config: RecipeConfig, optimizer: Any) -> int:
    name = config.optimizer.name.lower()
    if name == "adamw":
        return 2 + bool(config.optimizer.options.get("amsgrad"))
    if name == "sgd":
        return int(bool(config.optimizer.options.get("momentum")))
    return len(optimizer.element_state)


@dataclass(frozen=True)
class MemoryPart:
    """Bytes per rank of one part; `held` between steps, or only during one."""

    name: str
    bytes: float
    held: bool


def memory_parts(
    size: ModelSize,
    config: RecipeConfig,
    phase: Phase,
    micro: int,
    ranks: int,
    settings: Mapping[str, Any] | None = None,
) -> list[MemoryPart]:
    """Return the memory of one rank by part.

    Args:
        size: see `model_size`.
        config: ZeRO stage, precision and checkpointing.
        phase: sequence length.
        micro: sequences per forward pass.
        ranks: data-parallel processes.
        settings: DeepSpeed settings: bucket sizes, offload (offloaded parts are no GPU memory).
    """
    zero = (settings or {}).get("zero_optimization") or {}
    stage, precision = config.training.zero_stage, _precision(config)
    elements, share = size.elements, math.ceil(size.elements / ranks)
    width = _FP32 if precision == "fp32" else 2
    bucket = int(_number(zero, "reduce_bucket_size", _BUCKET))
    sharded = share if stage else elements
    accumulate_fp32 = stage == 1 and precision == "bf16"
    parts = [MemoryPart("weights", width * (share if stage == 3 else elements), True)]
    if stage == 3:
        threshold = _number(zero, "stage3_param_persistence_threshold", _PERSISTENT)
        kept = sum(n for n in size.layers if n <= threshold)
        live = min(elements, int(_number(zero, "stage3_max_live_parameters", _REUSE)))
        parts.append(MemoryPart("small weights kept whole", width * kept, True))
        parts.append(MemoryPart("gathered weights", width * max(0, live - kept), False))
    if stage in (1, 2):  # seen in some runs of real engines, not in all
        parts.append(MemoryPart("kept embedding gradient", width * size.vocabulary * size.shape.hidden, True))
    parts.append(MemoryPart("gradients", width * (share if stage >= 2 else elements), stage == 3))
    if accumulate_fp32:
        parts.append(MemoryPart("fp32 sum of gradients", _FP32 * elements, True))
    if stage or width == 2:
        parts.append(MemoryPart("fp32 master weights", _FP32 * sharded, True))
    parts.append(MemoryPart("optimizer state", _FP32 * size.states * sharded, True))
    if stage in (1, 2) and not accumulate_fp32:
        parts.append(MemoryPart("fp32 gradients of the step", _FP32 * share, False))
    if size.statistics == "squares":
        whole = elements if stage < 2 else 0  # until the step, as its gradients
        parts.append(MemoryPart("squares of gradients", _FP32 * (whole + (share if stage else 0)), True))
        if stage:
            parts.append(MemoryPart("squares on their way", _FP32 * min(2 * elements, BUCKET_ELEMENTS), False))
    if stage >= 2 or (stage == 1 and not accumulate_fp32):
        buffers = 2 if stage < 3 and zero.get("overlap_comm") else 1
        parts.append(MemoryPart("reduction bucket", width * bucket * buffers, stage == 3))
    elif ranks > 1:
        parts.append(MemoryPart("reduction bucket", width * min(bucket, elements), False))
    parts.append(MemoryPart("activations", _activations(size, config, phase.sequence_length, micro, width), False))
    return [part for part in parts if part.name not in _offloaded(zero)]


def _activations(size: ModelSize, config: RecipeConfig, length: int, micro: int, width: int) -> float:
    """Bytes that autograd keeps of one micro-batch, with fused attention, and the logits' gradient.

    Per token and encoder layer of width h and inner width f: the layer's input, q, k, v, the attention's output, the
    inputs and outputs of both norms and the two sides of the activation function, 7 h + 2 f numbers; with dropout one
    byte per element of its two masks. Checkpointing keeps the input and, while it computes one layer again, the rest.
    """
    shape, tokens = size.shape, micro * length
    layer = tokens * ((7 * shape.hidden + 2 * shape.intermediate) * width + 2 * shape.hidden * (shape.dropout > 0))
    boundary = tokens * shape.hidden * width
    checkpointing = config.training.activation_checkpointing
    encoder = shape.layers * boundary + layer if checkpointing else shape.layers * layer
    embeddings = tokens * shape.hidden * width * 2
    masked = math.ceil(tokens * config.data.mask_probability)
    # Logits in the model's precision, in fp32, their log-softmax, and the gradients of the last two.
    head = masked * (4 * shape.hidden * width + size.vocabulary * (width + (2 if width == 2 else 1) * _FP32 + _FP32))
    return encoder + embeddings + head


@dataclass(frozen=True)
class Traffic:
    """What one update sends: bytes per rank by purpose, and the number of collectives by purpose."""

    bytes: dict[str, float]
    collectives: dict[str, int]


def traffic(size: ModelSize, config: RecipeConfig, accumulation: int, ranks: int, groups: int = 2) -> Traffic:
    """Return what one update sends, with ring algorithms: 2 (r - 1) / r of an all-reduced vector, half of it otherwise.

    Stage 2 reduces after every micro-batch, and DeepSpeed does so with all-reduces of whole buckets. Stage 3 gathers
    weights once per update as long as the model is smaller than stage3_max_reuse_distance, else twice per micro-batch.

    Args:
        size: see `model_size`.
        config: ZeRO stage and precision.
        accumulation: micro-batches per update.
        ranks: data-parallel processes.
        groups: parameter groups, which the sharded optimizers step one by one.
    """
    if ranks == 1:
        return Traffic({}, {})
    stage, precision = config.training.zero_stage, _precision(config)
    width = _FP32 if precision == "fp32" else 2
    ring = (ranks - 1) / ranks
    buckets = math.ceil(size.elements / _BUCKET)
    rounds = accumulation if stage >= 2 else 1
    sent = {"gradients": rounds * (1 if stage == 3 else 2) * ring * width * size.elements}
    calls = {"gradients": rounds * buckets}
    if stage in (1, 2):
        sent["weights"] = ring * width * size.elements
        calls["weights"] = groups
    if stage == 3:
        gathers = 1 if size.elements <= _REUSE else 2 * accumulation
        sent["weights"] = gathers * ring * width * size.elements
        calls["weights"] = gathers * len(size.layers)
    if stage and size.norm_sums:
        # BF16_Optimizer (stage 1, bf16) steps all groups in one call; each call carries the layers of its groups.
        steps = 1 if stage == 1 and precision == "bf16" else groups
        calls["norms"] = steps * len(size.norm_sums)
        sent["norms"] = 2 * ring * _FP64 * sum(size.norm_sums) * len(size.layers)
    if stage and size.norm_sums is None:
        calls["norms (a guess)"], sent["norms (a guess)"] = groups * 2, 2 * ring * _FP64 * 6 * len(size.layers)
    if stage == 0 and size.statistics:
        calls["norms"], sent["norms"] = 1, 2 * ring * _FP64 * _GROUP_SUMS * len(size.layers)
    if size.statistics == "squares":
        calls["squares of gradients"], travels = _squares_traffic(size.elements, stage, accumulation, ranks)
        sent["squares of gradients"] = travels * (2 if stage == 0 else 1) * ring * _FP32 * size.elements
    calls["scalars"] = 3  # masked tokens and stop flags, gradient norm, overflow
    sent["scalars"] = calls["scalars"] * 2 * ring * _FP64
    return Traffic(sent, calls)


def _squares_traffic(elements: int, stage: int, accumulation: int, ranks: int) -> tuple[int, int]:
    """Return the collectives of an update that send squares, and how often each square travels.

    Whole ones are packed into buckets. Sharded ones are staged in half a bucket: a model that fits is sent once per
    update, a larger one with every micro-batch from stage 2 on. Stages 1 and 2 cut the parameters' buffer, so
    a border between two owners makes one more collective; stage 3 cuts every layer.
    """
    if stage == 0:
        return math.ceil(elements / BUCKET_ELEMENTS), 1
    if elements <= BUCKET_ELEMENTS // 2:
        return 1, 1
    travels = accumulation if stage >= 2 else 1
    borders = travels * (ranks - 1) if stage < 3 else 0
    return math.ceil(travels * elements / (BUCKET_ELEMENTS // 2)) + borders, travels


def flops_per_sequence(size: ModelSize, length: int, masked: float, checkpointing: bool) -> tuple[float, float]:
    """Return the useful FLOPs of one sequence, forward and backward, and those really done (recomputation included).

    Per token forward: 2 per weight of the encoder's matrices and 4 length h per layer for attention; at the masked
    positions 2 (h^2 + h V). Backward is twice the forward.
    """
    h, f = size.shape.hidden, size.shape.intermediate
    encoder = size.shape.layers * length * (8 * h * h + 4 * h * f + 4 * length * h)
    head = masked * length * 2 * (h * h + h * size.vocabulary)
    return 3.0 * (encoder + head), (4.0 if checkpointing else 3.0) * encoder + 3.0 * head


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
    problem = ""
    if phase.global_batch % gpus:
        below = phase.global_batch // gpus * gpus
        nearest = " and ".join(f"{batch:,}" for batch in (below, below + gpus) if batch)
        problem = f"{phase.global_batch:,} sequences are not divisible by {gpus} GPUs; nearest: {nearest}"
    elif micro:
        problem = _undivided(phase.global_batch, micro, gpus)
    per_rank = max(1, phase.global_batch // gpus)

    def total(candidate: int) -> float:
        parts = memory_parts(size, config, phase, candidate, gpus)
        return sum(part.bytes for part in parts) + machine.reserve

    chosen = micro
    if chosen is None:
        fitting = [n for n in divisors(per_rank) if total(n) <= machine.memory]
        chosen = max(fitting, default=0)
    parts = tuple(memory_parts(size, config, phase, max(1, chosen), gpus))
    needed = total(max(1, chosen))
    accumulation = per_rank // max(1, chosen)
    sent = traffic(size, config, accumulation, gpus)
    _, done = flops_per_sequence(
        size, phase.sequence_length, config.data.mask_probability, config.training.activation_checkpointing
    )
    compute = phase.global_batch / gpus * done / (machine.peak * machine.utilization)
    rate = machine.link if gpus <= machine.gpus_per_node else machine.network
    hops = math.ceil(math.log2(gpus)) if gpus > 1 else 0
    communication = sum(sent.bytes.values()) / rate + sum(sent.collectives.values()) * machine.latency * hops
    share = size.elements / gpus if config.training.zero_stage else size.elements
    # Measuring and applying both read weights, gradient and state; applying writes weights and state.
    update = share * _FP32 * (2 * (2 + size.states) + 1 + size.states) / machine.memory_rate
    step = compute + (1 - machine.overlap) * communication + update
    return PhasePlan(
        phase=phase,
        gpus=gpus,
        micro=chosen,
        accumulation=accumulation,
        memory=parts,
        total=needed,
        fits=needed <= machine.memory and chosen > 0,
        traffic=sent,
        compute=compute,
        communication=communication,
        update=update,
        step=step,
        sequences_per_second=phase.global_batch / step,
        hours=phase.steps * step / 3600,
        problem=problem,
    )


def _undivided(global_batch: int, micro: int, gpus: int) -> str:
    """Return the recipe's complaint about a global batch that the micro-batch does not divide, or ""."""
    try:
        plan_batch(global_batch, micro, gpus)
    except RecipeError as error:
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
    gpus = f"{ranks} GPU{'s' * (ranks > 1)}"
    return (
        f"phase {phase.number} of {config.preset} needs {_gib(needed)} per GPU with {phase.micro_batch} sequences of "
        f"{phase.sequence_length} on {gpus} (ZeRO-{config.training.zero_stage}, {_precision(config)}), and a GPU here "
        f"has {_gib(memory)}: {listed}; {'; '.join(advice) or 'use more GPUs or a smaller model'}"
    )


def _precision(config: RecipeConfig) -> str:
    return "bf16" if config.training.precision == "auto" else config.training.precision


def _number(section: Mapping[str, Any], name: str, default: float) -> float:
    value = section.get(name, default)
    return default if value == "auto" else float(value)


def _offloaded(zero: Mapping[str, Any]) -> set[str]:
    def away(name: str) -> bool:
        return (zero.get(name) or {}).get("device", "none") not in ("none", None)

    gone = (
        {"fp32 master weights", "optimizer state", "fp32 gradients of the step"} if away("offload_optimizer") else set()
    )
    return gone | ({"weights"} if away("offload_param") else set())


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"
