"""Runs of the recipe inside the worker processes of a pool: its own loop, or the Trainer's."""

from __future__ import annotations

import contextlib
import io
import os
from unittest import mock

SMALL = (
    *("--sequence_length", "16", "--global_batch", "16", "--micro_batch", "4", "--steps", "10"),
    *("data.vocabulary=200", "data.validation_fraction=0.2", "data.validation_sequences=10"),
    *("model.hidden=32", "model.intermediate=64", "model.max_positions=16", "run.validate_every=5"),
)


def train(cache: str, environment: dict[str, str], by_trainer: bool, arguments: list[str]) -> str:
    """Run the recipe on this rank as a launcher would have started it; return how it ended."""
    from accelerate.state import AcceleratorState

    from trustratio.recipes.common import errors as recipe_errors
    from trustratio.recipes.training import (
        bert as bert_pretraining,
    )
    from trustratio.recipes.training import (
        bert_trainer as trainer_pretraining,
    )
    from trustratio.recipes.training import (
        launchers as front_ends,
    )

    front_end = front_ends.AccelerateFrontEnd if environment else front_ends.DeepSpeedFrontEnd
    recipe = trainer_pretraining if by_trainer else bert_pretraining
    with mock.patch.dict(os.environ, {**environment, "TRUSTRATIO_CACHE": cache}):
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            invocation = bert_pretraining.parse_command_line(arguments)
            run = recipe.check_run(invocation) if by_trainer else recipe.check_run(invocation, front_end())
            with contextlib.redirect_stdout(io.StringIO()):
                recipe.pretrain(run, bert_pretraining.Reporter(active=int(os.environ["RANK"]) == 0))
        except recipe_errors.RecipeError as error:
            return f"{type(error).__name__}: {error}"
    return "finished"
