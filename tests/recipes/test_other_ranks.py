"""Runs that another number of ranks continues: the losses of the undisturbed run, and which numbers can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .recipe_runs import losses, recipe, records, train

FEW = ("model.dropout=0", "--steps", "4", "phase_two.steps=2", "run.checkpoint_every=3", "run.validate_every=0")
# name: what the launcher sets, the script, further arguments
WRAPPERS = {
    "zero-1": ({}, "bert.py", ("--zero_stage", "1")),
    "zero-2": ({}, "bert.py", ("--zero_stage", "2", "--precision", "bf16")),
    "zero-3": ({}, "bert.py", ("--zero_stage", "3", "optimizer.name=vrlamb", "phase_two.micro_batch=2")),
    "zero-0": ({}, "bert.py", ("--zero_stage", "0", "optimizer.name=adamw", "run.noise_scale=false")),
    "ddp": ({}, "bert_accelerate.py", ()),
}


@pytest.fixture(scope="module")
def launch(pools, text_folder, tmp_path_factory):
    """Run the recipe on one or two ranks; return its folder and how it ended on the first."""
    root = tmp_path_factory.mktemp("ranks")

    def start(name: str, ranks: int, wrapper: str, *arguments: str) -> tuple[Path, str]:
        environment, script, own = WRAPPERS[wrapper]
        line = recipe(text_folder, root / name, *FEW, *own, *arguments)
        return root / name, pools.get(ranks).run(train, str(root / "cache"), environment, script, line)[0]

    return start


@pytest.mark.parametrize(
    ("wrapper", "before", "after"),
    [("zero-1", 2, 1), ("zero-2", 1, 2), ("zero-3", 2, 1), ("zero-0", 1, 2), ("ddp", 2, 1)],
)
def test_a_run_goes_on_with_another_number_of_ranks(launch, wrapper, before, after):
    """Before the border of the phases; the same samples and masks are in every update, so the losses are the same."""
    straight, ending = launch(f"{wrapper}-straight", before, wrapper)
    assert ending == "finished"
    checkpoint = straight / "checkpoints" / "step-00000003"
    resumed, ending = launch(f"{wrapper}-resumed", after, wrapper, "--resume", str(checkpoint))
    assert ending == "finished"
    expected = losses(straight)[3:]
    assert len(expected) == 3
    rounding = 1e-2 if wrapper == "zero-2" else 1e-5
    assert losses(resumed) == pytest.approx(expected, rel=rounding)
    for name in ("sequences", "masked_tokens", "lr"):
        assert [r[name] for r in records(resumed)] == [r[name] for r in records(straight)][3:]
    assert json.loads((resumed / "environment.json").read_text())["ranks"] == after
