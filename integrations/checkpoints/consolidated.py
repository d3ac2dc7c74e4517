"""An optimizer's state in one file that any backend on any number of ranks reads: by parameter name, in safetensors.

    save_optimizer_state(optimizer, "optimizer.safetensors")        # on all ranks, e.g. four under ZeRO-3
    load_optimizer_state(optimizer, "optimizer.safetensors")        # on all ranks, e.g. two under FSDP2

The file holds, under "<what>/<layer's name>", whole tensors of the layers' shapes: `weight`, which is what the
optimizer steps (the fp32 master weights where a wrapper keeps them), and the optimizer's element-wise state; the
per-layer state as scalars; and, as JSON in the header, every option of every group with the names of its layers.

Saving streams: batches of bounded size are added up from the ranks' pieces, and rank 0 appends them. Loading reads, on
each rank, what its own pieces need. Where they are comes from the optimizer's layout.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from trustratio.optimizers.sharding.layout import listing
from trustratio.optimizers.stepping.count import steps_of
from trustratio.optimizers.stepping.kept_storage import Conversions

from .catalogue import Catalogue, prove_positions, share_out
from .content import CONTENT, UNKNOWN
from .local_state import WEIGHT, LocalState
from .plain import as_json
from .ranks import OptimizerStateError, device_for, of_all_ranks, raise_together, rank, several_ranks
from .safetensors_file import ReplacedFile, StoredTensor, header_of
from .stored import DAMAGED, FORMAT, VERSION, StoredFile, key_of

__all__ = ["OptimizerStateError", "load_optimizer_state", "save_optimizer_state"]

BATCH_BYTES = 64 << 20
"""How much of the state is on its way to rank 0 at a time."""


def save_optimizer_state(
    optimizer: Any, path: str | os.PathLike[str], *, model: torch.nn.Module | None = None, extra: Any = None
) -> None:
    """Write the optimizer's weights, state and group options to one file. Call it on all ranks, between steps.

    The file appears under its name when it is complete on disk; a write that is interrupted leaves the file that was
    there before. Memory: 64 MiB on each rank, or the largest row of a layer if that is more.

    Args:
        optimizer: One of this package's optimizers, or an object that holds it as `optimizer` (DeepSpeed's engine,
            accelerate's AcceleratedOptimizer).
        path: The file, which rank 0 writes; its folder is made.
        model: Names the layers by `model.named_parameters()`. Needed if the optimizer was not made from named
            parameters: without names, layers are called by their position, which other backends do not share.
        extra: Anything plain, e.g. a scheduler's state_dict(); `load_optimizer_state` returns rank 0's, with lists for
            tuples and numbers for tensors; keys of dicts are text or numbers and come back as they were.

    Raises:
        OptimizerStateError: On all ranks, if two layers share a name, ranks disagree about a layer, the position of
            a layer's elements is not known, an option cannot be written as JSON, or the file cannot be written.
        LayoutError: If no backend explains the optimizer's tensors.
        TypeError: If this is not an optimizer of this package, or `extra` is not plain.
    """
    encoded_extra = _encoded(extra)
    local = LocalState(optimizer, model)
    catalogue = Catalogue.of_all_ranks(local)
    if local.state_of_others:
        warnings.warn(
            f"not in the file: the state {', '.join(local.state_of_others)}, which is not {local.class_name}'s own. "
            "Whoever put it there must save it, e.g. as `extra` if it is plain",
            stacklevel=2,
        )
    owned = share_out(local, catalogue.trained)
    tensors = _stored_tensors(catalogue, local.layer_state)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "optimizer": local.class_name,
        "element_state": json.dumps(local.element_state),
        "layer_state": json.dumps(local.layer_state),
        "groups": json.dumps(catalogue.groups()),
        "extra": encoded_extra,
    }

    def header(content: dict[str, str]) -> bytes:
        return header_of((tensor for _, _, tensor in tensors), {**metadata, **content})

    file = ReplacedFile(path)
    write = partial(_on_rank_0, file)
    try:
        write(lambda: file.open())
        write(lambda: file.write_header(header({CONTENT: UNKNOWN})))
        for batch in _batches(tensors, BATCH_BYTES):
            values = _gather(batch, local, owned)
            write(partial(_append, file, batch, values))
        write(lambda: file.write_header(header({CONTENT: file.content.hexdigest()})))
        write(lambda: file.commit())
    finally:
        file.discard()


def load_optimizer_state(
    optimizer: Any,
    path: str | os.PathLike[str],
    *,
    model: torch.nn.Module | None = None,
    weights: bool = True,
    strict: bool = True,
    verify: bool = True,
) -> Any:
    """Restore what `save_optimizer_state` wrote, under any backend and number of ranks. Call it on all ranks.

    It may precede the first step. All group options are restored, `lr` and a scheduler's `initial_lr` among them, so
    change an option after loading. Make a scheduler before loading, and load its own state_dict() after it. How numbers
    are kept (`state_dtype`, `master`, `rounding_seed`) stays as it is, and state is converted, with a warning.

    Nothing is unpickled. Memory: this rank's part of one layer.

    Args:
        optimizer: As in `save_optimizer_state`, of the class that was saved, in the wrapper that will step it.
        path: The file; every rank reads it.
        model: As in `save_optimizer_state`.
        weights: Also restore what the optimizer steps, and with it the model's trained parameters: exact where a
            wrapper keeps fp32 master weights of 16-bit parameters. False leaves all weights as they are; load the
            model first then, since the file's compensation is taken where weights are the file's alone.
        strict: Whether the file must hold the same layers. With False, after layers were thawed, frozen, added or
            removed, those that both have are restored, and one warning lists the others. A layer that the file lacks
            keeps its weights and state (in a new optimizer none: its `step` counts from 0), a group of such layers
            alone keeps its options.
        verify: Read every byte first, shared among the ranks of each machine, and compare its hash with the one that
            the file has of it (files of earlier releases have none). Takes a second per GB and core.

    Returns:
        What was given as `extra`.

    Raises:
        OptimizerStateError: On all ranks and before anything is changed, if the position of a layer's elements is not
            known, the file cannot be read, is damaged, or holds the state of another model or optimizer, or ranks
            were given different files or options; the message lists the differences.
        LayoutError: If no backend explains the optimizer's tensors.
        TypeError: If this is not an optimizer of this package.
    """
    local = LocalState(optimizer, model)
    catalogue = Catalogue.of_all_ranks(local)
    prove_positions(local)
    stored, problems = _open(path)
    if len(set(of_all_ranks((bool(weights), bool(strict), bool(verify))))) > 1:
        problems.append("ranks were given different weights=, strict= or verify=: give all of them the same")
    raise_together(problems)
    assert stored is not None
    other_layers = _other_layers(stored, catalogue)
    problems = _differences(stored, local, catalogue) + (_refused(other_layers) if strict else [])
    if len(set(of_all_ranks(stored.fingerprint))) > 1:
        problems.append(f"ranks read different files under {os.fspath(path)}: copy one to all of them")
    raise_together(problems)
    raise_together(_damage(stored, path) if verify else [])
    if any(other_layers.values()):
        warnings.warn("; ".join(_described(other_layers)), stacklevel=2)
    _converted(stored, local, weights).warn(stacklevel=2)
    _set_state(stored, local, weights)
    for index, group in enumerate(local.optimizer.param_groups):
        for options in stored.options_of(local.names_of_group(index)):
            local.optimizer.modernize(options)
            for key, value in options.items():
                _set_option(group, key, value)
            if "step" not in options:
                group["step"] = steps_of(local.optimizer.state)
    steps = max(group["step"] for group in local.optimizer.param_groups)
    for group in local.optimizer.param_groups:
        group["step"] = steps  # of new layers alone, too
    if weights:
        local.publish_weights()
    return stored.extra


def _set_state(stored: StoredFile, local: LocalState, weights: bool) -> None:
    """Set what this rank holds of the layers that the file has."""
    without_rest = []
    with torch.no_grad():
        for name, layer in local.by_name.items():
            if name not in stored.shapes:
                continue
            for what in local.layer_state:
                local.set_numbers(layer, what, stored.number(name, what))
            for what in local.element_state:
                local.copy_from(stored.reader(name, what), layer, what)
            if weights:
                is_sum = name in stored.compensated and local.dtype(layer, WEIGHT) != torch.bfloat16
                local.copy_from(stored.sum_reader(name) if is_sum else stored.reader(name, WEIGHT), layer, WEIGHT)
            if local.has_compensation(layer):
                readers = stored.rest_reader(name), stored.reader(name, WEIGHT)
                if not local.copy_compensation_from(*readers, layer) and name in stored.compensated:
                    without_rest.append(name)
    if without_rest:
        warnings.warn(
            f"the file's compensation of {listing(without_rest)} was not taken, since with weights=False it is taken "
            "where the weights here are the file's, and none of these is: load the model first",
            stacklevel=3,
        )


def _converted(stored: StoredFile, local: LocalState, weights: bool) -> Conversions:
    """What this rank keeps with another number of bits than the file."""
    conversions = Conversions(local.optimizer)
    for name, layer in local.by_name.items():
        if name not in stored.shapes:
            continue
        for what in local.element_state:
            conversions.note(what, stored.dtype(name, what), local.dtype(layer, what))
        has_place = local.has_compensation(layer) or (weights and local.dtype(layer, WEIGHT) != torch.bfloat16)
        if name in stored.compensated and not has_place:
            conversions.note_left_behind()
    return conversions


# Writing ------------------------------------------------------------------------------------------------------------


def _encoded(extra: Any) -> str:
    """What the user adds, as JSON; TypeError on all ranks if any rank's is not plain."""
    encoded, problems = "", []
    try:
        encoded = as_json(extra)
    except (TypeError, ValueError) as error:  # the latter if it contains itself
        problems = [f"extra cannot be written as JSON: {error}"]
    raise_together(problems, TypeError)
    return encoded


def _stored_tensors(catalogue: Catalogue, layer_state: list[str]) -> list[tuple[str, str, StoredTensor]]:
    """Every tensor of the file with its layer and what it is, wider dtypes first, so that all are aligned."""
    tensors = [
        (name, what, StoredTensor(key_of(name, what), dtype, () if what in layer_state else layer.shape))
        for name, layer in catalogue.trained.items()
        for what, dtype in layer.dtypes.items()
    ]
    return sorted(tensors, key=lambda entry: -entry[2].dtype.itemsize)


@dataclass(frozen=True)
class _Rows:
    """Some rows of a tensor of the file, at an offset in a batch's buffer, in bytes."""

    name: str
    what: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    offset: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def within(self, buffer: torch.Tensor) -> torch.Tensor:
        """The rows as a view of the buffer."""
        begin = self.offset // self.dtype.itemsize
        return buffer.view(self.dtype)[begin : begin + prod(self.shape)].view(self.shape)


def _batches(tensors: list[tuple[str, str, StoredTensor]], limit: int) -> Iterator[list[_Rows]]:
    """Cut the file's tensors into batches of at most `limit` bytes, if no row is larger."""
    batch: list[_Rows] = []
    size = 0
    for name, what, tensor in tensors:
        rows = tensor.shape[0] if tensor.shape else 1
        first = 0
        while first < rows:
            count = min(rows - first, (limit - size) // (tensor.nbytes // rows))
            if count <= 0 and batch:
                yield batch
                batch, size = [], 0
                continue
            count = max(count, 1)
            shape = (count, *tensor.shape[1:]) if tensor.shape else ()
            batch.append(_Rows(name, what, tensor.dtype, shape, first, size))
            size += -(-batch[-1].nbytes // 8) * 8
            first += count
    if batch:
        yield batch


def _gather(batch: list[_Rows], local: LocalState, owned: dict[str, bool]) -> torch.Tensor:
    """Add up the ranks' pieces on rank 0. As integers: all summands but one are zero, so that every bit arrives."""
    device = device_for(local.layout.device)
    buffer = torch.zeros(-(-(batch[-1].offset + batch[-1].nbytes) // 8), dtype=torch.int64, device=device)
    for rows in batch:
        if rows.name in owned and (rows.what not in local.layer_state or owned[rows.name]):
            local.copy_to(rows.within(buffer), rows.first, local.by_name[rows.name], rows.what)
    if several_ranks():
        dist.reduce(buffer, dst=0)
    return buffer


def _append(file: ReplacedFile, batch: list[_Rows], values: torch.Tensor) -> None:
    content = values.cpu()
    for rows in batch:
        file.write(rows.within(content))


def _on_rank_0(file: ReplacedFile, action: Callable[[], None]) -> None:
    """Run the action on rank 0; if it fails, raise on all ranks."""
    problems = []
    if rank() == 0:
        try:
            action()
        except OSError as error:
            problems = [f"could not write {file.path}: {error}. A file that was there before is unchanged"]
    raise_together(problems)


# Reading ------------------------------------------------------------------------------------------------------------


def _open(path: str | os.PathLike[str]) -> tuple[StoredFile | None, list[str]]:
    if os.path.isdir(path):
        return None, [f"{os.fspath(path)} is a folder: give the file that save_optimizer_state wrote"]
    try:
        return StoredFile(path), []
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        return None, [f"{os.fspath(path)} cannot be read as an optimizer's state: {error}"]


def _damage(stored: StoredFile, path: str | os.PathLike[str]) -> list[str]:
    try:
        whole = stored.is_whole()
    except OSError as error:
        return [f"{os.fspath(path)} cannot be read as an optimizer's state: {error}"]
    return [] if whole else [f"{os.fspath(path)} cannot be read as an optimizer's state: {DAMAGED}"]


def _other_layers(stored: StoredFile, catalogue: Catalogue) -> dict[str, list[str]]:
    """The layers that only one of both has, by what is to be said of them."""
    return {
        "layers that the file lacks": [name for name in catalogue.trained if name not in stored.shapes],
        "layers that only the file has": [name for name in stored.shapes if name not in catalogue.layers],
    }


def _described(layers: dict[str, list[str]]) -> list[str]:
    return [f"{which}: {_shown(names)}" for which, names in layers.items() if names]


def _refused(layers: dict[str, list[str]]) -> list[str]:
    hint = (
        "load it into the same model with the same parameters trained, or with strict=False to restore the layers "
        "that are in both; where only names differ, pass `model` or named parameters when saving and when loading"
    )
    return [*_described(layers), hint] if any(layers.values()) else []


def _differences(stored: StoredFile, local: LocalState, catalogue: Catalogue) -> list[str]:
    """Why the file does not belong to this optimizer and model."""
    problems = []
    if stored.class_name != local.class_name:
        problems.append(f"the file is of {stored.class_name}, the optimizer is {local.class_name}: make that optimizer")
    elif (stored.element_state, stored.layer_state) != (local.element_state, local.layer_state):
        kept, wanted = (", ".join((*of.element_state, *of.layer_state)) for of in (stored, local))
        problems.append(
            f"the file keeps {kept}, this {local.class_name} keeps {wanted}: make the optimizer with the file's "
            f"options: {_differing_options(stored, local)}"
        )
    shapes = [
        f"{name} {stored.shapes[name]} in the file, {layer.shape} in the model"
        for name, layer in catalogue.layers.items()
        if stored.shapes.get(name, layer.shape) != layer.shape
    ]
    if shapes:
        problems.append(f"layers of another shape: {_shown(shapes)}")
    for index in range(len(local.optimizer.param_groups)):
        options = stored.options_of(local.names_of_group(index))
        if len(options) > 1:
            keys = sorted(key for key in {*options[0], *options[1]} if options[0].get(key) != options[1].get(key))
            problems.append(
                f"group {index} here holds layers of groups with different {', '.join(keys)} in the file: make groups "
                "that keep them apart"
            )
    return problems


def _differing_options(stored: StoredFile, local: LocalState) -> str:
    differing = []
    for index, group in enumerate(local.optimizer.param_groups):
        for options in stored.options_of(local.names_of_group(index)):
            differing += [
                f"{key}={value!r} (here {group[key]!r}) in group {index}"
                for key, value in options.items()
                if key in group and _like(group[key], value) != group[key] and key not in ("lr", "initial_lr")
            ]
    return _shown(differing)


def _like(current: Any, value: Any) -> Any:
    """The value as the optimizer keeps the option: JSON has no tuples and no tensors."""
    if isinstance(current, torch.Tensor):
        return torch.as_tensor(value, device="cpu").to(current)
    return tuple(value) if isinstance(current, tuple) else value


def _set_option(group: dict[str, Any], key: str, value: Any) -> None:
    current = group.get(key)
    if isinstance(current, torch.Tensor):
        current.copy_(_like(current, value))  # in place, as graphs and compiled steps need it
    else:
        group[key] = _like(current, value)


def _shown(items: list[str]) -> str:
    return listing(items, shown=8)
