"""One setting on this rank: the training case of tests/distributed on a device, and how far it is from float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import tree_map_only

from tests.distributed.cases import Case, CaseRun, gathered, make_optimizer, masters
from tests.distributed.exactness import assemble, expected, worst_error
from trustratio.optimizers.sharding import layout, local_tensors

from .settings import BOUND

__all__ = ["RATIO_BOUND", "judge", "sending_to_itself", "train"]

RATIO_BOUND = 1e-6


class DeviceRun(CaseRun):
    """A case whose model is on a device."""

    def __init__(self, case: Case, device: str) -> None:
        self.device = device
        super().__init__(case)

    def _wrap(self) -> None:
        self.model.to(self.device)
        if self.case.stage == "fsdp":
            fully_shard(self.model, mesh=mesh_of_all(self.device))
            self.optimizer = make_optimizer(self.case, self.model)  # of the parameters that there are now
        else:
            super()._wrap()

    def answer(self) -> dict[str, Any]:
        """What `judge` compares, on the CPU."""
        found = {
            "weights": {layer.name: self._whole(layer.name) for layer in self.case.layers},
            "masters": masters(self.optimizer) if self.case.dtype != "fp32" else {},
            "ratios": self.ratios,
            "collectives": self.counter.per_call,
        }
        return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu(), found)

    def _whole(self, name: str) -> torch.Tensor:
        parameter: Any = self.model.leaves[name].weight
        with gathered([parameter]):
            whole: torch.Tensor = parameter.full_tensor() if self.case.stage == "fsdp" else parameter
            return whole.detach().float().clone()


def mesh_of_all(device: str) -> DeviceMesh:
    """All ranks, in the group that they are in.

    Where there is a GPU and that group is gloo's, `init_device_mesh` makes another one. By the version of torch it may
    be NCCL's, which refuses two ranks on one device.
    """
    assert dist.group.WORLD is not None
    return DeviceMesh.from_group(dist.group.WORLD, device)


def train(case: Case, device: str) -> dict[str, Any]:
    """Train a case on this rank; see `DeviceRun.answer`."""
    run = DeviceRun(case, device)
    try:
        run.train(0, case.steps)
        return run.answer()
    finally:
        run.close()


def judge(case: Case, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Errors of all ranks against the float64 reference, and the collectives of each call after the first step.

    Returns:
        error: Largest relative error of a layer's weight change (of its fp32 master with 16-bit weights), of `layer`.
        ratio_error: Largest relative error of a trust ratio.
        collectives: Numbers of collectives that calls had.
        exact: Whether the errors are within `BOUND` and `RATIO_BOUND` and all ranks have the same ratios.
    """
    ranks = len(answers)
    of_masters = case.dtype != "fp32"
    weights = [assemble(case, list(answers))] if of_masters else [answer["weights"] for answer in answers]
    error, layer = max((worst_error(case, found, ranks=ranks) for found in weights), key=_nan_is_largest)
    ratio_error = _ratio_error(case, answers[0]["ratios"], ranks)
    agreeing = all(answer["ratios"] == answers[0]["ratios"] for answer in answers)
    calls = answers[0]["collectives"]
    in_first_step = len(calls) // case.steps
    return {
        "error": error,
        "layer": layer,
        "ratio_error": ratio_error,
        "collectives": sorted({*calls[in_first_step:]}),
        "exact": error <= BOUND and ratio_error <= RATIO_BOUND and agreeing,
    }


def _nan_is_largest(found: tuple[float, str]) -> float:
    return float("inf") if found[0] != found[0] else found[0]


def _ratio_error(case: Case, found: Sequence[dict[str, float]], ranks: int) -> float:
    _, wanted = expected(case, ranks)
    errors = [
        abs(step.get(layer, float("nan")) / ratio - 1)
        for step, ratios in zip(found, wanted, strict=True)
        for layer, ratio in ratios.items()
    ]
    return max(errors, key=lambda error: float("inf") if error != error else error, default=0.0)


class _Alone(int):
    """One rank, that is not equal to 1."""

    def __eq__(self, other: object) -> bool:
        return False

    def __ne__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


class _Sending:
    """torch.distributed, where a group of one rank does not look like one."""

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def get_world_size(self, group: Any = None) -> int:
        size = dist.get_world_size(group)
        return _Alone(1) if size == 1 else size


@contextmanager
def sending_to_itself() -> Iterator[None]:
    """Have steps of a single rank reduce their sums all the same, which they else leave out: to see NCCL carry them."""
    with ExitStack() as stack:
        for module in (layout, local_tensors):
            stack.enter_context(patch.object(module, "dist", _Sending()))
        yield
