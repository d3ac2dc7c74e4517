"""The card beside an exported model: metadata as the Hub reads them, the run's own numbers, no paths of a machine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.common.marks import require_unchanged, write_checksums
from trustratio.recipes.configuration.batch_growth import updates_of
from trustratio.recipes.configuration.config import RecipeConfig
from trustratio.recipes.configuration.overrides import apply_overrides
from trustratio.recipes.configuration.phases import learning_rate, phases_of, total_steps
from trustratio.recipes.configuration.presets import PUBLISHED, get_preset
from trustratio.recipes.training.model_card import model_card, write_card

ENVIRONMENT = {"device": "H100 | 80 GB", "ranks": 8, "python": "3.12.1", "torch": "2.13.0", "trustratio": "0.1.0"}


def validation(step: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"kind": "validation", "step": step, "validation_loss": loss, "validation_accuracy": 0.25, **more}


def write_run(
    folder: Path, config: RecipeConfig, records: list[dict[str, Any]], environment: dict[str, Any] | None = None
) -> Path:
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if environment is not None:
        (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def card_of(folder: Path, step: int) -> tuple[str, ModelCard]:
    """Written, read back, and its metadata built anew by the Hub's own class, which refuses what it cannot read."""
    write_card(folder, step, folder)
    card = ModelCard.load(folder / "README.md")
    metadata = yaml.safe_load(card.content.split("---")[1])
    assert ModelCardData(**metadata, ignore_metadata_errors=False).to_dict() == card.data.to_dict()
    return card.content, card


RECORDS = [
    {"kind": "train", "step": 80, "loss": 6.0, "sequences": 5120},
    validation(80, 6.5, unigram_entropy=6.25),
    {"kind": "train", "step": 100, "loss": 5.0, "sequences": 6400},
    validation(100, 5.5, unigram_entropy=6.25),
]


def ended(config: RecipeConfig, step: int) -> list[dict[str, Any]]:
    """What a finished run of so many updates recorded last."""
    read = phases_of(config)[-1].sequences_before + phases_of(config)[-1].sequences
    train = {"kind": "train", "step": step, "loss": 5.0, "sequences": read, "lr": 2e-6}
    return [train, validation(step, 5.5, unigram_entropy=6.25)]


def test_the_hubs_metadata(tmp_path):
    config = apply_overrides(
        get_preset("lamb-64k-32k"), ['data.sources=["hf:org/text:en@train","hf:org/text:de","a.txt"]']
    )
    _, card = card_of(write_run(tmp_path, config, RECORDS, ENVIRONMENT), 100)
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.datasets) == ("transformers", "fill-mask", ["org/text"])
    assert data.tags == ["bert", "masked-lm", "trustratio", "lamb"]
    assert (data.language, data.license) == (None, None)
    assert (data.model_name, {result.dataset_type for result in data.eval_results}) == ("lamb-64k-32k", {"org/text"})
    numbers = {result.metric_type: result.metric_value for result in data.eval_results}
    assert numbers == {"loss": 5.5, "perplexity": pytest.approx(math.exp(5.5), rel=1e-5), "accuracy": 0.25}
    index = eval_results_to_model_index(data.model_name, data.eval_results)
    assert model_index_to_eval_results(index) == (data.model_name, data.eval_results)


def test_what_was_trained_is_said(tmp_path):
    config = get_preset("modernbert-base")
    steps = updates_of(config)[0][0] + config.phase_two.steps
    text, _ = card_of(write_run(tmp_path, config, ended(config, steps), ENVIRONMENT), steps)
    for words in (
        "ModernBERT, 22 layers x 768",
        "preset `modernbert-base`",
        "Its source: Warner et al. 2024",
        "Text: the documentation of the installed Python packages.",
        "Optimizer: `stableadamw`, lr 0.0008, weight_decay 0.0125, betas [0.9, 0.98]",
        "- Learning rate: linear warm-up, peak, no cooldown, then peak, 1-sqrt cooldown to 0.001 of the peak; at most "
        "0.0008, then 0.0003; 2e-06 at the last update.",
        "Phase 1: 768 to 4,608 sequences of 1,024 tokens per update, growing over the first 48,828,180 sequences.",
        "Phase 2: 576 sequences of 8,192 tokens per update.",
        f"Updates: {steps:,}, 1,",
        f"after update {steps:,}:",
        "| cross-entropy of the masked tokens in nats | 5.5 |",
        "| of guessing by the tokens' frequencies, in nats | 6.25 |",
        "- 8 x H100 80 GB",
        "python 3.12.1, torch 2.13.0, trustratio 0.1.0",
        'AutoModelForMaskedLM.from_pretrained("FOLDER")',
        "run.smallest_batch=768",
        "run.batch_warmup=0.029086",
        "schedule.shape=wsd",
        "phase_two.global_rope_theta=160000.0",
    ):
        assert words in text, words
    for words in ("Saved before", "besides", "validate_every"):
        assert words not in text, words


def test_training_that_the_weights_did_not_have_is_not_claimed(tmp_path):
    """A checkpoint in the warm-up, at the border of the phases, before the cooldown and in it."""
    options = ("run.batch_warmup=0", "run.smallest_batch=null", "training.steps=100", "phase_two.steps=60")
    config = apply_overrides(get_preset("modernbert-base"), [*options, "schedule.warmup=20", "phase_two.cooldown=30"])
    warming, border, peak, cooling, end = (
        next(line for line in model_card(write_run(tmp_path, config, []), step).splitlines() if "Learning rate" in line)
        for step in (10, 100, 130, 140, 160)
    )
    assert warming == "- Learning rate: linear warm-up, not to its end; at most 0.0004."
    assert border == "- Learning rate: linear warm-up, peak, no cooldown; at most 0.0008."
    both = "linear warm-up, peak, no cooldown, then peak"
    assert peak == f"- Learning rate: {both}, before its cooldown; at most 0.0008, then 0.0003."
    cooldown = "1-sqrt cooldown to 0.001 of the peak"
    assert cooling == f"- Learning rate: {both}, {cooldown}, not to its end; at most 0.0008, then 0.0003."
    assert end == f"- Learning rate: {both}, {cooldown}; at most 0.0008, then 0.0003."
    text = model_card(tmp_path, 100)
    assert "- Saved before the end of its run, in phase 1 of 2: 160 updates were planned." in text
    assert "Phase 2" not in text
    assert "Saved before" in model_card(tmp_path, 159)
    assert "Saved before" not in model_card(tmp_path, 160)


@pytest.mark.parametrize(
    ("options", "step", "words"),
    [
        ((), 10, "linear warm-up, not to its end; at most 0.005."),
        ((), 40, "linear warm-up, decay (1 - p)^1 to 0 of the peak, not to its end; at most 0.01."),
        ((), 100, "linear warm-up, decay (1 - p)^1 to 0 of the peak; at most 0.01."),
        (("schedule.constant=0.5",), 40, "linear warm-up, plateau; at most 0.01."),
        (("schedule.warmup=0",), 100, "Learning rate: decay (1 - p)^1 to 0 of the peak; at most 0.01."),
        (("schedule.decay_from_start=true",), 21, "linear warm-up, decay (1 - p)^1 to 0 of the peak, not to its end;"),
        (("schedule.shape=exponential",), 20, "quadratic warm-up; at most 0.009025."),
        (("schedule.shape=exponential",), 100, "quadratic warm-up, x0.9 every 250 updates; at most 0.01."),
        (("schedule.shape=wsd", "schedule.cooldown=0"), 100, "linear warm-up, peak, no cooldown; at most 0.01."),
    ],
)
def test_the_parts_of_every_shape(options, step, words, tmp_path):
    config = apply_overrides(get_preset("lamb-tiny"), ["training.steps=100", "schedule.warmup=20", *options])
    assert words in model_card(write_run(tmp_path, config, []), step)


@pytest.mark.parametrize(("step", "sequences", "batch"), [(7, 48, 12), (7, 47, 12), (8, 59, 16), (8, 52, 16)])
def test_how_far_a_run_with_growing_batches_came(step, sequences, batch, tmp_path):
    """By what was read: its updates are more, or fewer, than those of the global batch. 96 sequences, then 32."""
    sizes = ("training.global_batch=16", "training.steps=6", "phase_two.steps=4", "phase_two.global_batch=8")
    config = apply_overrides(get_preset("lamb-tiny"), [*sizes, "run.smallest_batch=4", "run.batch_warmup=0.5"])
    known = {"kind": "train", "loss": 5.0, "step": step, "sequences": sequences, "batch": batch}
    text = model_card(write_run(tmp_path, config, [known]), step)
    assert f"growing over the first 48 sequences; {batch} at the last update." in text
    assert "in phase 1 of 2: 10 updates of the global batch were planned." in text
    at_border = {"kind": "train", "loss": 5.0, "step": 9, "sequences": 96, "batch": 16}
    assert "in phase 1 of 2" in model_card(write_run(tmp_path, config, [at_border]), 9)
    later = {"kind": "train", "loss": 5.0, "step": 10, "sequences": 104, "batch": 8}
    assert "in phase 2 of 2" in model_card(write_run(tmp_path, config, [at_border, later]), 10)
    last = {"kind": "train", "loss": 5.0, "step": 13, "sequences": 128, "batch": 8}
    assert "Saved before" not in model_card(write_run(tmp_path, config, [last]), 13)
    assert "in phase 1 of 2" in model_card(write_run(tmp_path, config, []), 10)  # no more than is certain


def test_what_contradicts_the_presets_description_is_said_beside_it(tmp_path):
    options = ["model.layers=3", "data.sources=/home/somebody/a.txt", "optimizer.lr=0.5", "run.validate_every=3"]
    text = model_card(write_run(tmp_path, apply_overrides(get_preset("lamb-tiny"), options), []), 560)
    described = "This run has besides, which the preset has otherwise: `model.layers=3`, `data.sources=['a.txt']`, "
    assert described + "`optimizer.lr=0.5`.\n" in text


@pytest.mark.parametrize(
    ("tokenizer", "shown"),
    [
        ("answerdotai/ModernBERT-base", "answerdotai/ModernBERT-base"),
        ("bert-base-uncased", "bert-base-uncased"),
        ("somewhere/vocab.txt", "vocab.txt"),
        ("somewhere/tokenizer.json", "tokenizer.json"),
        ("../somewhere/words", "words"),
        ("/home/somebody/words", "words"),
        ("local/words", "words"),
    ],
)
def test_a_tokenizer_of_the_hub_keeps_its_owner(tokenizer, shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local" / "words").mkdir(parents=True)
    config = apply_overrides(get_preset("lamb-tiny"), [f"data.tokenizer={tokenizer}"])
    text = model_card(write_run(tmp_path, config, []), 560)
    assert f"- Tokenizer: `{shown}`." in text
    assert f"\ndata.tokenizer={shown}\n" in text


def test_masks_that_came_with_the_data_were_not_drawn(tmp_path):
    config = apply_overrides(get_preset("lamb-tiny"), ["data.masks=as_given"])
    text = model_card(write_run(tmp_path, config, []), 560)
    assert "- Masks are those that came with the data." in text
    assert "anew in every epoch" not in text


@pytest.mark.parametrize("name", ["lamb-tiny", *PUBLISHED])
def test_every_preset_has_a_card(name, tmp_path):
    config = get_preset(name)
    step = total_steps(config)
    text, card = card_of(write_run(tmp_path, config, ended(config, step)), step)
    assert config.model.architecture in card.data.tags
    peak = max(
        learning_rate(config, step) for step in range(0, config.training.steps, max(1, config.training.steps // 2000))
    )
    shown = text.split("; at most ")[1].split(";")[0].split(", then ")
    assert float(shown[0]) == pytest.approx(peak, rel=2e-3)


def test_no_path_of_a_machine_is_in_it(tmp_path):
    config = apply_overrides(
        get_preset("lamb-tiny"),
        [
            'data.sources=["/home/somebody/text/*.jsonl","../private/b`ook|s.txt","s3://bucket/wiki.txt?key=secret"]',
            "data.tokenizer=/home/somebody/vocabulary",
            "model.initial_weights=/home/somebody/base",
        ],
    )
    text, _ = card_of(write_run(tmp_path, config, RECORDS), 100)
    assert "Text: `*.jsonl`, `b ook s.txt`, `wiki.txt`." in text
    assert "data.tokenizer=vocabulary" in text
    assert "model.initial_weights=base" in text
    assert not [word for word in ("somebody", "private", "bucket", "secret", str(tmp_path)) if word in text]


def test_numbers_of_other_weights_are_not_the_models(tmp_path):
    """What came after it is left out; what came before is dated, and no program reads it."""
    run = write_run(tmp_path, get_preset("lamb-tiny"), RECORDS)
    text, card = card_of(run, 90)
    assert "after update 80; this model is of update 90:" in text
    assert "| 6.5 |" in text
    assert "5.5" not in text
    assert card.data.eval_results is None
    text, card = card_of(run, 40)
    assert "No validation of this model was recorded." in text
    assert card.data.eval_results is None


@pytest.mark.parametrize(
    ("loss", "kinds"), [(math.nan, ["accuracy"]), (math.inf, ["accuracy"]), (800.0, ["loss", "accuracy"])]
)
def test_what_is_not_finite_is_left_out(tmp_path, loss, kinds):
    text, card = card_of(write_run(tmp_path, get_preset("lamb-tiny"), [validation(5, loss)]), 5)
    assert [result.metric_type for result in card.data.eval_results] == kinds
    assert "| nan |" not in text
    assert "| inf |" not in text


def test_a_run_of_an_earlier_release_has_one(tmp_path):
    """Whose configuration has fewer fields, and which may have lost what it had measured."""
    values = get_preset("lamb-64k-32k").to_dict()
    for section, names in {"schedule": ("cooldown", "cooldown_form", "unit"), "run": ("batch_warmup",)}.items():
        for name in names:
            del values[section][name]
    del values["phase_two"]["cooldown"]
    for name in ("architecture", "attention", "global_rope_theta"):
        del values["model"][name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    text, card = card_of(tmp_path, 100)
    assert "BERT, 24 layers x 1024" in text
    assert "The run does not say with which versions it was made." in text
    assert card.data.eval_results is None
    (tmp_path / "environment.json").write_text("half of")
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "val')
    assert card_of(tmp_path, 100)[0] == text
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RecipeError, match="cannot read the run's configuration"):
        model_card(tmp_path, 100)


def test_a_card_may_be_edited(tmp_path):
    (tmp_path / "model.safetensors").write_text("weights")
    (tmp_path / "README.md").write_text("of before")
    write_checksums(tmp_path)
    (tmp_path / "README.md").write_text("license: mit")
    require_unchanged(tmp_path)
    (tmp_path / "model.safetensors").write_text("others")
    with pytest.raises(RecipeError, match=r"model\.safetensors in .* was changed"):
        require_unchanged(tmp_path)
