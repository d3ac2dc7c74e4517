"""Fine-tuning with the Hugging Face Trainer: classification, regression and question answering, over several seeds."""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from trustratio.integrations.transformers import optimizer_for_trainer

from ..common.called import called, examples
from ..common.command import MOST_SEED, CommandParser, ends_with_message, within
from ..common.errors import RecipeError
from ..common.files import require_place_for, require_writable, write_json
from ..common.machine import describe_machine
from ..common.marks import require_unchanged
from ..common.reporter import Reporter
from ..training.export import export_checkpoint, is_exported
from .data import LabelledTexts, Questions, data_names, load_data
from .metrics import METRICS, squad_scores
from .questions import best_answers, windows

PRETRAINED, RANDOM = "pretrained", "random"
_LEAST_LENGTH = 8
Scores = dict[str, float]


@dataclass(frozen=True)
class Options:
    """How to fine-tune; `optimizer` is "adamw" or one of trustratio's."""

    lr: float = 1e-4
    epochs: float = 3.0
    batch: int = 32
    length: int = 128
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    warmup: float = 0.1
    limit: int | None = None


@ends_with_message("error")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; return 0, or 2 for bad input."""
    transformers.logging.set_verbosity_error()  # each run would list the head that is new, and the one left out
    transformers.logging.disable_progress_bar()
    compare(_parser().parse_args(arguments), Reporter())
    return 0


def compare(arguments: argparse.Namespace, reporter: Reporter) -> dict[str, Any]:
    """Fine-tune from both starts with every learning rate and seed; print a table and write the results as JSON.

    Returns:
        What is written: the options, `runs`, and for each start in `best` the learning rate with the highest first
        metric, and its means over the seeds.

    Raises:
        RecipeError: missing checkpoint or data, options out of range, or an output that cannot be written.
    """
    values = {name: getattr(arguments, name) for name in asdict(Options()) if name != "length"}
    trials = [Options(**{**values, "lr": rate}) for rate in arguments.lr]
    within("--length", arguments.length, _LEAST_LENGTH)
    for options in trials:
        _check(options)
    for seed in arguments.seeds:
        within("--seeds", seed, 0, MOST_SEED)
    if arguments.output is not None:
        require_place_for(arguments.output)
    if arguments.export is not None:
        require_writable(arguments.export)
    data = load_data(arguments.data, arguments.data_folder)
    with tempfile.TemporaryDirectory() as scratch:
        model = pretrained_folder(arguments.checkpoint, arguments.export or Path(scratch, "model"), reporter)
        values["length"] = _length(arguments.length, model, _tokenizer_of(model, arguments.checkpoint))
        trials = [replace(options, length=values["length"]) for options in trials]
        starts = (PRETRAINED, RANDOM) if not arguments.no_random else (PRETRAINED,)
        runs: list[dict[str, Any]] = []
        for options, seed, start in itertools.product(trials, arguments.seeds, starts):
            scores = fine_tune(model, data, options, seed, start == RANDOM, Path(scratch, "trainer"))
            runs.append({"start": start, "lr": options.lr, "seed": seed, "scores": scores})
            shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            reporter.line(f"{data.name}, lr {options.lr:g}, seed {seed}, from {start} weights: {shown}")
    results = {
        "data": data.name,
        "train": len(data.train),
        "validation": len(data.validation),
        "checkpoint": Path(arguments.checkpoint).name,
        "options": {**values, "seeds": arguments.seeds},
        "runs": runs,
        "best": {start: _best([run for run in runs if run["start"] == start]) for start in starts},
        "machine": describe_machine(),
    }
    for line in _table(runs):
        reporter.line(line)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, results)
    return results


def pretrained_folder(checkpoint: str, output: Path, reporter: Reporter) -> str:
    """Return what `from_pretrained` takes: an exported folder or hub name as it is, a recipe's checkpoint exported."""
    path = Path(checkpoint)
    for folder in (path, path / "model"):
        if is_exported(folder):
            require_unchanged(folder)
            return str(folder)
    if path.exists():
        return str(export_checkpoint(path, output, reporter))
    try:
        AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"--checkpoint {checkpoint!r} is no folder, and no model that the hub or its cache has "
            f"({str(error).splitlines()[0]}); give a run's folder, one of its checkpoints, or a folder that "
            "save_pretrained wrote"
        ) from error
    return checkpoint


def _tokenizer_of(model: str, checkpoint: str) -> Any:
    """Return the tokenizer of a model, which stands for a checkpoint.

    Raises:
        RecipeError: it cannot fill up the shorter texts of a batch.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token_id is None:
        raise RecipeError(
            f"the tokenizer of --checkpoint {checkpoint!r} has no padding token, which batches of texts of several "
            "lengths need; pretrain with a vocabulary that has [PAD]"
        )
    return tokenizer


def _length(asked: int | None, model: str, tokenizer: Any) -> int:
    """Return the length of texts in tokens: what was asked for, else the usual one as far as the model takes it.

    Raises:
        RecipeError: the model or its tokenizer takes fewer, and would cut the texts.
    """
    positions = getattr(AutoConfig.from_pretrained(model), "max_position_embeddings", None)
    most = tokenizer.model_max_length
    most = min(most, positions) if positions else most
    within("--length", asked, _LEAST_LENGTH, most)
    return min(Options.length, most) if asked is None else asked


def fine_tune(
    model: str, data: LabelledTexts | Questions, options: Options, seed: int, random_start: bool, scratch: Path
) -> Scores:
    """Fine-tune once and return the metrics on the validation split.

    Args:
        model: folder or name with the pretrained model and its tokenizer.
        data: from `load_data`.
        options: see `Options`.
        seed: of the new head, the random start, the data order and dropout.
        random_start: begin with random weights instead of the pretrained ones.
        scratch: folder for the Trainer.
    """
    transformers.set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if isinstance(data, Questions):
        return _question_answering(model, tokenizer, data, options, seed, random_start, scratch)
    return _classification(model, tokenizer, data, options, seed, random_start, scratch)


def _classification(
    model: str, tokenizer: Any, data: LabelledTexts, options: Options, seed: int, random_start: bool, scratch: Path
) -> Scores:
    features = [_encode(split[: options.limit], tokenizer, data, options) for split in (data.train, data.validation)]
    shape = {"num_labels": data.classes or 1, "problem_type": None if data.classes else "regression"}
    network = _build(AutoModelForSequenceClassification, model, random_start, **shape)
    trainer = _train(network, features[0], options, seed, scratch, DataCollatorWithPadding(tokenizer))
    logits = np.asarray(trainer.predict(features[1]).predictions)  # type: ignore[arg-type]
    predictions = logits.argmax(axis=-1) if data.classes else logits[:, 0]
    labels = np.array([feature["labels"] for feature in features[1]])
    return {name: METRICS[name](predictions, labels) for name in data.metrics}


def _encode(
    examples: Sequence[tuple[tuple[str, ...], float]], tokenizer: Any, data: LabelledTexts, options: Options
) -> list[dict[str, Any]]:
    columns = list(zip(*(texts for texts, _ in examples), strict=True))
    encoded = tokenizer(*map(list, columns), truncation=True, max_length=options.length)
    label: Callable[[float], float] = int if data.classes else float
    names = tokenizer.model_input_names
    return [
        {**{name: encoded[name][i] for name in names}, "labels": label(value)} for i, (_, value) in enumerate(examples)
    ]


def _question_answering(
    model: str, tokenizer: Any, data: Questions, options: Options, seed: int, random_start: bool, scratch: Path
) -> Scores:
    questions = data.validation[: options.limit]
    network = _build(AutoModelForQuestionAnswering, model, random_start)
    cut = windows(data.train[: options.limit], tokenizer, options.length)
    trainer = _train(network, [window.with_labels() for window in cut], options, seed, scratch, None)
    held_out = windows(questions, tokenizer, options.length)
    starts, ends = trainer.predict([window.with_labels() for window in held_out]).predictions  # type: ignore
    truths = {question.key: [text for text, _ in question.answers] for question in questions}
    return squad_scores(best_answers(questions, held_out, starts, ends), truths)


def _build(kind: Any, model: str, random_start: bool, **shape: Any) -> Any:
    """Build the network in fp32, whatever its file is in: updates of bf16 weights would be lost."""
    if random_start:
        return kind.from_config(AutoConfig.from_pretrained(model, **shape), dtype=torch.float32)
    try:
        return kind.from_pretrained(model, trust_remote_code=False, dtype=torch.float32, **shape)
    except Exception as error:  # of many classes: the weights are damaged, foreign, or of another kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"the model in {model} cannot be read: {reason}") from error


def _train(
    network: Any, features: list[dict[str, Any]], options: Options, seed: int, scratch: Path, collator: Any
) -> Trainer:
    optimizer: dict[str, Any] = {}
    if options.optimizer != "adamw":
        optimizer["optimizer_cls_and_kwargs"] = optimizer_for_trainer(
            options.optimizer, lr=options.lr, weight_decay=options.weight_decay
        )
    trainer = Trainer(
        network,
        TrainingArguments(
            output_dir=str(scratch),
            learning_rate=options.lr,
            weight_decay=options.weight_decay,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=4 * options.batch,
            warmup_steps=options.warmup,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=features,  # type: ignore[arg-type]
        data_collator=collator,
        **optimizer,
    )
    trainer.remove_callback(PrinterCallback)  # it would print the run time of every run
    trainer.train()
    return trainer


def _check(options: Options) -> None:
    within("--lr", options.lr, 0, above=True)
    within("--weight_decay", options.weight_decay, 0)
    within("--epochs", options.epochs, 0, above=True)
    within("--batch", options.batch, 1)
    within("--limit", options.limit, 1)
    if not 0 <= options.warmup < 1:
        raise RecipeError(f"--warmup {options.warmup} is out of range: allowed is 0 to below 1, a share of the steps")
    if options.optimizer != "adamw":
        try:
            optimizer_for_trainer(options.optimizer, lr=options.lr, weight_decay=options.weight_decay)
        except ValueError as error:
            raise RecipeError(f"--optimizer: {error} (or adamw)") from error


def _by_rate(runs: Sequence[dict[str, Any]]) -> dict[float, list[Scores]]:
    return {run["lr"]: [other["scores"] for other in runs if other["lr"] == run["lr"]] for run in runs}


def _means(scores: Sequence[Scores]) -> Scores:
    return {name: statistics.fmean(of_seed[name] for of_seed in scores) for name in scores[0]}


def _best(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    means = {rate: _means(scores) for rate, scores in _by_rate(runs).items()}
    rate = max(means, key=lambda rate: next(iter(means[rate].values())))
    return {"lr": rate, **means[rate]}


def _table(runs: Sequence[dict[str, Any]]) -> list[str]:
    names = list(runs[0]["scores"])
    lines = [f"| start | lr | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for start in dict.fromkeys(run["start"] for run in runs):
        for rate, scores in _by_rate([run for run in runs if run["start"] == start]).items():
            cells = [_spread([of_seed[name] for of_seed in scores]) for name in names]
            lines.append(f"| {start} | {rate:g} | {' | '.join(cells)} |")
    return lines


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


def _parser() -> CommandParser:
    prog = called("fine_tune")
    parser = CommandParser(
        prog=prog,
        description=__doc__,
        examples=examples(prog, "--checkpoint runs/lamb-tiny-1 --data rotten-tomatoes --length 32"),
    )
    defaults = Options()
    parser.add_argument(
        "--checkpoint", required=True, help="run's folder, checkpoint, folder of save_pretrained, or name"
    )
    parser.add_argument("--data", required=True, help=", ".join(data_names()))
    parser.add_argument(
        "--data_folder", type=Path, help="where the data lie as files, if they are not to be downloaded"
    )
    parser.add_argument(
        "--lr",
        "--lrs",
        type=float,
        nargs="+",
        default=[defaults.lr],
        help=f"learning rates to try, each with every seed; default: {defaults.lr:g}",
    )
    for name, kind in (("epochs", float), ("batch", int), ("optimizer", str)):
        parser.add_argument(f"--{name}", type=kind, default=getattr(defaults, name), help="default: %(default)s")
    parser.add_argument(
        "--length",
        type=int,
        help=f"tokens per text; default: {defaults.length}, or what the model takes if that is less",
    )
    parser.add_argument("--weight_decay", type=float, default=defaults.weight_decay, help="default: %(default)s")
    parser.add_argument(
        "--warmup", type=float, default=defaults.warmup, help="share of the steps; default: %(default)s"
    )
    parser.add_argument("--limit", type=int, help="use the first N examples of each split alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--no_random", action="store_true", help="do not compare with random weights")
    parser.add_argument("--export", type=Path, metavar="DIR", help="keep the exported model and tokenizer there")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    return parser
