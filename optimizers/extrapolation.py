"""Extrapolation: gradients are taken a little away from the weights (Lin et al. 2020, arXiv 2006.05720).

    w̃ = w - step_size · ζ        g = ∇f(w̃; batch)        w ← what an optimizer makes of w and g

It is no optimizer, and goes around any. Where it moves weights is said in `displacements`, how in `MovedWeights`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from .curvature import SamplesCurvature
from .displacements.attachment import Attachment
from .displacements.displacement import Displacement, Scaler
from .displacements.layer_noise import DISTRIBUTIONS, LayerNoise
from .displacements.own_gradient import OwnGradient
from .displacements.previous_gradient import PreviousGradient
from .displacements.replaced import ReplacedWatch
from .displacements.step_hooks import StepHooks
from .displacements.step_layout import StepLayout
from .formulas.hyperparameters import check_choice, check_range
from .sharding.layout import Layout
from .sharding.moved_weights import MovedWeights
from .sharding.observed import innermost

__all__ = ["Extrapolation", "check_options"]

DIRECTIONS = ("gradient", "own_gradient", "noise")


class Extrapolation:
    r"""Has gradients taken at w̃ = w - step_size · ζ, around any optimizer of this package or of torch.

    In a loop of one's own, a context around forward and backward, one for each micro-batch or one for all of a step:

        extrapolation = Extrapolation(optimizer, step_size=0.01)
        with extrapolation:
            model(batch).backward()
        optimizer.step()

    Outside of it weights are the original ones, to the bit: at steps, evaluations and checkpoints. Where the loop is
    somebody else's (Trainer, Lightning), `attach(model)` once.

    ζ is, by `direction`:

        "gradient"       the gradient of the last step, averaged over ranks, as `step()` got it: unscaled and clipped by
                         torch or the wrapper, before the optimizer's own weight decay and clipping. 0 before a step.
        "own_gradient"   this rank's own part of it, the mean over its micro-batches, unscaled and not clipped, so
                         that ranks move differently. One process, DDP, ZeRO-0, ZeRO-1 and BF16_Optimizer.
        "noise"          (‖w‖/√n) z for a layer of n elements: z is of mean 0 and variance 1, a function of seed, step,
                         layer's name and position. The same under every sharding if parameters have names.

    The equations are a reconstruction from the abstract: unverified. The paper's is read as "own_gradient". Stable on a
    quadratic of curvature L, with a learning rate γ of plain descent, if (γ + 2 · step_size) L < 2.

    A step that is skipped after an overflow leaves everything as it was. Gradients that are not finite count as 0. A
    layer without a gradient in the last step does not move by it.

    Memory on each rank: a copy of the weights that this rank steps, and for "gradient" one gradient of that size; for
    "own_gradient" a copy of the whole model and two whole gradients in fp32. Time: a pass over them each way. Under
    ZeRO and Megatron's DistributedOptimizer the context has the model's weights gathered twice, `attach` once per step.
    "noise" has one all-reduce per context for all layers where they are sharded.

    Args:
        optimizer: What is stepped, or whatever wraps it (an engine, accelerate's optimizer), before or after wrapping.
        step_size: ≥ 0. May be set later, on all ranks alike; 0 leaves weights where they are, at no cost.
        direction: As above.
        noise: "gaussian" or "uniform".
        seed: Of the noise.
        model: Names the layers of an optimizer of another package; by default the modules of the process are looked at.

    Warns if another optimizer steps the parameters, as one that DeepSpeed has put in its place, and raises RuntimeError
    where that would step weights that are away.

    Raises:
        ValueError: If an argument is out of range; if the optimizer takes samples of the curvature, for which it moves
            the weights itself.
        TypeError: If `optimizer` is none of torch's, and wraps none.
        LayoutError: At the first context or step, if weights cannot be moved exactly under the wrapper; it says why.
        RuntimeError: If contexts are nested; if `step()`, or the optimizer's `state_dict()` is called inside of one; if
            weights were changed while they were away, from then on until a checkpoint is loaded.
    """

    def __init__(
        self,
        optimizer: Any,
        step_size: float,
        direction: str = "gradient",
        *,
        noise: str = "gaussian",
        seed: int = 0,
        model: torch.nn.Module | None = None,
    ):
        check_options(step_size, direction, noise=noise, seed=seed)
        self.step_size = step_size
        self._optimizer = _checked(optimizer)
        _refuse_samples(self._optimizer)
        self._direction = direction
        self._layouts = StepLayout(self._optimizer, model)
        self._displacement = _displacement(direction, noise, seed, self._layouts, self._optimizer)
        self._moved = MovedWeights(None)
        self._is_inside = self._is_stale = False
        self._attachment: Attachment | None = None
        self._number = 0  # of the steps since the first move
        self._has_moved = self._has_seen = False
        self._stepped: set[int] = set()  # ids of the tensors stepped since the last move
        self._loaded: dict[str, Any] | None = None
        self._replaced = ReplacedWatch(self._optimizer, model, self._another_steps)
        before = self._before_state, self._before_load
        self._hooks = StepHooks(self._optimizer, self._before_step, self._see, self._after_step, *before)

    @property
    def step_size(self) -> float:
        """How far the weights move, in units of the direction."""
        return self._step_size

    @step_size.setter
    def step_size(self, value: float) -> None:
        check_range("step_size", value, 0.0)
        self._step_size = float(value)

    @property
    def is_moved(self) -> bool:
        """Whether the weights are away now; also if they cannot come back, as somebody has changed them."""
        return self._moved.are_moved

    # In a loop of one's own ----------------------------------------------------------------------------------------

    def __enter__(self) -> Extrapolation:
        if self._is_inside:
            raise RuntimeError("the weights are extrapolated already: leave the context before it is entered again")
        if self._attachment is not None:
            raise RuntimeError("a model is attached, whose forwards extrapolate: leave the context out, or detach()")
        self._move()
        self._is_inside = True
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self._is_inside = False
        # After an error other ranks may be anywhere, so nobody waits for them: the error must come out.
        self._restore(publish=kind is None or not self._communicates())

    @contextmanager
    def original(self) -> Iterator[None]:
        """Where the weights are away, have the original ones within this context; on all ranks alike.

        For an evaluation or a checkpoint within a context, or before a step while a model is attached.
        """
        inside = self._is_inside
        self._is_inside = False
        self._restore()
        try:
            yield
        finally:
            if inside:
                self._move()
                self._is_inside = True

    # In somebody else's ---------------------------------------------------------------------------------------------

    def attach(self, model: torch.nn.Module) -> Extrapolation:
        """Have the model's training extrapolated from now on, without contexts; `detach` ends it.

        Weights move at the first forward in training mode with gradients, and are back when the optimizer steps. Before
        that too, on all ranks alike, when the model is evaluated (in eval mode, or without gradients), and for its and
        the optimizer's `state_dict` and `load_state_dict`. So evaluation and checkpoints have the original ones.

        Args:
            model: What the loop calls: the engine, or the model in DDP or FSDP. Attach it after it was wrapped.

        Raises:
            RuntimeError: If a model is attached, or this is inside a context; at a step, if the model has not been
                called since the last one, as where the loop calls another object.
        """
        if self._attachment is not None or self._is_inside:
            raise RuntimeError("a model is attached already, or a context is open: detach() or leave it before")
        self._attachment = Attachment(model, self._move, self._restore, self._before_model_load)
        return self

    def detach(self) -> None:
        """Have the original weights back, and extrapolate no more at the model's forwards. On all ranks alike."""
        if self._attachment is not None:
            self._restore()
            self._attachment.remove()
            self._attachment = None

    def remove(self) -> None:
        """Detach, look at steps no more, and free what was kept."""
        self.detach()
        self._moved.refuse_lost()
        self._hooks.remove()
        self._replaced.remove()
        self._displacement.remove()

    # Checkpoints ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on bit for bit; each rank saves and loads its own.

        With "gradient" that is this rank's part of the last gradient, with "own_gradient" its own whole one, with
        "noise" numbers alone. Where nothing is sharded, ranks' states are the same but for "own_gradient". Until the
        first context or step after `load_state_dict` it is what was loaded.

        Raises:
            RuntimeError: If weights were changed while they were away.
        """
        self._moved.refuse_lost()
        if self._loaded is not None:
            return dict(self._loaded)
        rank, ranks = _rank_and_ranks()
        return {
            "direction": self._direction,
            "number": self._next_number(),
            "has_seen": self._has_seen,
            "rank": rank if ranks > 1 and self._differs_by_rank() else None,
            "ranks": ranks,
            "displacement": self._displacement.state_dict(self._layouts.layout),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; it may precede the first step.

        Weights that were changed while they were away count as the original ones from here on.

        Raises:
            ValueError: If it is of another direction, rank or number of ranks; at the first context or step, and at
                each until another is loaded, if it is of other layers.
        """
        if state["direction"] != self._direction:
            raise ValueError(f"the state is of direction {state['direction']!r}, and this one is {self._direction!r}")
        here = _rank_and_ranks()
        if state["rank"] is not None and (state["rank"], state["ranks"]) != here:
            raise ValueError(
                f"the extrapolation's state is of rank {state['rank']} of {state['ranks']}, and this is rank {here[0]} "
                f"of {here[1]}: each rank saves its own state and loads it again"
            )
        self._number, self._has_seen = state["number"], state["has_seen"]
        self._has_moved, self._stepped = True, set()
        self._loaded = dict(state)
        self._forget_lost()
        if self._layouts.layout is not None:
            self._current()

    def _differs_by_rank(self) -> bool:
        layout = self._layouts.layout
        return self._direction == "own_gradient" or (layout is not None and bool(layout.reductions))

    # Moving ---------------------------------------------------------------------------------------------------------

    def _move(self) -> None:
        self._moved.refuse_lost()
        _refuse_samples(self._optimizer)
        if self._moved.are_moved:
            return
        layout = self._current()
        self._number, self._has_moved = self._next_number(), True
        self._stepped.clear()
        if self._step_size and (self._has_seen or not self._displacement.needs_step):
            tensors, change = self._displacement.moves(layout, self._number, self._step_size)
            self._moved = MovedWeights(self._layouts.asked())
            self._moved.move(tensors, change, publish=self._displacement.publishes)
            self._is_stale = False
        else:  # as when weights move: what a forward without gradients has cast of FSDP2's would get none later
            torch.clear_autocast_cache()

    def _restore(self, publish: bool = True) -> None:
        publishes = self._displacement.publishes
        if self._moved.are_moved:
            self._moved.restore(publish=publish and publishes)
            self._is_stale = publishes and not publish
        elif self._is_stale and publish:
            self._moved.publish()
            self._is_stale = False

    def _next_number(self) -> int:
        return self._number + bool(self._has_moved and self._stepped)

    def _current(self) -> Layout:
        layout, is_new = self._layouts.current()
        if is_new:
            self._displacement.check(layout)
        if self._loaded is not None:
            self._displacement.load_state_dict(self._loaded["displacement"], layout)
            self._loaded = None
        return layout

    def _communicates(self) -> bool:
        layout = self._layouts.layout
        return layout is not None and bool(layout.reductions)

    # Steps ----------------------------------------------------------------------------------------------------------

    def _before_step(self) -> None:
        if self._is_inside:
            raise RuntimeError(
                "step() was called where the weights are extrapolated, and would change the wrong ones: call it after "
                "the `with` block"
            )
        self._restore(publish=False)  # as the step does that
        if self._attachment is not None and not self._stepped.isdisjoint(self._ids_of_call()):
            raise RuntimeError(
                f"{type(self._optimizer).__name__} steps, and the model that Extrapolation was attached to was not "
                "called since the last step: attach what the loop calls, which is the model as it was wrapped at last, "
                "or detach()"
            )

    def _see(self, scaler: Scaler) -> None:
        layout = self._current()
        self._displacement.see(layout, self._layouts.of_call(), scaler)
        self._has_seen = True

    def _after_step(self) -> None:
        self._stepped |= self._ids_of_call()
        self._is_stale = False

    def _before_state(self) -> None:
        if self._is_inside:
            raise RuntimeError(
                "the optimizer's state is saved or loaded where the weights are extrapolated: do so after the `with` "
                "block, or within `original()`"
            )
        self._restore()

    def _before_load(self) -> None:
        if not self._is_inside:
            self._forget_lost()
        self._before_state()

    def _before_model_load(self) -> None:
        if not self._moved.are_lost:  # else loading is what helps
            self._restore()

    def _forget_lost(self) -> None:
        if self._moved.are_lost:
            self._moved.forget()

    def _another_steps(self, other: str) -> None:
        problem = (
            f"Extrapolation was given {type(self._optimizer).__name__}, but {other} steps its parameters: give it what "
            'the wrapper has returned, or train with your own optimizer (no "optimizer" section in the DeepSpeed '
            'config, and "zero_force_ds_cpu_optimizer": false)'
        )
        if self.is_moved:
            raise RuntimeError(problem)
        warnings.warn(problem, stacklevel=6)

    def _ids_of_call(self) -> set[int]:
        return {id(tensor) for group in self._optimizer.param_groups for tensor in group["params"]}


def check_options(step_size: Any, direction: Any, *, noise: Any = "gaussian", seed: Any = 0) -> None:
    """Raise ValueError if an option of `Extrapolation` is out of range."""
    check_range("step_size", step_size, 0.0)
    check_choice("direction", direction, DIRECTIONS)
    check_choice("noise", noise, tuple(DISTRIBUTIONS))
    check_range("seed", seed)


def _displacement(
    direction: str, noise: str, seed: int, layouts: StepLayout, optimizer: torch.optim.Optimizer
) -> Displacement:
    if direction == "gradient":
        return PreviousGradient()
    return LayerNoise(noise, seed) if direction == "noise" else OwnGradient(layouts, optimizer)


def _checked(optimizer: Any) -> torch.optim.Optimizer:
    """The innermost optimizer, if torch runs hooks around its steps."""
    inner = innermost(optimizer)
    if not isinstance(inner, torch.optim.Optimizer) or not hasattr(inner, "_optimizer_step_pre_hooks"):
        raise TypeError(
            "Extrapolation needs a torch.optim.Optimizer, or one wrapper of one that has it as `optimizer` or `optim`; "
            f"got {type(optimizer).__name__}"
        )
    return inner


def _refuse_samples(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError if the optimizer moves the weights too, for samples of the curvature."""
    if isinstance(optimizer, SamplesCurvature) and optimizer.takes_samples():
        raise ValueError(
            f"Extrapolation cannot go around {type(optimizer).__name__}, which takes samples of the curvature, as both "
            "move the weights around forward and backward: give the optimizer interval=None, so that it takes none, or "
            "leave Extrapolation out"
        )


def _rank_and_ranks() -> tuple[int, int]:
    known = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if known else (0, 1)
