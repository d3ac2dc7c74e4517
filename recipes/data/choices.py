"""Which options go with which data: what can be refused before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..common.errors import RecipeError
from ..configuration.config import DataConfig
from .documents import TOKENS, expand_sources, kind_of_file
from .given_masks import AS_GIVEN, MOST_TOKENS
from .prepared import check_sources, is_prepared, read_manifest
from .wordpiece import load_tokenizer


def check_data(config: DataConfig) -> None:
    """Check what a run is to be trained on, as far as that needs no reading.

    Raises:
        RecipeError: missing sources, formats that are not read, and options that do not fit the sources.
    """
    check_sources(config.sources)
    if any(map(is_prepared, config.sources)):
        check_prepared(config, Path(config.sources[0]))
    else:
        check_choices(config, expand_sources(config.sources))


def check_prepared(config: DataConfig, folder: Path) -> None:
    """Check that a configuration fits a folder that is prepared already; raises RecipeError if it does not."""
    for name in ("max_documents", "max_characters"):
        if getattr(config, name) is not None:
            raise RecipeError(
                f"data.{name} bounds what is read of text, and {folder} is prepared already; prepare it anew with it"
            )
    if config.masks == AS_GIVEN and read_manifest(folder).get("masks") != AS_GIVEN:
        raise RecipeError(
            f"data.masks={AS_GIVEN}: {folder} was prepared without the masks of its source; prepare shards that have "
            f"them (.hdf5) with --masks {AS_GIVEN}"
        )
    _check_lowercase(config)


def check_choices(config: DataConfig, sources: Sequence[str]) -> None:
    """Check the options that depend on what the sources are, before anything is read or written; raises RecipeError."""
    tokens = [source for source in sources if kind_of_file(Path(source)) == TOKENS]
    if tokens and config.tokenizer is None:
        raise RecipeError(
            f"{tokens[0]} holds token ids, whose vocabulary has to be known; give the vocab.txt that it was made with: "
            "--tokenizer vocab.txt"
        )
    others = [source for source in sources if source not in tokens]
    if config.masks == AS_GIVEN and (others or not sources):
        raise RecipeError(
            f"data.masks={AS_GIVEN} is for shards that are masked already (.hdf5), and "
            f"{others[0] if others else 'the documentation'} is text; leave it out"
        )
    _check_lowercase(config)


def check_vocabulary(config: DataConfig, size: int) -> None:
    """Check that given masks can be kept with a vocabulary of `size` tokens; raises RecipeError if not."""
    if config.masks == AS_GIVEN and size > MOST_TOKENS:
        raise RecipeError(
            f"data.masks={AS_GIVEN} takes vocabularies of up to {MOST_TOKENS:,} tokens, and {config.tokenizer!r} has "
            f"{size:,}; leave it out: the tokens are then masked anew"
        )


def _check_lowercase(config: DataConfig) -> None:
    if config.lowercase is not None and config.tokenizer is None:
        raise RecipeError(
            f"data.lowercase={str(config.lowercase).lower()} is for a vocab.txt that --tokenizer names; leave it out: "
            "a vocabulary that is trained here is lower-cased"
        )


def check_tokenizer(config: DataConfig, folder: Path) -> None:
    """Check that a tokenizer that is named is that of a prepared folder; raises RecipeError if it is another."""
    if config.tokenizer is None:
        return
    if load_tokenizer(config.tokenizer, config.lowercase).fingerprint != read_manifest(folder)["tokenizer"]:
        raise RecipeError(
            f"{folder} was prepared with another tokenizer than {config.tokenizer!r}; leave --tokenizer out, or "
            "prepare the text with it"
        )
