"""What every layer-wise optimizer shares with the others, and with torch.optim; and the bases of two families.

One `step()` call runs the algorithm's `stages`, whose sums are reduced over the processes, and then its `update`; see
`formulas.algorithm` for what an algorithm fills in and `stepping.step` for who runs it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import Unpack

from .formulas.algorithm import Algorithm
from .formulas.chunk_view import COMPENSATION
from .formulas.hyperparameters import check_betas, check_choice, check_range
from .gradient_statistics.watch import GradientStatistics
from .kernels.choice import IMPLEMENTATIONS
from .options.common import COMMON_DEFAULTS, OF_THE_WHOLE, CommonOptions, fill_in, floats_of, signature_of
from .options.groups import GroupOptions
from .options.parameters import listed
from .options.plain import make_plain
from .options.unknown import check_keys, refuse_unknown
from .sharding.backends import admit, before_group
from .sharding.data_parallel import as_process_group
from .sharding.layout import Layout, LayoutError
from .sharding.resolve import resolve_layout
from .sharding.unsharded import has_its_own_parameters
from .stepping.count import StepCount, most_steps, steps_of, whole_steps
from .stepping.foreign_state import refuse_foreign_state
from .stepping.kept_storage import Conversions, in_one_dtype, kept_as_here
from .stepping.loaded_state import LoadedState, prove_loaded_state, with_layer_names
from .stepping.lost_updates import RoundedUpdates
from .stepping.plan import Plan, options_of_plan
from .stepping.plans import Plans
from .stepping.state import element_dtype, on_device
from .stepping.step import Step
from .stepping.storage import forget_compensation, refuse_storage
from .stepping.taking_part import frozen_layers, taking_part

__all__ = ["LayerwiseAdam", "LayerwiseMomentum", "LayerwiseOptimizer"]

PARAMETER_KEYS = ("params", "param_names")


@dataclass
class _Shared:
    """What may be set at any time, in an object of its own: proxies that copy the attributes of an optimizer, as
    Lightning's do, or look them up in it, read and write the same.

    Attributes:
        owner: The optimizer itself.
        statistics: See `LayerwiseOptimizer.statistics`.
        data_parallel_group: See `LayerwiseOptimizer.data_parallel_group`.
    """

    owner: Callable[[], LayerwiseOptimizer | None]
    statistics: GradientStatistics | None
    data_parallel_group: dist.ProcessGroup | None = None


class LayerwiseOptimizer(Algorithm, torch.optim.Optimizer):
    """Base of all optimizers here. A subclass names its state and fills in `stages` and `update`; see `Algorithm`.

    Arithmetic is fp32 whatever the parameter's dtype (fp64 for fp64 parameters), and so is state, or what `state_dtype`
    says; a 16-bit parameter without a wrapper that keeps master weights is rounded once per step, when it is written,
    as `master` says.
    """

    _shared: _Shared

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__signature__" not in vars(cls):
            cls.__signature__ = signature_of(cls)  # type: ignore[attr-defined]

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], **common: Unpack[CommonOptions]):
        """Construct an optimizer.

        Args:
            params: Parameters, named parameters or groups.
            defaults: The algorithm's own options; any of the common ones may be among them.
            common: See `CommonOptions`.

        Raises:
            ValueError: If an option is out of range, or there are no parameters.
            TypeError: If an option is unknown; the nearest is named. If params are no parameters.
        """
        params = listed(params)
        refuse_unknown(type(self), common)
        defaults = {**defaults, **common}
        for name, default in COMMON_DEFAULTS.items():
            defaults.setdefault(name, default)
        make_plain(defaults, self.plain_options or tuple(defaults), floats_of(type(self)))
        check_choice("implementation", defaults["implementation"], (None, *IMPLEMENTATIONS))
        self._forget()
        super().__init__(params, defaults)
        admit(self)

    # The step -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Re-evaluates the model and returns the loss, as in torch.optim.

        Returns:
            The closure's loss, or None.

        Raises:
            LayoutError: If the local tensors cannot be explained, so that the norms would be wrong, or the model has
                other parameters by now; after the first step, if ranks that train the same layers have taken different
                ones.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @torch._disable_dynamo  # as torch's own methods are; imports the compiler when it is called
    def _step(self) -> None:
        self._options.check_changes(self)
        plan = self._plan()
        self._plans.begin(plan)
        ratios = gradient_squares = torch.zeros(0, dtype=torch.float64, device="cpu")
        if plan.layout.tensors:
            step = Step(self, plan)
            rounded = RoundedUpdates(step.operands) if self._watches_rounding and plan.has_16_bit_weights else None
            ratios, gradient_squares = step.run(), step.gradient_squares()
            if rounded is not None:
                self._warn_of(rounded.describe(step.groups))
            self._plans.end(plan, ratios)
            if step.changed_something() and self.counts_steps:
                self._count.add(self.param_groups, self._plans.steps_begun)
        if plan.agreement.steps_left:
            plan.agreement.check(self, plan.layout, ratios, gradient_squares)

    def collect_group_norms(self) -> None:
        """Keep norms of the gradients of single groups (one rank's one micro-batch) from the next backward on.

        For diagnostics such as `noise_scale.gradient_noise`; CLARS and the VR optimizers do so themselves. Call it on
        all ranks; where no wrapper averages gradients, see `data_parallel_group`.
        """
        if self.statistics is None:
            self._shared.statistics = statistics = GradientStatistics(self._shared.owner(), squares=False)
            for parameter in list(self._names):
                statistics.watch(parameter)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients as in torch.optim, and with them what was kept of the groups' gradients."""
        super().zero_grad(set_to_none)
        if self.statistics is not None:
            self.statistics.discard()

    def trust_ratios(self) -> dict[str, float]:
        """Each layer's ratio in the last step: 1.0 where it was not adapted, had no gradient, or where there is none.

        With `update_clip`, what scales the rate: the ratio divided by max(1, RMS / update_clip), in every layer.

        Frozen layers, which have none, are the last.

        Waits for the device; nothing else in this class does. See `trust_ratio_vector` for the ratios without waiting.
        """
        names, vector = self.trust_ratio_vector()
        return dict(zip(names, vector.tolist(), strict=True))

    def trust_ratio_vector(self) -> tuple[list[str], torch.Tensor]:
        """The same as names and a tensor, shape (layers,), fp64, without waiting for the device."""
        names, ratios = self._plans.ratios()
        if not names:
            return names, ratios
        layers = frozen_layers(self.param_groups, self.was_given)
        frozen = [self.parameter_name(parameter) or place for place, parameter in layers]
        return [*names, *frozen], torch.cat([ratios, ratios.new_ones(len(frozen))])

    def adapted_layers(self) -> set[str]:
        """Names of the layers that the ratio scaled in the last step, as `adapt` said; known after a step.

        The ratio itself does not tell: a clipped one can be exactly 1.0.
        """
        return self._plans.adapted_layers()

    @property
    def statistics(self) -> GradientStatistics | None:
        """Sees the groups' gradients, where they are wanted. See `collect_group_norms`."""
        return self._shared.statistics

    # Parameters and options -----------------------------------------------------------------------------------------

    @property
    def implementation(self) -> str | None:
        """Who computes the step: "eager", "cpu" or "triton"; None chooses by device. See `kernels`."""
        implementation: str | None = self.defaults["implementation"]
        return implementation

    @implementation.setter
    def implementation(self, value: str | None) -> None:
        check_choice("implementation", value, (None, *IMPLEMENTATIONS))
        self.defaults["implementation"] = value

    @property
    def data_parallel_group(self) -> dist.ProcessGroup | None:
        """Who averages gradients, where no wrapper can be found: the ranks that do it by hand; None by default.

        CLARS, the VR optimizers, `collect_group_norms()` and CowClip's counts add up over these ranks what each has
        seen of its own samples, and raise LayoutError at the step where there are several ranks and nobody is known.
        DistributedDataParallel, DeepSpeed, fully_shard and Megatron are found, and need no call. Gradients are to be
        averaged (or added up) between backward() and step(), all of one optimizer over the same ranks.

        May be set to a process group that this rank is in, or a DeviceMesh of one dimension; before or after the model
        is wrapped. Where every rank trains a model of its own, that is
        ``dist.new_group([rank], use_local_synchronization=True)``. It is not part of copies, pickles and state dicts.

        Raises:
            TypeError: If set to anything else.
            ValueError: If set to a group that this rank is not in.
        """
        return self._shared.data_parallel_group

    @data_parallel_group.setter
    def data_parallel_group(self, value: Any) -> None:
        self._shared.data_parallel_group = as_process_group(value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch.optim; its keys, options and parameters are checked.

        Raises:
            ValueError: If a key is a mistake (see `options.unknown`), an option out of range, or a parameter that
                is to be trained no tensor of real numbers. Then there is no new group.
            LayoutError: If a wrapper steps copies of the parameters, and would not step the new ones.
        """
        if self.param_groups and not has_its_own_parameters(self):
            before_group(self)
        if isinstance(param_group, dict):  # else torch says so
            self._check_keys(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for name in OF_THE_WHOLE:
            del group[name]
        try:
            if self.counts_steps:
                group["step"] = whole_steps(group.get("step", most_steps(self.param_groups[:-1])))
            self._options.check(self, group)
            names = group.get("param_names") or [None] * len(group["params"])
            for parameter, name in zip(group["params"], names, strict=False):
                if parameter.requires_grad:
                    _check_parameter(parameter, name)
        except ValueError:
            self.param_groups.pop()
            raise
        self._remember(group)
        self._plans.clear()

    def _check_keys(self, group: dict[str, Any]) -> None:
        check_keys(type(self), group, self.defaults)

    def was_given(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is a parameter that the constructor (or `add_param_group`) was given."""
        return tensor in self._names

    def parameter_name(self, parameter: torch.Tensor) -> str | None:
        """The name that came with the parameter, if any."""
        name: str | None = self._names.get(parameter)
        return name

    def name_parameters(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Name the parameters that came without a name, e.g. from a trainer that makes the groups itself.

        Args:
            named_parameters: The model's; those that the optimizer was not given are ignored. Before the first step.
        """
        for name, parameter in named_parameters:
            if self.was_given(parameter) and self.parameter_name(parameter) is None:
                self._names[parameter] = name

    def _remember(self, group: dict[str, Any]) -> None:
        self.given_options.append({key: _kept(value) for key, value in group.items() if key not in PARAMETER_KEYS})
        names = group.get("param_names") or [None] * len(group["params"])
        self._names.update(WeakIdKeyDictionary(dict(zip(group["params"], names, strict=False))))
        if self.statistics is not None:
            for parameter in group["params"]:
                self.statistics.watch(parameter)

    def _forget(self) -> None:
        wanted = self.group_statistics
        statistics = None if wanted is None else GradientStatistics(self, squares=wanted == "squares")
        self._shared = _Shared(weakref.ref(self), statistics)
        self._plans = Plans()
        # Of each group, as the user gave them: schedulers write over the groups' own.
        self.given_options: list[dict[str, Any]] = []
        self._loaded: LoadedState | None = None
        self._options = GroupOptions()
        self._watches_rounding = True
        self._count = StepCount()
        # Weak, so that parameters which a wrapper replaces are not kept alive.
        self._names: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        are_parameters = [[self.was_given(p) for p in group["params"]] for group in self.param_groups]
        collects = self.statistics is not None and self.group_statistics is None
        return {**super().__getstate__(), "_given": are_parameters, "_collects_group_norms": collects}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch calls this from load_state_dict too, on an optimizer that knows its parameters.
        are_parameters = state.pop("_given", None)
        collects = state.pop("_collects_group_norms", False)
        if are_parameters is not None:
            self._forget()
        super().__setstate__(state)
        self.modernize(self.defaults)
        self.defaults.update({**COMMON_DEFAULTS, **self.defaults})
        if "_implementation" in self.__dict__:  # where older versions have it
            self.implementation = self.__dict__.pop("_implementation")
        for index, group in enumerate(self.param_groups):
            self.modernize(group)
            fill_in(group)
            if self.counts_steps and not group.get("step"):  # as in a file of an older version
                group["step"] = steps_of(self.state)
            # A copy of a wrapped optimizer holds flat tensors, which must not pass for layers.
            if are_parameters is not None and all(are_parameters[index]):
                self._remember(group)
        if are_parameters is not None:
            admit(self)
        if collects:
            self.collect_group_norms()

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim; of flat tensors that a wrapper made, it has the names and places of their layers too."""
        tensors = [p for group in self.param_groups for p in group["params"]]
        layouts = [plan.layout for plan in self._plans.values()]
        saved = in_one_dtype(self, super().state_dict())
        return with_layer_names(saved, tensors, layouts, [self.was_given(p) for p in tensors])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch.optim does, hooks included, but into the dtype in which state is kept here.

        That is fp32 also for 16-bit parameters, or what `state_dtype` says, with a warning where the file has another.
        How numbers are kept (`state_dtype`, `master`, `rounding_seed`) stays as it is; the compensation of a file with
        master "kahan" is dropped where none is kept, with a warning. State and group keys that others put beside the
        optimizer's own, e.g. a wrapper's slow weights, are kept.

        Raises:
            ValueError: Before anything is changed, if what the pre-hooks made of it is the state of another optimizer,
                or of other parameters.
        """
        loaded: dict[str, Any] = {}
        conversions = Conversions(self)

        def check(_: Any, found: dict[str, Any]) -> dict[str, Any]:
            refuse_foreign_state(self, found)
            conversions.note_groups(found)
            loaded.update(kept_as_here(self, found))
            return loaded

        # The last of the hooks before, which sees what the user's have made; the first after, so that theirs are last.
        handles = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(lambda _: self._keep_dtypes(loaded, conversions), prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
        conversions.warn(stacklevel=2)

    def _keep_dtypes(self, state_dict: dict[str, Any], conversions: Conversions) -> None:
        """Set the state again, which torch has cast to the parameters' dtype."""
        current = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for (group, parameter), index in zip(current, saved, strict=True):
            if self.state.get(parameter, {}) is None:  # as some files say that there is none yet
                del self.state[parameter]
            for name, value in (state_dict["state"].get(index) or {}).items():
                kept = self.state[parameter][name] = self._as_loaded(group, parameter, name, value)
                conversions.note(name, getattr(value, "dtype", None), getattr(kept, "dtype", None))
            if conversions.leaves_behind(group, parameter, self.state.get(parameter, {})):
                del self.state[parameter][COMPENSATION]
        self._plans.clear()
        self._count.restart()
        self._loaded = LoadedState(self, state_dict)

    def _as_loaded(self, group: dict[str, Any], parameter: torch.Tensor, name: str, value: Any) -> Any:
        kept = on_device(value, parameter.device)
        is_ours = name in (*self.element_state, COMPENSATION)
        return kept.to(element_dtype(parameter, name, group)) if is_ours else kept

    def _warn_of(self, lost_updates: str | None) -> None:
        if lost_updates is not None:
            self._watches_rounding = False
            if lost_updates:
                warnings.warn(lost_updates, stacklevel=5)

    # Plans ----------------------------------------------------------------------------------------------------------

    def _plan(self) -> Plan:
        groups, tensors = taking_part(self.param_groups, self.was_given)
        plan = self._plans.find(tensors, options_of_plan(self, groups))
        if plan is None:
            plan = self._make_plan(groups, tensors)
            self._plans.add(plan)
        plan.places.refuse_abandoned(self, tensors)
        return plan

    def _make_plan(self, groups: Sequence[int], tensors: Sequence[torch.Tensor]) -> Plan:
        # The options may have been loaded, or assigned, since the constructor looked at them.
        for group in self.param_groups:
            self._options.check(self, group)
        for tensor in tensors:
            _check_parameter(tensor, self.parameter_name(tensor))
        layout = resolve_layout(self, list(zip(groups, tensors, strict=True)))
        self._refuse_segments_of_groups(layout)
        refuse_storage(self, layout)
        self.check_layout(layout)
        forget_compensation(self, layout)
        plan = Plan.of(self, layout, tensors, groups)
        if self._loaded is not None:
            plan.share_layer_state(self.layer_state, self.state)
            prove_loaded_state(self, layout, self._loaded)
        return plan

    def _refuse_segments_of_groups(self, layout: Layout) -> None:
        parameters = {id(layer.parameter) for layer in layout.layers}
        if self.statistics is not None and len(parameters) < len(layout.layers):
            raise LayoutError(
                f"{type(self).__name__} takes norms of whole parameters' gradients in backward: leave out the option "
                "segments, which cuts parameters into several layers"
            )


class LayerwiseMomentum(LayerwiseOptimizer):
    """Base of those with the options lr, momentum and weight_decay, which keep v of `MomentumUpdate`."""

    @property
    def element_state(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if any(group["momentum"] for group in self.param_groups) else ()

    def check(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"], 0.0)
        check_range("momentum", group["momentum"], 0.0, 1.0, high_open=True)
        check_range("weight_decay", group["weight_decay"], 0.0)


class LayerwiseAdam(LayerwiseOptimizer):
    """Base of those with the options lr, betas, eps and weight_decay, which keep m and v of `AdamUpdate`."""

    @property
    def element_state(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def check(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"], 0.0)
        check_betas(group["betas"])
        check_range("eps", group["eps"], 0.0)
        check_range("weight_decay", group["weight_decay"], 0.0)


def _check_parameter(parameter: torch.Tensor, name: str | None) -> None:
    if not parameter.is_floating_point():
        raise ValueError(
            "parameters that are trained must be real floating point tensors, got "
            f"{f'{name}, ' if name else ''}{parameter.dtype} of shape {tuple(parameter.shape)}"
        )


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
