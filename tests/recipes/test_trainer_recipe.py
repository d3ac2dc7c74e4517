"""The recipe through the Hugging Face Trainer, on two ranks: a model that loads, as an exported checkpoint does."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForMaskedLM, AutoTokenizer

from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.training.export import export_checkpoint

from .recipe_runs import SMALL, recipe, records, train

ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}
ZERO = {**ACCELERATE, "ACCELERATE_USE_DEEPSPEED": "true"}
LOOP, LOOP_ACCELERATE, TRAINER = "bert.py", "bert_accelerate.py", "bert_trainer.py"
# name: what the launcher sets, the script, further arguments
RUNS = {
    "loop": ({}, LOOP, ()),
    "loop-zero-0": ({}, LOOP, ("--zero_stage", "0")),
    "loop-zero-3": ({}, LOOP, ("--zero_stage", "3")),
    "loop-ddp": ({**ACCELERATE, "ACCELERATE_USE_CPU": "true"}, LOOP_ACCELERATE, ()),
    "trainer-zero-1": ({"ACCELERATE_USE_CPU": "true"}, TRAINER, ("--zero_stage", "1")),
    "trainer-accelerate-zero-3": ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, TRAINER, ()),
}
TEN_UPDATES = (*SMALL, "--steps", "10", "model.max_positions=16")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def launch(text_folder, cache, pools, tmp_path_factory):
    root = tmp_path_factory.mktemp("trainer")

    def start(name, *arguments):
        environment, script, options = RUNS[name]
        line = recipe(text_folder, root / name, *options, *arguments, settings=TEN_UPDATES)
        return root / name, pools.get(2).run(train, str(cache), environment, script, line, report=script == TRAINER)

    return start


@pytest.fixture(scope="module")
def runs(launch):
    made = {}
    for name in RUNS:
        made[name], endings = launch(name)
        assert endings == ["finished"] * 2, endings
    return made


def test_the_model_loads_in_transformers(runs):
    for name in ("trainer-zero-1", "trainer-accelerate-zero-3"):
        model = AutoModelForMaskedLM.from_pretrained(runs[name] / "model")
        assert model.config.hidden_size == 32
        assert type(model).__name__ == "BertForMaskedLM"
        card = ModelCard.load(runs[name] / "model" / "README.md")
        losses = [record["validation_loss"] for record in records(runs[name], "validation")]
        assert card.data.eval_results[0].metric_value == pytest.approx(losses[-1], rel=1e-5)
        assert (runs[name] / "report.png").exists()


@pytest.mark.parametrize("name", [name for name, (_, script, _) in RUNS.items() if script != TRAINER])
def test_an_exported_checkpoint_has_the_trained_weights(runs, cache, name, tmp_path, monkeypatch):
    """Whatever wrapper wrote it; compared with the Trainer's model, which trained the same."""
    monkeypatch.setenv("TRUSTRATIO_CACHE", str(cache))
    export_checkpoint(runs[name], tmp_path, Reporter(active=False))
    exported = AutoModelForMaskedLM.from_pretrained(tmp_path)
    trained = AutoModelForMaskedLM.from_pretrained(runs["trainer-zero-1"] / "model")
    for (layer, one), other in zip(exported.named_parameters(), trained.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5), layer
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("trust ratio", "large batch")
    assert tokenizer.decode(ids["input_ids"]) == "[CLS] trust ratio [SEP] large batch [SEP]"
    assert set(ids["token_type_ids"]) == {0, 1}
    card = ModelCard.load(tmp_path / "README.md")
    validations = records(runs[name], "validation")
    assert validations[-1]["step"] == 10
    assert card.data.eval_results[0].metric_value == pytest.approx(validations[-1]["validation_loss"], rel=1e-5)


def test_a_checkpoint_of_other_data_is_refused(runs, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("TRUSTRATIO_CACHE", str(cache))
    run = tmp_path / "run"
    shutil.copytree(runs["loop"], run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["vocabulary"] = 190
    del config["digest"]  # as the message about changed files says
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="was trained on other data than"):
        export_checkpoint(run, tmp_path / "model", Reporter(active=False))


def test_a_checkpoint_of_the_other_scripts_is_refused(launch, runs):
    _, endings = launch("trainer-zero-1", "--resume", str(runs["loop"]))
    assert "was not written by bert_trainer.py; continue it with the script that wrote it" in endings[0]
