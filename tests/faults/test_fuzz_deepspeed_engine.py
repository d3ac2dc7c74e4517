"""Made-up DeepSpeed configurations that the recipe takes: engines of two ranks and of one train with them exactly."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from tests.distributed.cases import Case, run_case
from tests.distributed.exactness import MODEL, assemble, assert_exact, two_groups, worst_error
from tests.distributed.pool import WorkerPool
from tests.fuzzing import examples
from tests.recipes.deepspeed_examples import settings_of_every_stage
from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.rules.global_batch import BatchPlan
from trustratio.recipes.training.deepspeed_settings import merge, precision_of, stage_of

pytestmark = pytest.mark.slow

OF_16_BITS = 2e-2  # what gradients that are sent in 16 bits leave of a step


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[int, WorkerPool]]:
    """Pools by their number of ranks."""
    made = {ranks: WorkerPool(ranks) for ranks in (1, 2)}
    yield made
    for pool in made.values():
        pool.close()


def completed(settings: dict[str, Any], ranks: int) -> tuple[dict[str, Any], int, str] | None:
    """What the recipe makes of a file with these settings, its stage and precision; None if it refuses them."""
    stage, precision = stage_of(settings), precision_of(settings) or "fp32"
    stage = 1 if stage is None else stage
    try:
        return merge(settings, BatchPlan(1, 2, ranks), stage, precision, 1.0, elementwise=False), stage, precision
    except RecipeError:
        return None


def run_in(folder: str, case: Case) -> dict[str, Any]:
    """Train in a folder, into which DeepSpeed's monitors write."""
    os.chdir(folder)
    return run_case(case)


@examples(100)
@given(settings=settings_of_every_stage(), ranks=st.sampled_from([1, 2]))
def test_what_is_taken_trains_exactly(
    engines: dict[int, WorkerPool], tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any], ranks: int
) -> None:
    taken = completed(settings, ranks)
    if taken is None:
        event("refused")
        return
    merged, stage, precision = taken
    event(f"trained, stage {stage}, {precision}, {ranks} ranks")
    sent = merged.get("communication_data_type", "fp32")
    case = Case("lamb", MODEL, stage, two_groups("lamb"), steps=2, accumulation=2, dtype=precision, spread=0.0)
    case = replace(case, config=merged, clipping=merged["gradient_clipping"])
    answers = engines[ranks].run(run_in, str(tmp_path_factory.getbasetemp()), case)
    if sent in ("fp32", precision):
        assert_exact(case, answers)
    else:
        error, layer = worst_error(case, assemble(case, answers), ranks=ranks)
        assert error <= OF_16_BITS, f"{layer}: relative error of the weight change {error:.2e}"
