"""DeepSpeed's universal checkpoint for every optimizer of this package.

    save_universal_checkpoint(engine, "folder", "step100")      # on all ranks, e.g. two under ZeRO-1
    load_universal_checkpoint(engine, "folder", "step100")      # on all ranks, e.g. three under ZeRO-3

DeepSpeed's converter knows `exp_avg` and `exp_avg_sq` alone, so the folder is written from the engine-state file:

    <tag>/zero/<parameter>/fp32.pt, <state>.pt      whole tensors, every element-wise state under its own name
    <tag>/zero/optimizer_state.pt                   group options, as DeepSpeed reads them
    <tag>/*_model_states.pt                         counters and scheduler, as DeepSpeed reads them
    <tag>/trustratio.json                           per-layer state, and options by parameter name
    latest_universal                                the tag

`engine.load_checkpoint` with `"checkpoint": {"load_universal": true}` reads the weights and element-wise state of it
under ZeRO-1 and 2; under ZeRO-3 it reads `exp_avg` and `exp_avg_sq` alone and gives every group the first group's
options. Nowhere does it know state per layer. `load_universal_checkpoint` reads all of it, instead of that call or
after it. Read from DeepSpeed 0.19.8.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint.constants import CAT_DIM, DS_VERSION, FP32_WEIGHT_KEY, OPTIMIZER_STATE_DICT, PARAM
from deepspeed.runtime.engine import DeepSpeedEngine

from .consolidated import restore
from .deepspeed_engine import restore_engine, save_engine_state
from .local_state import WEIGHT
from .pieces import ReadBlock
from .ranks import raise_together, rank
from .stored import StoredFile, StoredState

__all__ = ["load_universal_checkpoint", "save_universal_checkpoint", "universal_from_engine_state"]

OWN_FILE = "trustratio.json"
# ZeRO-1/2 look for the first, ZeRO-3 for the second; the checkpoint's own name says nothing about its stage.
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def save_universal_checkpoint(
    engine: DeepSpeedEngine, folder: str | os.PathLike[str], tag: str, *, extra: Any = None
) -> None:
    """Write a universal checkpoint from an engine. Call it on all ranks after `engine.step()`.

    Args:
        engine: As in `save_engine_state`.
        folder: Of all checkpoints; rank 0 writes `<folder>/<tag>`, which appears when it is complete.
        tag: Of this checkpoint.
        extra: Anything plain, as in `save_engine_state`; `load_universal_checkpoint` returns it.

    Raises:
        OptimizerStateError: On all ranks, as `save_engine_state`, or if the folder cannot be written.
    """
    state_file = Path(folder, f"{tag}.safetensors")
    save_engine_state(engine, state_file, extra=extra)
    problems = []
    if rank() == 0:
        try:
            universal_from_engine_state(state_file, folder, tag)
        except (OSError, ValueError) as error:
            problems = [f"could not write the universal checkpoint {Path(folder, tag)}: {error}"]
        state_file.unlink()
    raise_together(problems)


def universal_from_engine_state(state_file: str | os.PathLike[str], folder: str | os.PathLike[str], tag: str) -> None:
    """Write a universal checkpoint from a file of `save_engine_state`, in one process. Memory: one tensor.

    Raises:
        ValueError: If the file is of another kind, or has segments of parameters, which DeepSpeed does not know, or
            the tag exists.
        OSError: If the folder cannot be written.
    """
    stored = StoredFile(state_file)
    if not isinstance(stored.extra, dict) or not {"counters", "scheduler"} <= stored.extra.keys():
        raise ValueError(f"{os.fspath(state_file)} has no engine's counters: write it with save_engine_state")
    whole, partial = Path(folder, tag), Path(folder, f"{tag}.partial")
    if whole.exists():
        raise ValueError(f"{whole} exists: give each checkpoint a tag of its own, or remove it first")
    if any(group["options"].get("segments") for group in stored.groups):
        raise ValueError(
            "DeepSpeed knows no segments of parameters: use load_engine_state for optimizers with segments"
        )
    shutil.rmtree(partial, ignore_errors=True)
    for path, content in _files(stored):
        (partial / path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, partial / path)
    (partial / OWN_FILE).write_text(json.dumps({"metadata": stored.metadata, "numbers": _numbers(stored)}))
    partial.rename(whole)
    latest = Path(folder, "latest_universal.partial")
    latest.write_text(tag)
    latest.rename(Path(folder, "latest_universal"))


def load_universal_checkpoint(engine: DeepSpeedEngine, folder: str | os.PathLike[str], tag: str | None = None) -> Any:
    """Continue from a checkpoint of `save_universal_checkpoint`, with any number of ranks and any ZeRO stage.

    It restores all that `load_engine_state` restores, so `engine.load_checkpoint` need not be called before it; if it
    was, the options of all groups and the state per layer are right after this call. Call it on all ranks.

    Args:
        engine: An engine for the same model and optimizer.
        folder: Of all checkpoints.
        tag: Of one; else the last one written.

    Returns:
        What was given as `extra`.

    Raises:
        OptimizerStateError: On all ranks, before anything is changed, if the checkpoint cannot be read or is of
            another model or optimizer.
    """
    root = os.fspath(folder)
    return restore_engine(engine, restore(engine, lambda path: _UniversalFolder(path, tag), root, model=engine.module))


# Writing ------------------------------------------------------------------------------------------------------------


def _files(stored: StoredFile) -> Iterator[tuple[str, Any]]:
    """The files that DeepSpeed reads, one at a time."""
    for name in stored.shapes:
        for what in (WEIGHT, *stored.element_state):
            tensor = stored.whole(name, what)
            yield _path(name, what), {PARAM: tensor, CAT_DIM: 0}
    groups = [_options(group) for group in stored.groups]
    # ZeRO-3 wants a step there, which it takes for every layer's.
    step = torch.tensor(max((stored.number(name, "step") for name in stored.shapes), default=0.0))
    inner = {"state": {0: {"step": step}}, "param_groups": groups}
    yield (
        "zero/optimizer_state.pt",
        {DS_VERSION: deepspeed.__version__, "param_groups": groups, OPTIMIZER_STATE_DICT: inner},
    )
    for path in MODEL_FILES:
        yield path, _engine_state(stored.extra)


def _path(name: str, what: str) -> str:
    return f"zero/{name}/{FP32_WEIGHT_KEY if what == WEIGHT else what}.pt"


def _options(group: dict[str, Any]) -> dict[str, Any]:
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in group["options"].items()}
    return {**options, "params": []}


def _engine_state(extra: dict[str, Any]) -> dict[str, Any]:
    return {
        **extra["counters"],
        "lr_scheduler": extra["scheduler"],
        "module": {},
        "dp_world_size": 1,
        "mp_world_size": 1,
    }


def _numbers(stored: StoredFile) -> dict[str, dict[str, float]]:
    return {what: {name: stored.number(name, what) for name in stored.shapes} for what in stored.layer_state}


# Reading ------------------------------------------------------------------------------------------------------------


class _UniversalFolder(StoredState):
    """A universal checkpoint as the optimizer's state by name. Nothing is unpickled but tensors."""

    def __init__(self, folder: str, tag: str | None):
        self._folder = Path(folder, tag or Path(folder, "latest_universal").read_text().strip())
        content = json.loads((self._folder / OWN_FILE).read_text())
        self._of_layers: dict[str, dict[str, float]] = content["numbers"]
        super().__init__(content["metadata"])

    def _tensor(self, name: str, what: str) -> torch.Tensor:
        # Mapped into memory: of the file only what is used is read.
        return torch.load(self._folder / _path(name, what), weights_only=True, mmap=True)[PARAM]

    def shape(self, name: str, what: str) -> tuple[int, ...]:
        return tuple(self._tensor(name, what).shape)

    def reader(self, name: str, what: str) -> ReadBlock:
        return lambda slices: self._tensor(name, what)[slices]

    def number(self, name: str, what: str) -> float:
        return self._of_layers[what][name]
