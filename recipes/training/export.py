"""Turn a checkpoint of the recipe into a folder that transformers' `from_pretrained` loads, with its tokenizer."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ..common.called import called, examples
from ..common.command import CommandParser, ends_with_message
from ..common.errors import RecipeError
from ..common.files import parse_json, require_writable
from ..common.marks import write_checksums
from ..common.reporter import Reporter
from ..configuration.overrides import load_config
from ..configuration.phases import phases_of
from ..data.preparation import prepare
from ..data.prepared import TOKENIZER, PreparedData
from ..data.wordpiece import without_lengths
from ..model.masked_language_model import MaskedLanguageModel, build_model, rows_of_checkpoint, stock_model
from ..runs.checkpoints import describe_checkpoint, find_checkpoint, require_whole, run_of
from ..runs.folder import CONFIG
from .engines import ENGINE_STATE, TRAINING_STATE
from .growth_state import trained_phase
from .model_card import write_card
from .quiet import quieten
from .unpickling import tensors_only

_MODEL_FILE = "mp_rank_00_model_states.pt"


@ends_with_message("error")
def main(arguments: Sequence[str] | None = None) -> int:
    """Export a checkpoint; return the exit status: 0, or 2 for bad input."""
    options = _parser().parse_args(arguments)
    for folder in (options.checkpoint, options.checkpoint / "model"):
        if is_exported(folder):
            raise RecipeError(f"{str(folder)!r} is in transformers' format already: load or copy it as it is")
    require_writable(options.output)
    if options.output.is_dir() and any(options.output.iterdir()):
        raise RecipeError(f"output folder {str(options.output)!r} is not empty: choose another folder")
    quieten()
    reporter = Reporter()
    export_checkpoint(options.checkpoint, options.output, reporter)
    reporter.line(f"model, tokenizer and model card: {options.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    prog = called("export")
    parser = CommandParser(
        prog=prog,
        description="Write a checkpoint of a run as a folder that transformers' from_pretrained loads: the model in "
        "fp32, its tokenizer and a model card.",
        examples=examples(prog, "runs/lamb-tiny-1 exported", "runs/lamb-tiny-1/checkpoints/step-00000100 exported-100"),
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="a run's folder, of which the newest checkpoint is taken, or one of its checkpoints",
    )
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to write, new or empty")
    return parser


def is_exported(path: Path) -> bool:
    """Tell whether transformers loads the folder as it is."""
    try:
        return "model_type" in parse_json((path / "config.json").read_bytes())
    except (OSError, ValueError):
        return False


def export_checkpoint(path: Path, output: Path, reporter: Reporter) -> Path:
    """Write model, tokenizer and model card of a checkpoint in transformers' format.

    Args:
        path: a run's folder (its newest checkpoint) or one checkpoint, of `bert.py` or `bert_accelerate.py`.
        output: folder to write.
        reporter: for what preparing the tokenizer prints.

    Returns:
        `output`.

    Raises:
        RecipeError: no checkpoint, a damaged one, or the data that its tokenizer was trained on have changed.
    """
    checkpoint = find_checkpoint(path)
    require_whole(checkpoint, lambda name: name != ENGINE_STATE)
    config = load_config(run_of(checkpoint) / CONFIG)
    data = prepare(config.data, reporter)
    identity = describe_checkpoint(checkpoint)["identity"]
    if data.fingerprint not in str(identity.get("data")).split("+"):
        raise RecipeError(
            f"{checkpoint} was trained on other data than {', '.join(config.data.sources) or 'the documentation'} "
            f"now gives (packages or files have changed), so its tokenizer is not known; restore them or "
            "$TRUSTRATIO_CACHE"
        )
    shape = dataclasses.replace(config.model, initial_weights=None)
    trained = build_model(shape, rows_of_checkpoint(identity, data.vocabulary_size), data.special_tokens())
    trained.begin_phase(trained_phase(checkpoint, phases_of(config)))
    model = stock_model(trained)
    missing, unexpected = model.load_state_dict(trained_weights(checkpoint), strict=False)
    own = dict(model.named_parameters())  # a tied weight has one name here; a checkpoint may hold it once
    missing = [name for name in missing if name in own]
    if missing or unexpected:
        raise RecipeError(f"{checkpoint} does not fit its configuration: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.save_pretrained(output)
    save_tokenizer(data, config.model.max_positions, output, takes_token_types(trained))
    write_checksums(output)
    write_card(run_of(checkpoint), describe_checkpoint(checkpoint)["step"], output)
    return output


def takes_token_types(model: MaskedLanguageModel) -> bool:
    """Tell whether the architecture tells the texts of a pair apart by embeddings, as BERT does."""
    return hasattr(model.config, "type_vocab_size")


def save_tokenizer(data: PreparedData, max_positions: int, output: Path, token_types: bool = True) -> None:
    """Write the tokenizer of prepared data such that it adds its special tokens and knows pairs of texts.

    Args:
        data: that was trained on.
        max_positions: of the model.
        output: folder to write into.
        token_types: the model takes the number of each token's text, see `takes_token_types`.
    """
    tokenizer = without_lengths(Tokenizer.from_file(str(Path(data.folder, TOKENIZER))))
    ids = {kind: token for kind, token in data.special_tokens().items() if token is not None}
    special = {kind: tokenizer.id_to_token(token) for kind, token in ids.items()}
    cls, sep = special["cls"], special["sep"]
    tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single=[cls, "$A", sep],
        pair=[cls, "$A", sep, "$B:1", f"{sep}:1"],
        special_tokens=[(cls, ids["cls"]), (sep, ids["sep"])],
    )
    tokens: dict[str, Any] = {f"{kind}_token": token for kind, token in special.items()}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_positions,
        model_input_names=["input_ids", *["token_type_ids"] * token_types, "attention_mask"],
        **tokens,
        **_settings_of_bert(tokenizer),
    )
    fast.save_pretrained(output)


def _settings_of_bert(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what `BertTokenizer` makes its normalizer by; without it that lower-cases whatever tokenizer.json says."""
    parts = json.loads(tokenizer.to_str())
    normalizer = parts["normalizer"] or {}
    if parts["model"].get("type") != "WordPiece" or normalizer.get("type") != "BertNormalizer":
        return {}
    return {
        "do_lower_case": normalizer["lowercase"],
        "strip_accents": normalizer["strip_accents"],
        "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
    }


def trained_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the fp32 weights of a checkpoint by name, from whatever wrapper wrote them.

    Raises:
        RecipeError: no known file, or one that would unpickle more than tensors.
    """
    with tensors_only(checkpoint):
        return _read_weights(checkpoint)


def _read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    if (checkpoint / TRAINING_STATE).is_file():
        return torch.load(checkpoint / TRAINING_STATE, weights_only=True, map_location="cpu")["model"]
    if list(checkpoint.glob("*zero_pp_rank_*_optim_states.pt")):
        gathered = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        return {name: torch.as_tensor(weight, device="cpu") for name, weight in gathered.items()}
    if (checkpoint / _MODEL_FILE).is_file():
        return torch.load(checkpoint / _MODEL_FILE, weights_only=True, map_location="cpu")["module"]
    raise RecipeError(f"{checkpoint} holds neither DeepSpeed's files nor {TRAINING_STATE}")
