"""The commands at the front of recipes/: what they are, and that their folder stands in for no package."""

from __future__ import annotations

import ast
import errno
import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trustratio.recipes.common.command import CommandParser, ends_with_message
from trustratio.recipes.common.errors import BAD_INPUT, FAILED, RecipeError
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
    bodies = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and str(n.value).startswith("trustratio")]
    assert len(bodies) == (2 if name.startswith("bert") else 1)  # what takes seconds to import has an opening
    for body in bodies:
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


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_may_be_closed(tmp_path, closed):
    """And no file of the command gets their numbers, which libraries write to."""
    (tmp_path / "body.py").write_text(
        "import pathlib, sys\ndef main():\n    print('line')\n    print('line', file=sys.stderr)\n"
        "    sys.stdout.flush()\n    sys.stderr.isatty()\n    sys.stdin.read()\n"
        "    return 7 if open(pathlib.Path(__file__)).fileno() > 2 else 1\n"
    )
    (tmp_path / "command.py").write_text("from trustratio.recipes.common.script import run\nrun('body')\n")
    process = subprocess.run(
        f"exec {sys.executable} command.py {closed}",
        shell=True,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert process.returncode == 7


ABORTS_WITH_THE_INTERPRETER = """
import atexit, os, sys
class Thread:
    def __del__(self, abort=os.abort):
        abort()
left = Thread()
def main():
    atexit.register(print, "registered")
    print("line", end="")
    return STATUS
"""


@pytest.mark.parametrize(("cluster", "status", "found"), [(True, 0, 0), (True, 3, 3), (False, 0, -signal.SIGABRT)])
def test_a_thread_that_outlives_python_does_not_spoil_the_status_of_a_rank(tmp_path, cluster, status, found):
    """As gloo's do now and then; what is registered for the exit is done, and all that was printed is seen."""
    (tmp_path / "body.py").write_text(ABORTS_WITH_THE_INTERPRETER.replace("STATUS", str(status)))
    (tmp_path / "command.py").write_text(
        f"from trustratio.recipes.common.script import run\nrun('body', cluster={cluster})\n"
    )
    done = run("command.py", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (found, "lineregistered\n"), done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_what_a_rank_could_not_print_in_the_end_is_told_by_its_status(tmp_path):
    (tmp_path / "body.py").write_text("def main():\n    print('line', end='')\n    return 0\n")
    command = "from trustratio.recipes.common.script import run; run('body', cluster=True)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", command], stdout=full, env=environment)
    assert done.returncode == 120


@pytest.mark.parametrize(
    "how", ["print(LINES)", "sys.stdout.write(LINES)", "argparse.ArgumentParser(epilog=LINES).print_help()"]
)
def test_the_reader_of_a_command_may_leave(tmp_path, how):
    """The command goes on to its end: a training must not end with its reader."""
    body, done = tmp_path / "body.py", tmp_path / "done"
    body.write_text(
        f"import argparse, pathlib, sys\nLINES = 'line\\n' * 100_000\ndef main():\n    print('line')\n    {how}\n"
        f"    print('more')\n    pathlib.Path({str(done)!r}).touch()\n    return 7\n"
    )
    command = tmp_path / "command.py"
    command.write_text("from trustratio.recipes.common.script import run\nrun('body')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 7
    assert done.exists()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
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
    with pytest.raises(RecipeError, match=r"whole number in digits, .*given was 'x'; --help lists the options"):
        parser.parse_args(["--steps", "x"])


@pytest.mark.parametrize("arguments", [["--output", ""], ["--output="], ["--data", "a", ""]])
def test_an_empty_text_is_no_value(arguments):
    parser = CommandParser(prog="command")
    parser.add_argument("--output", type=Path, default=Path("runs"))
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--launcher", default="")
    assert parser.parse_args([]).launcher == parser.parse_args(["--launcher", ""]).launcher == ""
    with pytest.raises(RecipeError, match=r"^--(output|data) is empty \(is a variable not set\?\): give it a value"):
        parser.parse_args(arguments)


def test_options_are_taken_with_hyphens_and_answered_with_the_nearest():
    parser = CommandParser(prog="command")
    for name in ("global_batch", "micro_batch", "max_steps", "steps", "output", "dry_run"):
        parser.add_argument(f"--{name}")
    assert parser.parse_args(["--global-batch", "8", "--max-steps=-3", "--output", "a-b"]).max_steps == "-3"
    assert parser.parse_args(["--global-batch=8"]).global_batch == "8"
    with pytest.raises(RecipeError) as refused:
        parser.parse_args(["--global-bacth", "8"])
    assert str(refused.value) == (
        "unknown option '--global_bacth'; nearest: --global_batch, --micro_batch, --max_steps; --help lists all"
    )
    with pytest.raises(RecipeError, match="'stray' belongs to no option"):
        parser.parse_args(["stray"])


MISSPELT = {
    "training.bert": ["--globl-batch", "8"],
    "training.bert_accelerate": ["--globl-batch", "8"],
    "training.bert_trainer": ["--globl-batch", "8"],
    "planning.plan": ["--gpu", "8"],
    "data.prepare": ["--output", "x", "--vocabulry", "8"],
    "comparison.gpu_evidence": [],
    "comparison.compare": ["--optimizers", "lamb", "--globl-batch", "8"],
    "runs.report": ["x", "--ouput", "y"],
    "training.export": ["x", "y", "--overwrite"],
    "fine_tuning.fine_tune": ["--checkpoint", "x", "--data", "y", "--epoch", "1"],
    "studies.tabular": ["--epoch", "1"],
    "studies.click_through": ["--epoch", "1"],
}


@pytest.mark.parametrize("body", MISSPELT)
def test_every_command_answers_a_misspelt_option_in_one_line(body, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = importlib.import_module(f"trustratio.recipes.{body}").main
    assert main(MISSPELT[body]) == BAD_INPUT
    shown = capsys.readouterr().err
    assert "nearest: " in shown or "--help lists" in shown
    assert shown.count("\n") == 1
    assert len(shown) < 250
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ("planning.plan", ["--memory", "nan"]),
        ("planning.plan", ["--peak", "1e400"]),
        ("planning.plan", ["--gpus", "0"]),
        ("planning.plan", ["--gpus", "99999999999999999999"]),
        ("planning.plan", ["training.seed=-1"]),
        ("data.prepare", ["--output", "x", "--shard-megabytes", "inf"]),
        ("data.prepare", ["--output", "x", "--shard_megabytes", "nan"]),
        ("data.prepare", ["--output", "x", "--sequence_lengths", "2"]),
        ("data.prepare", ["--output", "x", "--workers", "-1"]),
        ("data.prepare", ["--output", "x", "--vocabulary", "99999999999999999999"]),
        ("comparison.compare", ["--optimizers", "lamb", "--seeds", "-1"]),
        ("comparison.compare", ["--optimizers", "lamb", "--lrs", "nan,1,2"]),
        ("fine_tuning.fine_tune", ["--checkpoint", "x", "--data", "y", "--epochs", "inf"]),
        ("fine_tuning.fine_tune", ["--checkpoint", "x", "--data", "y", "--lr", "nan"]),
        ("fine_tuning.fine_tune", ["--checkpoint", "x", "--data", "y", "--seeds", "99999999999999999999"]),
        ("fine_tuning.fine_tune", ["--checkpoint", "x", "--data", "y", "--weight_decay", "-1"]),
        ("studies.tabular", ["--batches", "99999999999999999999"]),
        ("studies.click_through", ["--epochs", "0"]),
    ],
)
def test_absurd_numbers_are_refused_by_name(body, arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module(f"trustratio.recipes.{body}").main(arguments) == BAD_INPUT
    assert re.search("out of range|must be finite", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ("data.prepare", ["--output", "file/x"]),
        ("comparison.compare", ["--optimizers", "lamb", "--output", "file/x"]),
        ("comparison.compare", ["--optimizers", "lamb", "--report", "file/x"]),
        ("fine_tuning.fine_tune", ["--checkpoint", "x", "--data", "y", "--output", "file/x.json"]),
        ("fine_tuning.fine_tune", ["--checkpoint", "x", "--data", "y", "--output", "."]),
        ("fine_tuning.fine_tune", ["--checkpoint", "x", "--data", "y", "--export", "file"]),
        ("training.export", ["x", "file"]),
        ("studies.tabular", ["--output", "file/x"]),
        ("studies.click_through", ["--output", "file/x"]),
    ],
)
def test_an_output_that_cannot_be_is_named_before_the_work(body, arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert importlib.import_module(f"trustratio.recipes.{body}").main(arguments) == BAD_INPUT
    shown = capsys.readouterr()
    assert re.search("output (folder|file) .*choose a", shown.err)
    assert shown.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EROFS, "can be written"),
        (errno.ENOSPC, "free some space"),
        (errno.EACCES, "may write"),
        (errno.EIO, "error"),
    ],
)
def test_a_place_that_refuses_is_one_sentence(capsys, number, advice):
    @ends_with_message("command")
    def main() -> int:
        raise OSError(number, os.strerror(number), "some/file")

    assert main() == FAILED == 3
    shown = capsys.readouterr().err
    assert shown.startswith("command: 'some/file': ")
    assert advice in shown
    assert shown.count("\n") == 1


def test_help_says_defaults_and_keeps_examples_on_one_line(capsys):
    example = "python command.py --steps 3 " + "--output a-long-name " * 8
    parser = CommandParser(prog="command", description="A sentence that is folded. " * 6, examples=(example,))
    parser.add_argument("--steps", type=int, default=100_000, help="updates")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.1], help="a share of 5%% or more")
    parser.add_argument("--output", default="runs", help="folder (default: where the command is)")
    parser.add_argument("--quick", action="store_true", help="less work")
    parser.add_argument("--seed", type=int, help="of the run")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    assert "updates (default: 100000)" in words
    assert "5% or more (default: 0.01 0.1)" in words
    assert words.count("(default: ") == 3
    assert f"examples:\n  {example}\n" in shown
    assert max(len(line) for line in shown.splitlines() if "python" not in line) <= 80
