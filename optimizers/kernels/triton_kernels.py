"""Sweeps on a GPU: one Triton launch per sweep, groups that are stepped together, and combination of dtypes.

Works on the same descriptions as the CPU's sweeps, and in the same way: blocks of one shard each, whose sums have a
place of their own and are added up in a fixed order. The table of blocks stays on the device: where a tensor takes no
part in a step its pointers are null and its blocks empty. Pointers are sent when they change. So a step waits for
nothing and can be captured in a CUDA graph once a step has been taken.
With the environment variable TRITON_INTERPRET=1 Triton computes all this on the CPU; that is for tests.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from ..formulas.chunk_view import COMPENSATION
from ..formulas.rounding import Rounding
from ..formulas.stages import Stage
from .compiled_form import PLACE_OF_SUM, PLACES, CompiledForm, Kind, compiled_sums, compiled_update
from .cpu_shards import Shards
from .device_copies import DeviceCopies
from .interface import ElementUpdate, LocalSums, Operands, Recent
from .triton_blocks import BLOCK, BlockTable, Launch, residues

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["KERNELS", "TritonKernels", "Types", "compiler_options"]

FOLD = 1024  # partial sums that are added at a time
# What takes registers gets more threads, with fewer elements for each: random bits, and an address for every element.
WARPS = 4
WARPS_THAT_ROUND = 8
WARPS_NOT_ALIGNED = 16
REGISTERS = 1 << 16  # of a multiprocessor
FAST_IN_FP64 = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))  # capabilities; others have a 32nd or 64th of fp32's speed
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
    """The implementation "triton".

    Args:
        wide: Whether squares are added in fp64 throughout, or in fp32 within 16 neighbours; None asks the device.
    """

    name = "triton"

    def __init__(self, wide: bool | None = None):
        self.wide = wide

    def devices(self) -> tuple[str, ...]:
        return ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)

    def missing(self) -> str | None:
        return "the package triton: pip install triton" if triton is None else None

    def unable(self, device: torch.device) -> str | None:
        return _why_nothing_compiles(device)

    def serves(self, operands: Operands) -> list[bool]:
        device = operands.layout.device
        types = {dtype: name for dtype, name in TYPES.items() if name != "bf16" or _has_bf16(device)}
        of_groups = {index: _state_dtype(group.rounding) for index, group in operands.groups.items()}
        kept_in = [of_groups.get(group, torch.float32) for group in operands.layout.groups]
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
        wide = _is_fast_in_fp64(operands.layout.device) if self.wide is None else self.wide
        return TritonSweeps(operands, served, cache, wide=wide)


KERNELS = TritonKernels()


class Types(NamedTuple):
    """Names of dtypes of a local tensor, and its master, "none" for weights that are rounded to nearest if at all."""

    weight: str
    gradient: str
    state: str
    master: str

    def sizes(self) -> dict[str, int]:
        """Of elements, in bytes, by what they are; "state" of all state by other names."""
        size = {name: dtype.itemsize for dtype, name in TYPES.items()}
        weight = size[self.weight]
        others = {"gradients": size[self.gradient], "mean_square": 4, "state": size[self.state]}
        return {"weights": weight, COMPENSATION: weight, **others}

    def warps(self, mode: int, aligned: bool) -> int:
        """Of a block, in a sweep of this mode."""
        if not aligned:
            return WARPS_NOT_ALIGNED
        rounds = self.state == "bf16" or self.master == "kahan" or (self.master == "stochastic" and mode >= APPLY)
        return WARPS_THAT_ROUND if rounds else WARPS


class _Pointers(NamedTuple):
    """Where the local tensors are.

    Attributes:
        rows: By name, int64, shape (tensors,), on the device.
        residues: Of each tensor, see the function.
    """

    rows: dict[str, torch.Tensor]
    residues: list[int]


class TritonSweeps:
    """See `Sweeps`."""

    def __init__(self, operands: Operands, served: Sequence[bool], cache: dict[Any, Any], *, wide: bool = True):
        self.operands = operands
        self.served = served
        self.device = operands.layout.device
        self.cache = cache
        self.copies: DeviceCopies = cache.setdefault("copies", DeviceCopies(self.device))
        self.wide = wide
        self.idle: dict[int, torch.Tensor] = {}

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
        blocks, partial = self._sweep(group, form, self.operands.groups[group].table.may_change(), mode)
        with _launching_on(self.device):
            _fold[(layers, PLACES)](partial, blocks.ends, total, blocks.count, layers, BLOCK=FOLD)
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
    ) -> tuple[BlockTable, torch.Tensor]:
        """Launch the kernel for each combination of dtypes; return the blocks and their sums, (PLACES, blocks)."""
        blocks = self._blocks(group)
        if changing is None:
            changing = torch.ones(len(self.operands.groups[group].layers), dtype=torch.bool, device=self.device)
        # A kernel has an argument for every vector; this one stands in for those that are zero or not read.
        some = torch.zeros_like(changing, dtype=torch.float32)
        changing = changing.to(torch.int64)
        if mode == MEASURE_AND_KEEP:
            self.idle[group] = torch.zeros(blocks.count, dtype=torch.int64, device=self.device)
        vectors = [form.vectors.get(name, some) for name in VECTORS]
        scalars = [float(form.scalars.get(name, 0.0)) for name in SCALARS]
        complements = [1.0 - form.scalars.get("beta2", 0.0), 1.0 - form.scalars.get("beta3", 0.0)]
        pointers = self._pointers.rows
        weights, gradients = pointers["weights"], pointers["gradients"]
        state = [pointers[name] for name in form.state]
        state += [weights] * (3 - len(state))
        mean_square, factor = weights, some
        if form.kind.has_gsnr:
            given = self.operands.inputs["mean_square"][1]
            assert given is not None
            mean_square = pointers["mean_square"]
            factor = given.to(torch.float32).reshape(1)
        compensations, keys, gammas = self._rounding(group, weights)
        # One column per block; sums that the kind does not measure stay zero, and those of blocks that are left out.
        partial = torch.zeros(PLACES, blocks.count, dtype=torch.float64, device=self.device)
        idle = self.idle.get(group, changing)
        for launch in self._launches(blocks):
            with _launching_on(self.device):
                _KERNELS[_family(form.kind)][(len(launch.rows),)](
                    *(launch.rows, changing, idle, partial, blocks.count),
                    *(weights, gradients, *state, mean_square, factor, compensations, keys, gammas),
                    *(*vectors, *scalars, *complements),
                    KIND=form.kind.name,
                    MODE=mode,
                    MOMENTUM=bool(form.state),
                    NESTEROV=bool(form.scalars.get("nesterov", 0)),
                    CLIPS=bool(form.scalars.get("smallest_root", 0)),
                    DECAYS="weight_scale" in form.vectors,
                    WEIGHT=_TL_TYPES[launch.types.weight],
                    GRADIENT=_TL_TYPES[launch.types.gradient],
                    STATE=_TL_TYPES[launch.types.state],
                    MASTER=launch.types.master,
                    BLOCK=BLOCK,
                    ALIGNED=launch.aligned,
                    WIDE=self.wide,
                    **compiler_options(launch.types.warps(mode, launch.aligned)),
                )
        return blocks, partial

    def _rounding(self, group: int, nothing: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pointers of `COMPENSATION`, keys and gammas of the group's layers; `nothing` in place of what is not read."""
        rounding = self.operands.groups[group].rounding
        if rounding is None:
            return nothing, nothing, nothing
        compensations = nothing
        if rounding.master == "kahan" and COMPENSATION in self.operands.state:
            compensations = self._pointers.rows[COMPENSATION]
        return compensations, rounding.keys, rounding.gammas

    # What lies on the device

    def _launches(self, blocks: BlockTable) -> list[Launch]:
        """Those with blocks of tensors that are served now; for others there may be no kernel."""
        return [launch for launch in blocks.launches if launch.types in self._served_types]

    @functools.cached_property
    def _served_types(self) -> set[Types | None]:
        return {of_tensor for of_tensor, served in zip(self._types, self.served, strict=True) if served}

    def _blocks(self, group: int) -> BlockTable:
        """The blocks of a group: the same ones whichever of its tensors are served now."""
        content = self._types, self._pointers.residues
        blocks: BlockTable = self._table(("blocks", group), content, lambda: self._make_blocks(group), most=2)
        self.copies.used(blocks.ends, *(launch.rows for launch in blocks.launches))
        return blocks

    def _make_blocks(self, group: int) -> BlockTable:
        layers = self.operands.groups[group].layers
        shards = self._shards.only(self._shards.group == group).counted_from(layers.start)
        blocks = BlockTable.of(shards, len(layers), self._types, self._pointers.residues)
        launches = [launch._replace(rows=self.copies.send(launch.rows)) for launch in blocks.launches]
        return BlockTable(launches, self.copies.send(blocks.ends), blocks.count)

    @functools.cached_property
    def _shards(self) -> Shards:
        """Those of groups that round as runs: without rounding, positions do not matter."""
        rounded = tuple(index for index, group in self.operands.groups.items() if group.rounding is not None)
        shards: Shards = self.cache.setdefault("shards", Recent(1)).find(
            rounded, lambda: Shards.of(self.operands, rounded)
        )
        return shards

    @functools.cached_property
    def _types(self) -> list[Types | None]:
        """Of all tensors, None where no kernel can work; with no gradient as with the last one, at first the weight."""
        weights, last = [weight.dtype for weight in self.operands.weights], self.cache.get("dtypes of gradients")
        gradients = [
            gradient.dtype if served and gradient is not None else dtype
            for gradient, dtype, served in zip(self.operands.gradients, last or weights, self.served, strict=True)
        ]
        self.cache["dtypes of gradients"] = gradients
        content = weights, gradients
        types: list[Types | None] = self.cache.setdefault("types", Recent(2)).find(
            content, lambda: [_types(self.operands, index, gradient) for index, gradient in enumerate(gradients)]
        )
        return types

    @functools.cached_property
    def _pointers(self) -> _Pointers:
        """Addresses of everything that is served, on the device, sent there if they differ from the last step's."""
        given: dict[str, Sequence[torch.Tensor | None]] = {
            "weights": self.operands.weights,
            "gradients": self.operands.gradients,
            **self.operands.state,
        }
        if "mean_square" in self.operands.inputs:
            given["mean_square"] = self.operands.inputs["mean_square"][0]
        addresses = {
            name: [
                tensor.data_ptr() if served and tensor is not None else 0
                for tensor, served in zip(tensors, self.served, strict=True)
            ]
            for name, tensors in given.items()
        }
        content = {**addresses, "dtypes": self._types}
        pointers: _Pointers = self._table(("pointers",), content, lambda: self._send_pointers(addresses))
        self.copies.used(pointers.rows["weights"])  # the others lie in the same memory
        return pointers

    def _send_pointers(self, addresses: dict[str, list[int]]) -> _Pointers:
        on_host = torch.tensor(list(addresses.values()), dtype=torch.int64, device="cpu")
        content = self._types, list(addresses)
        sizes = self.cache.setdefault("sizes", Recent(2)).find(content, lambda: _sizes(*content))
        common, self.cache["residues"] = residues(on_host, sizes, self.cache.get("residues"))
        return _Pointers(dict(zip(addresses, self.copies.send(on_host), strict=True)), common.tolist())

    def _table(self, name: tuple[Any, ...], content: Any, make: Callable[[], Any], most: int = 1) -> Any:
        """What was made of this content in one of the last steps, or is made now; only the newest are kept."""
        tables = self.cache.setdefault(name, Recent(most))
        return self.copies.find(tables, content, make, lambda: _why_not_captured(_what_changed(name, tables, content)))


def _sizes(types: Sequence[Types | None], names: Sequence[str]) -> torch.Tensor:
    """Of elements, in bytes, shape (names, tensors); 1 where there are none."""
    of_types = [{} if of_tensor is None else of_tensor.sizes() for of_tensor in types]
    sizes = [[sizes.get(name, sizes.get("state", 1)) for sizes in of_types] for name in names]
    return torch.tensor(sizes, dtype=torch.int64, device="cpu")


def compiler_options(warps: int) -> dict[str, Any]:
    """How a kernel is compiled.

    With as many registers as a thread can have: without a limit the compiler keeps a few numbers of some kernels in
    memory, so that more programs fit on a multiprocessor.
    """
    options = {"num_warps": warps, "enable_fp_fusion": True}
    if torch.version.hip is None:
        options["maxnreg"] = min(255, REGISTERS // (32 * warps))
    return options


def _what_changed(name: tuple[Any, ...], known: Recent, content: Any) -> str:
    """For a message: pointers, whose content is by name, or blocks."""
    if name != ("pointers",):
        return " of ".join(map(str, name))
    last = known.made[0][0] if known.made else {}
    changed = [of for of in content if last.get(of) != content[of] and of != "dtypes"]
    return f"pointers of {', '.join(changed)}" if changed else "dtypes"


def _why_not_captured(changed: str) -> str:
    return (
        f"the {changed} changed since the last step, and a CUDA graph cannot capture how they get to the device: "
        "before the capture take two steps, with zero_grad(set_to_none=False) so that gradients stay in place, and "
        "leave weights and state where they are; gradients that a step has to copy, as for maximize=True, cannot be "
        "captured"
    )


def _state_dtype(rounding: Rounding | None) -> torch.dtype:
    """What a group's state is to be kept in; with any other it is left to tensor operations."""
    return torch.bfloat16 if rounding is not None and rounding.state else torch.float32


def _types(operands: Operands, index: int, gradient: torch.dtype) -> Types | None:
    weight = operands.weights[index].dtype
    if weight not in TYPES or gradient not in TYPES:
        return None
    group = operands.groups.get(operands.layout.groups[index])
    rounding = None if group is None else group.rounding
    master = rounding.master if rounding is not None and weight is torch.bfloat16 else None
    return Types(
        weight=TYPES[weight],
        gradient=TYPES[gradient],
        state=TYPES[_state_dtype(rounding)],
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


def _is_fast_in_fp64(device: torch.device) -> bool:
    """Whether adding squares in fp64 takes less time than reading the numbers."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return not is_nvidia or torch.cuda.get_device_capability(device) in FAST_IN_FP64


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
    from .triton_parts import one_for_all
    from .triton_sums import sums

    @one_for_all
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
