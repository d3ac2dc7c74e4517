import subprocess
import sys

import pytest

from trustratio.recipes.common.errors import RecipeError, TrainingFailure
from trustratio.recipes.common.files import WRITING
from trustratio.recipes.runs.checkpoints import (
    CheckpointFolder,
    check_same_run,
    describe_checkpoint,
    find_checkpoint,
    require_newest,
    require_whole,
    run_of,
)
from trustratio.recipes.runs.folder import claim_folder, fresh_folder, hold, let_go, require_free
from trustratio.recipes.runs.metrics import MetricsLog, read_metrics
from trustratio.recipes.training.engines import ENGINE_STATE
from trustratio.recipes.training.other_ranks import is_read


def write(checkpoints, step, fail=False):
    def save(folder):
        (folder / "weights").write_text(f"weights of step {step}")
        if fail:
            raise OSError(28, "No space left on device")

    return checkpoints.write(step, save, agree=alone, first=True)


def alone(failure):
    """What `ranks.collect_failures` returns where there is one rank."""
    return [] if failure is None else [f"rank 0: {failure}"]


def test_fresh_folders_get_new_names(tmp_path):
    assert [fresh_folder(tmp_path / "runs", "x").name for _ in range(3)] == ["x-1", "x-2", "x-3"]


def test_overwriting_clears_a_run_and_nothing_else(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    (tmp_path / "metrics.jsonl").write_text("old")
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(RecipeError, match="is not empty"):
        claim_folder(tmp_path, overwrite=False)
    assert (tmp_path / "metrics.jsonl").exists()
    claim_folder(tmp_path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(WRITING)] == ["mine.txt"]


_HOLDER = """
import sys
from pathlib import Path
from trustratio.recipes.runs.folder import hold
hold(Path(sys.argv[1]))
print(flush=True)
sys.stdin.read()
"""


def test_a_folder_that_a_run_writes_into_is_not_taken_from_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("of the run")
    holder = [sys.executable, "-c", _HOLDER, str(tmp_path)]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        for take in (hold, lambda folder: claim_folder(folder, overwrite=True), require_free):
            with pytest.raises(RecipeError, match=rf"another run \(process {other.pid} on .*\) is writing into"):
                take(tmp_path)
        assert (tmp_path / "metrics.jsonl").read_text() == "of the run"
        other.kill()
    claim_folder(tmp_path, overwrite=True)  # a run that was killed holds nothing
    let_go(tmp_path)


def test_an_unusable_output_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot use output folder"):
        claim_folder(tmp_path / "file", overwrite=False)


def test_the_newest_complete_checkpoint_is_found_and_old_ones_go(tmp_path):
    checkpoints = CheckpointFolder(tmp_path, keep=2, identity={"model": "tiny"})
    for step in (1, 2, 3):
        path = write(checkpoints, step)
    assert find_checkpoint(tmp_path) == path
    assert find_checkpoint(path) == path
    assert run_of(path) == tmp_path.resolve()
    assert describe_checkpoint(path) == {"step": 3, "identity": {"model": "tiny"}}
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["latest", "step-00000002", "step-00000003"]


def test_a_failed_checkpoint_leaves_the_previous_one_whole(tmp_path):
    checkpoints = CheckpointFolder(tmp_path, keep=1, identity={})
    good = write(checkpoints, 1)
    with pytest.raises(TrainingFailure, match=r"checkpoint of step 2 could not be written \(rank 0: .*No space left"):
        write(checkpoints, 2, fail=True)
    assert checkpoints.newest() == good
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["latest", "step-00000001"]  # space is freed
    assert find_checkpoint(tmp_path) == good
    assert (good / "weights").read_text() == "weights of step 1"
    assert find_checkpoint(write(checkpoints, 2)).name == "step-00000002"  # the partial folder is in nobody's way


def test_missing_and_broken_checkpoints_are_named(tmp_path):
    with pytest.raises(RecipeError, match="no such folder"):
        find_checkpoint(tmp_path / "none")
    with pytest.raises(RecipeError, match="no complete checkpoint"):
        find_checkpoint(tmp_path)
    path = write(CheckpointFolder(tmp_path, keep=1, identity={}), 1)
    for damaged in ("{", "[]", '{"step": -3, "identity": {}}', '{"step": 2, "identity": {}}'):
        (path / "checkpoint.json").write_text(damaged)
        with pytest.raises(RecipeError, match="cannot read"):
            describe_checkpoint(path)
    (path / "checkpoint.json").unlink()
    with pytest.raises(RecipeError, match=r"no complete checkpoint .* no step-N has a checkpoint\.json"):
        find_checkpoint(tmp_path)


def swapped(good, other):
    (good / "weights").write_bytes((other / "weights").read_bytes())


@pytest.mark.parametrize(
    "damage",
    [
        swapped,
        lambda good, _: (good / "weights").write_bytes(b""),
        lambda good, _: (good / "weights").write_text("weights"),
    ],
)
def test_files_that_are_not_the_checkpoints_are_named(tmp_path, damage):
    checkpoints = CheckpointFolder(tmp_path, keep=2, identity={})
    other, good = write(checkpoints, 1), write(checkpoints, 2)
    require_whole(good)
    damage(good, other)
    with pytest.raises(RecipeError, match="step-00000002 is damaged: weights was changed, cut short or replaced"):
        require_whole(good)
    require_whole(other)


def test_missing_files_are_named_but_for_those_that_nobody_reads(tmp_path):
    path = write(CheckpointFolder(tmp_path, keep=1, identity={}), 1)
    (path / "weights").unlink()
    with pytest.raises(RecipeError, match="step-00000001 is damaged: weights is missing; copy"):
        require_whole(path)
    require_whole(path, lambda name: name != "weights")


@pytest.mark.parametrize(("saved", "read"), [(2, "optimizer.pt"), (None, "optimizer.pt"), (4, ENGINE_STATE)])
def test_other_numbers_of_ranks_read_the_engine_state_alone(tmp_path, saved, read):
    (tmp_path / ENGINE_STATE).touch()
    tells = is_read(tmp_path, saved, 2)
    assert [name for name in ("optimizer.pt", ENGINE_STATE) if tells(name)] == [read]
    (tmp_path / ENGINE_STATE).unlink()
    assert is_read(tmp_path, saved, 2)("optimizer.pt")


def test_a_checkpoint_that_does_not_list_its_files_passes(tmp_path):
    path = write(CheckpointFolder(tmp_path, keep=1, identity={}), 1)
    (path / "checkpoint.json").write_text('{"step": 1, "identity": {}}')
    require_whole(path)


def test_continuing_over_later_checkpoints_needs_leave(tmp_path):
    checkpoints = CheckpointFolder(tmp_path, keep=3, identity={})
    first, second = write(checkpoints, 1), write(checkpoints, 2)
    require_newest(second, overwrite=False)
    require_newest(first, overwrite=True)
    with pytest.raises(RecipeError, match="followed by step-00000002"):
        require_newest(first, overwrite=False)


def test_another_models_checkpoint_is_refused(tmp_path):
    check_same_run({"seed": 1, "more": 2}, {"seed": 1}, tmp_path)
    with pytest.raises(RecipeError, match=r"another model or run.*\n  model: checkpoint 'base', this run 'tiny'"):
        check_same_run({"model": "base", "seed": 1}, {"model": "tiny", "seed": 1}, tmp_path)


def test_metrics_of_a_resumed_run_replace_those_it_repeats(tmp_path):
    for losses in ({1: 3.0, 2: 2.0, 3: 9.0}, {3: 1.0, 4: 0.5}):
        log = MetricsLog(tmp_path, active=True)
        for step, loss in losses.items():
            log.write({"kind": "train", "step": step, "loss": loss})
        log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # a killed run
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5)]


def test_what_is_no_text_among_the_metrics_is_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'\xff\x82\n{"kind": "train", "step": 1, "loss": 3.0}\n')
    assert [r["loss"] for r in read_metrics(tmp_path)] == [3.0]


def test_layer_names_are_written_once_and_read_back(tmp_path):
    records = [
        {"kind": "train", "step": 1, "loss": 3.0, "trust_ratios": {"a": 0.1, "b": 1.0}},
        {"kind": "train", "step": 2, "loss": 2.0, "trust_ratios": {"a": 0.2, "b": 1.0}, "noise_scales": {"b": 7.0}},
        {"kind": "validation", "step": 2, "validation_loss": 2.5},
        {"kind": "train", "step": 3, "loss": 1.0, "trust_ratios": {"c": 0.123456789}},
    ]
    log = MetricsLog(tmp_path, active=True)
    for record in records:
        log.write(record)
    log.close()
    written = (tmp_path / "metrics.jsonl").read_text()
    assert written.count('"names"') == 3  # at first, with the noise scales, and when the layers changed
    assert '"trust_ratios":[0.2,1.0]' in written
    records[-1]["trust_ratios"]["c"] = 0.1234568
    assert read_metrics(tmp_path) == records


def test_an_inactive_log_writes_nothing(tmp_path):
    log = MetricsLog(tmp_path, active=False)
    log.write({"step": 1})
    log.close()
    assert not list(tmp_path.iterdir())
