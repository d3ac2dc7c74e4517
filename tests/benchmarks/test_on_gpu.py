"""`python -m benchmarks.on_gpu` with toy parts: whatever befalls one, the others run and everything found is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.on_gpu import __main__ as command
from benchmarks.on_gpu.part import PARTS, Failed, Part
from benchmarks.on_gpu.part import main as part_main
from benchmarks.on_gpu.runner import environment, processes
from benchmarks.on_gpu.runner.environment import ROOT
from benchmarks.on_gpu.runner.parts import Runner
from benchmarks.on_gpu.runner.results import Results, last_line
from benchmarks.on_gpu.runner.shares import SHARES, Share, limit_of

from .leftovers import is_gone

TOYS = {
    "passes": "record(number=1, verdict='fine')",
    "fails": "record(number=2, verdict='two are wrong'); sys.exit(1)",
    "breaks": "record(number=3); print('before'); raise ValueError('no such device')",
    "says nothing": "print('forgot')",
    "is killed": "record(number=4); print('allocating'); os.kill(os.getpid(), signal.SIGKILL)",
    "crashes": "print('soon', flush=True); os.abort()",
    "hangs": "record(number=5); print('waiting'); time.sleep(100)",
    "hangs on": "signal.signal(signal.SIGTERM, signal.SIG_IGN); record(number=6); time.sleep(100)",
    "leaves others": "subprocess.Popen([sys.executable, '-c', CHILD], start_new_session=True)\n"
    "while not os.path.exists(PID): time.sleep(0.01)\n"
    "record(verdict='fine')",
    "hangs with others": "subprocess.Popen([sys.executable, '-c', CHILD], start_new_session=True); time.sleep(100)",
    "prints": "sys.stdout.write('first\\n'); [sys.stdout.write('x' * 999 + '\\n') for _ in range(20_000)]; "
    "print('last'); record(verdict='fine')",
    "tears its file": "open(PATH, 'w').write('{\"number\": 7'); print('torn'); sys.exit(2)",
}
FRAME = """
import json, os, signal, subprocess, sys, time
NAME, PATH, PID = {name!r}, {path!r}, {pid!r}
CHILD = chr(10).join((
    "import os, signal, time",
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    "open({pid!r}, 'w').write(str(os.getpid()))",
    "time.sleep(100)",
))
found = dict()
def record(**values):
    found.update(values)
    open(PATH, 'w').write(json.dumps(found))
{body}
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.3)
    monkeypatch.setattr("benchmarks.on_gpu.runner.parts.GRACE", 0.3)
    monkeypatch.setattr("benchmarks.on_gpu.runner.parts.PACKING", 0.0)
    monkeypatch.setattr(processes, "_POLL", 0.02)


def run(
    folder: Path,
    names: list[str],
    seconds: float = 60.0,
    limit: float = 30.0,
    bring: Path | None = None,
    **shares: Share,
) -> bool:
    def toy(name: str, limit: float) -> list[str]:
        facts = {"name": name, "path": str(folder / f"{name}.json"), "pid": str(folder / "pid")}
        return [sys.executable, "-c", FRAME.format(body=TOYS[name], **facts)]

    given = {name: Share(limit, 0.1) for name in names} | shares
    ends = time.monotonic() + seconds
    variables = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return Runner(Results(folder, bring), toy, variables, folder, ends, given, {"device": "toy"}).run(names)


def summary(folder: Path) -> dict[str, str]:
    lines = (folder / "summary.txt").read_text().splitlines()
    return {line.split(": ")[0]: line.split(": ", 2)[2] for line in lines}


def numbers(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.usefixtures("quick")
def test_each_end_has_its_line_and_what_was_recorded(tmp_path: Path) -> None:
    names = ["passes", "fails", "breaks", "says nothing", "is killed", "crashes", "tears its file"]
    assert not run(tmp_path, names)
    lines = summary(tmp_path)
    assert list(lines) == names
    assert lines["passes"] == "fine"
    assert lines["fails"] == "failed: two are wrong"
    assert lines["breaks"] == (
        "failed: without a verdict, exit status 1; recorded so far: number; last line: ValueError: no such device"
    )
    assert lines["says nothing"] == (
        "failed: without a verdict, exit status 0; recorded so far: nothing; last line: forgot"
    )
    assert lines["is killed"] == ("killed: by SIGKILL, out of memory?; recorded so far: number; last line: allocating")
    assert lines["crashes"] == "killed: by SIGABRT; recorded so far: nothing; last line: soon"
    assert lines["tears its file"].endswith("exit status 2; recorded so far: nothing; last line: torn")
    for name in names:
        assert numbers(tmp_path, name)["run"]["device"] == "toy"
        assert (tmp_path / f"{name}.log").exists()
    assert numbers(tmp_path, "fails") | {"run": 0} == {"number": 2, "verdict": "two are wrong", "run": 0}
    assert numbers(tmp_path, "fails")["run"]["outcome"] == "failed"


@pytest.mark.usefixtures("quick")
def test_a_part_that_hangs_is_stopped_and_takes_nothing_from_the_next(tmp_path: Path) -> None:
    shares = {"hangs": Share(1, 0.5), "hangs on": Share(1, 0.5), "passes": Share(98, 0.5)}
    assert not run(tmp_path, list(shares), **shares)
    lines = summary(tmp_path)
    assert lines["hangs"].startswith("stopped: at its limit of 1 s; recorded so far: number; last line:")
    assert lines["hangs on"].startswith("stopped: at its limit of 1 s; recorded so far: number")
    assert lines["passes"] == "fine"
    assert numbers(tmp_path, "hangs on")["number"] == 6


@pytest.mark.usefixtures("quick")
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to see processes")
@pytest.mark.parametrize("name", ["leaves others", "hangs with others"])
def test_nothing_that_a_part_has_started_outlives_it(name: str, tmp_path: Path) -> None:
    """Not even what is in a session of its own and ignores SIGTERM."""
    limit = 30 if name == "leaves others" else 6
    assert run(tmp_path, [name], **{name: Share(1, limit)}, seconds=limit + 1) == (name == "leaves others")
    assert is_gone(int((tmp_path / "pid").read_text()))


@pytest.mark.usefixtures("quick")
def test_a_log_without_end_keeps_its_beginning_and_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LARGEST_LOG", 1 << 16)
    assert run(tmp_path, ["prints"])
    log = tmp_path / "prints.log"
    assert log.stat().st_size <= 1 << 16
    assert log.read_text().startswith("first\n")
    assert last_line(log) == "last"


def test_the_last_line_is_what_would_be_seen(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"first\n 10 %\r 20 %\r 30 % \n\n \xff\n\n")
    assert last_line(log) == "�"
    log.write_bytes(b"first\n 10 %\r 20 %\r\n\n")
    assert last_line(log) == "20 %"
    log.write_bytes(b"")
    assert last_line(log) == ""


@pytest.mark.usefixtures("quick")
def test_what_there_is_no_time_for_is_said_and_keeps_its_old_numbers(tmp_path: Path) -> None:
    (tmp_path / "passes.json").write_text('{"number": 0}')
    assert run(tmp_path, ["passes", "fails"], passes=Share(1, 100), fails=Share(1, 200), seconds=22.7)
    assert summary(tmp_path) == {
        "passes": "no time left: needs 100 s, 22 were left",
        "fails": "no time left: needs 200 s, 22 were left",
    }
    assert numbers(tmp_path, "passes") == {"number": 0}


@pytest.mark.usefixtures("quick")
def test_what_an_earlier_run_has_left_is_no_result_of_this_one(tmp_path: Path) -> None:
    for name in ("says nothing.json", "says nothing-trace.json", "passes-trace.json"):
        (tmp_path / name).write_text('{"verdict": "old"}')
    (tmp_path / "says nothing-run" / "checkpoint").mkdir(parents=True)
    run(tmp_path, ["says nothing"])
    assert "without a verdict" in summary(tmp_path)["says nothing"]
    assert not (tmp_path / "says nothing-trace.json").exists()
    assert not (tmp_path / "says nothing-run").exists()
    assert (tmp_path / "passes-trace.json").exists()


def test_what_early_parts_leave_goes_to_later_ones() -> None:
    shares = {"a": Share(1, 5), "b": Share(3, 5), "c": Share(1, 40)}
    assert limit_of("abc", 100, shares) == 20
    assert limit_of("bc", 100, shares) == 75  # nothing was used
    assert limit_of("bc", 60, shares) == 45
    assert limit_of("c", 60, shares) == 60
    assert limit_of("c", 39, shares) is None
    assert limit_of("abc", 10, shares) == 5  # no less than what it needs


def test_nine_minutes_are_enough_for_all() -> None:
    left = 540.0 - 40  # that installing may take
    for index, name in enumerate(PARTS):
        limit = limit_of(PARTS[index:], left)
        assert limit is not None, name
        assert limit >= 0.75 * SHARES[name].weight
        left -= limit


@pytest.mark.usefixtures("quick")
def test_few_files_are_brought_back(tmp_path: Path) -> None:
    """Where a machine gives back a handful, and nothing that lies deep."""
    folder, bring = tmp_path / "folder", tmp_path / "bring"
    folder.mkdir()
    (folder / "passes run").mkdir()
    (folder / "passes run" / "metrics.jsonl").write_text("{}")
    run(folder, ["passes", "breaks"], bring=bring)
    assert sorted(path.name for path in bring.iterdir()) == ["results.tar.gz", "summary.txt"]
    assert (bring / "summary.txt").read_text() == (folder / "summary.txt").read_text()
    with tarfile.open(bring / "results.tar.gz") as archive:
        assert sorted(archive.getnames()) == [
            *("breaks.json", "breaks.log", "passes run/metrics.jsonl", "passes.json", "passes.log", "summary.txt")
        ]


def test_numbers_come_before_what_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.on_gpu.runner.results.MOST_BYTES", 10)
    for name, size in {"a.trace": 6, "b.trace": 1, "speed.json": 8}.items():
        (tmp_path / name).write_text("x" * size)
    results = Results(tmp_path, tmp_path / "bring")
    assert [name for name, _ in results._contents()] == ["speed.json", "b.trace"]


@pytest.mark.usefixtures("quick")
def test_a_full_disk_costs_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    (folder / "summary.txt").mkdir(parents=True)  # which cannot be written either
    (folder / "passes.json.new").mkdir()
    monkeypatch.setattr(Results, "forget", lambda results, name: None)
    monkeypatch.setattr("tarfile.open", lambda *arguments, **options: (_ for _ in ()).throw(OSError("full")))
    assert run(folder, ["passes", "says nothing"], bring=tmp_path / "bring") is False
    assert [line.split(": ")[0] for line in (tmp_path / "bring" / "summary.txt").read_text().splitlines()] == [
        *("passes", "says nothing")
    ]


@pytest.mark.usefixtures("quick")
def test_a_part_that_cannot_be_started_costs_no_other(tmp_path: Path) -> None:
    def command(name: str, limit: float) -> list[str]:
        return ["/no/such/program"] if name == "fails" else [sys.executable, "-c", "print('there')"]

    shares = {"fails": Share(1, 1), "passes": Share(1, 1)}
    runner = Runner(Results(tmp_path), command, os.environ, tmp_path, time.monotonic() + 60, shares)
    assert not runner.run(list(shares))
    assert summary(tmp_path)["fails"].startswith("failed: could not be run: [Errno 2] No such file")
    assert summary(tmp_path)["passes"].endswith("last line: there")


def test_sigterm_ends_the_part_and_is_said(tmp_path: Path) -> None:
    """As from whoever lends the machine."""
    program = (
        "import sys\n"
        "from benchmarks.on_gpu import __main__ as command\n"
        "toy = 'import os, time; print(os.getpid(), file=open(sys_path, \"w\")); time.sleep(100)'\n"
        f"toy = toy.replace('sys_path', repr({str(tmp_path / 'pid')!r}))\n"
        "command._command = lambda *arguments: [sys.executable, '-c', toy]\n"
        f"sys.exit(command.main(['--rehearse', '--parts', 'machine', '--output', {str(tmp_path)!r}]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(60) == 1
    assert is_gone(int((tmp_path / "pid").read_text()))
    assert "interrupted" in (tmp_path / "summary.txt").read_text().splitlines()


# The command --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_the_command_runs_what_is_named_in_the_order_of_worth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float, bool]] = []

    def toy(name: str, limit: float, output: Path, rehearse: bool) -> list[str]:
        asked.append((name, limit, rehearse))
        facts = {"name": name, "path": str(output / f"{name}.json"), "pid": ""}
        return [sys.executable, "-c", FRAME.format(body=TOYS["fails" if name == "job" else "passes"], **facts)]

    monkeypatch.setattr(command, "_command", toy)
    monkeypatch.setattr(command, "prepare", lambda *args, **options: os.environ)
    given = ["--output", str(tmp_path), "--rehearse", "--minutes", "5", "--parts"]
    assert command.main([*given, "sharded", "machine"]) == 0
    assert [name for name, _, _ in asked] == ["machine", "sharded"]
    assert all(rehearse for *_, rehearse in asked)
    assert 290 < asked[1][1] <= 300
    assert command.main([*given, "job"]) == 1
    assert numbers(tmp_path, "machine")["run"]["rehearsal"] is True
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert lines[0].startswith("CPU, a rehearsal; ")
    assert lines[0].endswith("at most 5 minutes")
    assert any(line.startswith("job: ") and line.endswith("failed: two are wrong") for line in lines)


def test_results_go_where_they_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def results(*arguments: str) -> Results:
        return command._results(command._parser().parse_args(arguments), tmp_path / "scratch")

    monkeypatch.setattr(command, "RESULTS", tmp_path / "docs")
    monkeypatch.delenv("OUT", raising=False)
    assert results().folder == tmp_path / "docs"
    assert results("--rehearse").folder == tmp_path / "scratch" / "results"  # never into the documentation
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert (results().folder, results().bring) == (tmp_path / "scratch" / "results", tmp_path / "out")
    given = results("--output", str(tmp_path / "given"))
    assert (given.folder, given.bring) == (tmp_path / "given", None)


@pytest.mark.parametrize("given", ["0", "-1", "nan", "1441", "ten"])
def test_minutes_that_make_no_sense_are_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--minutes", given])
    assert "--minutes" in capsys.readouterr().err


def test_the_command_needs_nothing_but_python() -> None:
    """It has to start, and say what is wrong, where torch or this package is broken."""
    told = subprocess.run(
        [sys.executable, "-S", "-m", "benchmarks.on_gpu", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--rehearse" in told.stdout


# What the parts find ------------------------------------------------------------------------------------------------


def test_a_package_that_is_not_installed_is_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(environment, "_is_importable", lambda environment: False)
    found = environment.prepare(tmp_path, tmp_path / "log", said.append, seconds=0)
    look = "from importlib.util import find_spec; print(find_spec('trustratio.recipes').origin)"
    ran = subprocess.run(
        [sys.executable, "-S", "-c", look], env=found, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert Path(ran.stdout.strip()) == tmp_path / "site" / "trustratio" / "recipes" / "__init__.py"
    assert said == ["trustratio is not installed: its folders are linked, without compiled sweeps on the CPU"]


def test_one_bad_wheel_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("bad-1-py3-none-any.whl", "good-1-py3-none-any.whl"):
        (wheels / name).write_bytes(b"")
    asked: list[list[str]] = []

    def install(command: list[str], log: Path, limit: float, *others: Any) -> processes.End:
        asked.append([Path(argument).name for argument in command if argument.endswith((".whl", str(ROOT)))])
        log.write_text("told\n")
        return processes.End(1.0, int(any("bad" in name for name in asked[-1])), False)

    said: list[str] = []
    monkeypatch.setattr(environment, "run_until", install)
    environment.prepare(tmp_path, tmp_path / "log", said.append, seconds=60, wheels=wheels)
    assert (tmp_path / "log").read_text() == "told\n" * 4
    assert asked == [
        ["bad-1-py3-none-any.whl", "good-1-py3-none-any.whl"],
        ["bad-1-py3-none-any.whl"],
        ["good-1-py3-none-any.whl"],
        [ROOT.name],
    ]
    assert said == ["wheels: bad-1-py3-none-any.whl could not be installed, see log"]


def test_installing_does_not_take_the_time_of_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "run_until", lambda *arguments: pytest.fail("was begun"))
    (tmp_path / "late-1-py3-none-any.whl").write_bytes(b"")
    said: list[str] = []
    environment.prepare(tmp_path, tmp_path / "log", said.append, seconds=0, wheels=tmp_path)
    assert said == ["wheels: late-1-py3-none-any.whl could not be installed, see log"]


def test_a_rehearsal_is_on_the_cpu_even_beside_a_gpu(tmp_path: Path) -> None:
    found = environment.prepare(tmp_path, tmp_path / "log", pytest.fail, seconds=0, rehearse=True)
    assert (found["CUDA_VISIBLE_DEVICES"], found["TRITON_INTERPRET"]) == ("", "1")


def test_nothing_of_a_rehearsal_leaks_into_a_run_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.ON_CPU.items():
        monkeypatch.setenv(name, value)
    found = environment._variables(tmp_path, rehearse=False)
    assert not environment.ON_CPU.keys() & found.keys()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert environment._variables(tmp_path, rehearse=False)["CUDA_VISIBLE_DEVICES"] == "1"


# A part -------------------------------------------------------------------------------------------------------------


def test_a_part_that_finds_something_wrong_has_a_verdict_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(part: Part) -> str:
        part.record(number=1)
        raise Failed("1 of 3 is wrong")

    monkeypatch.setattr("benchmarks.on_gpu.parts.machine.run", find)
    assert part_main(["machine", "--output", str(tmp_path), "--limit", "10", "--rehearse"]) == 1
    assert numbers(tmp_path, "machine")["verdict"] == "1 of 3 is wrong"
    assert numbers(tmp_path, "machine")["number"] == 1


def run_as_a_program(folder: Path, part: str) -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks.on_gpu.part machine`, whose module `machine` is these lines."""
    program = (
        "import runpy, sys, types\n"
        "machine = sys.modules['benchmarks.on_gpu.parts.machine'] = types.ModuleType('machine')\n"
        f"exec({part!r}, machine.__dict__)\n"
        f"sys.argv = ['part', 'machine', '--output', {str(folder)!r}, '--limit', '10', '--rehearse']\n"
        "runpy.run_module('benchmarks.on_gpu.part', run_name='__main__')\n"
    )
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30)


def test_what_keeps_an_interpreter_from_ending_costs_no_time(tmp_path: Path) -> None:
    """Threads of a communicator or a compiler; the numbers are on disk."""
    ran = run_as_a_program(
        tmp_path,
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(99,)).start()\n"
        "def run(part):\n    print('told')\n    return 'fine'\n",
    )
    assert (ran.returncode, ran.stdout) == (0, "told\n")
    assert numbers(tmp_path, "machine")["verdict"] == "fine"


def test_a_program_knows_the_error_of_its_part(tmp_path: Path) -> None:
    """As a program, this module is there twice, and so would its error be."""
    body = "    from benchmarks.on_gpu.part import Failed\n    raise Failed('1 of 3 is wrong')\n"
    ran = run_as_a_program(tmp_path, f"def run(part):\n{body}")
    assert (ran.returncode, ran.stderr) == (1, "")
    assert numbers(tmp_path, "machine")["verdict"] == "1 of 3 is wrong"


def test_every_part_has_a_share() -> None:
    assert set(SHARES) == set(PARTS)
    assert all(share.least < share.weight for share in SHARES.values())
