"""BERT's `vocab.txt`: one token per line, whose number is its id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece

from ..common.errors import RecipeError, shown
from ..common.files import parse_json

NAME = "vocab.txt"
_SETTINGS = "tokenizer_config.json"
_OF_BERT = {"BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer", "MPNetTokenizer"}
_UNKNOWN = "[UNK]"


def vocabulary_of(path: Path) -> Path | None:
    """Return the `vocab.txt` that a file or folder stands for; None: it is something that `transformers` reads."""
    if path.is_file():
        return path if path.suffix == ".txt" else None
    file = path / NAME
    if not file.is_file() or (path / "tokenizer.json").is_file():
        return None
    kind = _settings(file).get("tokenizer_class")
    return file if kind is None or str(kind).removesuffix("Fast") in _OF_BERT else None


def read_vocabulary(path: Path, lowercase: bool | None, special_tokens: list[str]) -> Tokenizer:
    """Return the WordPiece tokenizer of a vocabulary file.

    Args:
        path: of the file. A `tokenizer_config.json` beside it is heeded.
        lowercase: whether text is lower-cased; None: as `do_lower_case` of that configuration says, and without it if
            no token has a capital letter.
        special_tokens: those that are known as such where the file has them.

    Raises:
        RecipeError: the file is no vocabulary, holds a token twice, or cannot be read.
    """
    tokens = _tokens(path)
    settings = _settings(path)
    if lowercase is None:
        lowercase = settings.get("do_lower_case")
    if lowercase is None:
        lowercase = not any(token != token.lower() for token in tokens if not _is_special(token))
    tokenizer = Tokenizer(WordPiece(tokens, unk_token=_UNKNOWN, max_input_chars_per_word=100))  # type: ignore[call-arg]
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=bool(lowercase),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special_tokens if t in tokens])
    return tokenizer


def _tokens(path: Path) -> dict[str, int]:
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the vocabulary {path}: {error}") from error
    tokens: dict[str, int] = {}
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines):
        token = line.removesuffix("\r")
        if token in tokens:
            raise RecipeError(
                f"{path} holds the token {shown(token)} twice, in lines {tokens[token] + 1} and {number + 1}: ids are "
                "the numbers of lines, and it can have only one"
            )
        tokens[token] = number
    if _UNKNOWN not in tokens:
        raise RecipeError(f"{path} is no vocabulary of BERT's: it has no line {_UNKNOWN}; one token per line is read")
    return tokens


def _is_special(token: str) -> bool:
    return token.startswith("[") and token.endswith("]")


def _settings(path: Path) -> dict[str, Any]:
    file = path.with_name(_SETTINGS)
    if not file.is_file():
        return {}
    try:
        values = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read {file}: {error}") from error
    return values if isinstance(values, dict) else {}
