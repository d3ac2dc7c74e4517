"""Sweeps on the CPU: calls the compiled functions of cpu_kernels.c, one call per sweep and (joint) parameter group."""

from __future__ import annotations

import ctypes
import functools
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..formulas.chunk_view import COMPENSATION
from ..formulas.rounding import Rounding
from ..formulas.stages import Stage, Sums
from ..formulas.updates import TrustRule, is_zero
from .compiled_form import PLACE_OF_SUM, PLACES, CompiledForm, Kind, compiled_sums, compiled_update, targets_of
from .cpu_shards import Shards
from .interface import (
    IMPORTED_IN,
    SETS_OF_GRADIENTS,
    ElementUpdate,
    ImplementationError,
    LocalSums,
    Operands,
    Recent,
)

__all__ = ["KERNELS", "CpuKernels"]

ELEMENTS_PER_THREAD = 1 << 17  # starting a thread takes as long as sweeping over a fraction of this
# Layers that are measured and applied in one go. Together they should stay in cache.
CACHE_BYTES = 16 << 20
LEAST_BYTES_PER_THREAD = 1 << 20  # a few blocks, so that threads need not wait for each other after each
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# As in the enum of cpu_kernels.c: four modes of each kind of the Adam family follow each other.
CODES = {
    **{kind: code for code, kind in enumerate(kind for kind in Kind if not kind.is_adam)},
    **{kind: 7 + 4 * code for code, kind in enumerate(kind for kind in Kind if kind.is_adam)},
}
MEASURE_AND_KEEP, APPLY, APPLY_KEPT = 1, 2, 3

LEVELS = ("baseline", "avx2", "avx512")  # of instructions, as cpu_kernels.c counts them
LEVEL_VARIABLE = "TRUSTRATIO_CPU_LEVEL"

MASTERS: dict[str | None, int] = {None: 0, "stochastic": 1, "kahan": 2}

FUNCTIONS = (
    *("block", "size", "fields", "best_level", "cache_bytes", "lend_threads"),
    *("sweep", "step", "ratio", "random_words"),
)
FIELDS = 2  # of the structs below: raised where one becomes another of the same size


class _Sweep(ctypes.Structure):
    """The struct of the same name in cpu_kernels.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "threads", "shards", "layers", "state_type", "master")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("tensor", "start", "length", "layer", "position", "first_block", "weight_type", "gradient_type"),
                *("weight", "gradient", "first", "second", "third", "compensation", "mean_square"),
                *("changes", "idle", "partial", "sums", "key", "gamma"),
                *("gradient_scale", "weight_scale", "step", "second_step"),
                *("correction1", "correction2", "correction3", "resolution", "gsnr_scale"),
                *("decay", "rate", "offset", "weight_decay", "l2", "fixed_decay"),
            )
        ),
        *(
            (name, ctypes.c_double)
            for name in (
                *("beta1", "beta2", "beta3", "gain", "eps", "gsnr_floor", "mean_square_factor"),
                *("growth", "smallest_root"),
            )
        ),
        ("nesterov", ctypes.c_int64),
    )


class _Rule(ctypes.Structure):
    """The struct of the same name in cpu_kernels.c."""

    _fields_ = (
        *(
            (name, ctypes.c_double)
            for name in ("coefficient", "gradient", "direction", "constant", "low", "high", "update_clip")
        ),
        ("weight", ctypes.c_void_p),
        ("elements", ctypes.c_void_p),
        ("place", ctypes.c_int64),
        ("adapt", ctypes.c_void_p),
        ("targets", ctypes.c_int64),
        ("vector", ctypes.c_void_p * 2),
        ("base", ctypes.c_void_p * 2),
        ("factor", ctypes.c_void_p * 2),
    )


class _Step(ctypes.Structure):
    """The struct of the same name in cpu_kernels.c."""

    _fields_ = (
        ("measure", ctypes.POINTER(_Sweep)),
        ("apply", ctypes.POINTER(_Sweep)),
        *((name, ctypes.c_int64) for name in ("batches", "rules")),
        *((name, ctypes.c_void_p) for name in ("first_shard", "measured", "ready", "taken", "changes")),
        ("rule", _Rule * 2),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled functions, None where there are none or those of another version of this file."""
    try:
        library = ctypes.CDLL(str(Path(__file__).with_name("_cpu_kernels.so")))
    except OSError:  # there is none, or one for another processor
        return None
    if not all(hasattr(library, f"trustratio_{name}") for name in FUNCTIONS):
        return None
    for function in (library.trustratio_block, library.trustratio_size, library.trustratio_fields):
        function.restype = ctypes.c_int64
    library.trustratio_best_level.restype = library.trustratio_cache_bytes.restype = ctypes.c_int64
    library.trustratio_cache_bytes.argtypes = (ctypes.c_int64,)
    library.trustratio_lend_threads.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    library.trustratio_lend_threads.restype = None
    library.trustratio_sweep.argtypes = (ctypes.POINTER(_Sweep), ctypes.c_int64)
    library.trustratio_step.argtypes = (ctypes.POINTER(_Step), ctypes.c_int64)
    library.trustratio_ratio.argtypes = (ctypes.POINTER(_Rule), ctypes.c_int64, *[ctypes.c_double] * 4)
    library.trustratio_ratio.restype = ctypes.c_double
    library.trustratio_random_words.argtypes = (
        *[ctypes.c_uint64] * 2,
        *(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
    )
    library.trustratio_random_words.restype = None
    library.trustratio_sweep.restype = library.trustratio_step.restype = None
    if (
        library.trustratio_size() != ctypes.sizeof(_Sweep) + ctypes.sizeof(_Step)
        or library.trustratio_fields() != FIELDS
    ):
        return None
    library.trustratio_lend_threads(_parallel(), IMPORTED_IN)
    return library


def _parallel() -> ctypes.c_void_p | None:
    """The function of torch's OpenMP runtime that runs a function in its threads; None where it has another name."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p)  # LLVM's and Intel's have it too
    except (AttributeError, OSError, TypeError):
        return None


class CpuKernels:
    """The implementation "cpu"."""

    name = "cpu"

    def devices(self) -> tuple[str, ...]:
        return ("cpu",)

    def missing(self) -> str | None:
        if _library() is not None:
            return None
        return (
            "its compiled functions of this version, which come with a wheel or are built at installation: install a C "
            "compiler, then trustratio again"
        )

    def unable(self, device: torch.device) -> str | None:
        return None

    def serves(self, operands: Operands) -> list[bool]:
        roundings = {group: of_group.rounding for group, of_group in operands.groups.items()}
        of_tensors = [roundings.get(group) for group in operands.layout.groups]
        wanted = [_state_dtype(rounding) for rounding in of_tensors]
        served = [weight.dtype in TYPES and weight.is_cpu for weight in operands.weights]
        for name, state in operands.state.items():
            if name != COMPENSATION:
                columns = zip(served, state, wanted, strict=True)
                served = [ok and s.dtype is dtype and s.is_cpu for ok, s, dtype in columns]
        if any(roundings.values()):
            compensated = [_is_compensated(operands, tensor, of) for tensor, of in enumerate(of_tensors)]
            served = [ok and has_rest for ok, has_rest in zip(served, compensated, strict=True)]
        return [
            ok and (gradient is None or (gradient.dtype in TYPES and gradient.is_cpu))
            for ok, gradient in zip(served, operands.gradients, strict=True)
        ]

    def open(self, operands: Operands, served: Sequence[bool], cache: dict[Any, Any]) -> CpuSweeps:
        rounded = tuple(group for group, of_group in operands.groups.items() if of_group.rounding is not None)
        shards = cache.setdefault("shards", Recent(2)).find(rounded, lambda: Shards.of(operands, rounded))
        tables = cache.setdefault("tables", Recent(SETS_OF_GRADIENTS)).find((served, rounded), dict)
        return CpuSweeps(operands, shards, served, tables)


KERNELS = CpuKernels()


def _state_dtype(rounding: Rounding | None) -> torch.dtype:
    return torch.bfloat16 if rounding is not None and rounding.state else torch.float32


def _is_compensated(operands: Operands, tensor: int, rounding: Rounding | None) -> bool:
    """Whether bf16 weights have the rest beside them that their group keeps, if it keeps any."""
    weight = operands.weights[tensor]
    if rounding is None or rounding.master != "kahan" or weight.dtype is not torch.bfloat16:
        return True
    rest = operands.state[COMPENSATION][tensor]
    return rest.dtype is torch.bfloat16 and rest.is_cpu and rest.numel() == weight.numel()


@dataclass
class _GroupTable:
    """One group's shards, with layers counted from its first."""

    shards: Shards
    layers: int
    elements: int
    first_block: torch.Tensor
    blocks: int
    partial: torch.Tensor
    known_batches: dict[int, torch.Tensor | None] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        return min(torch.get_num_threads(), 1 + self.elements // ELEMENTS_PER_THREAD)

    def batches(self, most: int) -> torch.Tensor | None:
        """First shards of runs of whole layers, and the number of shards; None if a layer's shards are no run.

        A run has at most so many elements, unless it is a single layer.
        """
        if most not in self.known_batches:
            layers = self.shards.layer.tolist()
            lengths = torch.zeros(self.layers, dtype=torch.int64, device="cpu").index_add_(
                0, self.shards.layer, self.shards.length
            )
            firsts, filled = [0], 0
            for shard, layer in enumerate(layers):
                if shard and layer == layers[shard - 1]:
                    continue
                filled += int(lengths[layer])
                if shard and filled > most:
                    firsts.append(shard)
                    filled = int(lengths[layer])
            in_runs = layers == sorted(layers)
            self.known_batches[most] = torch.tensor([*firsts, len(layers)], device="cpu") if in_runs else None
        return self.known_batches[most]


class CpuSweeps:
    """See `Sweeps`."""

    def __init__(self, operands: Operands, shards: Shards, served: Sequence[bool], tables: dict[int, _GroupTable]):
        self.operands = operands
        if not all(served):
            shards = shards.only(torch.tensor(served, device="cpu")[shards.tensor])
        self.shards = shards
        self.tables = tables
        self.idle: dict[int, torch.Tensor] = {}
        self.weight_types = array("B", [TYPES.get(weight.dtype, 0) for weight in operands.weights])
        self.gradient_types = array("B", [0 if g is None else TYPES.get(g.dtype, 0) for g in operands.gradients])
        self.weights = _pointers(operands.weights)
        self.gradients = _pointers(operands.gradients)
        self.state = {name: _pointers(tensors) for name, tensors in operands.state.items()}
        self.mean_square: array[int] | None = None
        self.level = _level(os.environ.get(LEVEL_VARIABLE))

    def measure(self, group: int, stage: Stage, *, keep: bool) -> LocalSums | None:
        form = compiled_sums(stage)
        if form is None:
            return None
        sweep, sums = self._measuring(group, form, keep=keep)
        self._run(sweep)
        return _named_sums(stage, sums)

    def step(self, group: int, stage: Stage) -> LocalSums | None:
        if not (isinstance(stage, Sums) and stage.rules):
            return None
        measured, applied = compiled_sums(stage), compiled_update(stage.of)
        if measured is None or applied is None:
            return None
        # Runs of layers that stay in cache: each is measured, and applied before the next one is.
        table = self._table(group)
        read = 8 + len(measured.state) * self._state_dtype(group).itemsize  # bytes per element, by `measure`
        batches = table.batches(cache_bytes(table.threads) // read)
        if batches is None:
            return None
        measure, sums = self._measuring(group, measured, keep=True)
        apply = self._applying(group, applied, None)
        counters = torch.zeros(2 + 2 * table.threads, len(batches) - 1, dtype=torch.int64, device="cpu")
        changes = torch.zeros(table.layers, dtype=torch.uint8, device="cpu")
        apply.changes = changes.data_ptr()
        # The compiled function works out the ratios of a run's layers by the rules, and puts them into `applied`.
        step = _Step(ctypes.pointer(measure), ctypes.pointer(apply), len(batches) - 1, len(stage.rules))
        step.first_shard, step.changes = batches.data_ptr(), changes.data_ptr()
        step.measured, step.ready, step.taken = (counters[row].data_ptr() for row in range(3))
        elements = self.operands.groups[group].table.elements
        alive = [
            _fill(place, rule, stage.of, applied, elements) for place, rule in zip(step.rule, stage.rules, strict=False)
        ]
        if measure.shards:
            _compiled().trustratio_step(ctypes.byref(step), self.level)
        del alive
        return _named_sums(stage, sums)

    def apply(self, group: int, update: ElementUpdate) -> bool:
        form = compiled_update(update)
        if form is None:
            return False
        self._run(self._applying(group, form, self.operands.groups[group].table.has_gradient()))
        return True

    def _measuring(self, group: int, form: CompiledForm, *, keep: bool) -> tuple[_Sweep, torch.Tensor]:
        """The struct, and where the sums will be, shape (PLACES, layers)."""
        table = self._table(group)
        sums = torch.zeros(PLACES, table.layers, dtype=torch.float64, device="cpu")
        sweep = self._sweep(group, form, self.operands.groups[group].table.may_change())
        if form.kind.is_adam and keep:
            assert group not in self.idle, "a direction is measured once per step"
            self.idle[group] = torch.zeros(table.blocks, dtype=torch.uint8, device="cpu")
            sweep.kind += MEASURE_AND_KEEP
            sweep.idle = self.idle[group].data_ptr()
        sweep.sums, sweep.partial = sums.data_ptr(), table.partial.data_ptr()
        return sweep, sums

    def _applying(self, group: int, form: CompiledForm, changing: torch.Tensor | None) -> _Sweep:
        sweep = self._sweep(group, form, changing)
        if form.kind.is_adam:
            idle = self.idle.get(group)
            sweep.kind += APPLY if idle is None else APPLY_KEPT
            sweep.idle = None if idle is None else idle.data_ptr()
        return sweep

    def _table(self, group: int) -> _GroupTable:
        if group not in self.tables:
            layers = self.operands.groups[group].layers
            shards = self.shards.only(self.shards.group == group).counted_from(layers.start)
            # Each block of a shard has a place of its own for its sums, so that threads need not agree on an order.
            block = _block()
            ends = ((shards.length + block - 1) // block).cumsum(0)
            first_block = torch.cat([ends.new_zeros(1), ends])
            blocks = int(first_block[-1])
            partial = torch.empty(blocks * PLACES, dtype=torch.float64, device="cpu")
            self.tables[group] = _GroupTable(
                shards, len(layers), int(shards.length.sum()), first_block, blocks, partial
            )
        return self.tables[group]

    def _sweep(self, group: int, form: CompiledForm, changing: torch.Tensor | None) -> _Sweep:
        """The struct, with everything that it points to kept alive by it."""
        table = self._table(group)
        sweep = _Sweep(kind=CODES[form.kind], threads=table.threads, shards=len(table.shards.tensor))
        sweep.layers = table.layers
        sweep.alive = form, table
        for name in ("tensor", "start", "length", "layer"):
            setattr(sweep, name, getattr(table.shards, name).data_ptr())
        sweep.first_block = table.first_block.data_ptr()
        for name in ("weight_types", "gradient_types", "weights", "gradients"):
            setattr(sweep, name[:-1], _address(getattr(self, name)))
        for place, name in zip(("first", "second", "third"), form.state, strict=False):
            setattr(sweep, place, _address(self.state[name]))
        for name, vector in form.vectors.items():
            assert vector.shape == (table.layers,)
            setattr(sweep, name, vector.data_ptr())
        for name, number in form.scalars.items():
            setattr(sweep, name, number)
        if changing is not None:
            sweep.changing = changing.contiguous()
            sweep.changes = sweep.changing.data_ptr()
        if form.kind.has_gsnr:
            self._mean_square(sweep)
        self._rounding(sweep, group)
        return sweep

    def _rounding(self, sweep: _Sweep, group: int) -> None:
        rounding = self.operands.groups[group].rounding
        if rounding is None:
            return
        sweep.state_type, sweep.master = TYPES[self._state_dtype(group)], MASTERS[rounding.master]
        sweep.position = self._table(group).shards.position.data_ptr()
        sweep.numbers = rounding.keys.contiguous(), rounding.gammas.contiguous()
        sweep.key, sweep.gamma = (numbers.data_ptr() for numbers in sweep.numbers)
        if rounding.master == "kahan" and COMPENSATION in self.state:  # not where all weights are fp32
            sweep.compensation = _address(self.state[COMPENSATION])

    def _state_dtype(self, group: int) -> torch.dtype:
        return _state_dtype(self.operands.groups[group].rounding)

    def _mean_square(self, sweep: _Sweep) -> None:
        squares, factor = self.operands.inputs["mean_square"]
        assert factor is not None
        if self.mean_square is None:
            self.mean_square = _pointers(squares)
        sweep.mean_square, sweep.mean_square_factor = _address(self.mean_square), float(factor)

    def _run(self, sweep: _Sweep) -> None:
        if sweep.shards:
            _compiled().trustratio_sweep(ctypes.byref(sweep), self.level)


def _named_sums(stage: Stage, sums: torch.Tensor) -> LocalSums:
    """The sums that a stage asks for, of those that a sweep has left, shape (PLACES, layers)."""
    return LocalSums(sums[[PLACE_OF_SUM[name] for name in stage.sum_sizes]])


def _fill(place: _Rule, rule: TrustRule, update: Any, form: CompiledForm, elements: torch.Tensor) -> list[torch.Tensor]:
    """Describe a rule to the compiled functions; what it points to is returned and must be kept."""
    alive: list[torch.Tensor] = []

    def at(vector: torch.Tensor) -> int:
        alive.append(vector.contiguous())
        return alive[-1].data_ptr()

    def of_layers(number: float | torch.Tensor) -> int:
        return at(torch.as_tensor(number, dtype=torch.float64, device="cpu").expand(len(rule.adapt)))

    for name in ("coefficient", "gradient", "direction", "constant"):
        setattr(place, name, getattr(rule, name))
    place.low, place.high = rule.bounds
    place.place = PLACE_OF_SUM[rule.direction_name]
    place.adapt = at(rule.adapt)
    if not is_zero(rule.weight):
        place.weight = of_layers(rule.weight)
    if rule.update_clip is not None:
        place.update_clip, place.elements = rule.update_clip, at(elements)
    targets = targets_of(update, rule)
    place.targets = len(targets)
    for index, (name, (base, factor)) in enumerate(targets.items()):
        place.vector[index], place.base[index] = form.vectors[name].data_ptr(), at(base)
        if factor is not None:
            place.factor[index] = of_layers(factor)
    return alive


def cache_bytes(threads: int) -> int:
    """Of a batch: what the threads' own caches hold, at most half of the shared one and `CACHE_BYTES`."""
    of_thread, shared = (_compiled().trustratio_cache_bytes(level) for level in (2, 3))
    wanted = threads * max(of_thread, LEAST_BYTES_PER_THREAD) if of_thread else CACHE_BYTES
    return min(wanted, CACHE_BYTES, shared // 2 or CACHE_BYTES)


def _compiled() -> ctypes.CDLL:
    library = _library()
    assert library is not None
    return library


@functools.cache
def _block() -> int:
    return int(_compiled().trustratio_block())


@functools.cache
def _best_level() -> int:
    return int(_compiled().trustratio_best_level())


def _level(asked: str | None) -> int:
    """The instructions that are used: the best that the processor has, or those that are asked for.

    Raises:
        ValueError: If they have another name.
        ImplementationError: If the processor does not have them.
    """
    best = _best_level()
    if not asked:
        return best
    if asked not in LEVELS:
        raise ValueError(f"{LEVEL_VARIABLE} must be one of {', '.join(LEVELS)}, got {asked!r}")
    if LEVELS.index(asked) > best:
        raise ImplementationError(
            f"{LEVEL_VARIABLE}={asked}: this processor or this build has {', '.join(LEVELS[: best + 1])} only"
        )
    return LEVELS.index(asked)


def _pointers(tensors: Iterable[torch.Tensor | None]) -> array[int]:
    return array("Q", [0 if tensor is None else tensor.data_ptr() for tensor in tensors])


def _address(values: array[int]) -> int:
    return values.buffer_info()[0]
