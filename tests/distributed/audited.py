"""Optimizers that are right in one process and each wrong in one way once something is sharded or saved."""

from __future__ import annotations

import os
from typing import Any

import torch


class Plain(torch.optim.Optimizer):
    """SGD with decay and momentum, in the words that the others change."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.1, momentum: float = 0.9):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    def decays(self, p: torch.Tensor) -> bool:
        return True

    def steps(self, p: torch.Tensor) -> bool:
        return True

    def scale(self, p: torch.Tensor) -> Any:
        return 1.0

    def kept(self, p: torch.Tensor) -> dict[str, Any]:
        return self.state[p]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or not self.steps(p):
                    continue
                kept = self.kept(p)
                direction = p.grad + group["weight_decay"] * p * self.decays(p)
                kept["m"] = direction if "m" not in kept else group["momentum"] * kept["m"] + direction
                p.sub_(group["lr"] * self.scale(p) * kept["m"])


class ReadsPadding(Plain):
    def scale(self, p: torch.Tensor) -> Any:
        return 1.0 + 0.0 * p.sum()


class ReadsLargePadding(Plain):
    """As those that mask NaN and take the largest element of a tensor."""

    def scale(self, p: torch.Tensor) -> Any:
        return 0.5 if p.nan_to_num().abs().max() > 100 else 1.0


class RaisesOnNaN(Plain):
    def scale(self, p: torch.Tensor) -> Any:
        if not p.isfinite().all():
            raise FloatingPointError("NaN in the weights")
        return 1.0


class MovesRowsWithGradient(Plain):
    """As those for embeddings, which leave rows without gradient where they are, of whatever has rows."""

    def scale(self, p: torch.Tensor) -> Any:
        return p.grad.any(dim=1, keepdim=True).float() if p.grad is not None and p.dim() == 2 else 1.0


class MovesTensorsWithGradient(Plain):
    def scale(self, p: torch.Tensor) -> Any:
        return float(bool(p.grad.any())) if p.grad is not None else 0.0


class BreaksOnZeros(Plain):
    def scale(self, p: torch.Tensor) -> Any:
        return 1.0 / p.grad.norm() if p.grad is not None else 1.0


class BeginsLate(Plain):
    """Takes norms of whatever tensors there are, after seven steps."""

    def scale(self, p: torch.Tensor) -> Any:
        kept = self.state[p]
        kept["step"] = kept.get("step", 0) + 1
        return 1.0 if kept["step"] < 8 else 1.0 / (1.0 + p.norm())


class CountsInItsGroups(torch.optim.Optimizer):
    """Without state but a number of steps, which torch's get_state_dict counts up to have some state to save."""

    def __init__(self, params: Any):
        super().__init__(params, {"lr": 0.1, "step": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] / group["step"] * p.grad)


class CountsInAnAttribute(torch.optim.Optimizer):
    """Right once per step() alone: every call of it makes the next rate smaller."""

    def __init__(self, params: Any):
        super().__init__(params, {"lr": 0.1})
        self.calls = 0

    def count(self) -> int:
        self.calls += 1
        return self.calls

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        count = self.count()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] / count * p.grad)

    def state_dict(self) -> Any:
        return {**super().state_dict(), "calls": self.calls}

    def load_state_dict(self, state_dict: Any) -> None:
        self.calls = state_dict["calls"]
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "calls"})


class CountsInItsState(CountsInAnAttribute):
    """As some keep what belongs to no parameter."""

    def count(self) -> int:
        whole = self.state["whole"]
        whole["step"] = whole.get("step", 0) + 1
        return int(whole["step"])


class EstimatesTheModel(CountsInItsGroups):
    """Has a number of all gradients in its group, which does not show in the weights for a while."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        seen = sum(float(p.grad.square().sum()) for p in group["params"] if p.grad is not None)
        group["estimate"] = group.get("estimate", 0.0) + seen
        super().step(closure)


class AroundAnother(torch.optim.Optimizer):
    """As some implementations of Lookahead, whose constructor is not torch's."""

    def __init__(self, params: Any):
        self.inner = Plain(params)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict)

    def step(self, closure: Any = None) -> None:
        self.inner.step(closure)


class CannotSave(Plain):
    def state_dict(self) -> Any:
        raise NotImplementedError("no state to give away")


class MakesStateEarly(Plain):
    """In its constructor, of parameters that ZeRO does not step."""

    def __init__(self, params: Any):
        super().__init__(params)
        for p in self.param_groups[0]["params"]:
            self.state[p]["m"] = torch.zeros_like(p)


class CannotLoad(Plain):
    def load_state_dict(self, state_dict: Any) -> None:
        raise NotImplementedError("no state is taken")


class StepsOnOneRankOnly(Plain):
    def scale(self, p: torch.Tensor) -> Any:
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            raise ValueError("not on this rank")
        return 1.0


class LoadsOnOneRankOnly(Plain):
    def load_state_dict(self, state_dict: Any) -> None:
        if torch.distributed.get_rank() == 1:
            raise ValueError("not on this rank")
        super().load_state_dict(state_dict)


class DecaysMatrices(Plain):
    def decays(self, p: torch.Tensor) -> bool:
        return p.dim() > 1


class DecaysVectors(Plain):
    def decays(self, p: torch.Tensor) -> bool:
        return p.dim() <= 1


class StepsMatrices(Plain):
    def steps(self, p: torch.Tensor) -> bool:
        return p.dim() > 1


class BreaksOnLarge(Plain):
    """Divides by zero where a tensor is larger than any layer is."""

    def scale(self, p: torch.Tensor) -> Any:
        return torch.tensor(float("nan")) if p.numel() > 3000 else 1.0


class ForgetsMomentum(Plain):
    """Its state is nowhere that a checkpoint would look."""

    def __init__(self, params: Any, **options: Any):
        super().__init__(params, **options)
        self.momenta: dict[int, dict[str, Any]] = {}

    def kept(self, p: torch.Tensor) -> dict[str, Any]:
        return self.momenta.setdefault(id(p), {})


class SetsUpInItsFirstStep(Plain):
    """Begins with a momentum of zeros in the first step of a process, whatever was loaded before."""

    def __init__(self, params: Any, **options: Any):
        super().__init__(params, **options)
        self.is_set_up = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if not self.is_set_up:
            self.state.clear()
            self.is_set_up = True
        super().step(closure)


class ChangesOptions(Plain):
    """Comes back from a checkpoint with another momentum."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group["momentum"] = 0.5


class StepsOnTheFirstRank(Plain):
    """Right on rank 0 alone."""

    def steps(self, p: torch.Tensor) -> bool:
        return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


class LoadsOnTheFirstRank(Plain):
    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        if torch.distributed.get_rank() > 0:
            self.state.clear()


class Rule:
    """Prints as the place in memory where it is."""


def with_a_rule(parameters: Any) -> Plain:
    optimizer = Plain(parameters)
    optimizer.param_groups[0]["rule"] = Rule()
    return optimizer


def without_rate(parameters: Any) -> Plain:
    """As optimizers that find their rate themselves: it is None."""
    optimizer = Relative(parameters)
    optimizer.param_groups[0]["lr"] = None
    return optimizer


class Chance(Plain):
    def scale(self, p: torch.Tensor) -> Any:
        return torch.rand(())


class Relative(Plain):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.sub_(0.1 * p.grad)


class NeedsClosure(Plain):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


class RaisesWhenCut(Plain):
    """As optimizers that want matrices do."""

    def scale(self, p: torch.Tensor) -> Any:
        if p.numel() > 3000:
            raise ValueError("a tensor that is no layer")
        return 1.0


def dies(parameters: Any) -> Plain:
    """An optimizer that ends every process but the first, which trains alone."""
    import multiprocessing

    if multiprocessing.parent_process() is not None:
        os._exit(7)
    return Plain(parameters)


def hangs(parameters: Any) -> Plain:
    import multiprocessing
    import time

    if multiprocessing.parent_process() is not None:
        time.sleep(1000)
    return Plain(parameters)


def zero_redundancy(parameters: Any) -> torch.optim.Optimizer:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=0.01, weight_decay=0.1)


def naive_zero_redundancy(parameters: Any) -> torch.optim.Optimizer:
    """Each rank steps the parameters it has with a rate of its own."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(parameters, torch.optim.SGD, lr=0.01 * (1 + torch.distributed.get_rank()))


class SumsInStep(Plain):
    """Takes a sum over the ranks, as optimizers with collectives of their own do."""

    def scale(self, p: torch.Tensor) -> Any:
        total = torch.ones(())
        torch.distributed.all_reduce(total)
        return total / torch.distributed.get_world_size()


def of_the_model(model: torch.nn.Module) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def images() -> torch.nn.Module:
    """Whose weights do not lie in the order of their elements."""
    convolution = torch.nn.Conv2d(3, 8, 3)
    return torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(8)).to(memory_format=torch.channels_last)


def two_layers() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3))


def half_frozen() -> torch.nn.Module:
    model = two_layers()
    model[0].requires_grad_(False)
    return model


def with_a_group_at_rest(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW with a group of the parameters that are frozen."""
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return torch.optim.AdamW([{"params": trained}, {"params": frozen}], lr=0.01)


def of_the_rank() -> torch.nn.Module:
    """As pipeline stages: each rank has a layer of its own."""
    return torch.nn.ModuleDict(
        {"shared": torch.nn.Linear(5, 4), f"of_{os.environ.get('RANK', 'none')}": torch.nn.Linear(6, 5)}
    )


def lists_in_lists() -> torch.nn.Module:
    blocks = [torch.nn.ModuleList([torch.nn.Linear(6, 5), torch.nn.Linear(5, 6)]), torch.nn.Linear(6, 5)]
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList(blocks)
    return model


class ListsOfParameters(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.listed = torch.nn.ParameterList([torch.ones(3), torch.ones(4, 5)])
        self.named = torch.nn.ParameterDict({"a": torch.ones(5)})


def empty_model() -> torch.nn.Module:
    return torch.nn.ReLU()


def on_meta() -> torch.nn.Module:
    return torch.nn.Linear(3, 4, device="meta")


def lazy() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.LazyLinear(4))


def no_optimizer(parameters: Any) -> None:
    pass


def exits(parameters: Any) -> None:
    raise SystemExit(3)


def not_a_model() -> int:
    return 3


def matrices_alone(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    """AdamW that is not given biases and norms."""
    return torch.optim.AdamW([p for p in parameters if p.dim() > 1], lr=0.01)


def vectors_alone(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    """AdamW that is given biases and norms alone."""
    return torch.optim.AdamW([p for p in parameters if p.dim() < 2], lr=0.01)


def bf16_model() -> torch.nn.Module:
    """A model whose weights no optimizer sees in fp32."""
    return torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.Linear(12, 4)).to(torch.bfloat16)
