"""What each extra of pyproject.toml promises: it installs every package that the modules it is for import."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from .test_import_graph import ROOT, import_graph, modules, tomllib

DISTRIBUTIONS = {"megatron": "megatron-core", "yaml": "pyyaml", "typing_extensions": "typing-extensions"}
"""Names of packages that are not those of their modules."""

BESIDE = {
    "torch": {"typing-extensions"},
    "accelerate": {"pyyaml"},
    "deepspeed": {"pydantic"},
    "datasets": {"huggingface_hub"},
}
"""What comes with a package and is imported here too."""

BY_CHOICE = {"h5py", "lightning", "pytorch-lightning", "triton"}
"""Nobody imports these who has not installed them: GPUs without torch for CUDA, other people's trainers."""


def promised(extra: str) -> set[str]:
    """The names of what an extra installs, with what the package itself does."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: set[str] = set()
    waiting = list(project["dependencies"]) + list(project["optional-dependencies"].get(extra, []))
    while waiting:
        name, _, rest = waiting.pop().partition("[")
        if name == "trustratio":
            waiting += [line for one in rest.rstrip("]").split(",") for line in project["optional-dependencies"][one]]
        else:
            found.add(re.split(r"[<>=;~! ]", name)[0].lower())
    return found | {one for name in found for one in BESIDE.get(name, ())}


def others(path: Path, late: bool) -> set[str]:
    """The distributions that a module imports at its top, or anywhere with `late`."""
    tree = ast.parse(path.read_text())
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    ignored = {id(node) for one in typing for node in ast.walk(one)}
    nodes = [node for node in (ast.walk(tree) if late else tree.body) if id(node) not in ignored]
    named = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    named += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    names = {name.partition(".")[0] for name in named} - sys.stdlib_module_names - {"trustratio"}
    return {DISTRIBUTIONS.get(name, name) for name in names}


KNOWN = modules(ROOT)


def reached(first: list[str]) -> list[str]:
    """Some modules with all of this package that they import, whenever."""
    graph = import_graph(ROOT)
    found, waiting = set[str](), list(first)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return sorted(found)


def of_folder(folder: str) -> list[str]:
    return [name for name in KNOWN if f"{name}.".startswith(f"trustratio.{folder}.")]


FRONTS = {
    "ctr": ["trustratio.recipes.studies.click_through", "trustratio.recipes.common.launcher_watch"],
    "deepspeed": of_folder("integrations.deepspeed"),
    "checkpoints": of_folder("integrations.checkpoints"),
    "recipes": of_folder("recipes"),
    "": of_folder("optimizers"),
}


@pytest.mark.parametrize("extra", FRONTS)
def test_an_extra_has_what_its_modules_import(extra: str) -> None:
    # Of wrappers whoever uses one has it: checkpoints of DeepSpeed are not for people without DeepSpeed.
    late = extra in ("recipes", "")
    allowed = promised(extra) | BY_CHOICE | (promised("loggers") if extra == "recipes" else set())
    for name in FRONTS[extra] if extra in ("recipes", "") else reached(FRONTS[extra]):
        if not (extra == "checkpoints" and name.endswith("deepspeed_engine")):
            assert others(KNOWN[name], late) <= allowed, name


def test_a_package_that_is_missing_is_seen(tmp_path: Path) -> None:
    module = tmp_path / "a.py"
    module.write_text("import os, zstandard\ndef late():\n    from megatron.core import x\n")
    assert others(module, late=False) == {"zstandard"}
    assert others(module, late=True) == {"zstandard", "megatron-core"}
