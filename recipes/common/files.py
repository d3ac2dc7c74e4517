"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_PARTIAL = ".partial"


def write_json(path: Path, values: Any) -> None:
    """Write JSON so that the file is always either the old or the new one."""
    temporary = path.with_name(path.name + _PARTIAL)
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(temporary, path)
