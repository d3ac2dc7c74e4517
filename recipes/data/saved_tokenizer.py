"""What a tokenizer.json says, where `transformers` reads a folder otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..common.files import parse_json

_FILE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_SAID = {
    "normalizer": {
        "lowercase": "do_lower_case",
        "strip_accents": "strip_accents",
        "handle_chinese_chars": "tokenize_chinese_chars",
    },
    "pre_tokenizer": {"add_prefix_space": "add_prefix_space"},
}
"""Parts of a tokenizer that classes of `transformers` make anew, and by which settings they do."""


def as_its_file_says(loaded: Tokenizer, name: str) -> Tokenizer:
    """Return a tokenizer with the normalizer and pre-tokenizer of its tokenizer.json.

    Classes as `BertTokenizer` make both anew from their arguments, whose defaults hold where tokenizer_config.json
    lacks a setting: a cased tokenizer would lower-case. What the settings do say is heeded.

    Args:
        loaded: by `transformers`.
        name: of the folder, or on the hub.
    """
    file = _find(name, _FILE)
    if file is None:
        return loaded
    parts, saved = json.loads(loaded.to_str()), json.loads(Tokenizer.from_file(str(file)).to_str())
    settings = _settings(_find(name, _SETTINGS))
    said = {part: _with_settings(saved[part], names, settings) for part, names in _SAID.items()}
    if all(parts[part] == value for part, value in said.items()):
        return loaded
    return Tokenizer.from_str(json.dumps({**parts, **said}))


def _find(name: str, file: str) -> Path | None:
    from transformers.utils import cached_file

    try:
        found = cached_file(name, file)
    except OSError:  # the folder, or what the hub has under the name, lacks it
        return None
    return None if found is None else Path(found)


def _settings(file: Path | None) -> dict[str, Any]:
    values = parse_json(file.read_bytes()) if file is not None else {}
    return values if isinstance(values, dict) else {}


def _with_settings(part: Any, names: dict[str, str], settings: dict[str, Any]) -> Any:
    if not isinstance(part, dict):
        return part
    said = {key: settings[name] for key, name in names.items() if key in part and settings.get(name) is not None}
    return {**part, **said}
