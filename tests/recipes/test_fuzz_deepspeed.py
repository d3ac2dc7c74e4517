"""DeepSpeed configurations that nobody thought of: taken, or refused in one sentence that names what is wrong."""

from __future__ import annotations

import json

from hypothesis import event, given
from hypothesis import strategies as st

from tests.fuzzing import examples
from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.rules.global_batch import BatchPlan
from trustratio.recipes.training.deepspeed_schema import check_settings
from trustratio.recipes.training.deepspeed_settings import describe_sums, merge, precision_of, stage_of

from .deepspeed_examples import any_settings


def names_in(settings: object) -> set[str]:
    """Every key of a configuration, at any depth."""
    if not isinstance(settings, dict):
        return set()
    return {*settings, *(name for value in settings.values() for name in names_in(value))}


@examples(100)
@given(any_settings(), st.sampled_from([1, 2]))
def test_a_configuration_is_taken_or_refused_by_name(settings, ranks):
    plan, refusal, merged = BatchPlan(1, 2, ranks), "", {}
    try:
        check_settings(settings)
        stage, precision = stage_of(settings), precision_of(settings)
        stage, precision = 1 if stage is None else stage, precision or "fp32"
        merged = merge(settings, plan, stage, precision, 1.0, elementwise=False)
        describe_sums(merged, precision, stage, plan.accumulation)
    except RecipeError as error:
        refusal = str(error)
    event("refused" if refusal else "taken")
    if refusal:
        assert "\n" not in refusal
        assert any(name in refusal for name in names_in(settings)), refusal
    else:
        json.dumps(merged, allow_nan=False)  # it goes into the run's folder
        assert merged["zero_optimization"]["stage"] == stage
