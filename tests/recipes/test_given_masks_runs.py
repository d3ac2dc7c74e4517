"""Runs on shards that are masked already: the same losses on any number of ranks, under any wrapper, after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .recipe_runs import losses, records, train
from .test_bert_shards import SIZE, Samples

FEW = (
    *("--sequence_length", "16", "--global_batch", "12", "--micro_batch", "2", "--steps", "4"),
    *("data.validation_fraction=0.2", "data.validation_sequences=10", "data.masks=as_given"),
    *("model.hidden=32", "model.intermediate=64", "model.max_positions=32", "run.checkpoint_every=3"),
    *("run.validate_every=2", "run.noise_scale=false", "phase_two.steps=2", "phase_two.sequence_length=32"),
    *("phase_two.global_batch=6", "phase_two.micro_batch=1"),
)
WRAPPERS = {
    "zero-0": ("bert.py", ("--zero_stage", "0")),
    "zero-1": ("bert.py", ("--zero_stage", "1")),
    "zero-2": ("bert.py", ("--zero_stage", "2")),
    "zero-3": ("bert.py", ("--zero_stage", "3")),
    "ddp": ("bert_accelerate.py", ()),
    "trainer": ("bert_trainer.py", ()),
}


@pytest.fixture(scope="module")
def launch(pools, tmp_path_factory):
    """Run the recipe on two phases of shards; return its folder and how it ended on the first rank."""
    root = tmp_path_factory.mktemp("given")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(SIZE - 5))]
    (root / "vocab.txt").write_text("\n".join(words))
    Samples(count=120).write(root / "a.hdf5")

    def start(name: str, ranks: int, wrapper: str, *arguments: str) -> tuple[Path, str]:
        script, own = WRAPPERS[wrapper]
        line = ["--data", str(root / "a.hdf5"), "--tokenizer", str(root / "vocab.txt"), *FEW, *own]
        line += ["--output", str(root / name), *arguments]
        return root / name, pools.get(ranks).run(train, str(root / "cache"), {}, script, line)[0]

    return start


@pytest.fixture(scope="module")
def alone(launch):
    folder, ending = launch("alone", 1, "zero-0")
    assert ending == "finished"
    return folder


SLOW = [("zero-2", 2), ("zero-3", 2), ("trainer", 2), ("zero-1", 3), ("zero-2", 3), ("zero-3", 3)]


@pytest.mark.parametrize(
    ("wrapper", "ranks"),
    [("zero-1", 2), ("ddp", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_given_masks_are_the_same_on_any_ranks(launch, alone, wrapper, ranks):
    folder, ending = launch(f"{wrapper}-{ranks}", ranks, wrapper)
    assert ending == "finished"
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-5)
    assert [r["masked_tokens"] for r in records(folder)] == [r["masked_tokens"] for r in records(alone)]


def test_the_masks_are_those_of_the_source_and_not_new_ones(launch, alone):
    folder, ending = launch("anew", 1, "zero-0", "data.masks=anew")
    assert ending == "finished"
    assert [r["masked_tokens"] for r in records(folder)] != [r["masked_tokens"] for r in records(alone)]


def test_a_run_goes_on_with_given_masks_and_with_no_others(launch, alone):
    checkpoint = str(alone / "checkpoints" / "step-00000003")
    folder, ending = launch("resumed", 2, "zero-0", "--resume", checkpoint)
    assert ending == "finished"
    assert losses(folder) == pytest.approx(losses(alone)[3:], rel=1e-5)
    _, ending = launch("other", 1, "zero-0", "--resume", checkpoint, "data.masks=anew")
    assert ending.startswith("RecipeError: ")
    assert "masks: checkpoint 'as_given', this run None" in ending
    assert json.loads((alone / "config.json").read_text())["data"]["masks"] == "as_given"


def test_a_model_of_shards_is_exported_with_their_vocabulary(alone, tmp_path, monkeypatch):
    from transformers import AutoTokenizer, BertForMaskedLM

    from trustratio.recipes.common.reporter import Reporter
    from trustratio.recipes.training.export import export_checkpoint

    monkeypatch.setenv("TRUSTRATIO_CACHE", str(alone.parent / "cache"))
    export_checkpoint(alone, tmp_path / "model", Reporter(active=False))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("7 [MASK] 8")["input_ids"] == [2, 12, 4, 13, 3]
    assert BertForMaskedLM.from_pretrained(tmp_path / "model").config.vocab_size == 320
