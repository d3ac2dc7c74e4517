"""The console command `trustratio`: its words, what it passes on, and what it says about other words."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from trustratio.recipes.common import called, console
from trustratio.recipes.common.script import command_file
from trustratio.recipes.configuration.presets import list_presets
from trustratio.recipes.training import start

FRONT = command_file("plan.py").parent
STARTED_BY_LAUNCHERS = {"bert", "bert_accelerate", "bert_trainer"}
CONSOLE = "import sys; from trustratio.recipes.common.console import main; sys.exit(main())"


def trustratio(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-c", CONSOLE, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_command_at_the_front_has_a_word():
    modules = {command.module for command in console.COMMANDS.values()} - {None}
    fronts = {path.stem for path in FRONT.glob("*.py")} - {"__init__"}
    assert {f"trustratio.recipes.{name}" for name in fronts - STARTED_BY_LAUNCHERS} <= modules
    own = {word for word, command in console.COMMANDS.items() if not command.given and command.answer is None}
    assert own == {console.COMMANDS[word].module.rpartition(".")[2].replace("_", "-") for word in own}


def test_the_list_is_there_without_a_package(tmp_path):
    """Where nothing but the standard library can be imported, and of this package what it needs."""
    code = f"{CONSOLE.replace('sys.exit(main())', 'main()')}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    *lines, modules = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    for word, command in console.COMMANDS.items():
        assert any(line.split()[0] == word and line.endswith(command.line) for line in lines if line.strip())
    assert not {"torch", "numpy", "psutil", "trustratio.optimizers"} & set(modules.split())
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"], ["configs", "--help"]])
def test_alone_it_lists_the_commands(arguments, capsys):
    assert console.main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == console.overview()


def test_the_version_is_that_of_pyproject(capsys):
    promised = (FRONT.parent / "pyproject.toml").read_text()
    (version,) = re.findall(r'^version = "(.+)"$', promised, re.MULTILINE)
    for word in ("--version", "-V", "version"):
        assert console.main([word]) == 0
        assert capsys.readouterr().out == f"trustratio {version}\n"


@pytest.mark.parametrize(("word", "nearest"), [("pln", "plan"), ("fine-tuen", "fine-tune"), ("traim", "train")])
def test_an_unknown_word_is_answered_with_the_nearest(word, nearest, capsys):
    assert console.main([word, "--gpus", "8"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"trustratio: unknown command {word!r}; nearest: {nearest}")
    assert shown.err.count("\n") == 1


def test_configurations_are_found(capsys):
    names = ["ddp", "zero1", "zero2", "zero3"]
    for name in names:
        assert console.main(["configs", name]) == console.main(["configs", f"{name}.yaml"]) == 0
        first, second = capsys.readouterr().out.splitlines()
        assert first == second
        assert "num_processes" in Path(first).read_text()
    assert console.main(["configs"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == names
    assert console.main(["configs", "zero9"]) == 2
    assert "unknown configuration 'zero9'; nearest: zero" in capsys.readouterr().err


def test_files_for_clusters_are_found(capsys):
    files = {path.name for path in console.LAUNCH.iterdir()}
    for name in files:
        assert console.main(["launch", name]) == 0
        assert Path(capsys.readouterr().out.strip()) == console.LAUNCH / name
    assert console.main(["launch", "slurm_torchrun"]) == 0
    assert "#SBATCH --nodes" in Path(capsys.readouterr().out.strip()).read_text()
    assert console.main(["launch"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == sorted(name.rpartition(".")[0] for name in files if not name.endswith(".sh"))
    assert console.main(["launch", "slurm-torchrun"]) == 2
    assert "unknown launch file 'slurm-torchrun'; nearest: slurm_torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("word", [word for word, command in console.COMMANDS.items() if command.module])
def test_a_word_becomes_its_module(word, monkeypatch):
    ran = []
    monkeypatch.setattr(sys, "argv", ["trustratio", word])
    monkeypatch.setattr("runpy.run_module", lambda module, run_name: ran.append((module, run_name, list(sys.argv))))
    console.main([word, "--help", "a b"])
    command = console.COMMANDS[word]
    (name, *rest), (module, run_name) = ran[0][2], ran[0][:2]
    assert (module, run_name) == (command.module, "__main__")
    assert name.startswith("trustratio ")
    assert rest == [*command.given, "--help", "a b"]


@pytest.mark.parametrize(
    ("arguments", "status", "shown"),
    [
        (["audit", "--help"], 0, "  trustratio audit --optimizer torch.optim.AdamW --options lr=0.01"),
        (["layer-norms", "report", "nowhere.jsonl"], 2, "nowhere.jsonl"),
        (["train", "--preset", "lamb-tny"], 2, "lamb-tiny"),
        (["presets"], 0, list_presets()[0]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_options_and_status_are_the_commands(arguments, status, shown, tmp_path):
    done = trustratio(*arguments, cwd=tmp_path)
    assert done.returncode == status, done.stderr
    assert shown in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_not_installed_is_one_sentence(tmp_path):
    (tmp_path / "psutil.py").write_text("raise ModuleNotFoundError(\"No module named 'psutil'\", name='psutil')\n")
    done = trustratio("plan", "--help", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == (
        "error: the package psutil is not installed, which this command needs: pip install 'trustratio[recipes]' has "
        "all that recipes need\n"
    )


# Help says the form that was used ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "module", "wanted"),
    [
        (["trustratio plan"], None, "trustratio fine-tune"),
        (["recipes/plan.py"], None, "python recipes/fine_tune.py"),
        (["/a/plan.py"], "trustratio.recipes.plan", "python -m trustratio.recipes.fine_tune"),
    ],
)
def test_a_command_is_named_as_it_was_called(argv, module, wanted, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(called, "_module", lambda: module or "")
    assert called.called("fine_tune") == wanted
    assert called.examples(wanted, "", "--data x") == [wanted, f"{wanted} --data x"]


@pytest.mark.parametrize(
    ("program", "module", "usage", "example"),
    [
        ("recipes/bert.py", "", "deepspeed [--num_gpus N] recipes/bert.py", "deepspeed --num_gpus 2 recipes/bert.py"),
        ("recipes/bert_trainer.py", "", "deepspeed [--num_gpus N] recipes/bert_trainer.py", None),
        (
            "x",
            "trustratio.recipes.bert",
            "deepspeed [--num_gpus N] --module trustratio.recipes.bert",
            "torchrun --nproc_per_node 2 -m trustratio.recipes.bert --optimizer lans --lr 0.01 model.layers=4 "
            "schedule.warmup=50",
        ),
        (
            "x",
            "trustratio.recipes.bert_accelerate",
            "accelerate launch --config_file CONFIG -m trustratio.recipes.bert_accelerate",
            "accelerate launch --num_processes 2 --config_file $(trustratio configs zero2) "
            "-m trustratio.recipes.bert_accelerate "
            "--preset lamb-64k-32k --output runs/lamb --resume auto",
        ),
        ("trustratio train", "", "trustratio train [--num_gpus N]", "trustratio train"),
        (
            "x",
            "trustratio.recipes.train",
            "python -m trustratio.recipes.train [--num_gpus N]",
            "python -m trustratio.recipes.train",
        ),
    ],
)
def test_pretraining_is_named_with_its_launcher(program, module, usage, example, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program])
    monkeypatch.setattr(called, "_module", lambda: module)
    prog, examples = called.pretraining()
    assert prog == usage
    assert example is None or example in examples
    assert all(line.startswith((prog.partition(" ")[0], "torchrun")) for line in examples)


# train ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def became(monkeypatch):
    """The command lines that this process was to become."""
    lines = []
    monkeypatch.setattr("os.execv", lambda path, line: lines.append((path, line)))
    monkeypatch.delenv("RANK", raising=False)
    return lines


@pytest.mark.parametrize(
    ("gpus", "given", "ranks"),
    [
        (False, [], ["--num_gpus", "2"]),
        (True, [], []),
        (True, ["--num_gpus", "4"], ["--num_gpus", "4"]),
        (False, ["--num-gpus=3"], ["--num_gpus", "3"]),
    ],
)
def test_train_becomes_the_launcher(gpus, given, ranks, became, monkeypatch, capsys):
    monkeypatch.setattr(start, "_has_gpus", lambda: gpus)
    start.main([*given, "--max-steps", "2", "model.layers=4"])
    recipe = ["--module", "trustratio.recipes.bert", "--max_steps", "2", "model.layers=4"]
    line = [sys.executable, "-m", "deepspeed.launcher.runner", *ranks, *recipe]
    assert became == [(sys.executable, line)]
    assert capsys.readouterr().out.endswith("--max_steps 2 model.layers=4\n")


@pytest.mark.parametrize("given", [["--stesp", "2"], ["--preset", "lamp"], ["model.layer=4"], ["--num_gpus", "x"]])
def test_train_starts_nothing_for_a_bad_line(given, became, capsys):
    assert start.main(given) == 2
    assert became == []
    assert capsys.readouterr().err.startswith("error: ")


def test_train_in_a_launcher_is_the_recipe(became, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("trustratio.recipes.training.bert.main", lambda given: len(given))
    assert start.main(["--max_steps", "2"]) == 2
    assert became == []


@pytest.mark.parametrize(
    ("accelerator", "available", "has"), [("cpu", True, False), ("", True, True), ("", False, False)]
)
def test_gpus_are_torchs_unless_the_cpu_is_wanted(accelerator, available, has, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", accelerator)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: available)
    assert start._has_gpus() is has
