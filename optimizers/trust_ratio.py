"""TrustRatio: a trust ratio per layer around anybody's optimizer, exact under every sharding."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .formulas.chunk_view import ChunkView
from .formulas.chunks import Summand, squares
from .formulas.hyperparameters import check_bounds, check_range
from .formulas.layer_table import LayerTable
from .formulas.stages import Stage, sums_over_layers
from .formulas.updates import TrustRule
from .layerwise import PARAMETER_KEYS, LayerwiseOptimizer
from .options.common import COMMON_DEFAULTS
from .options.unknown import PASSENGERS, check_keys
from .proposals.base import (
    attributes_of,
    check_base_class,
    check_options,
    dtensors_named,
    known_at_first,
    make_alone,
    params_may_come_first,
    propose,
    refuse_hooks,
    refuse_unknown_options,
)
from .proposals.groups import GivenGroups
from .proposals.instances import (
    copied,
    make_base,
    options_of_base,
    own_of,
    restore,
    step_without_hooks,
)
from .proposals.made_of_zeros import MadeOfZeros
from .proposals.nature import Nature, kinds_of, nature_of, unread_keys
from .proposals.rates import at_rate
from .proposals.refusals import refuse_layout, refuse_loss, refuse_storage_options, warn_of_lost_digits
from .proposals.trial import LARGE_RATE
from .sharding.layout import Layout
from .sharding.local_tensors import is_plain, local_part, placements_of

__all__ = ["TrustRatio"]

OWN_OPTIONS = ("adapt", "segments", "trust_bounds")
KEPT_IN_COPIES = (
    *("base_class", "base_options", "base"),
    *("_takes_groups", "_given_keys", "_makes_state_when_made", "_made_of_zeros"),
)
"""Attributes that copies and pickles have besides what torch gives them."""


class TrustRatio(LayerwiseOptimizer):
    r"""Another optimizer's step, scaled per layer by ‖w‖ / ‖u‖.

    With u the direction that the base proposes, its weight decay included:

        u = (w - w_after) / lr        ratio = clamp(‖w‖ / ‖u‖, trust_bounds)        w ← w - lr · ratio · u

    Around AdamW this is LAMB, around RMSprop or Lion what has no name. The norms are of whole layers, however a wrapper
    cuts them. The ratio is 1 where ‖w‖ or ‖u‖ is zero and for layers that are not adapted; then the step is the base's.

        optimizer = TrustRatio(torch.optim.RMSprop, model.named_parameters(), lr=1e-3, trust_bounds=(0, 10), alpha=0.95)
        optimizer = TrustRatio(model.named_parameters(), lr=1e-3, base_class=torch.optim.RMSprop)

    The base, ``optimizer.base``, shares groups and state with this optimizer: options, state and checkpoints are its
    own. Before the first step it is tried on a few small layers, with what its groups have
    (`nature_of`), and again when an option becomes of another kind. Is it element-wise? If
    not (Muon, Shampoo, Adafactor, LAMB), it is refused where layers are cut. Do direction and state depend on the
    learning rate? If not (AdamW, SGD, RMSprop, Lion and most), it steps at the rate 2⁴⁸ and u is taken from that: at
    small rates w - w_after has few digits of it. Else it steps at the group's own rate, with those digits; where they
    are too few in the first step, a warning says so. Bases are refused whose steps depend on anything outside of state
    and groups, that keep copies of the weights, or that write the learning rate.

    Args:
        base_class: An optimizer class of torch's kind with an option ``lr``.
        params: Parameters, named parameters or groups; groups may have the base's options, and those here. The base's
            constructor gets tensors or groups, as given, without names; if it makes other groups, they are ours too.
        lr: Learning rate ≥ 0; a float or a tensor. None for the base's default.
        trust_bounds: (low, high) of the ratio of an adapted layer.
        adapt: Which layers the ratio scales: all (True), none (False), or those of two or more dimensions (None).
        segments: Into how many equal parts along dimension 0 a layer is cut for the ratio; see `CommonOptions`.
        base_options: The base's own options; ``maximize``, ``foreach``, ``fused``, ``capturable`` are the base's too.

    Raises:
        TypeError: If the class is none, lacks an option (the nearest is named), or registers hooks on itself; if params
            are no parameters.
        ValueError: If an option is out of range: what the base says of its own; if there are no parameters, or the base
            leaves any out, or has one twice.
        LayoutError: At the first step, if layers are cut and the base is not element-wise; if weights of 16 bits would
            swallow its step; if it keeps copies of the weights, or anything that its steps need outside of state
            and groups; if it writes ``group["lr"]``, goes by the numbers of groups that come one by one, or reads the
            loss where ranks have their own.

    State: the base's. Sums per step: ‖w‖², ‖w - w_after‖², ‖g‖², one all-reduce if sharded. Memory: one copy of the
    local weights during the step. A layer whose gradient is zero on all ranks keeps its weights; what becomes of its
    state is the base's business.

    Source: the wrapping is apex's LARC, the ratio LAMB's (arXiv 1904.00962, with φ the identity).
    """

    vector_options = ("lr", "adapt")
    step_options = ("lr", "adapt", "trust_bounds")

    layer_state = ()
    counts_steps = False
    keeps_own_state = False
    plain_options = ("lr", *OWN_OPTIONS)
    _most_groups: int

    @params_may_come_first
    def __init__(
        self,
        base_class: type[torch.optim.Optimizer],
        params: Any,
        lr: float | torch.Tensor | None = None,
        trust_bounds: tuple[float, float] = (0.0, math.inf),
        adapt: bool | None = None,
        segments: int | Mapping[str, int] | None = None,
        **base_options: Any,
    ):
        check_base_class(base_class)
        if issubclass(base_class, LayerwiseOptimizer):
            raise TypeError(f"{base_class.__name__} has a ratio of its own, or needs none: use it by itself")
        refuse_unknown_options(base_class, base_options, ("lr", *OWN_OPTIONS))
        self.base_class = base_class
        self.base_options = base_options
        self._given_keys: set[str] = set()
        own = {"trust_bounds": trust_bounds, "adapt": adapt, "segments": segments}
        given = GivenGroups(params, own)
        self._takes_groups = given.are_groups
        self.base = make_base(base_class, given.for_base(), lr, base_options)
        refuse_hooks(self.base)
        of_base = self.base.defaults.get("lr")  # not always what was given: some make a tensor of it
        lr = lr if of_base is None else of_base
        if lr is None:
            raise ValueError(
                f"lr must be given: {base_class.__name__} chooses its own, and a direction is a step divided by lr"
            )
        # Else groups would get defaults in the place of what a base keeps to itself.
        common = {name: value for name, value in base_options.items() if name in COMMON_DEFAULTS}
        defaults = {**common, **self.base.defaults, "lr": lr, **own}
        self._check_given_keys(given, {**COMMON_DEFAULTS, **defaults})
        super().__init__(given.of_base(base_class.__name__, self.base.param_groups), defaults)
        for key, value in self.base.state.items():
            if not isinstance(key, torch.Tensor):  # of the whole optimizer
                self.state.setdefault(key, value)
        self._makes_state_when_made = bool(self.base.state)  # as Adagrad does
        self._share()

    # The base -------------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as the base does, which may make several of it; see `LayerwiseOptimizer`."""
        if not isinstance(param_group, dict) or not self._shares:  # or in the constructor, of what the base has made
            super().add_param_group(param_group)
            return
        groups, state = len(self.param_groups), set(self.state)
        try:
            for group in self._as_the_base_adds(param_group):
                super().add_param_group(group)
        except Exception:  # whatever the base may raise
            del self.param_groups[groups:]
            for key in [key for key in self.state if key not in state]:
                del self.state[key]
            raise

    def _as_the_base_adds(self, param_group: dict[str, Any]) -> list[dict[str, Any]]:
        given = GivenGroups([param_group], {name: self.defaults[name] for name in OWN_OPTIONS})
        self._check_given_keys(given, self.defaults)
        self._share()
        self.base.param_groups = []  # the others have names, which it would miss
        try:
            for group in given.for_base():
                self.base.add_param_group(group)
            return given.of_base(self.base_class.__name__, self.base.param_groups)
        finally:
            self._share()

    def _check_given_keys(self, given: GivenGroups, defaults: Mapping[str, Any]) -> None:
        names, _ = options_of_base(self.base_class)
        known = [*dict.fromkeys((*defaults, *names))]
        for group in given.groups:
            check_keys(type(self), group, known, others_read=True)
            self._given_keys |= {key for key in group if key not in (*known, *PARAMETER_KEYS, *PASSENGERS)}

    def _check_keys(self, group: dict[str, Any]) -> None:
        """What the base puts into its groups is its business; the user's keys are looked at before."""

    def _share(self) -> None:
        """Have the base see this optimizer's groups, options and state, which wrappers and loading replace."""
        self.base.param_groups = self.param_groups
        self.base.defaults = self.defaults
        self.base.state = self.state
        self._shares = True
        self._most_groups = max(self._most_groups, len(self.param_groups))

    def _forget(self) -> None:
        super()._forget()
        self._shares = False
        self._made_of_zeros = MadeOfZeros()
        self._natures: WeakIdKeyDictionary = WeakIdKeyDictionary()  # layout -> of each group, and for which options
        self._takes_large_rate = False
        self._looks_at_digits = False
        self._closure: Callable[[Sequence[torch.Tensor]], Callable[[], Any]] | None = None
        self._checked_options: dict[int, Any] = {}
        self._last_step = 0  # the number of the last one that was no step of zeros
        self._most_groups = 0  # that there have been
        self._began: dict[int, tuple[int, dict[Any, Any]]] = {}  # by id of a group or the state: of which step, and it

    def _options_of_base(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """A group's options of the base; some classes keep what they were given to themselves."""
        names, _ = options_of_base(self.base_class)
        options = {**self.base_options, **{name: group[name] for name in names if name in group}}
        return {name: value for name, value in options.items() if name != "lr"}

    def _keys_of_base(self, group: Mapping[str, Any]) -> dict[str, Any] | None:
        """What a group has besides, as constructors that are given groups may want it; None for those given tensors."""
        names, _ = options_of_base(self.base_class)
        others = {"lr", *PARAMETER_KEYS, *OWN_OPTIONS, *COMMON_DEFAULTS, *names}
        return {name: value for name, value in group.items() if name not in others} if self._takes_groups else None

    # Options --------------------------------------------------------------------------------------------------------

    def check(self, group: dict[str, Any]) -> None:
        check_range("lr", group["lr"], 0.0)
        check_bounds("trust_bounds", group["trust_bounds"])
        options = self._options_of_base(group)
        refuse_storage_options(self.base_class.__name__, group, options)
        if group["maximize"] and "maximize" not in options:
            raise ValueError(f"maximize must be False: {self.base_class.__name__} has no such option")
        known = repr(options)
        if self._checked_options.get(id(group)) != known:
            check_options(self.base_class, options, self.base_options, self._keys_of_base(group))
            self._checked_options[id(group)] = known

    def check_layout(self, layout: Layout) -> None:
        natures = [
            nature_of(self.base_class, self._options_of_base(group), layout.device, self._seen_by_base(group))
            for group in self.param_groups
        ]
        stepped = [group for group in self.param_groups if group["params"]]
        has_all_groups = all(map(self.was_given, layout.tensors)) or len(stepped) >= self._most_groups
        for index in dict.fromkeys(layout.groups):
            refuse_layout(self.base_class.__name__, natures[index], layout, has_all_groups=has_all_groups)
        self._natures[layout] = natures, self._kinds()
        self._warn_of_unread_keys()

    def _warn_of_unread_keys(self) -> None:
        """Warn of what users have put into groups and the base makes nothing of; once."""
        given, self._given_keys = self._given_keys, set()
        for group in self.param_groups if given else []:
            options, in_group = self._options_of_base(group), self._seen_by_base(group)
            unread = unread_keys(self.base_class, options, in_group, [key for key in in_group if key in given])
            if unread:
                warnings.warn(
                    f"{self.base_class.__name__} makes nothing of the group key {', '.join(map(repr, unread))}, which "
                    "is no option of it: leave it out",
                    stacklevel=2,
                )
                return

    def _seen_by_base(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in group.items() if name not in OWN_OPTIONS}

    def _kinds(self) -> list[dict[str, Any]]:
        return [kinds_of(self._seen_by_base(group)) for group in self.param_groups]

    def _natures_on(self, layout: Layout) -> list[Nature]:
        """Of each group; found out anew, and what cannot be exact refused, if options are of another kind by now."""
        natures, kinds = self._natures[layout]
        if kinds != self._kinds():
            self.check_layout(layout)
            natures, _ = self._natures[layout]
        return natures  # type: ignore[no-any-return]

    # The step -------------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Re-evaluates the model and returns the loss, as in torch.optim: once, and again as often as a base
                that steps by evaluations, such as LBFGS, asks for it.

        Returns:
            The closure's loss before the step, or None.

        Raises:
            LayoutError: As `LayerwiseOptimizer.step`; if the base cannot be exact on what it is stepped with.
        """
        if closure is None:
            return super().step()

        def evaluate() -> Any:
            loss = closure()
            self._closure = partial(known_at_first, closure, loss)
            return loss

        try:
            return super().step(evaluate)
        finally:
            self._closure = None

    def inputs(
        self, layout: Layout, gradients: Sequence[torch.Tensor | None], *, is_first: bool
    ) -> dict[str, Sequence[torch.Tensor]]:
        natures = self._natures_on(layout)
        self._takes_large_rate = all(nature.is_proportional for nature in natures)
        if self._closure is not None and any(nature.reads_loss for nature in natures):
            refuse_loss(self.base_class.__name__)
        parts = [local_part(tensor).detach() for tensor in layout.tensors]
        moving = [index for index, gradient in enumerate(gradients) if gradient is not None]
        step = partial(propose, [parts[index] for index in moving], partial(self._step_base, layout, gradients))
        step = dtensors_named(self.base_class.__name__, layout)(step)
        number = self._plans.steps_begun
        if is_first and self._last_step != number and not self._is_step(layout, gradients):
            self._made_of_zeros.make(number, self.param_groups, self.state, layout.tensors, step)
            return {"proposed": parts}
        self._last_step = number
        self._made_of_zeros.keep(number)
        self._made_of_zeros.drop(self.state, layout.tensors)
        self._looks_at_digits = is_first
        proposed = dict(zip(moving, step(), strict=True))
        return {"proposed": [proposed.get(index, part) for index, part in enumerate(parts)]}

    def _is_step(self, layout: Layout, gradients: Sequence[torch.Tensor | None]) -> bool:
        """Whether any rank has a gradient that is not zero, or state: else it is made for the sake of the state.

        Waits for the device; one small all-reduce if sharded.
        """
        here = [
            (gradient is not None and bool(gradient.any()))
            or (bool(self.state[tensor]) and not self._made_of_zeros.has_made(tensor, self.state[tensor]))
            for tensor, gradient in zip(layout.tensors, gradients, strict=True)
        ]
        of_layers = [[float(here[layer.tensor]) for layer in layout.layers]]
        return bool(layout.reduce(torch.tensor(of_layers, dtype=torch.float64, device="cpu")).any())

    def _step_base(self, layout: Layout, gradients: Sequence[torch.Tensor | None]) -> None:
        self._share()
        self._make_state(layout)
        own_gradients = [*_complete(layout, gradients)]
        own_data = [(tensor, tensor.detach()) for tensor in layout.tensors if is_plain(tensor)]
        own_members = self._leave_out_what_stays(layout, gradients)
        not_stepped = self._as_several_calls_began(layout)
        rate = at_rate(self.param_groups, LARGE_RATE) if self._takes_large_rate else nullcontext()
        try:
            with rate:
                step_without_hooks(self.base, *(() if self._closure is None else (self._closure(layout.tensors),)))
        finally:
            for group, members in own_members:
                group["params"] = members
            for group, kept in not_stepped:
                restore(group, kept, PARAMETER_KEYS)
            for tensor, gradient in own_gradients:
                tensor.grad = gradient
            for tensor, data in own_data:
                if tensor.data_ptr() != data.data_ptr():  # the base has put another one in its place
                    data.copy_(tensor.detach())
                    tensor.data = data

    def _leave_out_what_stays(
        self, layout: Layout, gradients: Sequence[torch.Tensor | None]
    ) -> list[tuple[dict[str, Any], list[torch.Tensor]]]:
        """Take tensors without gradient out of the groups, since a base might decay them; return what was there."""
        moving = {id(t) for t, gradient in zip(layout.tensors, gradients, strict=True) if gradient is not None}
        own = [(group, group["params"]) for group in self.param_groups]
        for group, members in own:
            if not all(id(member) in moving for member in members):
                group["params"] = [member for member in members if id(member) in moving]
        return own

    def _as_several_calls_began(self, layout: Layout) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Where a wrapper makes several calls of a step, have a base count in each group and in the state once.

        Only wrappers that step tensors of their own do that, as ZeRO does; else each call is a step.

        Returns:
            Groups that this call does not step, and what they have.
        """
        if all(map(self.was_given, layout.tensors)):
            return []
        self._as_the_step_began(self.state)
        for group in self.param_groups:
            if group["params"]:
                self._as_the_step_began(group, PARAMETER_KEYS)
        empty = [group for group in self.param_groups if not group["params"]]
        return [(group, copied(own_of(group, PARAMETER_KEYS))) for group in empty]

    def _as_the_step_began(self, kept: MutableMapping[Any, Any], left_out: Sequence[Any] = ()) -> None:
        """Give what is stepped in several calls, a group or the whole state, what it had before the first of them.

        Args:
            kept: The group, or the state.
            left_out: Keys of it that stay; tensors, which each call has of its own, do so anyway.
        """
        step, began = self._began.get(id(kept), (None, {}))
        if step == self._plans.steps_begun:
            restore(kept, began, left_out)
        else:
            self._began[id(kept)] = self._plans.steps_begun, copied(own_of(kept, left_out))

    def _make_state(self, layout: Layout) -> None:
        """Give new tensors the state that the base makes when it is constructed."""
        if self._makes_state_when_made:
            for index, tensor in zip(layout.groups, layout.tensors, strict=True):
                if not self.state[tensor]:
                    group = self.param_groups[index]
                    options, keys = self._options_of_base(group), self._keys_of_base(group)
                    fresh = make_alone(self.base_class, tensor, group["lr"], options, keys)
                    self.state[tensor].update(fresh.state[tensor])

    def stages(self, group: dict[str, Any], layers: LayerTable) -> Iterator[Stage]:
        yield self.norms
        # ‖w‖ / (‖w - w_after‖ / rate)
        rule = TrustRule(
            layers.adapt,
            coefficient=LARGE_RATE if self._takes_large_rate else group["lr"],
            direction=1.0,
            direction_name="d",
            bounds=group["trust_bounds"],
        )
        layers.trust_ratio = rule(layers)
        if self._looks_at_digits:
            warn_of_lost_digits(self.base_class.__name__, group, layers, takes_large_rate=self._takes_large_rate)

    @sums_over_layers("w", "d", "g")
    def norms(self, group: dict[str, Any], layers: LayerTable, x: ChunkView) -> tuple[Summand, ...]:
        return squares(x.w), squares(x.w - x.proposed), squares(x.g)

    def change(self, group: dict[str, Any], layers: LayerTable, x: ChunkView) -> torch.Tensor:
        # At its own rate of 0, a base may move all the same.
        scale = group["lr"] / LARGE_RATE if self._takes_large_rate else 1.0 * (group["lr"] != 0)
        return x.of(scale * layers.trust_ratio) * (x.w - x.proposed)

    # Copies and files -----------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return super().__repr__().replace(type(self).__name__, f"{type(self).__name__}({self.base_class.__name__})", 1)

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in KEPT_IN_COPIES}
        return {**super().__getstate__(), **kept, "attributes_of_base": attributes_of(self.base)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch calls this from load_state_dict too, on an optimizer that has its base.
        attributes = state.pop("attributes_of_base", {})
        super().__setstate__(state)
        vars(self.base).update(attributes)
        self._share()
        self.base.__setstate__({"state": self.state, "param_groups": self.param_groups})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as `LayerwiseOptimizer` does, a ``state_dict()`` of the base alone too: then the own options stay.

        State gets the dtypes that torch gives it, those of the parameters; or keeps those of the file, if the base has
        a ``load_state_dict`` of its own, which is not called.
        """
        saved, current = state_dict["param_groups"], self.param_groups
        if len(saved) == len(current):
            pairs = zip(saved, current, strict=True)
            saved = [{**{name: mine[name] for name in OWN_OPTIONS}, **theirs} for theirs, mine in pairs]
        super().load_state_dict({**state_dict, "param_groups": saved})

    def _as_loaded(self, group: dict[str, Any], parameter: torch.Tensor, name: str, value: Any) -> Any:
        # As torch loads it, for the base expects that. But torch makes floats of masks and counts, and nothing of text;
        # and who loads by itself does so to keep the dtypes.
        made_of_it = self.state[parameter][name]
        if not isinstance(value, torch.Tensor):
            return super()._as_loaded(group, parameter, name, value)
        loads_itself = type(self.base).load_state_dict is not torch.optim.Optimizer.load_state_dict
        as_torch_casts = value.is_floating_point() and not loads_itself
        return (made_of_it if as_torch_casts else value.to(made_of_it.device)).detach().clone()


def _complete(
    layout: Layout, gradients: Sequence[torch.Tensor | None]
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Put complete gradients where DTensors have sums over ranks; yield the tensors and what they had."""
    for tensor, gradient in zip(layout.tensors, gradients, strict=True):
        placements, own = placements_of(tensor), tensor.grad
        if placements is not None and gradient is not None and (own is None or placements_of(own) != placements):
            kind: Any = type(tensor)
            local = gradient.view(local_part(tensor).shape)
            whole = {"shape": tensor.shape, "stride": tensor.stride()}
            mesh = tensor.device_mesh  # type: ignore[attr-defined]
            tensor.grad = kind.from_local(local, mesh, placements, run_check=False, **whole)
            yield tensor, own
