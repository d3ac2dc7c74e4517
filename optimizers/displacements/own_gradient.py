"""Along this rank's own part of the last gradient, as it was before ranks were averaged."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from ..gradient_statistics.loss_scale import LossScale
from ..gradient_statistics.watched import Watched, backward_pass, call_after_backward, is_added_up
from ..sharding.backends import copied_parameters, find_gradient_flow
from ..sharding.gradient_flow import GradientFlow
from ..sharding.layout import Layout, LayoutError
from ..sharding.local_tensors import compute_dtype, is_flattened, is_plain
from ..sharding.moved_weights import Change
from ..sharding.unsharded import has_its_own_parameters
from .displacement import Displacement, Scaler
from .previous_gradient import finite
from .step_layout import StepLayout

__all__ = ["OwnGradient"]


class OwnGradient(Displacement):
    """w_k - step_size · g_k on rank k, g_k the mean of the gradients of its micro-batches in the last step, unclipped.

    So the ranks' models differ while they are moved. What moves is the model's own parameters, in their dtype. It keeps
    two whole gradients in fp32, that of the last step and the one that is being added up.

    Args:
        step_layout: Of the optimizer.
        optimizer: The innermost one, before or after it is wrapped.
    """

    publishes = False

    def __init__(self, step_layout: StepLayout, optimizer: torch.optim.Optimizer):
        self._step_layout = step_layout
        self._scale = LossScale(optimizer)
        self._of_parameter: dict[int, _OfParameter] = {}
        self._flow: GradientFlow | None = None
        self._loss_scale: float | None = None  # as the wrapper tells it
        self._watch(p for group in optimizer.param_groups for p in group["params"] if p.requires_grad)

    def check(self, layout: Layout) -> None:
        asked = self._step_layout.asked()
        copied = [] if has_its_own_parameters(asked) else copied_parameters(asked)
        self._flow = find_gradient_flow(asked) if copied else None
        keeps_whole = self._flow is not None and all(one.kept_whole for one in self._flow.destinations.values())
        are_whole = not layout.reductions and all(is_plain(t) and not is_flattened(t) for t in layout.tensors)
        if not (are_whole or (copied and keeps_whole)):
            raise LayoutError(
                f"{layout.backend} has parts of the gradients or the weights on each rank, or hides them, so that it "
                'cannot move by its own gradient: use direction="gradient" or "noise" there, or one process, DDP, '
                "ZeRO-0 or ZeRO-1"
            )
        if copied and self._flow is None and any(parameter.dtype == torch.float16 for parameter in copied):
            raise LayoutError(
                f'{layout.backend} does not tell the loss scale of fp16: use direction="gradient", bf16 or ZeRO-1'
            )
        trained = [p for p in copied or layout.tensors if p.requires_grad]
        self._of_parameter = {id(p): self._of_parameter[id(p)] for p in trained if id(p) in self._of_parameter}
        self._watch(trained)

    def _watch(self, parameters: Iterable[torch.Tensor]) -> None:
        for parameter in parameters:
            if id(parameter) not in self._of_parameter and parameter.is_leaf:
                self._of_parameter[id(parameter)] = one = _OfParameter(parameter)
                this = weakref.ref(self)
                one.handle = parameter.register_hook(partial(_see, this, weakref.ref(parameter)))

    def add(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add the gradient of a micro-batch."""
        one = self._of_parameter.get(id(parameter))
        if one is None:
            return
        if self._flow is not None:
            self._loss_scale = self._flow.loss_scale()
        if one.watched.groups and not self._is_kept(one):
            one.watched.clear()
        one.add(gradient)
        if self._flow is None and backward_pass() != -1:
            call_after_backward(one.watched.note_gradient)

    def _is_kept(self, one: _OfParameter) -> bool:
        """Whether the gradient of earlier micro-batches is still there, so that the step will have both."""
        destination = None if self._flow is None else self._flow.destinations.get(id(one.watched.parameter()))
        if destination is None:
            return one.watched.keeps_gradient()
        return destination.holds is None or destination.holds()

    def see(self, layout: Layout, call: Collection[int], scaler: Scaler) -> None:
        if not any(one.watched.groups for one in self._of_parameter.values()):
            return  # a further call of the same step
        loss_scale: Any = self._loss_scale
        if loss_scale is None:
            loss_scale = self._scale.now(layout.numbers_device) if scaler.scale is None else scaler.scale
        for one in self._of_parameter.values():
            one.end_step(loss_scale, scaler)

    def moves(self, layout: Layout, number: int, step_size: float) -> tuple[Sequence[torch.Tensor], Change]:
        kept = [(p, one.last) for one in self._of_parameter.values() if (p := one.watched.parameter()) is not None]
        moving = [(parameter, gradient) for parameter, gradient in kept if gradient is not None]

        def change(index: int, weights: torch.Tensor) -> None:
            weights.sub_(moving[index][1], alpha=step_size)

        return [parameter for parameter, _ in moving], change

    def state_dict(self, layout: Layout | None) -> dict[str, Any]:
        return {"gradients": [one.last for one in self._of_parameter.values()]}

    def load_state_dict(self, state: dict[str, Any], layout: Layout) -> None:
        mine = list(self._of_parameter.values())
        saved = state["gradients"]
        if len(saved) != len(mine) or any(not one.fits(last) for one, last in zip(mine, saved, strict=False)):
            raise ValueError(
                f"the extrapolation's state has {len(saved)} gradients, and they are not those of the {len(mine)} "
                "parameters that this run trains: resume with the same model, each rank with its own state"
            )
        for one, last in zip(mine, saved, strict=True):
            one.load(last)

    def remove(self) -> None:
        for one in self._of_parameter.values():
            if one.handle is not None:
                one.handle.remove()
        self._of_parameter = {}


class _OfParameter:
    """What is kept of one parameter's gradients.

    Attributes:
        watched: The parameter, and whether its gradient is still there.
        sum: Of the micro-batches since the last step.
        last: The sum at the last step, without the loss scale; None before it, or where there was no gradient.
        handle: Of the hook.
    """

    def __init__(self, parameter: torch.Tensor):
        self.watched = Watched(weakref.ref(parameter))
        self.sum: torch.Tensor | None = None
        self.last: torch.Tensor | None = None
        self.handle: Any = None

    def add(self, gradient: torch.Tensor) -> None:
        if self.sum is None:
            self.sum = torch.empty_like(gradient, dtype=compute_dtype(gradient))
        self.sum.add_(gradient) if self.watched.groups else self.sum.copy_(gradient)
        self.watched.groups += 1

    def end_step(self, scale: torch.Tensor | float, scaler: Scaler) -> None:
        """Keep the sum as the last one. Nothing of a step that is left out."""
        if not self.watched.groups or self.sum is None:
            self.last = None
            return
        mean = finite(self.sum / (scale.to(self.sum) if isinstance(scale, torch.Tensor) else scale))
        self.last = scaler.kept(mean, torch.zeros_like(mean) if self.last is None else self.last)
        self.watched.clear()

    def fits(self, last: torch.Tensor | None) -> bool:
        parameter = self.watched.parameter()
        return last is None or (parameter is not None and last.shape == parameter.shape)

    def load(self, last: torch.Tensor | None) -> None:
        parameter = self.watched.parameter()
        if parameter is not None and last is not None:
            self.last = last.detach().to(parameter.device, compute_dtype(parameter), copy=True)
        self.watched.clear()


def _see(this: weakref.ref[OwnGradient], parameter: weakref.ref[torch.Tensor], gradient: torch.Tensor) -> None:
    own, watched = this(), parameter()
    if own is not None and watched is not None and is_added_up(watched):
        with torch.no_grad():
            own.add(watched, gradient.detach())
