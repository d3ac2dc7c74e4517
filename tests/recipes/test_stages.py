"""How long each stage takes, and what a command says before its imports."""

import io
import time

import pytest

from trustratio.recipes.common import script
from trustratio.recipes.common.stages import Stages
from trustratio.recipes.configuration import opening


def test_stages_add_up_and_inner_ones_are_taken_out(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    stages = Stages()  # at 0
    with stages("steps"):  # from 1
        with stages("validation"):  # from 2 to 3
            pass
        with stages("validation"):  # from 4 to 5
            pass
    # until 6
    assert {name: stage.seconds for name, stage in stages.all().items()} == {"steps": 3, "validation": 2, "rest": 2}
    assert stages.describe() == "stages: steps 3.0 s, validation 2.0 s, rest 3.0 s"
    assert stages.seconds() == 9


def test_a_stage_that_fails_counts(monkeypatch):
    stages = Stages()
    with pytest.raises(ValueError, match="no"), stages("harvest"):
        raise ValueError("no")
    assert stages.taken["harvest"].seconds > 0
    with stages("report"):
        assert sum(range(100_000))
    assert stages.taken["report"].cpu_seconds > 0


def test_what_came_before_is_counted_from_the_start_of_the_process():
    stages = Stages()
    stages.add_start()
    assert stages.taken["imports"].seconds > 0
    assert stages.taken["imports"].cpu_seconds > 0


@pytest.mark.parametrize(
    ("arguments", "status", "printed"),
    [
        (["--help"], 0, "usage: "),
        (["--list_presets"], 0, "lamb-tiny: "),
        (["--stepz", "3"], 2, "error: unknown option '--stepz'; nearest: --steps"),
        (["--resume", "/no/such"], 2, "error: "),
        (["--steps", "3"], None, "lamb-tiny on 2 ranks: importing torch ...\n"),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_the_first_rank_answers_before_the_imports(arguments, status, printed, rank, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bert.py", *arguments])
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    try:
        found = opening.main()
    except SystemExit as ended:  # argparse's way to end after --help
        found = ended.code
    assert found == status
    shown = capsys.readouterr()
    assert (shown.out + shown.err).startswith(printed) if rank == "0" else not shown.out + shown.err


@pytest.mark.parametrize(("first", "expected"), [("2", 2), ("None", 7)])
def test_a_body_is_not_imported_if_the_opening_has_answered(first, expected, tmp_path, monkeypatch):
    (tmp_path / "opening_of_test.py").write_text(f"def main():\n    return {first}\n")
    (tmp_path / "body_of_test.py").write_text("def main():\n    return 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}", io.StringIO())
    with pytest.raises(SystemExit) as ended:
        script.run("body_of_test", opening="opening_of_test")
    assert ended.value.code == expected
    import sys

    assert ("body_of_test" in sys.modules) == (expected == 7)
    sys.modules.pop("body_of_test", None)
    sys.modules.pop("opening_of_test", None)
