"""A Python that has only what a GPU machine without a network has: other packages are not found."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

THERE = ("accelerate", "matplotlib", "ninja", "numpy", "psutil", "pytest", "timm", "torch", "triton")
"""What is expected on the machine; pytest-xdist is not, and used where it is there."""

CARRIED = ("deepspeed", "hjson", "msgpack", "py-cpuinfo", "pydantic", "safetensors", "setuptools", "tokenizers")
CARRIED += ("transformers",)
"""What it is brought as wheels."""

_HIDE = """\
from importlib.machinery import PathFinder

hidden, find = frozenset({hidden!r}), PathFinder.find_spec
PathFinder.find_spec = classmethod(lambda cls, name, *others: None if name in hidden else find(name, *others))
"""


def environment(folder: Path) -> dict[str, str]:
    """Variables of a Python, and of all that it starts, which finds this project, `THERE`, `CARRIED` and their needs.

    Args:
        folder: where the module that hides all else is written.
    """
    wanted = set(_with_needs((*THERE, *CARRIED, "trustratio")))
    owners = packages_distributions()
    hidden = {name for name, distributions in owners.items() if not wanted & set(map(_canonical, distributions))}
    (folder / "sitecustomize.py").write_text(_HIDE.format(hidden=sorted(hidden)))
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    # Their plugins would be looked for, since what is installed can still be asked for.
    return {**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def _with_needs(names: Iterable[str]) -> Iterator[str]:
    waiting, seen = list(names), set[str]()
    while waiting:
        name = _canonical(waiting.pop())
        if name not in seen:
            seen.add(name)
            yield name
            waiting += _needs(name)


def _needs(name: str) -> list[str]:
    """The distributions that one cannot do without; none if it is not installed here itself."""
    try:
        lines = requires(name) or []
    except PackageNotFoundError:
        return []
    return [re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
