"""docs/seeds.md: no empty cell, what it names exists, its commands parse, and its shardings are what is tested."""

from __future__ import annotations

import importlib.util
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from tests.distributed import fsdp_runs, megatron_distributed_runs, test_exactness, test_fsdp1, test_fsdp_statistics
from trustratio.integrations.audits import command as audit_command
from trustratio.optimizers import OPTIMIZERS
from trustratio.recipes.comparison import compare
from trustratio.recipes.configuration.command_line import parse_command_line
from trustratio.recipes.studies import click_through, tabular
from trustratio.recipes.training.checks import check_run

ROOT = Path(__file__).resolve().parents[2]


def load():
    spec = importlib.util.spec_from_file_location("seeds_table", ROOT / "docs" / "seeds_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLE = load()
ROWS = [*TABLE.optimizers(), *TABLE.SYSTEMS]
each_row = pytest.mark.parametrize("system", ROWS, ids=[re.sub(r"\W+", "-", row.name) for row in ROWS])


PARSERS = {
    "recipes/bert.py": lambda arguments: check_run(parse_command_line(arguments)),
    "recipes/compare.py": compare.parse,
    "recipes/click_through.py": click_through.parse,
    "recipes/tabular.py": tabular.parse,
}


def test_the_page_is_what_the_script_writes():
    page = (ROOT / "docs" / "seeds.md").read_text(encoding="utf-8")
    assert TABLE.written(page) == page, "run: python docs/seeds_table.py"


def test_no_system_stands_there_twice_and_every_optimizer_once():
    names = [row.name for row in ROWS] + [name for name, _ in TABLE.ELSEWHERE]
    assert len(set(names)) == len(names)
    assert len(TABLE.optimizers()) == len(OPTIMIZERS)


@each_row
def test_no_cell_is_empty(system):
    assert all(cell.strip("` ") for cell in TABLE.cells(system))
    assert system.names
    assert all(name.startswith("trustratio.") for name in system.names)  # test_documentation.py imports them
    assert all("\n" not in cell for cell in TABLE.cells(system))


@each_row
def test_commands_parse(system, monkeypatch):
    check_command(system.command, monkeypatch)


def check_command(command, monkeypatch):
    """Check the files that a command names, and its options with its own parser."""
    monkeypatch.chdir(ROOT)
    words = shlex.split(command.removeprefix("deepspeed --num_gpus 2 ").removeprefix("python "))
    module, arguments = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    if module == "pytest":
        file, flag, chosen = arguments
        assert flag == "-k"
        tests = re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.MULTILINE)
        assert [test for test in tests if chosen in test], f"{file} has no test {chosen!r}"
    elif module == "trustratio.integrations.audit":
        options = audit_command._parser().parse_args(arguments)
        assert options.optimizer in OPTIMIZERS
        assert audit_command._options(options.options).keys() <= OPTIMIZERS[options.optimizer].defaults.keys() | {"lr"}
        audit_command._configuration(options)  # reads the file
    else:
        assert module in PARSERS, f"how {module} reads its options is not known here"
        PARSERS[module](arguments)
    assert module.endswith(".py") is (ROOT / module).is_file()


@pytest.mark.parametrize(
    "command",
    [
        "python -m pytest tests/recipes/test_gone.py -k anything",
        "python -m pytest tests/recipes/test_schedules.py -k no_such_test",
        "python recipes/gone.py",
        "python recipes/bert.py --preset lamb-tiny data.discard_smalest=0.1",
        "python recipes/bert.py --preset lamb-tiny data.discard_smallest=1.5",
        "python -m trustratio.integrations.audit --optimizer lamp --ddp",
    ],
)
def test_a_stale_command_is_seen(command, monkeypatch):
    with pytest.raises((Exception, pytest.fail.Exception)):
        check_command(command, monkeypatch)


def test_the_shardings_are_those_of_the_tests():
    tested = {
        "DDP": list(OPTIMIZERS) if "ddp" in test_exactness.STAGES else [],
        "ZeRO-1 to 3": list(OPTIMIZERS) if {1, 2, 3} <= set(test_exactness.STAGES) else [],
        "FSDP1": test_fsdp1.EXACT,
        "FSDP2": [*fsdp_runs.EXACT, *test_fsdp_statistics.STATISTICS],
        "HSDP": [*fsdp_runs.EXACT, *test_fsdp_statistics.STATISTICS],
        "Megatron": megatron_distributed_runs.WITHOUT_STATISTICS,
    }
    assert set(tested) == set(TABLE.SHARDINGS)
    for name, entry in OPTIMIZERS.items():
        named = TABLE.exact_under(entry).partition(";")[0].split(", ")
        assert named == [sharding for sharding in TABLE.SHARDINGS if name in tested[sharding]], name


def test_limits_are_told():
    entry = replace(OPTIMIZERS["lamb"], not_under=("HSDP", "Megatron", "embeddings on the moon"))
    assert TABLE.exact_under(entry) == "DDP, ZeRO-1 to 3, FSDP1, FSDP2; not embeddings on the moon"
