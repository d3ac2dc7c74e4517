"""Makes the reference: a page of docstrings for every module that users name, and what each command's --help prints.

Modules are read, not imported (griffe); a module is one that users name if it stands at the front of its folder and has
`__all__`, so a new one has its page without anybody's doing.
"""

from __future__ import annotations

import ast
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PLACE = "docs/site/reference.py"
"""What stands in the navigation where the reference comes."""

FURTHER: dict[str, tuple[str, ...]] = {
    "optimizers/gradient_statistics/norms.py": ("GroupNorms", "StatisticsError"),
    "optimizers/options/common.py": ("CommonOptions",),
    "optimizers/sharding/backends.py": (),
    "optimizers/sharding/layout.py": (),
    "optimizers/sharding/layout_builder.py": (),
    "recipes/rules/schedules.py": (),
}
"""Modules further inside that users, or those who extend the package, name; and which of their names, if not all."""

LEFT_OUT = {"optimizers/__init__.py"}
"""It has the names of the modules beside it, each of which has a page."""

INDEX = """# Reference

Every public name, by the module that it stands in, made of the docstrings; and the options of every command.
Equations are for one layer `w` with gradient `g`, as on the pages of the
[momentum family](../docs/momentum-family.md) and the [Adam family](../docs/adam-family.md), which say what is verified.

"""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the reference's pages into the navigation."""
    for entry in config.nav or []:
        for title, target in entry.items():
            if target == PLACE:
                entry[title] = navigation()
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference's pages."""
    for path, content in contents().items():
        page = File.generated(config, path, content=content)
        page.inclusion = InclusionLevel.INCLUDED
        files.append(page)
    return files


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Name sources by their paths in the repository."""
    return content.replace(".types/trustratio/", "") if page.file.src_uri.startswith("reference/") else content


def contents() -> dict[str, str]:
    """The text of every page by its path."""
    texts = dict(zip(map(command_page, commands()), map(command_text, commands(), helps()), strict=True))
    texts |= {module_page(module): module_text(module) for module in modules()}
    return {"reference/index.md": INDEX + summary(), **texts}


def navigation() -> list[Any]:
    """The reference's part of the navigation: folders of pages."""
    folders: dict[str, list[Any]] = {"optimizers": [], "integrations": [], "recipes": []}
    for module in modules():
        folders[module.split("/")[0]].append({title_of(module): module_page(module)})
    listed = [{command: command_page(command)} for command in commands()]
    return ["reference/index.md", *({name: pages} for name, pages in folders.items()), {"commands": listed}]


def summary() -> str:
    """Links to all pages, for the reference's first one."""
    lines = [f"- [`{dotted(m)}`]({link(module_page(m))}): {', '.join(names_of(m))}" for m in modules()]
    told = [f"- [`{c}`]({link(command_page(c))}): {first_sentence(c)}" for c in commands()]
    return "\n".join(["## Modules", "", *lines, "", "## Commands", "", *told, ""])


def link(page: str) -> str:
    return page.removeprefix("reference/")


# Modules ------------------------------------------------------------------------------------------------------------


@functools.cache
def modules() -> tuple[str, ...]:
    """Paths of the modules that users name."""
    fronts = [
        file.relative_to(ROOT).as_posix()
        for folder in ("optimizers", "integrations")
        for file in sorted((*(ROOT / folder).glob("*.py"), *(ROOT / folder).glob("*/__init__.py")))
    ]
    named = [path for path in fronts if path not in LEFT_OUT and names_of(path)]
    return (*named, *(path for path in FURTHER if (ROOT / path).exists()))


@functools.cache
def names_of(module: str) -> tuple[str, ...]:
    """What a module has for users: its `__all__`; without one, nothing."""
    if FURTHER.get(module):
        return FURTHER[module]
    for node in ast.parse((ROOT / module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return tuple(ast.literal_eval(node.value))
    return ()


def dotted(module: str) -> str:
    """For example trustratio.optimizers.lamb."""
    return "trustratio." + module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def module_page(module: str) -> str:
    return f"reference/{dotted(module).removeprefix('trustratio.').replace('.', '/')}.md"


def title_of(module: str) -> str:
    return dotted(module).split(".", 2)[2]


def module_text(module: str) -> str:
    """A page: how its names are imported, and what mkdocstrings makes of them."""
    names = names_of(module)
    at_the_front = set(names_of("optimizers/__init__.py")) if module.startswith("optimizers/") else set()
    homes = {name: "trustratio.optimizers" if name in at_the_front else dotted(module) for name in names}
    imports = [
        f"from {home} import {', '.join(name for name in names if homes[name] == home)}"
        for home in dict.fromkeys(homes.values())
    ]
    return "\n".join(
        [
            f"# {', '.join(names) if len(names) <= 3 else title_of(module)}",
            "",
            "```python",
            *(line if len(line) <= 100 else wrapped(line) for line in imports),
            "```",
            "",
            f"::: {dotted(module)}",
            "    options:",
            f"      members: [{', '.join(names)}]",
            "",
        ]
    )


def wrapped(line: str) -> str:
    """A long import, a name in each line."""
    head, names = line.split(" import ")
    return "\n".join([f"{head} import (", *(f"    {name}," for name in names.split(", ")), ")"])


# Commands -----------------------------------------------------------------------------------------------------------


@functools.cache
def commands() -> tuple[str, ...]:
    """All commands, as they are called after `python`."""
    recipes = sorted(file.name for file in (ROOT / "recipes").glob("*.py") if file.name != "__init__.py")
    return (*(f"recipes/{name}" for name in recipes), *tuple(of_modules()))


def of_modules() -> Iterator[str]:
    """Modules at the front of integrations/ that are commands."""
    for file in sorted((ROOT / "integrations").glob("*.py")):
        if "__main__" in file.read_text(encoding="utf-8"):
            yield f"-m trustratio.integrations.{file.stem}"


def command_page(command: str) -> str:
    return f"reference/commands/{Path(command.rpartition('.')[2] if command.startswith('-m') else command).stem}.md"


def file_of(command: str) -> Path:
    module = command.removeprefix("-m trustratio.")
    return ROOT / (module if module.endswith(".py") else f"{module.replace('.', '/')}.py")


def documentation(command: str) -> str:
    return ast.get_docstring(ast.parse(file_of(command).read_text(encoding="utf-8"))) or ""


def first_sentence(command: str) -> str:
    return documentation(command).split("\n\n")[0].replace("\n", " ").split(": `")[0].rstrip(".") + "."


def command_text(command: str, printed: str) -> str:
    return f"# {command}\n\n{documentation(command)}\n\n```text\n{printed.rstrip()}\n```\n"


@functools.cache
def helps() -> tuple[str, ...]:
    """What --help of every command prints, two of them at a time, since most import torch."""
    with ThreadPoolExecutor(2) as pool:
        return tuple(pool.map(printed_help, commands()))


def printed_help(command: str) -> str:
    """What --help prints.

    Raises:
        PluginError: If the command fails.
    """
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "DS_ACCELERATOR": "cpu"}
    run = subprocess.run(
        [sys.executable, *command.split(), "--help"], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    if run.returncode:
        raise PluginError(
            f"python {command} --help failed; the documentation needs the extra [test]: {run.stderr[-500:]}"
        )
    return run.stdout
