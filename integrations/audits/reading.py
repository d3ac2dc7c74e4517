"""Reads a configuration in any of its forms: by name, as a dict, from a DeepSpeed JSON or from an accelerate YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .accelerate_files import configuration_of_yaml
from .configurations import Configuration, configuration_of_mapping, read_json
from .errors import CannotAudit

__all__ = ["configuration_of"]

FORMS = (
    '"ddp", {"fsdp": 1} or {"fsdp": 2}, a DeepSpeed configuration as a dict, or the path of a DeepSpeed JSON or of an '
    "accelerate YAML"
)


def configuration_of(given: Any) -> Configuration:
    """Read a configuration.

    Raises:
        CannotAudit: If it cannot be read, or is of a kind that is not supported.
    """
    if isinstance(given, Configuration):
        return given
    if isinstance(given, Mapping):
        return configuration_of_mapping(dict(given))
    if given == "ddp":
        return Configuration("ddp", "DDP")
    if isinstance(given, (str, Path)) and Path(given).suffix in (".json", ".yaml", ".yml"):
        return _of_file(Path(given))
    raise CannotAudit(f"a configuration is {FORMS}, not {given!r}")


def _of_file(path: Path) -> Configuration:
    if path.suffix == ".json":
        return configuration_of_mapping(read_json(path))
    return configuration_of_yaml(_read_yaml(path), path)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise CannotAudit(f"reading {path} needs PyYAML: pip install pyyaml") from error
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise CannotAudit(f"{path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise CannotAudit(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise CannotAudit(f"{path} holds a {type(content).__name__}, where a configuration is a dict of settings")
    return content
