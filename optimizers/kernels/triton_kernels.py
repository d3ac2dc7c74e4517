"""Sweeps on a GPU: one Triton launch per sweep, parameter group and combination of dtypes, for all layers together.

Works on the same descriptions as the CPU's sweeps, and in the same way: blocks of one shard each, whose sums have a
place of their own and are added up in a fixed order. Tables of blocks and pointers lie on the device and are sent there
only when they change, so that a step waits for nothing and can be captured in a CUDA graph once a step has been taken.
With the environment variable TRITON_INTERPRET=1 Triton computes all this on the CPU; that is for tests.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch

from ..formulas.chunk_view import COMPENSATION
from ..formulas.rounding import Rounding
from ..formulas.stages import Stage
from ..sharding.layout import Shard
from ..sharding.positions import runs
from .compiled_form import PLACE_OF_SUM, PLACES, CompiledForm, Kind, compiled_sums, compiled_update
from .interface import SETS_OF_GRADIENTS, ElementUpdate, LocalSums, Operands, Recent

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["KERNELS", "TritonKernels", "Types"]

BLOCK = 2048
FOLD = 1024  # partial sums that are added at a time
WARPS = 4
WARPS_THAT_ROUND = 8  # random bits take registers, so that fewer elements go to a thread
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
VECTORS = (
    *("gradient_scale", "weight_scale", "step", "second_step"),
    *("correction1", "correction2", "correction3", "resolution", "gsnr_scale", "decay", "rate", "offset"),
    *("weight_decay", "l2", "fixed_decay"),
)
SCALARS = (
    *("beta1", "beta2", "beta3", "gain", "eps", "gsnr_floor"),
    *("growth", "smallest_root"),
)
MEASURE, MEASURE_AND_KEEP, APPLY, APPLY_KEPT = range(4)


class TritonKernels:
    """The implementation "triton"."""

    name = "triton"

    def devices(self) -> tuple[str, ...]:
        return ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)

    def missing(self) -> str | None:
        return "the package triton: pip install triton" if triton is None else None

    def unable(self, device: torch.device) -> str | None:
        return _why_nothing_compiles(device)

    def serves(self, operands: Operands) -> list[bool]:
        device = operands.layout.device
        types = {dtype: name for dtype, name in TYPES.items() if name != "bf16" or _has_bf16(device)}
        kept_in = [_state_dtype(operands, index) for index in range(len(operands.weights))]
        served = [
            weight.dtype in types and weight.device == device and state_dtype in types
            for weight, state_dtype in zip(operands.weights, kept_in, strict=True)
        ]
        for name, tensors in operands.state.items():
            for index, value in enumerate(tensors):
                wanted = torch.bfloat16 if name == COMPENSATION else kept_in[index]
                nothing = name == COMPENSATION and not value.numel()
                served[index] &= nothing or (value.dtype is wanted and value.device == device)
        for index, gradient in enumerate(operands.gradients):
            served[index] &= gradient is None or (gradient.dtype in types and gradient.device == device)
        dtypes = {*kept_in, *(weight.dtype for weight in operands.weights)}
        if torch.bfloat16 in dtypes and torch.bfloat16 not in types:
            _warn_of_bf16(device)
        return served

    def open(self, operands: Operands, served: Sequence[bool], cache: dict[Any, Any]) -> TritonSweeps:
        return TritonSweeps(operands, served, cache)


KERNELS = TritonKernels()

_captured: dict[int, Any] = {}
"""Tables that a CUDA graph reads at every replay. Nobody tells when a graph is gone, so they stay."""


class Types(NamedTuple):
    """Names of dtypes of a local tensor, and its master, "none" for weights that are rounded to nearest if at all."""

    weight: str
    gradient: str
    state: str
    master: str

    def warps(self, mode: int) -> int:
        """Of a block, in a sweep of this mode."""
        rounds = self.state == "bf16" or self.master == "kahan" or (self.master == "stochastic" and mode >= APPLY)
        return WARPS_THAT_ROUND if rounds else WARPS


@dataclass(frozen=True)
class _Blocks:
    """The blocks of one group and one combination of dtypes.

    Attributes:
        types: See there.
        rows: int64, shape (blocks, 5): tensor, start, length, layer counted from the group's first, position of the
            first element in the layer; in the order of layers.
        ends: int64, shape (layers + 1,): where each layer's blocks begin in `rows`.
    """

    types: Types
    rows: torch.Tensor
    ends: torch.Tensor


class TritonSweeps:
    """See `Sweeps`."""

    def __init__(self, operands: Operands, served: Sequence[bool], cache: dict[Any, Any]):
        self.operands = operands
        self.device = operands.layout.device
        self.cache = cache
        self.types = [_types(operands, index) if wanted else None for index, wanted in enumerate(served)]
        self.idle: dict[int, list[torch.Tensor]] = {}

    def measure(self, group: int, stage: Stage, *, keep: bool) -> LocalSums | None:
        form = compiled_sums(stage)
        if form is None:
            return None
        layers = len(self.operands.groups[group].layers)
        total = torch.zeros(PLACES, layers, dtype=torch.float64, device=self.device)
        mode = MEASURE
        if form.kind.is_adam and keep:
            assert group not in self.idle, "a direction is measured once per step"
            mode = MEASURE_AND_KEEP
        for blocks, partial in self._sweep(group, form, self.operands.groups[group].table.may_change(), mode):
            with _launching_on(self.device):
                _fold[(layers, PLACES)](partial, blocks.ends, total, len(blocks.rows), layers, BLOCK=FOLD)
        # An index made of a list would wait for the device.
        return LocalSums(torch.stack([total[PLACE_OF_SUM[name]] for name in stage.sum_sizes]))

    def step(self, group: int, stage: Stage) -> LocalSums | None:
        """Nothing: blocks of a launch run in no order that a cache could make use of."""
        return None

    def apply(self, group: int, update: ElementUpdate) -> bool:
        form = compiled_update(update)
        if form is None:
            return False
        changing = self.operands.groups[group].table.has_gradient()
        self._sweep(group, form, changing, APPLY_KEPT if group in self.idle else APPLY)
        return True

    def _sweep(
        self, group: int, form: CompiledForm, changing: torch.Tensor | None, mode: int
    ) -> list[tuple[_Blocks, torch.Tensor]]:
        """Launch the kernel for each combination of dtypes; return their blocks' sums, shape (PLACES, blocks)."""
        all_blocks = self._group_blocks(group)
        if changing is None:
            changing = torch.ones(len(self.operands.groups[group].layers), dtype=torch.bool, device=self.device)
        # A kernel has an argument for every vector; this one stands in for those that are zero or not read.
        some = torch.zeros_like(changing, dtype=torch.float32)
        changing = changing.to(torch.int64)
        if mode == MEASURE_AND_KEEP:
            self.idle[group] = [
                torch.zeros(len(blocks.rows), dtype=torch.int64, device=self.device) for blocks in all_blocks
            ]
        vectors = [form.vectors.get(name, some) for name in VECTORS]
        scalars = [float(form.scalars.get(name, 0.0)) for name in SCALARS]
        complements = [1.0 - form.scalars.get("beta2", 0.0), 1.0 - form.scalars.get("beta3", 0.0)]
        weights = self._pointers("weights", self.operands.weights)
        gradients = self._pointers("gradients", self.operands.gradients)
        state = [self._pointers(name, self.operands.state[name]) for name in form.state]
        state += [weights] * (3 - len(state))
        mean_square, factor = weights, some
        if form.kind.has_gsnr:
            squares, given = self.operands.inputs["mean_square"]
            assert given is not None
            mean_square = self._pointers("mean_square", squares)
            factor = given.to(torch.float32).reshape(1)
        compensations, keys, gammas = self._rounding(group, weights)
        results = []
        for index, blocks in enumerate(all_blocks):
            count = len(blocks.rows)
            # One column per block; sums that the kind does not measure stay zero.
            partial = torch.zeros(PLACES, count, dtype=torch.float64, device=self.device)
            idle = self.idle[group][index] if group in self.idle else changing
            with _launching_on(self.device):
                _KERNELS[_family(form.kind)][(count,)](
                    *(blocks.rows, changing, idle, partial, count),
                    *(weights, gradients, *state, mean_square, factor, compensations, keys, gammas),
                    *(*vectors, *scalars, *complements),
                    KIND=form.kind.name,
                    MODE=mode,
                    MOMENTUM=bool(form.state),
                    NESTEROV=bool(form.scalars.get("nesterov", 0)),
                    CLIPS=bool(form.scalars.get("smallest_root", 0)),
                    DECAYS="weight_scale" in form.vectors,
                    WEIGHT=_TL_TYPES[blocks.types.weight],
                    GRADIENT=_TL_TYPES[blocks.types.gradient],
                    STATE=_TL_TYPES[blocks.types.state],
                    MASTER=blocks.types.master,
                    BLOCK=BLOCK,
                    num_warps=blocks.types.warps(mode),
                )
            results.append((blocks, partial))
        return results

    def _rounding(self, group: int, nothing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pointers of `COMPENSATION`, keys and gammas of the group's layers; `nothing` in place of what is not read."""
        rounding = self.operands.groups[group].rounding
        if rounding is None:
            return nothing, nothing, nothing
        compensations = nothing
        if rounding.master == "kahan" and COMPENSATION in self.operands.state:
            compensations = self._pointers(COMPENSATION, self.operands.state[COMPENSATION])
        if self._is_capturing():
            _captured[id(rounding.gammas)] = rounding.gammas  # the keys are the graph's own
        return compensations, rounding.keys, rounding.gammas

    # What lies on the device

    def _group_blocks(self, group: int) -> list[_Blocks]:
        """The blocks of a group, for the tensors that are served now."""
        blocks: list[_Blocks] = self._table(
            ("blocks", group), self.types, lambda: self._make_group_blocks(group), SETS_OF_GRADIENTS
        )
        return blocks

    def _make_group_blocks(self, group: int) -> list[_Blocks]:
        layout, layers = self.operands.layout, self.operands.groups[group].layers
        rows: list[tuple[Any, ...]] = []
        for shard in layout.shards:
            tensor = layout.layers[shard.layer].tensor
            if layout.groups[tensor] == group and self.types[tensor] is not None:
                for start, position, run in self._runs(group, shard):
                    for begin in range(0, run, BLOCK):
                        length, layer = min(BLOCK, run - begin), shard.layer - layers.start
                        rows.append((self.types[tensor], (tensor, start + begin, length, layer, position + begin)))
        rows.sort(key=lambda typed: (typed[0], typed[1][3]))
        by_type = [(types, [row for _, row in of]) for types, of in groupby(rows, key=lambda typed: typed[0])]
        return [self._blocks(types, of, len(layers)) for types, of in by_type]

    def _runs(self, group: int, shard: Shard) -> Iterable[tuple[int, int, int]]:
        """Of what may be in one block: starts, positions and lengths. Without rounding, positions do not matter."""
        if self.operands.groups[group].rounding is None:
            return [(shard.start, shard.offset, shard.length)]
        layer = self.operands.layout.layers[shard.layer]
        return runs(layer, shard, tuple(self.operands.weights[layer.tensor].shape))

    def _blocks(self, types: Types, rows: list[tuple[int, ...]], layers: int) -> _Blocks:
        counts = torch.bincount(torch.tensor([row[3] for row in rows], device="cpu"), minlength=layers)
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return _Blocks(types, torch.tensor(rows, device="cpu").to(self.device), ends.to(self.device))

    def _pointers(self, name: str, tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Addresses as a tensor on the device, sent there if they differ from the last step's."""
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        pointers: torch.Tensor = self._table(("pointers", name), addresses, lambda: self._send(addresses))
        return pointers

    def _send(self, addresses: list[int]) -> torch.Tensor:
        on_host = torch.tensor(addresses, dtype=torch.int64, device="cpu")
        if self.device.type == "cuda":
            on_host = on_host.pin_memory()  # or the copy would wait
        return on_host.to(self.device, non_blocking=True)

    def _table(self, name: tuple[str, Any], content: list[Any], make: Callable[[], Any], most: int = 1) -> Any:
        """What was made of this content in one of the last steps, or is made now; only the newest are kept."""
        tables = self.cache.setdefault(name, Recent(most))
        capturing = self._is_capturing()
        if capturing and content not in tables:
            raise RuntimeError(
                f"the {' of '.join(map(str, name))} changed since the last step, and a CUDA graph cannot capture how "
                "they get to the device: before the capture take two steps, with zero_grad(set_to_none=False) so that "
                "gradients stay in place, and leave weights and state where they are"
            )
        table = tables.find(content, make)
        if capturing:
            _captured[id(table)] = table
        return table

    def _is_capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _rounding_of(operands: Operands, index: int) -> Rounding | None:
    """Of the group that a local tensor is in."""
    group = operands.groups.get(operands.layout.groups[index])
    return None if group is None else group.rounding


def _state_dtype(operands: Operands, index: int) -> torch.dtype:
    """What a local tensor's state is to be kept in; with any other it is left to tensor operations."""
    rounding = _rounding_of(operands, index)
    return torch.bfloat16 if rounding is not None and rounding.state else torch.float32


def _types(operands: Operands, index: int) -> Types:
    weight, gradient = operands.weights[index], operands.gradients[index]
    rounding = _rounding_of(operands, index)
    master = rounding.master if rounding is not None and weight.dtype is torch.bfloat16 else None
    return Types(
        weight=TYPES[weight.dtype],
        gradient="fp32" if gradient is None else TYPES[gradient.dtype],
        state=TYPES[_state_dtype(operands, index)],
        master=master or "none",
    )


@functools.cache
def _why_nothing_compiles(device: torch.device) -> str | None:
    """Launch the smallest kernel: there may be no compiler, or none for this GPU, and no other way tells."""
    try:
        with _launching_on(device):
            numbers = torch.zeros(PLACES, 1, dtype=torch.float64, device=device)
            _fold[(1, PLACES)](
                numbers, torch.tensor([0, 1], device="cpu").to(device), torch.zeros_like(numbers), 1, 1, BLOCK=FOLD
            )
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # an error of the launch itself comes later
    except Exception as error:
        if "0-dimensional" in str(error):  # its interpreter makes numbers of arrays of one
            return "numpy before 2.4, or Triton 3.7, for TRITON_INTERPRET=1"
        return f"a Triton that compiles for {device}, which fails with {type(error).__name__}: {str(error)[:200]}"
    return None


def _has_bf16(device: torch.device) -> bool:
    """Whether compiled code can convert bf16: not on NVIDIA's GPUs before sm_80."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return not is_nvidia or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def _warn_of_bf16(device: torch.device) -> None:
    warnings.warn(
        f"bf16 layers, and layers with state in bf16, on {device}, which is older than sm_80, are stepped by tensor "
        "operations: Triton does not compile bf16 for it",
        stacklevel=3,
    )


def _launching_on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the parameters."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _family(kind: Kind) -> str:
    if kind.is_adam:
        return "belief" if kind.is_belief else "adam"
    return "momentum" if kind in (Kind.MOMENTUM, Kind.MOMENTUM_GSNR) else "sums"


if triton is not None:
    _TL_TYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}

    from .triton_adam import adam
    from .triton_belief import belief
    from .triton_momentum import momentum
    from .triton_sums import sums

    @triton.jit
    def _fold(partial, ends, total, blocks, layers, BLOCK: tl.constexpr):
        """Add up one layer's blocks for one place, in a fixed order."""
        layer, place = tl.program_id(0), tl.program_id(1)
        begin, end = tl.load(ends + layer), tl.load(ends + layer + 1)
        offsets = tl.arange(0, BLOCK)
        parts = tl.zeros((BLOCK,), tl.float64)
        for at in range(begin, end, BLOCK):
            parts += tl.load(partial + place * blocks + at + offsets, mask=at + offsets < end, other=0.0)
        at_total = total + place * layers + layer
        tl.store(at_total, tl.load(at_total) + tl.sum(parts, 0))

    _KERNELS = {"sums": sums, "momentum": momentum, "adam": adam, "belief": belief}
