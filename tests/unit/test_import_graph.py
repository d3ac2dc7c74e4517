"""Who imports whom: no circles, folders look down only, and every folder is installed.

Imports inside functions and for type checkers count like all others: a circle is a circle, however late it closes.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]

TOPS = ("recipes", "integrations", "optimizers")
"""The packages, each of which may import those after it."""

FLOORS = {
    "recipes": (
        *("", "fine_tuning", "studies", "training", "comparison", "planning", "model", "data", "sources"),
        *("configuration", "runs", "rules", "common"),
    ),
    "integrations": ("", "audits", "norms", "pages", "checkpoints", "deepspeed", "fsdp2", "megatron", "guards"),
    "optimizers": (
        *("", "displacements", "sampling", "proposals", "stepping", "options", "kernels", "formulas"),
        *("gradient_statistics", "sharding"),
    ),
}
"""The folders of each package, its front ("") first. Each may import those after it and none before."""


def module_name(path: Path, root: Path) -> str:
    parts = ["trustratio", *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(root: Path) -> dict[str, Path]:
    return {module_name(path, root): path for top in TOPS for path in sorted((root / top).rglob("*.py"))}


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Yield the modules of this package that one of them imports, wherever in the file."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            target = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                submodule = f"{target}.{alias.name}"
                if submodule in known:
                    yield submodule
                elif target in known:
                    yield target


def import_graph(root: Path) -> dict[str, set[str]]:
    known = modules(root)
    return {name: set(imported(name, path, known)) - {name} for name, path in known.items()}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules that reach one another, by Tarjan's algorithm."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for other in graph[module]:
            if other not in order:
                visit(other)
            if other in stack:
                lowest[module] = min(lowest[module], lowest[other])
        if lowest[module] == order[module]:
            begin = stack.index(module)
            found.append(sorted(stack[begin:]))
            del stack[begin:]

    for module in graph:
        if module not in order:
            visit(module)
    return [circle for circle in found if len(circle) > 1]


def room(module: str, known: dict[str, Path]) -> tuple[str, str]:
    """The package and the folder in it where a module lies."""
    parts = module.split(".")[1:]
    is_package = known[module].name == "__init__.py"
    return parts[0], parts[1] if len(parts) > 2 or (is_package and len(parts) == 2) else ""


def arrows_that_run_up(root: Path) -> list[str]:
    known = modules(root)
    wrong = []
    for module, others in import_graph(root).items():
        top, folder = room(module, known)
        for other in sorted(others):
            other_top, other_folder = room(other, known)
            if top == other_top:
                runs_up = FLOORS[top].index(other_folder) < FLOORS[top].index(folder)
            else:
                runs_up = TOPS.index(other_top) < TOPS.index(top)
            if runs_up:
                wrong.append(f"{module} imports {other}")
    return wrong


def absolute_imports_inside(root: Path) -> list[str]:
    """Modules that name their own package in full; the commands at the front of recipes/ must."""
    wrong = []
    for name, path in modules(root).items():
        top, folder = room(name, modules(root))
        if top == "recipes" and not folder:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            wrong += [f"{name} imports {n}" for n in names if f"{n}.".startswith(f"trustratio.{top}.")]
    return wrong


def uninstalled_imports(root: Path) -> list[str]:
    """Modules that import tests, benchmarks or documentation, which are not installed with them."""
    return [
        f"{name} imports {target}"
        for name, path in modules(root).items()
        for node in ast.walk(ast.parse(path.read_text()))
        for target in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )
        if target.partition(".")[0] in ("tests", "benchmarks", "docs")
    ]


def test_nothing_imports_what_is_not_installed(tmp_path: Path):
    assert uninstalled_imports(ROOT) == []
    (tmp_path / "optimizers").mkdir()
    (tmp_path / "optimizers" / "a.py").write_text("def late():\n    from benchmarks.tables import PARTS")
    assert uninstalled_imports(tmp_path) == ["trustratio.optimizers.a imports benchmarks.tables"]


def test_there_are_no_circles():
    assert circles(import_graph(ROOT)) == []


def test_folders_look_down():
    assert arrows_that_run_up(ROOT) == []


def test_imports_inside_a_package_are_relative():
    assert absolute_imports_inside(ROOT) == []


def test_every_folder_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {module_name(path, ROOT) for top in TOPS for path in (ROOT / top).rglob("__init__.py")}
    with_code = {module_name(path.parent / "__init__.py", ROOT) for top in TOPS for path in (ROOT / top).rglob("*.py")}
    assert with_code <= folders, "a folder without __init__.py"
    assert sorted(listed) == sorted(folders)


def test_floors_name_every_folder():
    for top, floors in FLOORS.items():
        folders = {path.parent.name for path in (ROOT / top).glob("*/__init__.py")}
        assert folders == set(floors) - {""}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"optimizers/sharding/a.py": "from ..kernels import b", "optimizers/kernels/b.py": ""}, "kernels.b"),
        ({"optimizers/a.py": "def late():\n    import trustratio.recipes.b", "recipes/b.py": ""}, "recipes.b"),
        ({"optimizers/kernels/a.py": "from ..b import name", "optimizers/b.py": "name = 1"}, "optimizers.b"),
    ],
)
def test_an_arrow_that_runs_up_is_seen(tmp_path: Path, files: dict[str, str], message: str):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (wrong,) = arrows_that_run_up(tmp_path)
    assert wrong.endswith(message)


def test_a_circle_is_seen(tmp_path: Path):
    (tmp_path / "optimizers").mkdir()
    (tmp_path / "optimizers" / "a.py").write_text("from .b import name")
    (tmp_path / "optimizers" / "b.py").write_text("if TYPE_CHECKING:\n    from . import a")
    assert circles(import_graph(tmp_path)) == [["trustratio.optimizers.a", "trustratio.optimizers.b"]]
