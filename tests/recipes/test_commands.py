"""The commands at the front of recipes/: what they are, and that their folder stands in for no package."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

from trustratio.recipes.common.command import CommandParser, ends_with_message
from trustratio.recipes.common.errors import BAD_INPUT, RecipeError
from trustratio.recipes.common.script import command_file

RECIPES = command_file("plan.py").parent
COMMANDS = sorted(path.name for path in RECIPES.glob("*.py") if path.name != "__init__.py")

SHADOW = "raise SystemExit('a file beside the command was taken for the package')\n"
COMMAND = """
from trustratio.recipes.common.script import run

if __name__ == "__main__":
    run("body")
"""
BODY = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor


def work(value):
    import colorsys

    return colorsys.rgb_to_hsv(value, value, value)[2]


def main():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        print(pool.submit(work, 0.5).result(), work(0.25))
    return 7
"""


def run(*command, cwd, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_a_dozen_lines_and_its_body_has_a_main(name):
    text = (RECIPES / name).read_text()
    assert len(text.splitlines()) <= 12
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    # In full: a file that is started as a script has no package to be relative to.
    assert [(node.module, node.level) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)] == [
        ("trustratio.recipes.common.script", 0)
    ]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    (body,) = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and str(n.value).startswith("trustratio")]
    path = RECIPES.joinpath(*body.split(".")[2:]).with_suffix(".py")
    assert "main" in [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize(
    ("command", "cwd", "shown"),
    [
        ((str(RECIPES / "plan.py"),), "/", "usage: python recipes/plan.py"),
        (("plan.py",), RECIPES, "usage: python recipes/plan.py"),
        (("-m", "trustratio.recipes.prepare"), RECIPES, "usage: python -m trustratio.recipes.prepare"),
    ],
)
def test_a_command_starts_from_anywhere(command, cwd, shown):
    done = run(*command, "--help", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(shown)


@pytest.mark.parametrize("inside", [False, True])
def test_files_beside_a_command_stand_in_for_no_package(tmp_path, inside):
    scripts, library = tmp_path / "scripts", tmp_path / "library"
    for folder, name, text in (
        (scripts, "command.py", COMMAND),
        (scripts, "colorsys.py", SHADOW),
        (library, "body.py", BODY),
    ):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    cwd, command = (scripts, "command.py") if inside else (tmp_path, "scripts/command.py")
    done = run(command, cwd=cwd, PYTHONPATH=str(library))
    assert (done.returncode, done.stdout) == (7, "0.5 0.25\n"), done.stderr


def test_the_reader_of_a_plan_may_leave(tmp_path):
    body = tmp_path / "body.py"
    body.write_text("def main():\n    print('line\\n' * 100_000)\n    return 0\n")
    command = tmp_path / "command.py"
    command.write_text("from trustratio.recipes.common.script import run\nrun('body', ends_with_reader=True)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait(timeout=60)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("docstrings", ("torch", "deepspeed", "transformers", "numpy")),
        ("encoding", ("torch", "deepspeed", "transformers")),
        ("feed", ("deepspeed", "transformers", "datasets", "pyarrow")),
    ],
)
def test_workers_import_no_more_than_they_need(module, absent, tmp_path):
    code = f"import sys, trustratio.recipes.data.{module}; print(*(set({absent!r}) & set(sys.modules)))"
    done = run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_bad_input_is_a_message_and_a_status(capsys):
    @ends_with_message("command")
    def main(value: str) -> int:
        """Return the length."""
        if not value:
            raise RecipeError("nothing was given")
        return len(value)

    assert main("abc") == 3
    assert main(value="") == BAD_INPUT == 2
    assert capsys.readouterr().err == "command: nothing was given\n"
    assert (main.__name__, main.__doc__) == ("main", "Return the length.")


def test_a_parser_raises_instead_of_exiting():
    parser = CommandParser(prog="command")
    parser.add_argument("--steps", "-s", type=int)
    assert parser.flags() == ["--help", "--steps"]
    with pytest.raises(RecipeError, match="invalid int value: 'x'; --help lists the options"):
        parser.parse_args(["--steps", "x"])
