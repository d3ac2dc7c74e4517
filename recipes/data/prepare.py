"""Write text as token shards that training maps into memory: `python -m trustratio.recipes.prepare --help`.

A run that was interrupted continues with the shards that are missing; a finished folder is checked and its broken
shards are written anew.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from ..common.called import called, examples, from_console, launched
from ..common.command import CommandParser, ends_with_message, within
from ..common.errors import INTERRUPTED, RecipeError
from ..common.reporter import Reporter, clock
from ..configuration.config import MASKS, DataConfig
from ..configuration.ranges import MOST_TEXT
from .given_masks import AS_GIVEN
from .preparation import SHARD_CHARACTERS, Preparation, prepare_into
from .prepared import COUNTED_IN, TOKENIZER, read_manifest, rows_of

_MOST_WORKERS = 4096
_MOST_UNKNOWN = 0.05  # share of the tokens; more is worth a warning


@ends_with_message("error")
def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare a folder; return the exit status: 0 done, 2 bad input, 130 interrupted (finished shards stay)."""
    options = _parser().parse_args(arguments)
    reporter = Reporter()
    began = time.perf_counter()
    try:
        config = _config(options)
        how = Preparation(options.workers, int(options.shard_megabytes * 1e6), options.skip_broken)
        folder = prepare_into(Path(options.output), config, how, reporter)
    except KeyboardInterrupt:
        print(f"interrupted; the finished shards stay in {options.output}: the same command continues", file=sys.stderr)
        return INTERRUPTED
    seconds = time.perf_counter() - began
    for line in _summary(folder, options.sequence_lengths):
        reporter.line(line)
    training = called("train") if from_console() else launched("deepspeed", "bert")
    reporter.line(f"{clock(seconds)} in all; train with: {training} --data {folder}")
    return 0


def _config(options: argparse.Namespace) -> DataConfig:
    if not 0 < options.validation_fraction < 1:
        raise RecipeError(
            f"--validation_fraction {options.validation_fraction} is out of range: allowed is above 0 and below 1"
        )
    within("--vocabulary", options.vocabulary, 0, above=True)
    within("--max_documents", options.max_documents, 1, MOST_TEXT)
    within("--max_characters", options.max_characters, 1, MOST_TEXT)
    within("--shard_megabytes", options.shard_megabytes, 0, above=True)
    within("--workers", options.workers, 0, _MOST_WORKERS)  # 0: one per core
    for length in options.sequence_lengths:
        within("--sequence_lengths", length, 3)
    return DataConfig(
        sources=tuple(options.data),
        text_column=options.text_column,
        max_documents=options.max_documents,
        max_characters=options.max_characters,
        tokenizer=options.tokenizer,
        lowercase=None if options.lowercase is None else options.lowercase == "true",
        masks=options.masks,
        vocabulary=options.vocabulary,
        validation_fraction=options.validation_fraction,
    )


def _summary(folder: Path, lengths: Sequence[int]) -> list[str]:
    manifest = read_manifest(folder)
    tokens = manifest["tokens"]
    rows = ", ".join(f"{tokens['train'] // (length - 2):,} of {length}" for length in lengths)
    unknown, share = _unknown(folder)
    advice = "; much text is lost to the model: give a tokenizer or vocabulary that fits it"
    return [
        f"{manifest['documents']:,} documents ({manifest['repeated_documents']:,} repeated ones left out), "
        f"{manifest['characters'] / 1e6:.1f} million {manifest.get(COUNTED_IN, 'characters')}, "
        f"{len(manifest['shards'])} shards in {folder}",
        f"{tokens['train']:,} training tokens and {tokens['validation']:,} held out; vocabulary "
        f"{manifest['vocabulary_size']:,}; training sequences: {rows}",
        *([f"warning: {share:.1%} of the training tokens are {unknown}{advice}"] if share > _MOST_UNKNOWN else []),
        *([f"{share:.2%} of the training tokens are {unknown}"] if 0 < share <= _MOST_UNKNOWN else []),
    ]


def _unknown(folder: Path) -> tuple[str, float]:
    """Return the token that stands for what a vocabulary lacks, and its share of the training tokens without [SEP]."""
    manifest, tokenizer = read_manifest(folder), Tokenizer.from_file(str(folder / TOKENIZER))
    token = json.loads(tokenizer.to_str())["model"].get("unk_token")
    unknown = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if unknown is None:
        return "", 0.0
    counts = rows_of(folder, manifest, "train", 3).counts()
    counts[manifest["sep_id"]] = 0
    return token, counts[unknown] / max(counts.sum(), 1)


def _parser() -> CommandParser:
    defaults = DataConfig()
    prog = called("prepare")
    parser = CommandParser(
        prog=prog,
        description="Tokenize text once into shards. Documents are joined in the order of the sources; repeated ones "
        "are dropped, and the held-out ones are chosen by their content. The shards serve every sequence length.",
        examples=examples(
            prog,
            "--output tokens",
            "--data 'wiki/*.jsonl' a.parquet --vocabulary 30522 --output tokens",
        ),
    )
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="SOURCE",
        help="text, .jsonl, .csv, .tsv (these also .gz, .bz2, .xz, .zst), .parquet, .arrow or .hdf5 files, globs, "
        "folders of save_to_disk, hf:NAME[:CONFIGURATION][@SPLIT] (streamed); docs/data.md has them all; default: the "
        "documentation of the installed packages",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write or to continue")
    parser.add_argument("--text_column", default=defaults.text_column, help="of tables and data sets")
    parser.add_argument("--max_documents", type=int, metavar="N", help="read the first N documents of the sources")
    parser.add_argument(
        "--max_characters", type=int, metavar="N", help="stop at N characters (English has 4 to 5 per token)"
    )
    parser.add_argument(
        "--tokenizer", help="vocab.txt, tokenizer.json, folder or hub name (default: train WordPiece on the text)"
    )
    parser.add_argument(
        "--lowercase",
        choices=("true", "false"),
        help="of a vocab.txt (default: as tokenizer_config.json beside it or its own letters say)",
    )
    parser.add_argument(
        "--masks",
        choices=MASKS,
        default=defaults.masks,
        help=f"{AS_GIVEN}: keep those of .hdf5 shards, as data.masks={AS_GIVEN} then trains on them",
    )
    parser.add_argument("--vocabulary", type=int, default=defaults.vocabulary, help="size of a trained vocabulary")
    parser.add_argument(
        "--validation_fraction",
        type=float,
        default=defaults.validation_fraction,
        help="share of the documents that is held out",
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that tokenize (default: one per core)")
    parser.add_argument(
        "--shard_megabytes",
        type=float,
        default=SHARD_CHARACTERS / 1e6,
        help="million characters of text per shard: what an interruption loses at most",
    )
    parser.add_argument("--skip_broken", action="store_true", help="leave unreadable sources out instead of stopping")
    parser.add_argument(
        "--sequence_lengths", type=int, nargs="+", default=[128, 512], help="to say how many sequences there are"
    )
    return parser
