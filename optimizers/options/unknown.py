"""Options and group keys that an optimizer does not have: which are mistakes, and what to write in their place.

A key that the user gives to a group is

- refused, if it is misspelt, an option of another optimizer of this package, or a well-known option of other LARS and
  LAMB codes, unless its value there means what happens here anyway;
- kept without a word, if schedulers and wrappers are known to put it into groups;
- kept with a warning, otherwise.

Whatever is written into a group later is nobody's business, but for the options themselves.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..formulas.algorithm import Algorithm
from .common import COMMON_DEFAULTS, OF_THE_WHOLE, options_of

__all__ = ["check_keys", "chooses_elsewhere", "nearest", "options_of_others", "refuse_unknown", "why_refused"]

PACKAGE = __name__.removesuffix("options.unknown")
OF_TORCH = ("params", "param_names", "step", "last_sample")
PASSENGERS = {
    *("initial_lr", "max_lr", "min_lr", "base_lr", "swa_lr", "max_momentum", "min_momentum", "base_momentum"),
    *("name", "names", "tag", "group_name", "layer_name", "layer_names", "param_shapes", "param_group_id", "id"),
    *("lr_scale", "lr_mult", "wd_mult", "lr_multiplier", "weight_decay_mult", "lr_decay", "layer_decay"),
    *("pre_lr_mult", "pre_wd_mult", "start_wd", "end_wd", "default_config", "pre_clip"),
    *("is_expert", "is_expert_parallel", "is_decoupled_lr", "moe", "dp_process_group", "bucket_cap_mb"),
    *("fix_lr", "no_weight_decay", "apply_weight_decay", "freeze", "decoupled_weight_decay", "ds_pipe_replicated"),
    *("use_muon", "use_fallback"),
}
"""Keys that torch's schedulers, timm, DeepSpeed, Megatron and recipes put into groups for themselves."""

ALIASES = {
    **dict.fromkeys(("learning_rate", "base_learning_rate", "rate"), "lr"),
    **dict.fromkeys(("wd", "weight_decay_rate", "l2", "l2_reg"), "weight_decay"),
    **dict.fromkeys(("beta", "beta1", "beta2", "beta_1", "beta_2"), "betas"),
    **dict.fromkeys(("epsilon", "eps_root"), "eps"),
    **dict.fromkeys(("mu",), "momentum"),
    **dict.fromkeys(("weight_decouple",), "decoupled"),
    **dict.fromkeys(("keep_num", "n"), "keep"),
    **dict.fromkeys(("eta", "trust_coeff", "trust_coef", "lars_coefficient"), "trust_coefficient"),
    **dict.fromkeys(("clip_threshold",), "update_clip"),
    **dict.fromkeys(("max_norm", "clip_norm", "global_clip_norm"), "max_grad_norm"),
}
"""Other names of options; one that the optimizer does not have is a key like any other."""

NOT_ADAPTED = "write adapt=False in the groups whose layers no ratio should scale, or adapt=True for all"
ELSEWHERE: dict[str, tuple[tuple[Any, ...], str]] = {
    "lars_exclude": ((False,), NOT_ADAPTED),
    "lars_adaptation_filter": ((), NOT_ADAPTED),
    "layer_adaptation": ((True,), NOT_ADAPTED),
    "exclude_from_layer_adaptation": ((), NOT_ADAPTED),
    "always_adapt": ((), NOT_ADAPTED),
    "use_nvlamb": ((False,), NOT_ADAPTED),
    "exclude_bias_n_norm": ((True,), NOT_ADAPTED),
    "weight_decay": ((0, 0.0), "it has no weight decay: leave it out"),
    "weight_decay_filter": ((), "write weight_decay=0.0 in the groups whose layers should not decay"),
    "exclude_from_weight_decay": ((), "write weight_decay=0.0 in the groups whose layers should not decay"),
    "trust_clip": ((False,), "write trust_bounds=(0.0, 1.0) for LAMB, or take LAMBC"),
    "clip": ((False,), "a bound of the ratio is trust_bounds of LAMB or trust_clip of LAMBC"),
    "clamp_value": ((), "write trust_bounds=(0.0, clamp_value) for LAMB, or take LAMBC"),
    "max_coeff": ((), "write trust_bounds=(min_coeff, max_coeff) for LAMB"),
    "min_coeff": ((), "write trust_bounds=(min_coeff, max_coeff) for LAMB"),
    "dampening": ((0, 0.0), "no optimizer here dampens its momentum"),
    "amsgrad": ((False,), "AdaBelief alone divides by the largest second moment here"),
    "adam_w_mode": ((True, 1), "weight decay is a part of the direction, and so of the trust ratio"),
    "decoupled_decay": ((False,), "weight decay is a part of the direction, and so of the trust ratio"),
    "corrected_weight_decay": ((False,), "weight decay is a part of the direction, and so of the trust ratio"),
    "clip_lr": ((False,), "a bound of the ratio is trust_bounds of LAMB or trust_clip of LAMBC"),
    "decouple_lr": ((False,), "write weight_decay divided by the largest learning rate for StableAdamW"),
    "debias": ((True,), "write bias_correction for LAMB"),
    "caution": ((False,), "no optimizer here masks its update"),
    "adam": ((False,), "write adapt=False in every group"),
}
"""Options of other LARS and LAMB codes: values that mean what happens here anyway, and what to write otherwise."""


def options_of_others(defaults: Collection[str]) -> dict[str, str]:
    """Options that this package's optimizers have and these defaults lack, with the first class that has them.

    Not those of users' classes: an option of theirs may bear the name of a key that anybody puts into groups. Nor those
    in `ELSEWHERE`, of which the value decides.
    """
    found: dict[str, str] = {}
    for algorithm in _algorithms(Algorithm):
        for name in options_of(algorithm):
            if name not in defaults and name not in ELSEWHERE:
                found.setdefault(name, algorithm.__name__)
    return found


def _algorithms(base: type[Any]) -> Iterator[type[Any]]:
    """Yield this package's classes that derive from `base`."""
    for subclass in base.__subclasses__():
        if subclass.__module__.startswith(PACKAGE):
            yield subclass
        yield from _algorithms(subclass)


def nearest(unknown: str, allowed: Collection[str]) -> str:
    """For a message: the allowed names that are nearest to an unknown one, or all of them."""
    alias = ALIASES.get(unknown.lower())
    close = [alias] if alias in allowed else difflib.get_close_matches(unknown, allowed, n=3)
    return f"nearest: {', '.join(map(str, close))}" if close else f"known: {', '.join(allowed)}"


def refuse_unknown(optimizer_class: type, options: Mapping[str, Any]) -> None:
    """Raise TypeError, as Python does, if any of the options is not common to all optimizers."""
    for name in options:
        if name not in COMMON_DEFAULTS:
            advice = why_refused(optimizer_class, name) or nearest(name, list(options_of(optimizer_class)))
            raise TypeError(f"{optimizer_class.__name__}() got an unexpected keyword argument {name!r}; {advice}")


def why_refused(optimizer_class: type, name: str) -> str | None:
    """Why an option of its relatives has no meaning for an optimizer; None if it says nothing of that."""
    refused: Mapping[str, str] = getattr(optimizer_class, "refused_options", {})
    return refused.get(name)


def check_keys(
    optimizer_class: type, group: Mapping[str, Any], defaults: Collection[str], *, others_read: bool = False
) -> None:
    """Look at the keys that a user gives to a group; see above.

    Args:
        optimizer_class: Whose group it is.
        group: With these keys.
        defaults: Names of options.
        others_read: Whether keys that are no options may be read by others; misspelt ones alone are refused then.

    Raises:
        ValueError: Naming the key and what to write in its place.
    """
    options = [name for name in defaults if name not in OF_THE_WHOLE]
    for key, value in group.items():
        if key in options or key in OF_TORCH or str(key).startswith("_"):
            continue
        name = optimizer_class.__name__
        if key in OF_THE_WHOLE:
            raise ValueError(f"{key} is an option of the whole optimizer: give it to {name}(), not to a group")
        refused = None if value is None else why_refused(optimizer_class, key)
        advice = refused or _advice(key, value, options, others_read=others_read)
        if advice:
            raise ValueError(f"{name} has no group option {key!r} (got {value!r}): {advice}")
        if not others_read and key not in PASSENGERS and key not in ELSEWHERE and value is not None:
            warnings.warn(f"{name} keeps the group key {key!r} without using it; it is no option", stacklevel=2)


def chooses_elsewhere(key: str, value: Any) -> bool:
    """Whether a key is an option of other codes, of which the value asks for something that does not happen here."""
    if key not in ELSEWHERE or value is None:
        return False
    harmless, _ = ELSEWHERE[key]
    return not any(value is same or (type(value) is type(same) and value == same) for same in harmless)


def _advice(key: Any, value: Any, options: Collection[str], *, others_read: bool) -> str | None:
    """What to write in place of a key that is a mistake; None if it is none."""
    if not isinstance(key, str) or key in PASSENGERS or value is None:
        return None
    if key in ELSEWHERE and not others_read:
        harmless, advice = ELSEWHERE[key]
        return (
            None if any(value is same or (type(value) is type(same) and value == same) for same in harmless) else advice
        )
    close = _misspelt(key, options)
    if close is not None:
        return f"nearest: {close}"
    owner = None if others_read else options_of_others(options).get(key)
    if owner is not None and value is not False:
        return f"it is an option of {owner}; known here: {', '.join(options)}"
    return None


def _misspelt(key: str, options: Collection[str]) -> str | None:
    """The option that was probably meant: another name of one, or one that differs by a letter or two."""
    plain = key.lower().replace("-", "_")
    names = {**{option: option for option in options}, **{a: o for a, o in ALIASES.items() if o in options}}
    if plain in names:
        return names[plain]
    close = difflib.get_close_matches(plain, [name for name in names if abs(len(name) - len(plain)) < 3], 1, 0.85)
    return names[close[0]] if close else None
