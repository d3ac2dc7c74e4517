"""`python -m benchmarks.on_gpu` with toy parts: whatever befalls one, the others run and everything found is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.on_gpu import __main__ as command
from benchmarks.on_gpu.part import PARTS
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


@pytest.mark.usefixtures("quick")
def test_a_part_that_runs_has_its_facts_already(tmp_path: Path) -> None:
    """All that there is where the command itself is killed; what the part records stands beside them."""
    program = "from benchmarks.on_gpu.part import Part, main; import benchmarks.on_gpu.parts.machine as m, json\n"
    program += f"m.run = lambda part: (part.record(number=1), open({str(tmp_path / 'seen')!r}, 'w').write(\n"
    program += f"    open({str(tmp_path / 'machine.json')!r}).read()), 'fine')[-1]\n"
    program += f"main(['machine', '--output', {str(tmp_path)!r}, '--limit', '9', '--rehearse'])"
    (tmp_path / "machine.json").write_text('{"run": {"outcome": "passed", "device": "old"}}')

    def command(name: str, limit: float) -> list[str]:
        return [sys.executable, "-c", program]

    facts = {"device": "toy"}
    runner = Runner(Results(tmp_path), command, os.environ, ROOT, time.monotonic() + 90, SHARES, facts)
    assert runner.run(["machine"])
    assert runner.begun == ["machine"]
    seen = json.loads((tmp_path / "seen").read_text())
    assert (seen["number"], seen["run"]["outcome"], seen["run"]["device"]) == (1, "running", "toy")
    assert numbers(tmp_path, "machine")["run"]["outcome"] == "passed"


@pytest.mark.usefixtures("quick")
def test_old_numbers_that_cannot_be_removed_are_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(results: Results, name: str) -> None:
        raise OSError("read-only")

    monkeypatch.setattr(Results, "forget", forget)
    assert not run(tmp_path, ["passes"])
    assert summary(tmp_path)["passes"] == "failed: could not be run: read-only"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_the_part_and_is_said(number: signal.Signals, tmp_path: Path) -> None:
    """As from whoever lends the machine, a terminal that is closed, or Ctrl+C; a second one changes nothing."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    program = (
        "import sys\n"
        "from benchmarks.on_gpu import __main__ as command\n"
        "toy = 'import os, time; print(os.getpid(), file=open(sys_path, \"w\")); time.sleep(100)'\n"
        f"toy = toy.replace('sys_path', repr({str(tmp_path / 'pid')!r}))\n"
        "command._command = lambda *arguments: [sys.executable, '-c', toy]\n"
        "command.prepare = lambda *arguments, **options: dict(os.environ)\n"
        f"sys.exit(command.main(['--rehearse', '--parts', 'machine', '--output', {str(tmp_path)!r}]))\n"
    ).replace("import sys\n", "import os, sys\n", 1)
    variables = {**os.environ, "TMPDIR": str(temporary)}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env=variables, stdout=subprocess.DEVNULL)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1
    assert is_gone(int((tmp_path / "pid").read_text()))
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert "interrupted" in lines
    assert any(line.startswith("machine: ") and ": interrupted: after " in line for line in lines)
    assert numbers(tmp_path, "machine")["run"]["outcome"] == "interrupted"
    assert not list(temporary.glob("on_gpu-*"))


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


def test_without_a_device_nothing_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "machine.json").write_text("{}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert command.main(["--output", str(tmp_path), "--parts", "machine"]) == 2
    said = capsys.readouterr().err
    assert "no CUDA device (torch says: " in said
    assert said.endswith("; --rehearse runs on the CPU.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["machine.json"]


@pytest.mark.parametrize("there", ["file", "file/below"])
def test_results_that_cannot_be_written_stop_the_command(
    there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(command, "prepare", lambda *args, **options: pytest.fail("was begun"))
    assert command.main(["--rehearse", "--output", str(tmp_path / there)]) == 2
    assert capsys.readouterr().err.startswith("Results cannot be written: ")
    monkeypatch.setenv("OUT", str(tmp_path / there))
    assert command.main(["--rehearse"]) == 2
    assert "Results cannot be written: " in capsys.readouterr().err


def test_a_checkout_that_takes_no_files_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> None:
        raise OSError(f"Read-only file system: {dir}")

    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(command.tempfile, "TemporaryFile", refuse)
    with pytest.raises(environment.Unusable, match=r"Read-only file system: .*--output DIR"):
        command._results(command._parser().parse_args([]), tmp_path)


def test_wheels_that_are_nowhere_stop_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--rehearse", "--wheels", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == f"--wheels {tmp_path / 'nowhere'}: there is no such folder.\n"


def test_no_time_for_any_part_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "prepare", lambda *args, **options: os.environ)
    given = ["--rehearse", "--minutes", "0.1", "--output", str(tmp_path), "--parts"]
    assert command.main([*given, "kernels", "job"]) == 3
    assert "nothing was run: 0.1 minutes have no time for any of kernels, job\n" in capsys.readouterr().out
    assert "3 if there was no time" in command._parser().format_help()


def test_a_driver_that_does_not_answer_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(command, "ask", lambda query, limit, *others: (asked.append(limit), (None, []))[1])
    assert command._device() == "unknown GPU (nvidia-smi does not answer)"
    assert asked == [20.0]
    monkeypatch.setattr(command, "ask", lambda *others: (0, ["NVIDIA T, 1.2", "NVIDIA T, 1.2"]))
    assert command._device() == "NVIDIA T, 1.2; NVIDIA T, 1.2"


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


def test_every_part_has_a_share() -> None:
    assert set(SHARES) == set(PARTS)
    assert all(share.least < share.weight for share in SHARES.values())
