"""The command line: flags and dotted overrides on top of a preset, a saved run, or the default preset."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common.called import pretraining
from ..common.command import CommandParser
from ..common.errors import RecipeError
from ..runs.checkpoints import find_checkpoint, find_or_begin, run_of
from ..runs.folder import CONFIG, wait_until_free
from .config import MODEL_SIZES, PRECISIONS, RecipeConfig
from .given_schedule import check_given_schedule
from .overrides import apply_overrides, is_override, load_config, set_field, with_model_size
from .presets import DEFAULT_PRESET, PRESETS, get_preset
from .twins import TWIN_SIZES

# flag -> (section, field, type, help); a flag is a short name for a dotted override
_FLAGS: dict[str, tuple[str, str, type, str]] = {
    "tokenizer": (
        "data",
        "tokenizer",
        str,
        "vocab.txt, tokenizer.json, folder or hub name (default: train WordPiece on the text)",
    ),
    "text_column": ("data", "text_column", str, "column of the text in tables and data sets"),
    "sequence_length": ("data", "sequence_length", int, "tokens per sequence"),
    "optimizer": ("optimizer", "name", str, "optimizer by name; its options as optimizer.OPTION=VALUE"),
    "lr": ("optimizer", "lr", float, "peak learning rate"),
    "global_batch": ("training", "global_batch", int, "sequences per update over all ranks"),
    "micro_batch": ("training", "micro_batch", int, "sequences per rank and forward pass"),
    "steps": ("training", "steps", int, "updates; the length of the learning-rate schedule"),
    "zero_stage": ("training", "zero_stage", int, "ZeRO stage, 0 to 3"),
    "precision": (
        "training",
        "precision",
        str,
        f"{', '.join(PRECISIONS)} (auto: bf16 where the GPU has it, else fp32)",
    ),
    "seed": ("training", "seed", int, "seed of weights, data order, masks and dropout"),
}

_PLACEHOLDERS = {int: "N", float: "X", str: "NAME"}

AUTO = "auto"
"""Value of --resume: begin the run in the output folder, continue it, or end at once if it is finished."""

_ALSO_CALLED = {
    "--learning_rate": "--lr",
    "--batch_size": "--global_batch",
    "--train_batch_size": "--global_batch",
    "--per_device_train_batch_size": "--micro_batch",
    "--max_seq_length": "--sequence_length",
    "--num_train_steps": "--steps",
    "--output_dir": "--output",
    "--resume_from_checkpoint": "--resume",
    "--warmup_steps": "schedule.warmup=UPDATES",
    "--weight_decay": "optimizer.weight_decay=VALUE",
    "--gradient_clipping": "training.gradient_clipping=NORM",
    "--max_grad_norm": "training.gradient_clipping=NORM",
    "--gradient_accumulation_steps": "--global_batch",
    "--betas": "optimizer.betas=[B1,B2]",
    "--compile": "training.compile=true",
    "--layers": "model.layers=N",
    "--hidden_size": "model.hidden=N",
    "--dropout": "model.dropout=SHARE",
}
"""What other programs call things, or what is a field here and no option: for the hint behind a misspelt option."""


@dataclass(frozen=True)
class Invocation:
    """A parsed command line.

    Attributes:
        config: resolved but unchecked configuration.
        given: names of the fields (`section.field`) that the command line set.
        deepspeed_config: path of a DeepSpeed configuration, or None.
        output: explicit output folder, or None for a fresh one under runs/.
        resume: checkpoint folder to continue, or None.
        max_steps: stop after this many updates in all; the schedule keeps its length.
        overwrite: replace what the output folder holds.
        dry_run: check and print everything, then stop before reading data.
        list_presets: print the presets and do nothing else.
        verbose: print the whole configuration.
    """

    config: RecipeConfig
    given: frozenset[str]
    deepspeed_config: str | None
    output: Path | None
    resume: Path | None
    max_steps: int | None
    overwrite: bool
    dry_run: bool
    list_presets: bool = False
    verbose: bool = False


def parse_command_line(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> Invocation:
    """Parse and resolve a command line; `--resume auto` waits for a run that still writes into the folder.

    Args:
        arguments: without the program's name; None: this process's.
        say: is told of such waiting.

    Raises:
        RecipeError: unknown flag, preset or field, malformed value or override, missing checkpoint.
        SystemExit: for --help.
    """
    # Overrides may stand anywhere, which argparse's positional arguments may not: they are what it does not know.
    parser = _parser()
    options, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    parser.refuse([text for text in rest if text.startswith("-")], _ALSO_CALLED)
    # `--data a.txt optimizer.lr=0.01`: argparse gives a list flag all that follows it.
    sources = [text for text in options.data or [] if not is_override(text)]
    overrides = [text for text in options.data or [] if is_override(text)] + rest
    checkpoint, begun_anew = _checkpoint(options.resume, options.output, say)
    config = base = _base(options.preset, checkpoint)
    if options.model is not None:
        config = with_model_size(config, options.model)
    given = {text.partition("=")[0].strip() for text in overrides}
    if options.data is not None:
        if not sources:
            raise RecipeError("--data names no file, glob or data set")
        config = set_field(config, "data", "sources", sources)
        given.add("data.sources")
    for flag, (section, name, _, _) in _FLAGS.items():
        value = getattr(options, flag)
        if value is not None:
            config = set_field(config, section, name, value)
            given.add(f"{section}.{name}")
    config = apply_overrides(config, overrides)
    check_given_schedule(base, config, given)
    if options.max_steps is not None and options.max_steps < 1:
        raise RecipeError(f"--max_steps {options.max_steps} is out of range: allowed is at least 1")
    return Invocation(
        config=config,
        given=frozenset(given),
        deepspeed_config=options.deepspeed_config,
        output=Path(options.output) if options.output else None,
        resume=checkpoint,
        max_steps=options.max_steps,
        overwrite=options.overwrite or begun_anew,
        dry_run=options.dry_run,
        list_presets=options.list_presets,
        verbose=options.verbose,
    )


def _checkpoint(resume: str | None, output: str | None, say: Callable[[str], None]) -> tuple[Path | None, bool]:
    """Return the checkpoint to continue, if any, and whether a run without one is begun anew in its folder."""
    if not resume:
        return None, False
    if resume != AUTO:
        return find_checkpoint(Path(resume)), False
    if not output:
        raise RecipeError("--resume auto begins or continues the run in --output DIR: give that, too")
    wait_until_free(Path(output), say)
    return find_or_begin(Path(output))


def _base(preset: str | None, checkpoint: Path | None) -> RecipeConfig:
    if preset is not None:
        return get_preset(preset)
    if checkpoint is not None:
        return load_config(run_of(checkpoint) / CONFIG)
    return get_preset(DEFAULT_PRESET)


def _parser() -> CommandParser:
    shown = {name: preset for name, preset in PRESETS.items() if preset.twin_of is None}
    presets = "\n".join(f"  {name}: {preset.description}" for name, preset in shown.items())
    usual = get_preset(DEFAULT_PRESET)
    sizes = ", ".join(f"-{size} ({scale.runs_on})" for size, scale in TWIN_SIZES.items())
    prog, shown_examples = pretraining()
    parser = CommandParser(
        prog=prog,
        description="Pretrain BERT (masked language modelling) with a layer-wise optimizer under DeepSpeed ZeRO. "
        "Besides the options, any number of overrides section.field=value, e.g. model.layers=4.",
        epilog=f"presets (default {DEFAULT_PRESET}):\n{presets}\nScaled-down twins of the published ones: append "
        f"{sizes}.\n\nExit status of a rank: 0 when finished, or stopped by a signal with a checkpoint written; 138 "
        "when stopped by SIGUSR1, to be started again; 2 for bad input; 3 when training could not go on (NaN, full "
        "disk).",
        examples=shown_examples,
    )
    parser.add_argument("--preset", metavar="NAME", help=f"named configuration (default: {DEFAULT_PRESET})")
    parser.add_argument("--list_presets", action="store_true", help="print all presets with their sources, and stop")
    parser.add_argument("--model", metavar="SIZE", help=f"size of BERT or ModernBERT: {', '.join(MODEL_SIZES)}")
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="SOURCE",
        help="files, globs, hf:NAME[:CONFIGURATION][@SPLIT], or a folder of prepare.py or save_to_disk (default: the "
        "documentation of the installed packages); docs/data.md has the formats",
    )
    for flag, (section, name, kind, text) in _FLAGS.items():
        value = getattr(getattr(usual, section), name)
        shown_value = "" if value is None else f" ({usual.preset}: {value})"
        parser.add_argument(f"--{flag}", type=kind, metavar=_PLACEHOLDERS[kind], help=text + shown_value)
    parser.add_argument("--max_steps", type=int, metavar="N", help="stop after N updates, keeping the schedule")
    parser.add_argument("--deepspeed_config", metavar="FILE", help="DeepSpeed JSON; batch sizes may be left out")
    parser.add_argument("--output", metavar="DIR", help="folder of the run (default: a fresh runs/PRESET-N)")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that the output folder holds")
    parser.add_argument(
        "--resume",
        metavar="DIR",
        help="continue a run's newest checkpoint, or one checkpoint folder; auto: begin the run in --output, or go on",
    )
    parser.add_argument("--dry_run", action="store_true", help="check and print the configuration, train nothing")
    parser.add_argument("--verbose", action="store_true", help="print the whole configuration")
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)  # of launchers
    return parser
