"""SGD and AdamW whose layers have step sizes from the curvature along their own step (after arXiv 2305.13664)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from typing_extensions import Unpack

from .formulas.hyperparameters import check_choice, check_range
from .formulas.layer_table import LayerTable
from .formulas.stages import Stage, Sums
from .formulas.updates import AdamUpdate, MomentumUpdate, Number
from .layerwise import LayerwiseAdam, LayerwiseMomentum, LayerwiseOptimizer
from .options.common import CommonOptions
from .sampling.sampler import LAST_SAMPLE, Sampler
from .sharding.layout import Layout
from .stepping.count import most_steps
from .stepping.plan import Plan

__all__ = ["CurvatureAdamW", "CurvatureSGD"]

NEGATIVE = ("absolute", "floor")
"""What a negative curvature counts as."""


class SamplesCurvature(LayerwiseOptimizer):
    r"""Base of those whose ratio is the step size that fits the curvature along each layer's step.

    With p the step of layer l at rate 1, g the gradient and H_ll the layer's block of the Hessian, both of the loss
    (with SGD's λ/2‖w‖²):

        α_l = -⟨g_l, p_l⟩ / ⟨p_l, H_ll p_l⟩          w_l ← w_l + lr · α_l · p_l

    Numerator and denominator are running averages over samples, one every ``interval`` steps. A sample is one more
    gradient g' of the same batch, at weights that are moved in all layers at once, each by s_l h_l p_l with a random
    sign s_l and ‖h_l p_l‖ = ``perturbation`` · ‖w_l‖ (whose root mean square counts as at least 0.01):

        ⟨p_l, H_ll p_l⟩ ≈ s_l ⟨p_l, g'_l - g_l⟩ / h_l

    In the mean over the signs the other layers' moves cancel, and what is not quadratic in the third order; in one
    sample they do not, and a layer that matters little may get the wrong sign. So averages are what counts.

    Layers share a batch of random numbers in both passes, so dropout is the same. Whatever else a forward changes,
    such as the averages of a BatchNorm, it changes twice. Samples are of the gradient before clipping.
    """

    layer_state = ("step", "descent", "curvature", "samples")

    _sampler: Sampler
    _has_warned: bool

    # Samples --------------------------------------------------------------------------------------------------------

    def takes_samples(self) -> bool:
        """Whether it takes any; `interval` may be set at any time."""
        return any(group["interval"] is not None for group in self.param_groups)

    def wants_curvature(self) -> bool:
        """Whether the step that is to come should have a sample of the curvature; to be called before its forward.

        If so, run the batch once as always and once more inside `curvature()`:

            wanted = optimizer.wants_curvature()
            model(batch).backward()                           # engine.backward(engine(batch)); engine.step()
            if wanted:
                with optimizer.curvature():
                    model(batch).backward()                   # engine.backward(engine(batch)); engine.step()
            optimizer.step()                                  # with an engine, its second step() was it

        with all micro-batches where gradients are accumulated. It remembers torch's random numbers, for dropout. Under
        DeepSpeed's engine, which shows gradients in its step() alone, the first step() then only moves the weights.

        Raises:
            RuntimeError: If the last sample has no second pass yet, so that the weights are moved.
            LayoutError: If the wrapper leaves no way to take one.
        """
        self._options.check_changes(self)
        return self._sampler.want(self)

    def curvature(self, loss_scale: float | torch.Tensor = 1.0) -> AbstractContextManager[None]:
        """Return a context in which the batch is run again, at moved weights; see `wants_curvature`.

        At its end weights have the bits that they had, and gradients too, also after an exception.

        Args:
            loss_scale: By what gradients are multiplied in both passes, ``scaler.get_scale()`` of torch's GradScaler,
                which must not have been told to ``unscale_`` them yet. DeepSpeed's own scale is known.

        Raises:
            RuntimeError: If no sample is wanted; at its end, if both passes did not draw the same random numbers, or
                their gradients were clipped; if `step()` is called inside where no wrapper's step() belongs to a pass.
        """
        return self._sampler.second_pass(self, loss_scale)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Re-evaluates the model, calls backward() and returns the loss, as in torch.optim. Called a second
                time, at moved weights, where a sample of the curvature is due. It must not clip.

        Returns:
            The closure's loss, at the first call; or None.

        Raises:
            LayoutError: As `LayerwiseOptimizer.step`.
            RuntimeError: If a sample was left without its second pass. See `curvature` too.
        """
        if closure is None:
            return super().step()
        wanted = self.wants_curvature()
        with torch.enable_grad():
            loss = closure()
            if wanted:
                with self.curvature():
                    closure()
        super().step()
        return loss

    @torch._disable_dynamo  # as the base's
    def _step(self) -> None:
        self._options.check_changes(self)
        if self._sampler.ends_first_pass():
            self._sampler.begin(self, self._plan())
        elif self._sampler.is_inside:
            with self._sampler.ended(self, self._plan()):
                super()._step()
        else:
            self._sampler.refuse_moved("step()")
            self._step_without_pass()

    def _step_without_pass(self) -> None:
        was_due, steps = self._sampler.is_due(self), most_steps(self.param_groups)
        self._sampler.give_up()
        super()._step()
        if was_due and not self._has_warned and most_steps(self.param_groups) > steps:
            self._has_warned = True
            warnings.warn(
                f"{type(self).__name__} took a step without the sample of the curvature that was due, and its layers' "
                "ratios stay as they are: give step() a closure, or ask wants_curvature() before each forward and run "
                "the batch again in curvature(); interval=None wants none",
                stacklevel=4,
            )

    def plan_of_step(self) -> Plan:
        """What stays the same from step to step, of a `step()` call with what is in the groups now."""
        self._options.check_changes(self)
        return self._plan()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `LayerwiseOptimizer.add_param_group`."""
        super().add_param_group(param_group)
        self.param_groups[-1].setdefault(LAST_SAMPLE, 0)

    def given_parameters(self) -> list[torch.Tensor]:
        """The parameters that the optimizer was given, in their order."""
        return list(self._names)

    def clear_gradients(self) -> None:
        """Set the gradients of all parameters to None, and nothing else."""
        for group in self.param_groups:
            for tensor in group["params"]:
                tensor.grad = None

    def _forget(self) -> None:
        super()._forget()
        self._sampler = Sampler()
        self._has_warned = False

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim. Raises RuntimeError while weights are moved for a sample."""
        self._sampler.refuse_moved("state_dict()")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `LayerwiseOptimizer.load_state_dict`. Raises RuntimeError while weights are moved for a sample."""
        self._sampler.forget_lost()
        self._sampler.refuse_moved("load_state_dict()")
        super().load_state_dict(state_dict)
        self._sampler.restart()

    # The formula ----------------------------------------------------------------------------------------------------

    def check_layout(self, layout: Layout) -> None:
        for layer in layout.layers:
            tensor = layout.tensors[layer.tensor]
            perturbation = self.param_groups[layout.groups[layer.tensor]]["perturbation"]
            for dtype in {tensor.dtype, (tensor if layer.parameter is None else layer.parameter).dtype}:
                if perturbation < torch.finfo(dtype).eps:
                    raise ValueError(
                        f"perturbation={perturbation!r} moves the weights of {layer.name} by less than {dtype} "
                        f"resolves, {torch.finfo(dtype).eps:.1e}: set it to more than that"
                    )

    def fitted(self, group: dict[str, Any], layers: LayerTable) -> torch.Tensor:
        """α of each layer: at most `cap`, at least 0; before its first sample 1, or `cap` if that is less."""
        weight = 1 - group["beta"] ** layers.samples
        curvature = layers.curvature / weight
        if group["negative"] == "absolute":
            curvature = curvature.abs()
        step = layers.descent / weight / curvature.clamp(min=group["floor"])
        step = torch.where(layers.descent > 0, step, 0.0).clamp(max=group["cap"])
        step = torch.where(layers.samples > 0, step, min(1.0, group["cap"]))
        return torch.where(layers.adapt, step, 1.0)

    def check_samples(self, group: dict[str, Any]) -> None:
        """Raise ValueError if an option of the samples is out of range."""
        if group["interval"] is not None:
            check_range("interval", group["interval"], 1.0)
        check_range("seed", group["seed"])
        for name in ("interval", "seed"):
            if group[name] is not None and group[name] != int(group[name]):
                raise ValueError(f"{name} must be a whole number, got {group[name]!r}")
            if any(other[name] != group[name] for other in self.param_groups if name in other):
                raise ValueError(
                    f"a sample is of the whole model, so every group must have the same {name}, got {group[name]!r} in "
                    "one of several"
                )
        check_range("beta", group["beta"], 0.0, 1.0, high_open=True)
        check_range("floor", group["floor"], 0.0)
        check_range("cap", group["cap"], 0.0, low_open=True)
        check_range("perturbation", group["perturbation"], 0.0, 1.0, low_open=True)
        check_choice("negative", group["negative"], NEGATIVE)

    def stages(self, group: dict[str, Any], layers: LayerTable) -> Iterator[Stage]:
        layers.step = layers.step + 1
        layers.trust_ratio = self.fitted(group, layers)
        yield Sums("g")


class CurvatureSGD(SamplesCurvature, LayerwiseMomentum):
    r"""SGD with momentum whose layers step by the rate that fits the curvature along their step. Unverified.

        v ← μv + g + λw          p = -v          α = -⟨g + λw, p⟩ / ⟨p, (H_ll + λ) p⟩          w ← w - lr · α · v

    α is made of running averages over samples, each of which costs one more forward and backward of a batch:
    see `wants_curvature`, or give `step()` a closure. It is what ``trust_ratios()`` has.

    Args:
        params: Parameters, named parameters or groups. Give names where ranks may differ in their order.
        lr: Fraction ≥ 0 of the fitted step, or for layers that are not adapted the rate itself; a float or a tensor.
        momentum: μ in [0, 1).
        weight_decay: λ ≥ 0, part of what is minimised.
        interval: A sample is due every how many steps, a whole number ≥ 1, beginning with the first; None for none.
        beta: Of the running averages, in [0, 1).
        floor: Least denominator ≥ 0.
        cap: Largest α > 0; before a layer's first sample α is 1, or this if it is less.
        negative: What a negative denominator counts as: its absolute value, or the floor ("floor"), which mostly means
            the cap.
        perturbation: How far a layer is moved for a sample, in (0, 1], relative to its norm.
        seed: Of the signs, a whole number.
        adapt: Which layers α scales: all (True), none (False), or those of two or more dimensions (None); others have
            ratio 1, and need a group with a learning rate of its own. Also a group option.
        common: ``implementation``, ``maximize`` and what else all optimizers have; see `CommonOptions`.

    Raises:
        ValueError: If an argument is out of range.

    State: ``momentum_buffer`` (per element); ``descent``, ``curvature`` (averages, without bias correction),
    ``samples`` and ``step`` (per layer). Sums per step: ‖g‖², one all-reduce if sharded; two more in a sample.

    Source: the abstract of arXiv 2305.13664, which has step sizes from the curvature of each layer's diagonal block, at
    the memory of a first-order method. The equations are not the paper's: it was not at hand. What a negative
    denominator counts as, the averages and the cap are choices of this package, as are the moves in proportion to ‖w‖;
    random signs are Hutchinson's way to a diagonal.
    """

    vector_options = ("lr", "weight_decay", "adapt")

    def __init__(  # type: ignore[misc]  # adapt, one of the common options, has another default here
        self,
        params: Any,
        lr: float | torch.Tensor | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        interval: float | None = 10,
        beta: float = 0.95,
        floor: float = 1e-12,
        cap: float = 1.0,
        negative: str = "absolute",
        perturbation: float = 0.01,
        seed: float = 0,
        adapt: bool | None = True,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "interval": interval,
                "beta": beta,
                "floor": floor,
                "cap": cap,
                "negative": negative,
                "perturbation": perturbation,
                "seed": seed,
                "adapt": adapt,
            },
            **common,
        )

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        self.check_samples(group)

    def update(self, group: dict[str, Any], layers: LayerTable) -> MomentumUpdate:
        step = group["lr"] * layers.trust_ratio
        return MomentumUpdate(group["momentum"], group["weight_decay"], torch.ones_like(step), step)

    def direction(self, group: dict[str, Any], layers: LayerTable) -> MomentumUpdate:
        """Describe -p, of the gradient times `layers.scale`."""
        ones = torch.ones_like(layers.step)
        return MomentumUpdate(group["momentum"], group["weight_decay"], ones, ones, scale=layers.scale)

    def decay_in_gradient(self, group: dict[str, Any]) -> Number:
        """λ, where λ/2‖w‖² belongs to what is minimised."""
        decay: Number = group["weight_decay"]
        return decay


class CurvatureAdamW(SamplesCurvature, LayerwiseAdam):
    r"""AdamW whose layers step by the rate that fits the curvature along their step. Unverified.

        m ← β₁m + (1-β₁)g            v ← β₂v + (1-β₂)g²            p = -m̂ / (√v̂ + ε)
        α = -⟨g, p⟩ / ⟨p, H_ll p⟩        w ← w - lr · α · (λw - p)

    with m̂ = m/(1-β₁ᵗ) and v̂ = v/(1-β₂ᵗ): AdamW with the learning rate lr · α in each layer. Decay is no part of p.
    α comes about as in `CurvatureSGD`.

    Args:
        params: Parameters, named parameters or groups. Give names where ranks may differ in their order.
        lr: Fraction ≥ 0 of the fitted step, or for layers that are not adapted the rate itself; a float or a tensor.
        betas: (β₁, β₂), each in [0, 1).
        eps: ε ≥ 0, outside the root.
        weight_decay: λ ≥ 0.
        interval, beta, floor, cap, negative, perturbation, seed, adapt: As in `CurvatureSGD`.
        common: ``implementation``, ``maximize`` and what else all optimizers have; see `CommonOptions`.

    Raises:
        ValueError: If an argument is out of range.

    State: ``exp_avg``, ``exp_avg_sq`` (per element); ``descent``, ``curvature``, ``samples`` and ``step`` (per
    layer). Sums per step: ‖g‖², one all-reduce if sharded; two more in a sample.

    Source: as `CurvatureSGD`.
    """

    vector_options = ("lr", "weight_decay", "adapt")

    refused_options: ClassVar[Mapping[str, str]] = {
        "update_clip": "the rate of a layer is fitted to its step, which the option cap bounds"
    }

    def __init__(  # type: ignore[misc]  # adapt, one of the common options, has another default here
        self,
        params: Any,
        lr: float | torch.Tensor = 0.3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        interval: float | None = 10,
        beta: float = 0.95,
        floor: float = 1e-12,
        cap: float = 0.1,
        negative: str = "absolute",
        perturbation: float = 0.01,
        seed: float = 0,
        adapt: bool | None = True,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "interval": interval,
                "beta": beta,
                "floor": floor,
                "cap": cap,
                "negative": negative,
                "perturbation": perturbation,
                "seed": seed,
                "adapt": adapt,
            },
            **common,
        )

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        self.check_samples(group)

    def update(self, group: dict[str, Any], layers: LayerTable) -> AdamUpdate:
        return self._adam(group, layers.step, group["lr"] * layers.trust_ratio, group["weight_decay"])

    def direction(self, group: dict[str, Any], layers: LayerTable) -> AdamUpdate:
        """Describe -p, of the gradient times `layers.scale`."""
        return self._adam(group, layers.step + 1, torch.ones_like(layers.step), 0.0, layers.scale)

    def _adam(
        self,
        group: dict[str, Any],
        number: torch.Tensor,
        step: torch.Tensor,
        weight_decay: Number,
        scale: torch.Tensor | None = None,
    ) -> AdamUpdate:
        beta1, beta2 = group["betas"]
        corrections = 1 - beta1**number, 1 - beta2**number
        return AdamUpdate(group["betas"], group["eps"], weight_decay, step, *corrections, gain=1 - beta1, scale=scale)

    def decay_in_gradient(self, group: dict[str, Any]) -> float:
        """0: decay is decoupled."""
        return 0.0
