"""Print what a preset needs on given GPUs: `python recipes/plan.py --preset lamb-64k-32k --gpus 8 --memory 80`.

Nothing is allocated and no GPU is needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence

from ..common.called import called, examples
from ..common.command import CommandParser, ends_with_message, within
from ..common.errors import RecipeError
from ..common.reporter import clock
from ..configuration.config import ARCHITECTURES, MODEL_SIZES, RecipeConfig
from ..configuration.given_schedule import check_given_schedule
from ..configuration.overrides import apply_overrides, set_field, with_model_size
from ..configuration.phases import phases_of
from ..configuration.presets import DEFAULT_PRESET, get_preset
from ..configuration.ranges import check_ranges
from ..model.sixteen_bits import describe_storage
from ..rules.global_batch import BatchPlan
from .batch_range import BatchRange, batch_ranges, shared_micro_batches
from .demands import check_demands, check_groups
from .memory import GIB, ModelSize, model_size, planned_precision
from .phase_plan import Machine, PhasePlan, flops_per_sequence, growth, plan_phase

DOES_NOT_FIT = 1
"""Exit status: there is a plan, and the machine is too small for it."""


@ends_with_message("error")
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan; return 0 if every phase fits, 1 if one does not, 2 for bad input."""
    parser = _parser()
    options, overrides = parser.parse_known_args(arguments)
    parser.refuse([text for text in overrides if text.startswith("-")])
    config, machine = _config(options, overrides), _machine(options)
    size = model_size(config)
    phases = phases_of(config)
    shared = shared_micro_batches(size, config, options.gpus, machine) or (None,) * len(phases)
    plans = [
        plan_phase(size, config, phase, options.gpus, machine, options.micro_batch or micro)
        for phase, micro in zip(phases, shared, strict=True)
    ]
    ranges = batch_ranges(size, config, plans, machine)
    for plan in plans:
        if plan.fits and not plan.problem and not ranges:  # a range that cannot be measured says so itself
            check_groups(config, BatchPlan(plan.micro, plan.accumulation, plan.gpus))
    tables = [growth(size, config, phase, machine, options.most_gpus) for phase in phases]
    if options.json:
        values = {
            "preset": config.preset,
            "parameters": size.elements,
            "machine": dataclasses.asdict(machine),
            "phases": [plan.to_dict() for plan in plans],
            ("batch_from_noise" if not config.run.batch_warmup else "batch_warmup"): [
                dataclasses.asdict(batches) for batches in ranges
            ],
            "growth": [[plan.to_dict() for plan in table] for table in tables],
        }
        print(json.dumps(values, indent=1))
    else:
        print("\n".join(_text(config, size, machine, plans, tables, ranges)))
    possible = [plan.fits and not plan.problem for plan in plans] + [not batches.problem for batches in ranges]
    return 0 if all(possible) else DOES_NOT_FIT


def _text(
    config: RecipeConfig,
    size: ModelSize,
    machine: Machine,
    plans: Sequence[PhasePlan],
    tables: Sequence[Sequence[PhasePlan]],
    ranges: Sequence[BatchRange],
) -> list[str]:
    training = config.training
    lines = [
        f"{config.preset}: {ARCHITECTURES[config.model.architecture]} {config.model.layers} x {config.model.hidden}, "
        f"{size.elements / 1e6:.1f} million "
        f"parameters in {len(size.layers)} layers, {config.optimizer.name}, ZeRO-{training.zero_stage}, "
        f"{planned_precision(config)}, activation checkpointing {'on' if training.activation_checkpointing else 'off'}",
        f"assumed: {machine.peak / 1e12:.0f} TFLOP/s x {machine.utilization:.0%}, {machine.link / 1e9:.0f} GB/s inside "
        f"{machine.gpus_per_node} GPUs, {machine.network / 1e9:.0f} GB/s per GPU between nodes, "
        f"{machine.memory_rate / 1e12:.1f} TB/s memory, {machine.latency * 1e6:.0f} us per hop, "
        f"{machine.overlap:.0%} of communication hidden, {machine.reserve / GIB:.1f} GiB reserved",
        describe_storage(dataclasses.replace(training, precision=planned_precision(config)), True),
    ]
    for number, (plan, table) in enumerate(zip(plans, tables, strict=True)):
        lines += ["", *_phase_lines(config, size, machine, plan)]
        if ranges and not plan.problem:
            lines += ranges[number].describe()
        lines += ["", *_growth_lines(table)]
    return lines


def _phase_lines(config: RecipeConfig, size: ModelSize, machine: Machine, plan: PhasePlan) -> list[str]:
    phase = plan.phase
    head = f"phase {phase.number}: {phase.steps:,} steps of {phase.global_batch:,} sequences of {phase.sequence_length}"
    if plan.problem:
        return [head, f"  {plan.problem}"]
    if not plan.micro:
        head += f": does not fit on {plan.gpus} GPUs, even one sequence at a time"
    else:
        head += f" = micro-batch {plan.micro} x accumulation {plan.accumulation} x {plan.gpus} GPUs"
    lines = [head, f"  memory per GPU: {plan.total / GIB:.2f} of {machine.memory / GIB:.1f} GiB"]
    lines += [f"    {part.name:<28}{part.bytes / GIB:>9.3f} GiB" for part in plan.memory]
    lines += [f"    {'reserved':<28}{machine.reserve / GIB:>9.3f} GiB", "  sent per GPU and step:"]
    for name, count in plan.traffic.collectives.items():
        lines.append(f"    {name:<28}{_bytes(plan.traffic.bytes[name]):>13} in {count:,} collectives")
    if config.data.discard_smallest:
        lines.append(f"  data.discard_smallest={config.data.discard_smallest:g}: one more forward pass in every update")
    if size.sample_interval is not None:
        lines.append(
            f"  a sample of the curvature in every {size.sample_interval:g} updates: one more pass over the "
            "micro-batches, computed and sent; part of the times below, not of the table above"
        )
    model_flops = flops_per_sequence(size, config, phase) * plan.sequences_per_second / plan.gpus
    lines += [
        f"  step: {plan.compute:.3f} s computing + {plan.communication:.3f} s communicating + {plan.update:.4f} s "
        f"updating = {plan.step:.3f} s; {plan.sequences_per_second:,.0f} sequences/s, "
        f"{model_flops / 1e12:.1f} model TFLOP/s per GPU; phase: {clock(plan.hours * 3600)}",
    ]
    return lines


def _growth_lines(table: Sequence[PhasePlan]) -> list[str]:
    lines = [
        f"  {'GPUs':>6}{'micro':>7}{'accum':>7}{'GiB/GPU':>9}{'sent/GPU':>12}{'collectives':>12}{'step s':>9}"
        f"{'seq/s':>11}{'scaling':>9}"
    ]
    base = next((plan for plan in table if plan.fits and not plan.problem), None)
    for plan in table:
        if plan.problem:
            lines.append(f"  {plan.gpus:>6}  {plan.problem}")
            continue
        if not plan.fits or base is None:
            lines.append(f"  {plan.gpus:>6}  does not fit: {plan.total / GIB:.1f} GiB at one sequence at a time")
            continue
        scaling = plan.sequences_per_second / plan.gpus / (base.sequences_per_second / base.gpus)
        lines.append(
            f"  {plan.gpus:>6}{plan.micro:>7}{plan.accumulation:>7}{plan.total / GIB:>9.1f}"
            f"{_bytes(sum(plan.traffic.bytes.values())):>12}{sum(plan.traffic.collectives.values()):>12}"
            f"{plan.step:>9.3f}{plan.sequences_per_second:>11,.0f}{scaling:>9.1%}"
        )
    return lines


def _config(options: argparse.Namespace, overrides: Sequence[str]) -> RecipeConfig:
    config = base = get_preset(options.preset)
    if options.model is not None:
        config = with_model_size(config, options.model)
    for flag, (section, name) in _FIELDS.items():
        if getattr(options, flag) is not None:
            config = set_field(config, section, name, getattr(options, flag))
    config = apply_overrides(config, overrides)
    check_given_schedule(base, config, {text.partition("=")[0].strip() for text in overrides})
    check_ranges(config)
    check_demands(config)
    for flag in ("gpus", "gpus_per_node", "most_gpus", "micro_batch"):
        within(f"--{flag}", getattr(options, flag), 1)
    return config


def _machine(options: argparse.Namespace) -> Machine:
    for name, (unit, _) in _ASSUMPTIONS.items():
        value = getattr(options, name)
        low_open = name not in ("overlap", "reserve", "latency")
        if (
            not math.isfinite(value)
            or value < 0
            or (low_open and value == 0)
            or (name in ("overlap", "utilization") and value > 1)
        ):
            raise RecipeError(f"--{name} {value} is out of range ({_HELP[name]}; in units of {unit:g})")
    values = {name: getattr(options, name) * unit for name, (unit, _) in _ASSUMPTIONS.items()}
    return Machine(gpus_per_node=options.gpus_per_node, **values)


def _bytes(count: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count:.0f} B"


_FIELDS = {
    "optimizer": ("optimizer", "name"),
    "global_batch": ("training", "global_batch"),
    "sequence_length": ("data", "sequence_length"),
    "zero_stage": ("training", "zero_stage"),
    "precision": ("training", "precision"),
}
_ASSUMPTIONS: dict[str, tuple[float, float]] = {  # option -> (unit, default in that unit)
    "memory": (GIB, 80),
    "peak": (1e12, 312),
    "utilization": (1, 0.4),
    "link": (1e9, 200),
    "network": (1e9, 20),
    "memory_rate": (1e12, 1.5),
    "latency": (1e-6, 20),
    "overlap": (1, 0),
    "reserve": (GIB, 2),
}
_HELP = {
    "memory": "GiB per GPU",
    "peak": "peak TFLOP/s per GPU in the training precision (312: A100 bf16)",
    "utilization": "share of the peak that is reached (0.44: NVIDIA's published BERT-Large on A100)",
    "link": "GB/s per GPU and direction inside a node",
    "network": "GB/s per GPU and direction between nodes",
    "memory_rate": "TB/s of a GPU's memory",
    "latency": "microseconds per collective and hop",
    "overlap": "share of the communication that hides behind the computation",
    "reserve": "GiB per GPU for context, libraries and gaps",
}


def _parser() -> CommandParser:
    prog = called("plan")
    parser = CommandParser(
        prog=prog,
        description="Micro-batch and accumulation that fit, memory by part, traffic, collectives and step time, at one "
        "number of GPUs and growing to many. Any number of overrides section.field=value may follow.",
        epilog="Exit status: 0 if every phase fits and its batch can be divided, 1 if not, 2 for bad input.",
        examples=examples(
            prog,
            "--preset lamb-64k-32k --gpus 8 --memory 80",
            "--preset lamb-64k-32k --gpus 64 --peak 989 --zero_stage 2 --json",
        ),
    )
    parser.add_argument("--preset", default=DEFAULT_PRESET, help=f"named configuration (default {DEFAULT_PRESET})")
    parser.add_argument("--model", metavar="SIZE", help=f"size of BERT or ModernBERT: {', '.join(MODEL_SIZES)}")
    parser.add_argument("--gpus", type=int, default=8, help="data-parallel ranks (default 8)")
    parser.add_argument("--micro_batch", type=int, help="plan this micro-batch instead of the largest that fits")
    for flag, (section, name) in _FIELDS.items():
        kind = int if flag in ("global_batch", "sequence_length", "zero_stage") else str
        parser.add_argument(f"--{flag}", type=kind, help=f"instead of the preset's {section}.{name}")
    for name, (_, default) in _ASSUMPTIONS.items():
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{_HELP[name]} (default {default:g})")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="ranks that the link connects")
    parser.add_argument("--most_gpus", type=int, default=1024, help="end of the table 1, 2, 4, ... (default 1024)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser
