"""Runs that are cut in two: one pool writes the state after some steps, another reads it and trains on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from trustratio.integrations.checkpoints.consolidated import load_optimizer_state, save_optimizer_state
from trustratio.integrations.checkpoints.deepspeed_engine import load_engine_state, save_engine_state
from trustratio.optimizers import OPTIMIZERS

from . import cases, fsdp_runs
from .cases import Case
from .exactness import BOUND, MODEL, NOISE, assemble, expected, two_groups, worst_error

SAVED, STEPS = 3, 8
SAMPLE_GROUPS = 12  # a multiple of every number of ranks here
WITHOUT_STATISTICS = [name for name, entry in OPTIMIZERS.items() if entry.group_statistics is None]
# Besides the stages of `Case`.
FSDP = {"fsdp": fsdp_runs.Setup(), "hsdp": fsdp_runs.Setup((2, 2))}


def make_case(name: str, world_size: int, stage: str | int, **changes: Any) -> Case:
    """A case whose gradients, and whose groups of samples, do not depend on the number of ranks."""
    changes.setdefault("noise", NOISE.get(name, 0.0))
    changes.setdefault("accumulation", SAMPLE_GROUPS // world_size if OPTIMIZERS[name].group_statistics else 1)
    return Case(name, MODEL, stage, two_groups(name), steps=STEPS, **changes)


def start(case: Case) -> Any:
    """A model and its optimizer, wrapped."""
    return fsdp_runs.Run(case, FSDP[str(case.stage)]) if case.stage in FSDP else cases.CaseRun(case)


# How a run is written and read --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """One way to save a run and to load it."""

    save: Callable[[Any, str], None]
    load: Callable[[Any, str], None]


def _save_consolidated(run: Any, path: str) -> None:
    save_optimizer_state(run.optimizer, path, model=run.model, extra={"seed": run.case.seed})


def _load_consolidated(run: Any, path: str) -> None:
    assert load_optimizer_state(run.optimizer, path, model=run.model) == {"seed": 0}


def _save_engine(run: Any, path: str) -> None:
    save_engine_state(run.engine, path, extra={"seed": run.case.seed})


def _load_engine(run: Any, path: str) -> None:
    assert load_engine_state(run.engine, path) == {"seed": 0}


def _dcp_state(run: Any) -> dict[str, Any]:
    return {"model": run.model.state_dict(), "optimizer": get_optimizer_state_dict(run.model, run.optimizer)}


def _save_dcp(run: Any, path: str) -> None:
    dcp.save(_dcp_state(run), checkpoint_id=path)


def _load_dcp(run: Any, path: str) -> None:
    state = _dcp_state(run)
    dcp.load(state, checkpoint_id=path)
    run.model.load_state_dict(state["model"])
    set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"])


WAYS = {
    "consolidated": Way(_save_consolidated, _load_consolidated),
    "engine": Way(_save_engine, _load_engine),
    "dcp": Way(_save_dcp, _load_dcp),
}


# Inside the workers -------------------------------------------------------------------------------------------------


def write(way: str, case: Case, path: str) -> None:
    """Train the first steps and save."""
    run = start(case)
    try:
        run.train(0, SAVED)
        WAYS[way].save(run, path)
    finally:
        run.close()


def read(way: str, case: Case, path: str, first: int = SAVED, last: int = STEPS, then: str | None = None) -> Any:
    """Load into a model and an optimizer that differ in all that should be restored, train on, and perhaps save."""
    wrong = tuple({**options, "lr": 7 * options["lr"], "weight_decay": 0.3} for options in case.groups)
    run = start(replace(case, seed=case.seed + 7, groups=wrong))
    try:
        WAYS[way].load(run, path)
        run.case, run.gradients = case, cases.mean_gradients(case)
        run.train(first, last)
        if then is not None:
            WAYS[way].save(run, then)
        result = run.result()
        groups = zip(run.optimizer.param_groups, case.groups, strict=True)
        return {**result, "groups": [{key: group[key] for key in options} for group, options in groups]}
    finally:
        run.close()


def read_alone(case: Case, path: str) -> Any:
    """Read in this process, which has no process group."""
    assert not dist.is_initialized()
    return read("consolidated", case, path)


# Outside ------------------------------------------------------------------------------------------------------------


@dataclass
class Files:
    """What pools of different sizes share; a file is written when it is first asked for."""

    folder: Path
    pools: Any

    def get(self, way: str, name: str, world_size: int, stage: str | int, **changes: Any) -> str:
        path = self.folder / "-".join(map(str, (way, name, world_size, stage, *changes)))
        if not path.exists():
            self.run(world_size, write, way, make_case(name, world_size, stage, **changes), str(path))
        return str(path)

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run a function on all ranks of the pool of this size."""
        return self.pools.get(world_size).run(function, *args)


def assert_continued(case: Case, answers: list[Any], first: int = SAVED) -> None:
    """Weights after the last step, options, and the ratios since loading are the float64 reference's."""
    _, ratios = expected(case, len(answers))
    for answer in answers:
        weights = answer["weights"] if case.dtype == "fp32" else assemble(case, answers)
        error, layer = worst_error(case, weights, ranks=len(answers))
        assert error <= BOUND, f"{layer}: relative error of the weight change {error:.2e}"
        assert answer["groups"] == list(case.groups)
        assert len(answer["ratios"]) == case.steps - first
        for found, wanted in zip(answer["ratios"], ratios[first:], strict=True):
            for layer, ratio in wanted.items():
                assert abs(found[layer] / ratio - 1) <= 1e-6, f"{layer}: ratio {found[layer]} for {ratio}"
