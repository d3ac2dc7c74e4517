"""DeepSpeed configurations, made up from DeepSpeed's own models of them: every key that the recipe takes."""

from __future__ import annotations

import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt
from hypothesis import strategies as st
from pydantic import BaseModel

from trustratio.recipes.training.deepspeed_schema import MODELS, SECTIONS, VALUES

COUNTS = (0, 1, 2, 3, 7, 16, 100, 1000, 10**6, 5 * 10**8)
NAMES = st.sampled_from(["a", "Leaf", "leaves", "x.y"])
NOISE = st.sampled_from(
    [None, True, False, 0, -1, 1.5, 2**63, float("inf"), float("nan"), "", "auto", "yes", "fp32", [], [1], {}, {"a": 1}]
)
SECTION_VALUES: dict[str, st.SearchStrategy] = {
    "grad_accum_dtype": st.sampled_from(["auto", None, "fp32", "bf16", "fp16"]),
    "tag_validation": st.sampled_from(["Warn", "Ignore", "Fail", "warn"]),
    "output_file": st.none(),
    "detailed": st.booleans(),
}
"""Of sections that DeepSpeed has no model of; other keys are counts or flags."""

VALUE_CHOICES: dict[str, st.SearchStrategy] = {
    "gradient_clipping": st.sampled_from([0, 0.0, 0.5, 1.0, 1000, "auto"]),
    "communication_data_type": st.sampled_from(["fp32", "bf16", "fp16", "auto"]),
    "gradient_predivide_factor": st.sampled_from([0.5, 1, 2.0, 4.0]),  # others round gradients of 16 bits
    "gradient_allreduce_op": st.just("mean"),
    "zero_force_ds_cpu_optimizer": st.just(False),
    "steps_per_print": st.sampled_from([1, 10, 10**9]),
    "log_level": st.sampled_from(["debug", "info", "warning", "error", "critical"]),
    **dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), st.just("auto")
    ),
}


REFUSED = frozenset(
    [
        *(
            "fp16",
            "activation_checkpointing",
            "wandb",
            "comet",
            "zenflow",
            "super_offload",
            "ratio",
            "cpu_offload",
            "cpu_offload_param",
        ),
        *("elastic_checkpoint", "legacy_stage1", "compute_grad_norm", "use_gds"),
        *("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"),
        *("bf16_master_weights_and_grads", "bf16_optimizer_states"),
    ]
)
"""Keys that are refused on a CPU with most of their values."""


def of_model(model: type[BaseModel], without: frozenset[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Return objects with some of a model's fields, each of a value that its type and its bounds allow."""
    fields = {info.alias or name: info for name, info in model.model_fields.items() if name not in without}
    kinds = {name: of_type(info.annotation, info.metadata, without) for name, info in fields.items()}
    return st.fixed_dictionaries({}, optional=kinds)


def of_type(kind: Any, bounds: typing.Sequence[Any], without: frozenset[str]) -> st.SearchStrategy[Any]:
    """Return values of a type, within pydantic's bounds."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return st.one_of(
            [st.none() if one is type(None) else of_type(one, bounds, without) for one in typing.get_args(kind)]
        )
    if typing.get_origin(kind) is list or kind is list:
        return st.lists(NAMES, max_size=2)
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.sampled_from([value for value in COUNTS if within(value, bounds)])
    if kind is float:
        return st.sampled_from([value for value in (0.0, 0.25, 0.8, 1.0, 128.0) if within(value, bounds)])
    if kind in (str, Path):
        return st.sampled_from(["a", "x-1"])
    if isinstance(kind, type) and issubclass(kind, Enum):
        return st.sampled_from([member.value for member in kind])
    assert issubclass(kind, BaseModel), kind
    return of_model(kind, without)


def within(value: float, bounds: typing.Sequence[Any]) -> bool:
    """Tell whether pydantic's bounds allow a number."""
    checks = {
        Ge: lambda b: value >= b.ge,
        Gt: lambda b: value > b.gt,
        Le: lambda b: value <= b.le,
        Lt: lambda b: value < b.lt,
    }
    return all(checks[type(bound)](bound) for bound in bounds if type(bound) in checks)


def of_section(keys: typing.Iterable[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Return objects with some keys of a section that DeepSpeed reads key by key."""
    usual = st.one_of(st.booleans(), st.sampled_from(COUNTS))
    return st.fixed_dictionaries({}, optional={key: SECTION_VALUES.get(key, usual) for key in sorted(keys)})


def valid_settings(without: frozenset[str] = frozenset()) -> st.SearchStrategy[dict[str, Any]]:
    """Return configurations whose keys DeepSpeed knows and whose values are of its types, `without` some of them."""
    values = {key: VALUE_CHOICES.get(key, st.booleans()) for key in VALUES}
    models = {key: of_model(model, without) for key, model in MODELS.items()}
    sections = {key: of_section(keys.keys() - without) for key, keys in SECTIONS.items()}
    strategies = {**values, **models, **sections}
    return st.fixed_dictionaries({}, optional={key: kind for key, kind in strategies.items() if key not in without})


@st.composite
def settings_of_every_stage(draw: st.DrawFn) -> dict[str, Any]:
    """Return configurations most of which a CPU can train with: half of them in bf16, and as many of each stage."""
    settings = draw(valid_settings(REFUSED))
    zero = {**settings.get("zero_optimization", {}), "stage": draw(st.sampled_from([0, 1, 2, 3]))}
    precision = {"bf16": {**settings.get("bf16", {}), "enabled": draw(st.booleans())}}
    for name in ("offload_optimizer", "offload_param"):
        if isinstance(zero.get(name), dict):
            zero[name] = {**zero[name], "device": draw(st.sampled_from(["cpu", "none"]))}
    return {**settings, **precision, "zero_optimization": zero}


@st.composite
def any_settings(draw: st.DrawFn) -> dict[str, Any]:
    """Return a configuration of which one value, at any depth, may be anything."""
    settings = draw(valid_settings())
    if settings and draw(st.booleans()):
        place: Any = settings
        key = draw(st.sampled_from(sorted(place)))
        while isinstance(place[key], dict) and place[key] and draw(st.booleans()):
            place = place[key]
            key = draw(st.sampled_from(sorted(place)))
        place[key] = draw(NOISE)
    return settings
