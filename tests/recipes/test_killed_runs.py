"""What a process that is killed at the worst moment leaves, piece by piece; whole runs are killed in `tests/faults`."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from trustratio.optimizers.noise_scale import NoiseScale, RunningNoise
from trustratio.recipes.common import files, launcher_watch
from trustratio.recipes.common.errors import NothingToDo, RecipeError
from trustratio.recipes.common.files import WRITING, remove_folder, remove_unfinished, whole_file, write_text
from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.configuration.config import DataConfig
from trustratio.recipes.data.preparation import prepare
from trustratio.recipes.runs import folder as run_folder
from trustratio.recipes.runs.checkpoints import (
    CheckpointFolder,
    drop_checkpoints_after,
    find_checkpoint,
    find_or_begin,
    require_newest,
    run_of,
)
from trustratio.recipes.runs.folder import claim_folder, has_ended, hold, let_go, mark_ended, wait_until_free
from trustratio.recipes.runs.loggers import MetricLoggers
from trustratio.recipes.runs.metrics import MetricsLog, drop_records_after, read_metrics
from trustratio.recipes.training import session


class Killed(BaseException):
    """Stands for the end of the process: what follows in the code does not happen."""


def write_checkpoint(run: Path, step: int, keep: int = 3) -> Path:
    def save(folder: Path) -> None:
        (folder / "weights").write_text(f"weights of step {step}")

    return CheckpointFolder(run, keep, {}).write(step, save, lambda failure: [], first=True)


def killed_in(monkeypatch, module, name: str, call: int = 1):
    """Have the process be killed where `module` calls `name` for the given time."""
    function, calls = getattr(module, name), []

    def kill(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call:
            raise Killed
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, kill)


@pytest.mark.parametrize("latest", ["step-00000001\n", "", "step-99", None])
def test_the_newest_checkpoint_is_the_last_that_got_its_name(tmp_path, latest):
    """Killed before `latest` was written, or while: it is for other programs."""
    write_checkpoint(tmp_path, 1)
    newest = write_checkpoint(tmp_path, 2)
    (tmp_path / "config.json").touch()
    (tmp_path / "checkpoints" / "latest").unlink()
    if latest is not None:
        (tmp_path / "checkpoints" / "latest").write_text(latest)
    assert find_checkpoint(tmp_path) == newest
    assert find_or_begin(tmp_path) == (newest, False)
    require_newest(newest, overwrite=False)


def test_checkpoints_without_their_runs_configuration_are_told(tmp_path):
    write_checkpoint(tmp_path, 1)
    with pytest.raises(
        RecipeError, match=r"has checkpoints, but not the config\.json that their run is continued with"
    ):
        find_or_begin(tmp_path)


@pytest.mark.parametrize("linked", ["checkpoints", "checkpoints/step-00000001"])
def test_checkpoints_may_be_links_to_another_disk(tmp_path, linked):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    first, newest = (write_checkpoint(run, step) for step in (1, 2))
    (run / "config.json").touch()
    (run / linked).rename(elsewhere)
    (run / linked).symlink_to(elsewhere)
    assert find_checkpoint(run) == newest
    assert run_of(first) == run_of(newest) == run
    with pytest.raises(RecipeError, match="step-00000001 is followed by step-00000002, which continuing it would"):
        require_newest(first, overwrite=False)
    write_checkpoint(run, 3, keep=2)
    assert not first.exists()
    assert elsewhere.exists()


def test_of_links_to_folders_the_links_alone_are_removed(tmp_path):
    for name in ("gone", "there"):
        (tmp_path / f"{WRITING}0123456789abcde{len(name)}").symlink_to(tmp_path / name)
    (tmp_path / "there").mkdir()
    remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "there"]


def test_a_checkpoint_of_another_name_is_followed_by_later_ones_alone(tmp_path):
    write_checkpoint(tmp_path, 1)
    kept = write_checkpoint(tmp_path, 2).rename(tmp_path / "checkpoints" / "kept")
    (tmp_path / "config.json").touch()
    require_newest(kept, overwrite=False)
    write_checkpoint(tmp_path, 3)
    with pytest.raises(RecipeError, match="kept is followed by step-00000003, which"):
        require_newest(kept, overwrite=False)


def test_a_checkpoint_that_was_being_removed_is_none(tmp_path, monkeypatch):
    first = write_checkpoint(tmp_path, 1)
    killed_in(monkeypatch, files.shutil, "rmtree")
    with pytest.raises(Killed):
        remove_folder(first)
    monkeypatch.undo()
    with pytest.raises(RecipeError, match="no complete checkpoint"):
        find_checkpoint(tmp_path)
    drop_checkpoints_after(tmp_path, 0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["latest"]


def test_what_is_after_the_checkpoint_that_is_continued_goes(tmp_path):
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoints" / "step-00000004.partial").mkdir()
    (tmp_path / "checkpoints" / "step-00000004.partial" / "half").touch()
    drop_checkpoints_after(tmp_path, 2)
    steps = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert steps == ["latest", "step-00000001", "step-00000002"]


@pytest.mark.parametrize("call", range(1, 9))
def test_a_run_that_was_killed_while_another_was_cleared_away_begins_anew(tmp_path, monkeypatch, call):
    """`--resume auto` of a run without a checkpoint clears it away; what a kill leaves of that is not refused."""
    names = ("config.json", "deepspeed_config.json", "environment.json", "metrics.jsonl", "report.html", "report.png")
    for name in (*names, "trust_ratios.png", "wandb_id.txt"):
        (tmp_path / name).touch()
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events").touch()
    killed_in(monkeypatch, Path, "unlink", call)
    with pytest.raises(Killed):
        claim_folder(tmp_path, overwrite=True)
    monkeypatch.undo()
    let_go(tmp_path)  # as the end of the process does
    checkpoint, anew = find_or_begin(tmp_path)
    assert checkpoint is None
    claim_folder(tmp_path, overwrite=anew)
    let_go(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".writing-lock"]


def test_a_file_that_nobody_writes_any_more_goes_with_the_next_one(tmp_path):
    abandoned, foreign = tmp_path / f"{WRITING}{'0' * 16}", tmp_path / f"{WRITING}lock"
    abandoned.write_text("half of")
    foreign.touch()
    with whole_file(tmp_path / "other") as other:
        write_text(tmp_path / "one", "whole")  # does not take the other one, which is being written, for abandoned
        other.write("whole, too")
    assert sorted(path.name for path in tmp_path.iterdir()) == [foreign.name, "one", "other"]
    assert (tmp_path / "other").read_text() == "whole, too"


def test_a_file_that_was_taken_for_abandoned_is_begun_again(tmp_path, monkeypatch):
    """Another process may look between the opening of a file and its lock."""
    lock, taken = fcntl.flock, []

    def late(file, operation):
        if not taken and operation == fcntl.LOCK_EX:
            taken.append(file.name)
            os.unlink(file.name)
        lock(file, operation)

    monkeypatch.setattr(files.fcntl, "flock", late)
    write_text(tmp_path / "file", "whole")
    assert taken
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


def record(step: int) -> dict:
    return {"kind": "train", "step": step, "loss": 1.0 / step, "trust_ratios": {"a": 0.1, "b": 1.0}}


@pytest.mark.parametrize("torn", [0, 1, 20, 75])
def test_metrics_go_on_as_if_nobody_had_disturbed_the_run(tmp_path, torn):
    """The second of two lives goes on after step 2; the first was killed later, in the middle of a line perhaps."""
    (tmp_path / "killed").mkdir()
    for folder, lives in ((tmp_path, [range(1, 6)]), (tmp_path / "killed", [range(1, 5), range(3, 6)])):
        for steps in lives:
            drop_records_after(folder, steps[0] - 1)
            log = MetricsLog(folder, active=True)
            for step in steps:
                log.write(record(step))
                log.write({"kind": "validation", "step": step, "validation_loss": 2.0})
            log.close()
            if len(lives) == 2 and steps[0] == 1:
                content = (folder / "metrics.jsonl").read_bytes()
                (folder / "metrics.jsonl").write_bytes(content[: len(content) - torn])
    killed, undisturbed = ((folder / "metrics.jsonl").read_text() for folder in (tmp_path / "killed", tmp_path))
    assert killed == undisturbed


def test_a_line_without_its_end_is_computed_again(tmp_path):
    """Its step may be one that is kept: killed between two writes of a long line, all but its end was there."""
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind":"train","step":1,"loss":3.0}\n{"kind":"train","step":2,"loss":2.0}'
    )
    drop_records_after(tmp_path, 2)
    log = MetricsLog(tmp_path, active=True)
    log.write({"kind": "train", "step": 2, "loss": 2.0})
    log.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]


def test_tensorboard_does_not_show_what_is_computed_again(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for done, steps in ((0, (1, 2, 3)), (1, (2, 3))):
        loggers = MetricLoggers(tmp_path, ["tensorboard"], {}, True, done)
        for step in steps:
            loggers.write({"kind": "train", "step": step, "loss": 10.0 * done + step})
        loggers.close()
        time.sleep(1.1)  # the files are read in the order of the seconds in their names
    read = events.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(1, 1.0), (2, 12.0), (3, 13.0)]


def test_running_means_go_on():
    straight, stopped, resumed = RunningNoise(), RunningNoise(), RunningNoise()
    noises = [NoiseScale(signal, noise) for signal, noise in ((1.0, 2.0), (3.0, 5.0), (0.5, 0.25))]
    expected = [straight.update(noise) for noise in noises]
    assert [stopped.update(noise) for noise in noises[:2]] == expected[:2]
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert resumed.update(noises[2]) == expected[2]


_HOLDER = """
import sys, time
from pathlib import Path
from trustratio.recipes.runs.folder import hold
hold(Path(sys.argv[1]))
print(flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("patience", [60.0, 0.3])
def test_a_folder_that_is_still_written_is_waited_for(tmp_path, monkeypatch, patience):
    monkeypatch.setattr(run_folder, "PATIENCE", patience)
    holder = [sys.executable, "-c", _HOLDER, str(tmp_path), "1.5" if patience > 1 else "60"]
    said: list[str] = []
    wait_until_free(tmp_path, said.append)
    assert said == []
    with subprocess.Popen(holder, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        wait_until_free(tmp_path, said.append)
        assert said == [
            f"another run (process {other.pid} on {os.uname().nodename}) still writes into {tmp_path}: waiting for at "
            f"most {patience:g} seconds"
        ]
        if patience > 1:
            hold(tmp_path)
            let_go(tmp_path)
        else:
            with pytest.raises(RecipeError, match=f"another run .process {other.pid} on"):
                hold(tmp_path)
        other.kill()


def test_whether_a_run_came_to_its_end_is_noted(tmp_path):
    assert has_ended(tmp_path)  # of an earlier release, without the file
    (tmp_path / "environment.json").write_text('{"ranks": 2}')
    assert has_ended(tmp_path)
    (tmp_path / "environment.json").write_text('{"ranks": 2, "ended_at": null}')
    assert not has_ended(tmp_path)
    mark_ended(tmp_path, "step-00000010")
    assert has_ended(tmp_path)
    assert json.loads((tmp_path / "environment.json").read_text())["ranks"] == 2


def test_streamed_text_goes_after_the_data_are_there(text_folder):
    """Killed between the manifest and the removal of the file that a data set of the hub was streamed into."""
    config = DataConfig(sources=(f"{text_folder}/*.txt",), vocabulary=200, sequence_length=16)
    folder = Path(prepare(config, Reporter(active=False)).folder)
    (folder / "hub-0.jsonl").write_text("much")
    prepare(config, Reporter(active=False))
    assert not (folder / "hub-0.jsonl").exists()


_POOL = """
import sys, time
from trustratio.recipes.data.encoding import Block, encode_blocks
from trustratio.recipes.data.wordpiece import load_tokenizer

def blocks():
    for shard in range(100):
        block = Block(shard, ("train",))
        block.documents["train"].append("text " * 1000)
        yield block
        if shard == 20:
            print(flush=True)
            time.sleep(300)

if __name__ == "__main__":
    list(encode_blocks(blocks(), load_tokenizer(sys.argv[1]), 2))
"""


def test_workers_end_with_the_process_that_started_them(text_folder, tmp_path):
    config = DataConfig(sources=(f"{text_folder}/*.txt",), vocabulary=200, sequence_length=16)
    tokenizer = Path(prepare(config, Reporter(active=False)).folder, "tokenizer.json")
    script = tmp_path / "pool.py"
    script.write_text(_POOL)
    with subprocess.Popen([sys.executable, str(script), str(tokenizer)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    _, alive = psutil.wait_procs(workers, timeout=20)
    for worker in alive:
        worker.kill()
    assert len(workers) >= 2
    assert not alive


_RANK = """
import signal, sys, time
from trustratio.recipes.common import launcher_watch
launcher_watch._PAUSE = 0.05
launcher_watch.watch_launcher()
if sys.argv[1] == "trains":
    signal.signal(signal.SIGTERM, lambda *_: (print("asked to stop", flush=True), sys.exit()))
print("started", flush=True)
time.sleep(60)
"""
_LAUNCHER = """
import subprocess, sys
subprocess.run([sys.executable, *sys.argv[1:]])
"""


@pytest.mark.parametrize("state", ["trains", "imports"])
@pytest.mark.parametrize(
    ("names", "killed"),
    [
        (("torchrun",), 0),
        (("accelerate",), 0),
        (("deepspeed", "-m deepspeed.launcher.launch"), 0),
        (("deepspeed", "-m deepspeed.launcher.launch"), 1),
    ],
)
def test_a_rank_stops_when_a_launcher_is_gone(tmp_path, names, state, killed):
    _stand_in_for_deepspeed(tmp_path)
    (tmp_path / "rank.py").write_text(_RANK)
    command = [str(tmp_path / "rank.py"), state]
    for name in reversed(names):
        command = _launched(tmp_path, name) + command
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": tmp_path}
    with subprocess.Popen([sys.executable, *command], **options) as outer:
        assert outer.stdout.readline() == "started\n"
        chain = [psutil.Process(outer.pid), *psutil.Process(outer.pid).children(recursive=True)]
        chain[killed].kill()
        said = outer.stdout.read()  # until the last of them has ended
        outer.kill()
    # Whoever waited for the one that was killed may be gone as well by the time that the rank looks.
    gone = [f"the launcher, process {one.pid}, is gone: process {chain[-1].pid} stops" for one in chain[: killed + 1]]
    assert any(sentence in said for sentence in gone)
    assert ("asked to stop" in said) == (state == "trains")


def _stand_in_for_deepspeed(folder: Path) -> None:
    """Make a package whose launcher starts what it is told to."""
    package = folder / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    for part in (package.parent, package):
        (part / "__init__.py").touch()
    (package / "launch.py").write_text(_LAUNCHER)


def _launched(folder: Path, name: str) -> list[str]:
    if name.startswith("-m "):
        return name.split()
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(_LAUNCHER)
    return [str(folder / "bin" / name)]


def test_a_rank_outlives_what_is_no_launcher(tmp_path):
    (tmp_path / "rank.py").write_text(_RANK)
    (tmp_path / "shell.py").write_text(_LAUNCHER)
    command = [sys.executable, str(tmp_path / "shell.py"), str(tmp_path / "rank.py"), "trains", "-m", "torchrun"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout.readline() == "started\n"
        (rank,) = psutil.Process(shell.pid).children()
        shell.kill()
        time.sleep(0.5)
        assert rank.is_running()
        rank.send_signal(signal.SIGKILL)


def test_a_finished_run_is_not_begun_again(tmp_path):
    """Only one that was killed after its last checkpoint goes on, to what comes after that."""
    from trustratio.recipes.configuration.command_line import parse_command_line
    from trustratio.recipes.training.checks import check_run, early_identity

    arguments = ["--output", str(tmp_path), "--resume", "auto", "--steps", "5"]
    run = check_run(parse_command_line(arguments))
    (tmp_path / "config.json").write_text(json.dumps(run.config.to_dict()))
    (tmp_path / "deepspeed_config.json").write_text(json.dumps(run.settings))
    CheckpointFolder(tmp_path, 3, early_identity(run)).write(5, lambda path: None, lambda failure: [], first=True)
    for environment in ("{}", '{"ended_at": "step-00000005"}'):
        (tmp_path / "environment.json").write_text(environment)
        with pytest.raises(NothingToDo, match="nothing is left to do"):
            check_run(parse_command_line(arguments))
    (tmp_path / "environment.json").write_text('{"ended_at": null}')
    assert (check_run(parse_command_line(arguments)).first, run.last) == (5, 5)
    with pytest.raises(NothingToDo):  # somewhere else, where there is nothing to end
        check_run(parse_command_line(["--resume", str(tmp_path), "--output", str(tmp_path / "other")]))


def test_a_run_that_goes_on_says_from_where(tmp_path, capsys, monkeypatch):
    """The same line begins a run and continues it: what it prints tells one from the other."""
    from trustratio.recipes.configuration.command_line import parse_command_line
    from trustratio.recipes.training.checks import check_run, early_identity

    monkeypatch.setattr(session, "on_first_rank", lambda work: work())
    arguments = ["--output", str(tmp_path), "--resume", "auto", "--steps", "5"]
    run = check_run(parse_command_line(arguments))
    session.open_output(run, early_identity(run), Reporter())
    assert "going on" not in capsys.readouterr().out
    CheckpointFolder(tmp_path, 3, early_identity(run)).write(2, lambda path: None, lambda failure: [], first=True)
    let_go(tmp_path)
    run = check_run(parse_command_line(arguments))
    session.open_output(run, early_identity(run), Reporter())
    checkpoint = tmp_path.resolve() / "checkpoints" / "step-00000002"
    assert f"going on from {checkpoint}, after step 2 of 5\n" in capsys.readouterr().out
    let_go(tmp_path)
    with pytest.raises(
        RecipeError, match=r"--zero_stage 3 contradicts .* of the run that is continued, which has 1; leave"
    ):
        check_run(parse_command_line([*arguments, "--zero_stage", "3"]))


@pytest.mark.parametrize(
    ("command", "launches"),
    [
        ("/usr/bin/python /env/bin/torchrun --nproc_per_node 2 bert.py", True),
        ("python -u -m deepspeed.launcher.launch --world_info=x bert.py", True),
        ("python -m torch.distributed.run bert.py", True),
        ("python -m accelerate.commands.launch bert.py", True),
        ("deepspeed bert.py", True),
        ("bash start.sh deepspeed", False),
        ("python train.py -m torch.distributed.run", False),
        ("python -m pytest deepspeed", False),
        ("timeout 100 torchrun bert.py", False),  # its child is the launcher
        ("-bash", False),
        ("", False),
    ],
)
def test_launchers_are_told_by_their_script(command, launches):
    assert launcher_watch._is_launcher(command.split()) == launches


def test_ranks_that_found_different_checkpoints_are_told(monkeypatch):
    monkeypatch.setattr(session, "collect", lambda name: [name, name])
    session._require_one_beginning(Path("step-00000004"))
    monkeypatch.setattr(session, "collect", lambda name: [name, None])
    with pytest.raises(RecipeError, match=r"checkpoints .* \(rank 0: step-00000004, rank 1: none\).*start again"):
        session._require_one_beginning(Path("step-00000004"))
