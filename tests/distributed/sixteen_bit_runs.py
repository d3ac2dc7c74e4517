"""Runs that keep numbers of 16 bits, and what they have in the end, as the consolidated file has it.

Gradients are the same on all ranks and of bf16, so that their mean over a power of two of ranks is exact.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
    fully_shard,
)
from torch.nn.parallel import DistributedDataParallel

from trustratio.integrations.checkpoints.consolidated import load_optimizer_state, save_optimizer_state

from . import cases, megatron_distributed_runs
from .cases import Case, Model, initial_weights, make_optimizer, mean_gradients
from .checkpoint_runs import WAYS, Way
from .exactness import MODEL, two_groups
from .fsdp_runs import make_mesh

SAVED, STEPS = 3, 6
FP32: dict[str, Any] = {"bf16": {"enabled": False}}
BF16_OPTIMIZER: dict[str, Any] = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


@dataclass(frozen=True)
class Kept:
    """How numbers are kept: the dtype of the weights, and the optimizer's options."""

    weights: torch.dtype
    options: dict[str, Any]


KEPT = {
    "state": Kept(torch.float32, {"state_dtype": "bfloat16", "rounding_seed": 3}),
    "stochastic": Kept(torch.bfloat16, {"state_dtype": "bfloat16", "master": "stochastic"}),
    "kahan": Kept(torch.bfloat16, {"master": "kahan"}),
    "kahan and state": Kept(torch.bfloat16, {"state_dtype": "bfloat16", "master": "kahan"}),
    "fp32": Kept(torch.float32, {}),
}


def make_case(name: str, stage: str | int, kept: str, **changes: Any) -> Case:
    groups = two_groups(name, **KEPT[kept].options)
    options = {"constructor": {"implementation": "eager"}, "spread": 0.0, "dtype": "bf16", **changes}
    return Case(name, MODEL, stage, groups, steps=STEPS, **options)


# Inside the workers -------------------------------------------------------------------------------------------------


class Run:
    """In one process, or in torch's own wrappers."""

    def __init__(self, case: Case, kept: str, seed: int = 0):
        self.case = case
        self.model = Model(case).to(KEPT[kept].weights)
        self.model.load(initial_weights(replace(case, seed=case.seed + seed)))
        self.trained: Any = self.model
        if case.stage == "ddp":
            self.trained = DistributedDataParallel(self.model)
        elif case.stage in ("fsdp", "hsdp"):
            fully_shard(self.model, mesh=make_mesh((2, 2) if case.stage == "hsdp" else None))
        elif case.stage == "fsdp1":
            self.trained = FullyShardedDataParallel(self.model, use_orig_params=True, device_id=torch.device("cpu"))
        self.optimizer: Any = make_optimizer(case, self.model)

    def train(self, first: int, last: int) -> None:
        for gradients in mean_gradients(self.case)[first:last]:
            self.trained(gradients).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def close(self) -> None:
        self.model = self.trained = self.optimizer = None  # type: ignore[assignment]
        gc.collect()


@contextmanager
def running(case: Case, kept: str, seed: int = 0) -> Iterator[Any]:
    """A run with weights of another seed."""
    if case.stage == "megatron":
        with megatron_distributed_runs.running(case, perturbed=bool(seed)) as megatron:
            megatron.optimizer = megatron.wrapper
            yield megatron
        return
    run = Run(case, kept, seed) if isinstance(case.stage, str) else cases.CaseRun(case, perturbed=bool(seed))
    try:
        yield run
    finally:
        run.close()


def straight(case: Case, kept: str, path: str) -> None:
    """Train all steps and write what there is."""
    with running(case, kept) as run:
        run.train(0, STEPS)
        save_optimizer_state(run.optimizer, path, model=run.model)


def write(way: str, case: Case, kept: str, path: str) -> None:
    with running(case, kept) as run:
        run.train(0, SAVED)
        WAYS_HERE[way].save(run, path)


def resume(way: str, case: Case, kept: str, path: str, then: str) -> None:
    """Go on from a file in a new run with other weights, and write what there is in the end."""
    with running(case, kept, seed=7) as run:
        WAYS_HERE[way].load(run, path)
        run.train(SAVED, STEPS)
        save_optimizer_state(run.optimizer, then, model=run.model)


def warned_resume(way: str, case: Case, kept: str, path: str, then: str) -> list[str]:
    """The same, and what was said of how numbers are kept."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resume(way, case, kept, path, then)
    sentences = [str(one.message) for one in caught]
    return [sentence for sentence in sentences if "as state_dtype says" in sentence or "left behind" in sentence]


def _save_consolidated(run: Any, path: str) -> None:
    save_optimizer_state(run.optimizer, path, model=run.model)


def _load_consolidated(run: Any, path: str) -> None:
    load_optimizer_state(run.optimizer, path, model=run.model)


def _save_state_dicts(run: Any, path: str) -> None:
    """As a script saves them: of sharded tensors, each rank its own."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, f"{path}-{rank}")


def _load_state_dicts(run: Any, path: str) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    state = torch.load(f"{path}-{rank}", weights_only=False)
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])


def _whole_states(run: Any) -> Any:
    """Whole tensors; True aliases states that are on the CPU."""
    return FullyShardedDataParallel.state_dict_type(
        run.trained,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(offload_to_cpu=False, rank0_only=False),
        FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=False),
    )


def _save_fsdp1(run: Any, path: str) -> None:
    with _whole_states(run):
        optimizer = FullyShardedDataParallel.optim_state_dict(run.trained, run.optimizer)
        state = {"model": run.trained.state_dict(), "optimizer": optimizer}
    if dist.get_rank() == 0:
        torch.save(state, path)
    dist.barrier()


def _load_fsdp1(run: Any, path: str) -> None:
    state = torch.load(path, weights_only=False)
    with _whole_states(run):
        run.trained.load_state_dict(state["model"])
        loadable = FullyShardedDataParallel.optim_state_dict_to_load(run.trained, run.optimizer, state["optimizer"])
    run.optimizer.load_state_dict(loadable)


def dcp_state(run: Any) -> dict[str, Any]:
    return {"model": run.model.state_dict(), "optimizer": get_optimizer_state_dict(run.model, run.optimizer)}


def _save_dcp(run: Any, path: str) -> None:
    dcp.save(dcp_state(run), checkpoint_id=path)


def _load_dcp(run: Any, path: str) -> None:
    state = dcp_state(run)
    dcp.load(state, checkpoint_id=path)
    run.model.load_state_dict(state["model"])
    set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"])


def _save_engine_checkpoint(run: Any, path: str) -> None:
    run.engine.save_checkpoint(path, tag="middle")


def _load_engine_checkpoint(run: Any, path: str) -> None:
    found, _ = run.engine.load_checkpoint(path, tag="middle")
    assert found is not None


WAYS_HERE = {
    "consolidated": Way(_save_consolidated, _load_consolidated),
    "engine": WAYS["engine"],
    "engine's own": Way(_save_engine_checkpoint, _load_engine_checkpoint),
    "dcp": Way(_save_dcp, _load_dcp),
    "fsdp1": Way(_save_fsdp1, _load_fsdp1),
    "state_dict": Way(_save_state_dicts, _load_state_dicts),
}


# Outside ------------------------------------------------------------------------------------------------------------


def assert_same(one: str | Path, other: str | Path) -> None:
    """The same tensors in both files, in the same dtypes, to the bit."""
    found, expected = load_file(one), load_file(other)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        here, there = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (found[key], value))
        assert torch.equal(here, there), f"{key}: {(found[key] != value).sum()} of {value.numel()} differ"
