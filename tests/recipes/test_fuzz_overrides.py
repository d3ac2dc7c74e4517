"""Overrides of arbitrary text: a configuration whose values are in their ranges, or a sentence about what is wrong."""

from __future__ import annotations

import dataclasses
import json
import math

from hypothesis import event, example, given
from hypothesis import strategies as st

from tests.fuzzing import examples
from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.configuration.command_line import parse_command_line
from trustratio.recipes.configuration.config import RecipeConfig
from trustratio.recipes.configuration.overrides import from_dict
from trustratio.recipes.configuration.phases import describe_plan, phases_of, total_steps
from trustratio.recipes.configuration.presets import PRESETS
from trustratio.recipes.configuration.ranges import check_ranges
from trustratio.recipes.model.build import outline

FIELDS = [
    f"{section.name}.{field.name}"
    for section in dataclasses.fields(RecipeConfig)
    if section.name != "preset"
    for field in dataclasses.fields(getattr(RecipeConfig(), section.name))
]
OPTIONS = [f"optimizer.{name}" for name in ("betas", "eps", "adapt", "segments", "implementation", "options.eps", "x")]
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(["1e3", "1e400", "-0", "0x10", "1_000", "٣", "1" * 5000, "NaN", "-Infinity", " 7 "]),
).map(str)
LITERALS = ("true", "none", "null", "[]", "{}", '""', "[a,b]", "[1,", '{"a": {"b": 1}}', "[" * 3000, "lamb", "bf16")
TEXTS = ("polynomial", "exponential", "auto", "tensorboard", "[tensorboard]", "=", "a=b", "\ud800", "\x00", "\n")
KEYS = st.one_of(
    st.sampled_from(FIELDS),
    st.sampled_from(
        [*OPTIONS, "model", "optimizer.", ".lr", "modle.layers", "training.step", "preset", " model.layers "]
    ),
    st.text(max_size=8).map(lambda name: f"model.{name}"),
    st.text(max_size=12),
)
ANYTHING = st.builds(
    "{}={}".format, KEYS, st.one_of(NUMBERS, st.sampled_from([*LITERALS, *TEXTS]), st.text(max_size=12))
)


def like_the_default(key: str) -> st.SearchStrategy[str]:
    """Return overrides of a field by values near its default."""
    section, name = key.split(".")
    default = getattr(getattr(RecipeConfig(), section), name)
    values = [default, json.dumps(default)]
    if isinstance(default, int | float):
        values += [0, 1, 4, default * 2, default / 2, -default, 10**6, 2**31 - 1, int(default)]
    return st.sampled_from([f"{key}={'null' if value is None else value}" for value in values])


PLAUSIBLE = st.sampled_from([key for key in FIELDS if key != "optimizer.options"]).flatmap(like_the_default)
OVERRIDES = st.one_of(
    st.lists(PLAUSIBLE, min_size=1, max_size=4), st.lists(PLAUSIBLE | ANYTHING, min_size=1, max_size=3)
)


@examples(200)
@example(["optimizer.betas="], "adamw-64k")
@example(["phase_two.lr=1e400"], "lamb-tiny")  # of no phase
@given(OVERRIDES, st.sampled_from(sorted(PRESETS)))
def test_overrides_end_in_a_valid_configuration_or_a_sentence(overrides, preset):
    refusal = ""
    try:
        config = parse_command_line(["--preset", preset, *overrides]).config
        check_ranges(config)
        outline(config)
        for phase in phases_of(config):
            phase.plan(1)
    except RecipeError as error:
        refusal = str(error)
    event("refused" if refusal else "taken")
    if refusal:
        assert len(refusal) < 2000
        return
    numbers = [value for part in dataclasses.astuple(config) if isinstance(part, tuple) for value in part]
    assert all(math.isfinite(value) for value in numbers if isinstance(value, int | float))
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert total_steps(config) > 0
    assert describe_plan(config, 1)
