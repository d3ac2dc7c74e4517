"""The state of one local tensor: how a step and checkpoints read, make and set it.

State with one value per element is a tensor like the local tensor, under its name. State with one number per layer is a
0-d tensor under its name where the tensor carries one layer; where it carries several, a vector in the dict "layers",
because DeepSpeed cuts the padding's length off every tensor that lies in a flat tensor's state itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .chunks import compute_dtype

if TYPE_CHECKING:
    from .layerwise import LayerwiseOptimizer

__all__ = [
    "layer_numbers",
    "make_element_state",
    "put",
    "read_numbers",
    "set_layer_numbers",
    "state_dtype",
    "write_numbers",
]


def state_dtype(tensor: torch.Tensor, name: str) -> torch.dtype:
    """The dtype of a local tensor's state: fp64 for fp64 tensors, else fp32; of `step` fp32, as torch keeps it."""
    return torch.float32 if name == "step" else compute_dtype(tensor)


def make_element_state(optimizer: LayerwiseOptimizer, tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return a local tensor's element-wise state, which is made of zeros where there is none.

    It has the tensor's shape; of a DTensor it is a DTensor with the same placements.
    """
    state = optimizer.state[tensor]
    if name not in state:
        dense = torch.contiguous_format
        state[name] = torch.zeros_like(tensor, dtype=state_dtype(tensor, name), memory_format=dense)
    return state[name]


def layer_numbers(optimizer: LayerwiseOptimizer, tensor: torch.Tensor, name: str, layers: int) -> torch.Tensor:
    """The per-layer state of the layers that a local tensor carries, shape (layers,), fp64; zeros if there is none."""
    return read_numbers(optimizer.state.get(tensor, {}), name, layers, tensor.device).to(torch.float64).expand(layers)


def set_layer_numbers(optimizer: LayerwiseOptimizer, tensor: torch.Tensor, name: str, values: torch.Tensor) -> None:
    """Set the per-layer state of the layers that a local tensor carries, shape (layers,)."""
    write_numbers(optimizer.state[tensor], name, values.to(tensor.device, state_dtype(tensor, name)))


def read_numbers(state: dict[str, Any], name: str, layers: int, device: torch.device) -> torch.Tensor:
    """The per-layer state in a tensor's state as it is kept, (layers,) or, where one number stands for all, ()."""
    value = state.get(name)
    if layers != 1 or "layers" in state:
        value = state.get("layers", {}).get(name, value)
    if isinstance(value, torch.Tensor):
        return value if value.device == device else value.to(device)
    return torch.as_tensor(0.0 if value is None else value, dtype=torch.float32, device=device)


def write_numbers(state: dict[str, Any], name: str, values: torch.Tensor) -> None:
    """Keep a copy of the per-layer state of a tensor's layers, shape (layers,)."""
    if len(values) == 1:
        put(state, name, values[0])
        return
    put(state.setdefault("layers", {}), name, values)
    if name == "step":
        # DeepSpeed's universal checkpoint expects one `step` for the whole flat tensor.
        put(state, name, values.max())


def put(state: dict[str, Any], name: str, value: torch.Tensor) -> None:
    """Keep a copy; on a GPU in the same memory as before, since a captured graph reads and writes that."""
    known = state.get(name)
    if isinstance(known, torch.Tensor) and known.is_cuda and (known.shape, known.dtype) == (value.shape, value.dtype):
        known.copy_(value)
    else:
        state[name] = value.clone()
