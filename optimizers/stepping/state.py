"""The state of one local tensor: how a step and checkpoints read, make and set it.

State with one value per element is a tensor like the local tensor, under its name, in the dtype that the group's
`state_dtype` says. State with one number per layer is a
0-d tensor under its name where the tensor carries one layer; where it carries several, a vector in the dict "layers",
because DeepSpeed cuts the padding's length off every tensor that lies in a flat tensor's state itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..formulas.algorithm import Algorithm
from ..formulas.chunk_view import COMPENSATION
from ..formulas.rounding import sum_of
from ..options.common import STATE_DTYPES
from ..sharding.local_tensors import compute_dtype, has_fp64, is_plain, local_part, numbers_device

__all__ = [
    "element_dtype",
    "keeps_compensation",
    "layer_numbers",
    "make_element_state",
    "number_dtype",
    "on_device",
    "read_all_numbers",
    "read_numbers",
    "set_layer_numbers",
    "stepped_weights",
    "write_all_numbers",
    "write_numbers",
]


def number_dtype(tensor: torch.Tensor, name: str) -> torch.dtype:
    """The dtype of the numbers of a local tensor's layers: fp64 for fp64 tensors, else fp32; `step` as in torch."""
    return torch.float32 if name == "step" else compute_dtype(tensor)


def element_dtype(tensor: torch.Tensor, name: str, group: Mapping[str, Any]) -> torch.dtype:
    """The dtype of a local tensor's element-wise state in a group; fp64 for fp64 tensors."""
    if name == COMPENSATION:
        return tensor.dtype
    return STATE_DTYPES.get(group.get("state_dtype") or "", compute_dtype(tensor))


def keeps_compensation(tensor: torch.Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a local tensor of a group has the state `COMPENSATION`."""
    return group.get("master") == "kahan" and tensor.dtype == torch.bfloat16


def stepped_weights(optimizer: Any, tensor: torch.Tensor) -> torch.Tensor:
    """A local tensor's part here as any optimizer steps it: of bf16 weights with a compensation the sum, in fp32."""
    weights = local_part(tensor).detach()
    is_ours = isinstance(optimizer, Algorithm) and optimizer.keeps_own_state
    rest = optimizer.state.get(tensor, {}).get(COMPENSATION) if is_ours else None
    return weights if rest is None else sum_of(weights, local_part(rest))


def on_device(value: Any, device: torch.device) -> Any:
    """A copy of something from a state, with all its tensors on a device and, if it has that, in their own dtype."""
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.float64 and not has_fp64(device):
            value = value.to(torch.float32)
        return value.detach().clone().to(device)
    if isinstance(value, dict):
        return {name: on_device(inner, device) for name, inner in value.items()}
    if isinstance(value, list):
        return [on_device(inner, device) for inner in value]
    return copy.deepcopy(value)


def make_element_state(
    state: dict[str, Any], tensor: torch.Tensor, name: str, group: Mapping[str, Any]
) -> torch.Tensor:
    """Return an element-wise state of a local tensor in a group, which is made of zeros where there is none.

    It has the tensor's shape, and its order in memory; of a DTensor it is a DTensor with the same placements. State of
    another dtype, as before an option was set, is rounded to nearest.
    """
    dtype = element_dtype(tensor, name, group)
    if name not in state:
        order = torch.preserve_format if is_plain(tensor) else torch.contiguous_format
        state[name] = torch.zeros_like(tensor, dtype=dtype, memory_format=order)
    elif state[name].dtype != dtype:
        state[name] = state[name].to(dtype)
    values: torch.Tensor = state[name]
    return values


def layer_numbers(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, name: str, layers: int) -> torch.Tensor:
    """The per-layer state of the layers that a local tensor carries, shape (layers,), fp64; zeros if there is none."""
    numbers = read_numbers(optimizer.state.get(tensor, {}), name, layers, numbers_device(tensor.device))
    return numbers.to(torch.float64).expand(layers)


def set_layer_numbers(optimizer: torch.optim.Optimizer, tensor: torch.Tensor, name: str, values: torch.Tensor) -> None:
    """Set the per-layer state of the layers that a local tensor carries, shape (layers,)."""
    write_numbers(optimizer.state[tensor], name, values.to(number_dtype(tensor, name)).to(tensor.device))


def read_numbers(state: dict[str, Any], name: str, layers: int, device: torch.device) -> torch.Tensor:
    """The per-layer state in a tensor's state as it is kept, (layers,) or, where one number stands for all, ()."""
    value = state.get(name)
    if layers != 1 or "layers" in state:
        value = state.get("layers", {}).get(name, value)
    if isinstance(value, torch.Tensor):
        return value if value.device == device else value.to(device)
    # A tensor of a number would be copied to the device, and wait for it.
    return torch.full((), 0.0 if value is None else value, dtype=torch.float32, device=device)


def write_numbers(state: dict[str, Any], name: str, values: torch.Tensor) -> None:
    """Keep a copy of the per-layer state of a tensor's layers, shape (layers,)."""
    if len(values) == 1:
        _put(state, name, values[0])
        return
    _put(state.setdefault("layers", {}), name, values)
    if name == "step":
        # DeepSpeed's universal checkpoint expects one `step` for the whole flat tensor.
        _put(state, name, values.max())


def read_all_numbers(
    states: Sequence[dict[str, Any]], name: str, counts: Sequence[int], device: torch.device
) -> torch.Tensor:
    """The per-layer state of all tensors, one after the other, fp64; `counts` says how many layers each carries."""
    vectors = [read_numbers(state, name, count, device) for state, count in zip(states, counts, strict=True)]
    if len({(v.dtype, v.dim()) for v in vectors}) == 1 and len(vectors) == sum(counts) and vectors[0].dim() == 0:
        return torch.stack(vectors).to(torch.float64)
    return torch.cat([v.to(torch.float64).expand(count) for v, count in zip(vectors, counts, strict=True)])


def write_all_numbers(
    states: Sequence[dict[str, Any] | None],
    tensors: Sequence[torch.Tensor],
    name: str,
    counts: Sequence[int],
    values: torch.Tensor,
) -> None:
    """Keep what `read_all_numbers` has read, in the same memory where there is some; not where a state is None."""
    numbers, first = values.unbind(), 0
    known, new = [], []
    for state, tensor, count in zip(states, tensors, counts, strict=True):
        first, begin = first + count, first
        if state is None:
            continue
        if count != 1:
            write_numbers(state, name, values[begin:first].to(number_dtype(tensor, name)))
            continue
        value = state.get(name)
        if isinstance(value, torch.Tensor) and value.dim() == 0 and value.device == values.device:
            known.append(value)
            new.append(numbers[begin])
        else:
            state[name] = numbers[begin].to(number_dtype(tensor, name), copy=True)
    if known:
        torch._foreach_copy_(known, new)


def _put(state: dict[str, Any], name: str, value: torch.Tensor) -> None:
    """Keep a copy; on a GPU in the same memory as before, since a captured graph reads and writes that."""
    known = state.get(name)
    if isinstance(known, torch.Tensor) and known.is_cuda and (known.shape, known.dtype) == (value.shape, value.dtype):
        known.copy_(value)
    else:
        state[name] = value.clone()
