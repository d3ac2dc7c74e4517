"""Comparisons: grids, order of runs, what is kept, the report; with a stand-in for bert.py, and once with it."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
import time

import pytest

from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.common.script import command_file
from trustratio.recipes.comparison import compare, gpu_evidence
from trustratio.recipes.comparison.compare import grids
from trustratio.recipes.comparison.rate_grids import best_rate, edge, next_rate
from trustratio.recipes.comparison.report import Comparison, markdown
from trustratio.recipes.comparison.runs import Outcome, second_rate
from trustratio.recipes.configuration.command_line import parse_command_line
from trustratio.recipes.configuration.presets import get_preset
from trustratio.recipes.model.optimizer import starting_rates

# Started in bert.py's place, with its path as the first argument. The loss is smallest at 0.02; above 0.5 it diverges.
# A file "stop" beside the runs ends it once, half-way, with the exit status in the file.
STAND_IN = """
import json, math, pathlib, sys
a = sys.argv
value = lambda flag: a[a.index(flag) + 1]
folder = pathlib.Path(value("--output" if "--output" in a else "--resume"))
folder.mkdir(parents=True, exist_ok=True)
lr, steps = float(value("--lr")), int(value("--steps"))
steps += sum(int(text.partition("=")[2]) for text in a if text.startswith("phase_two.steps="))
with open(folder.parent / "started.txt", "a") as file:
    file.write(" ".join(a[2:]) + "\\n")
stop = folder.parent / "stop"
last = steps // 2 if stop.exists() else steps
loss = math.nan if lr > 0.5 else 5 + math.log10(lr / 0.02) ** 2 + (0.1 if value("--optimizer") == "adamw" else 0)
with open(folder / "metrics.jsonl", "w") as file:
    for step in range(1, last + 1):
        file.write(json.dumps({"kind": "train", "step": step, "loss": loss, "sequences": 8 * step,
                               "sequences_per_second": 10.0}) + "\\n")
    if last == steps:
        file.write(json.dumps({"kind": "validation", "step": steps, "validation_loss": loss,
                               "validation_accuracy": 0.1, "unigram_entropy": 6.0}) + "\\n")
(folder / "environment.json").write_text('{"torch": "0"}')
if stop.exists():
    status = int(stop.read_text())
    stop.unlink()
    (folder / "checkpoints" / "step-00000002").mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text("step-00000002")
    (folder / "checkpoints" / "step-00000002" / "checkpoint.json").write_text("{}")
    sys.exit(status)
sys.exit(3 if math.isnan(loss) else 0)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs a comparison with the stand-in and gives its exit status."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    output = tmp_path / "runs"

    def run(*arguments):
        launcher = f"{sys.executable} {tmp_path / 'stand_in.py'}"
        return compare.main([*arguments, "--steps", "4", "--output", str(output), "--launcher", launcher])

    run.output = output
    run.started = lambda: (output / "started.txt").read_text().splitlines()
    return run


def test_a_comparison_makes_a_table_and_a_figure(run, capsys):
    assert run("--optimizers", "lamb,adamw", "--lrs", "0.01,0.02,0.05", "adamw=0.02,0.2,2", "--seeds", "1", "2") == 0
    assert len(run.started()) == 2 * 3 * 2
    table = (run.output / "comparison.md").read_text()
    assert table in capsys.readouterr().out
    lines = table.splitlines()
    assert lines[2].startswith("| lamb | 0.02 | 5.000 ± 0.000 | 10.0% | 0.01: 5.091, 0.02: 5.000, 0.05: 5.158 |")
    assert lines[3].startswith("| adamw | 0.02 (edge of its grid) | 5.100")
    assert "2: diverged" in lines[3]
    assert "adamw: the best learning rate, 0.02, is the lowest of its grid: widen the grid (add 0.0067)" in table
    assert "Warning: lamb" not in table
    with (run.output / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["optimizer"], r["lr"], r["seed"]) for r in rows[:3]] == [
        ("lamb", "0.01", "1"),
        ("lamb", "0.01", "2"),
        ("lamb", "0.02", "1"),
    ]
    assert {r["status"] for r in rows if r["lr"] == "2.0"} == {"diverged"}
    found = json.loads((run.output / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert found["unigram_entropy"] == 6.0
    assert found["runs"][2]["validation"] == [[4, 5.0]]
    assert (run.output / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_runs_differ_in_optimizer_rate_and_seed_alone(run):
    listed = ("--lrs", "3", "model.layers=1", "--seeds", "1", "schedule.degree=2")  # lists that overrides follow
    assert run("--optimizers", "lamb,lans", *listed, "--global_batch", "64") == 0
    own = ("--optimizer", "--lr", "--output")
    shared = set()
    for line in run.started():
        words = line.split()
        shared.add(tuple(w for i, w in enumerate(words) if w not in own and (i == 0 or words[i - 1] not in own)))
    (words,) = shared
    assert words == (
        *("--preset", "lamb-tiny", "--global_batch", "64", "--steps", "4", "model.layers=1", "schedule.degree=2"),
        *("--seed", "1", "--overwrite"),
    )


def test_runs_of_two_phases_end_after_the_second_whose_rate_follows_the_first(run):
    preset = get_preset("lamb-64k-32k-tiny")
    first, second = preset.optimizer.lr, preset.phase_two.lr
    lrs = f"{first / 2!r},{first!r},{first * 2!r}"
    arguments = ("--preset", preset.preset, "--optimizers", "lamb", "--lrs", lrs)
    assert run(*arguments, "phase_two.steps=2") == 0
    assert json.loads((run.output / "comparison.json").read_text())["steps"] == 6
    started = [parse_command_line(line.split()) for line in run.started()]
    assert [invocation.config.optimizer.lr for invocation in started] == [first / 2, first, first * 2]
    assert [invocation.config.phase_two.lr for invocation in started] == [second / 2, second, second * 2]


def test_a_second_phase_without_a_rate_of_its_own_is_given_none():
    assert second_rate(get_preset("lamb-tiny"), 0.1) == []
    whole = parse_command_line(["--preset", "lamb-64k-32k", "phase_two.reset_schedule=false"]).config
    assert second_rate(whole, 0.1) == []


def test_a_step_limit_inside_the_second_phase_ends_the_runs(run):
    (run.output.parent / "stand_in.py").write_text(STAND_IN.replace('"phase_two.steps="', '"none"'))
    limited = ("phase_two.steps=100", "--max_steps", "4")
    assert run("--preset", "lamb-64k-32k-tiny", "--optimizers", "lamb", "--lrs", "3", *limited) == 0


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (130, 130, "interrupted; the same command goes on from here"),
        (0, 2, "lamb-lr0.05-seed1 ended with exit status 0 without a validation at its last step, 4"),
    ],
)
def test_finished_runs_are_kept_and_an_interrupted_one_goes_on(run, capsys, status, code, message):
    arguments = ("--optimizers", "lamb", "--lrs", "0.01,0.02,0.05")
    assert run(*arguments) == 0
    (run.output / "lamb-lr0.05-seed1" / "metrics.jsonl").unlink()
    (run.output / "stop").write_text(str(status))
    assert run(*arguments) == code
    assert message in capsys.readouterr().err
    assert len(run.started()) == 4
    assert run(*arguments) == 0
    assert len(run.started()) == 5
    assert "--resume" in run.started()[-1]
    assert run(*arguments) == 0
    assert len(run.started()) == 5
    # A wider grid runs what is new alone.
    assert run("--optimizers", "lamb", "--lrs", "0.01,0.02,0.05,0.1") == 0
    assert len(run.started()) == 6


def test_a_terminated_comparison_ends_its_run_first(tmp_path):
    """SIGTERM reaches the run, which would otherwise go on without anybody who knows of it."""
    script = """
import pathlib, signal, sys, time
def leave(number, frame):
    pathlib.Path("ended").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
pathlib.Path("began").touch()
time.sleep(60)
"""
    (tmp_path / "waiting.py").write_text(script)
    launcher = f"{sys.executable} {tmp_path / 'waiting.py'}"
    arguments = ["--optimizers", "lamb", "--lrs", "3", "--output", str(tmp_path / "runs"), "--launcher", launcher]
    process = subprocess.Popen([sys.executable, command_file("compare.py"), *arguments], cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (tmp_path / "began").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=60) == 130
    assert (tmp_path / "ended").exists()


def test_another_comparison_is_not_mixed_in(run, capsys):
    assert run("--optimizers", "lamb", "--lrs", "3") == 0
    assert run("--optimizers", "lamb", "--lrs", "3", "model.layers=7") == 2
    assert "holds a comparison with other settings" in capsys.readouterr().err


def test_one_learning_rate_is_refused_unless_insisted_on(run, capsys):
    assert run("--optimizers", "lamb", "--lrs", "0.01") == 2
    error = capsys.readouterr().err
    assert "compares the guesses, not the optimizers" in error
    assert "--allow_single_lr" in error
    assert not run.output.exists()
    assert run("--optimizers", "lamb", "--lrs", "0.01", "--allow_single_lr") == 0
    assert run("--optimizers", "lamb", "--lrs", "0.01", "--allow-single-lr") == 0
    assert "widen the grid" in (run.output / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--optimizers", "lamb", "--lrs", "a,b"), "no list of numbers"),
        (("--optimizers", "lamb", "--lrs", "0.1,0.2,-1"), "finite and above 0"),
        (("--optimizers", "lamb", "--lrs", "adamw=1,2,3"), "'adamw' is not among --optimizers lamb"),
        (("--optimizers", "lamb", "--lrs", "3", "--lr", "0.1"), "compare.py sets --lr itself; give --lrs"),
        (("--optimizers", "lamb", "--lrs", "3", "--lr=0.1"), "'--lr=0.1': compare.py sets --lr itself"),
        (("--optimizers", "lamb", "--lrs", "3", "optimizer.lr=0.5"), "sets optimizer.lr itself; give --lrs"),
        (("--lrs", "3", "--optimizers", "lamb,lan"), "unknown optimizer 'lan'; nearest: lans"),
        (("--lrs", "3", "--optimizers", "lamb", "optimizer.betaz=3"), "refused its options"),
        (("--lrs", "3", "--optimizers", "lamb", "optimizer.name=sgd"), "itself; give --optimizers"),
        (("--optimizers", "lamb", "--optimizer=sgd"), "sets --optimizer itself; give --optimizers"),
        (("--optimizers", "lamb", "--lrs", "3", "training.seed=9"), "sets training.seed itself; give --seeds"),
        (("--optimizers", "lamb", "--seed=9"), "sets --seed itself; give --seeds"),
        (("--optimizers", "lamb", "--resume=runs/a"), "goes on in the same --output"),
        (("--optimizers", "lamb", "--lrs", "3", "--golbal_batch", "8"), "unknown option '--golbal_batch'"),
        (("--optimizers", "lamb,adamw", "--lrs", "lamb=1,2,3"), "gives no rate for adamw"),
        (("--lrs", "3"), "--optimizers"),
        (("--optimizers", ",", "--lrs", "3"), "--optimizers ',' names none"),
    ],
)
def test_bad_options_are_refused_before_the_first_run(run, capsys, arguments, message):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
    assert not run.output.exists()


def test_a_run_that_fails_is_shown(tmp_path, capsys):
    (tmp_path / "failing.py").write_text("print('out of memory'); raise SystemExit(1)")
    launcher = f"{sys.executable} {tmp_path / 'failing.py'}"
    arguments = ["--optimizers", "lamb", "--lrs", "3", "--output", str(tmp_path / "runs"), "--launcher", launcher]
    assert compare.main(arguments) == 2
    assert "ended with exit status 1; its last lines:\nout of memory" in capsys.readouterr().err


def test_grids():
    assert grids(["lamb"], ["3"], False) == {"lamb": (0.0067, 0.02, 0.06)}
    assert grids(["lamb", "sgd"], ["4", "sgd=1,2,3"], False)["sgd"] == (1.0, 2.0, 3.0)
    losses = {0.1: 3.0, 0.2: 2.0, 0.4: math.nan}
    assert best_rate(losses) == 0.2
    assert edge(losses) is None  # above it lies a rate that diverged
    assert edge({0.1: 1.0, 0.2: 2.0}) == "lowest"
    assert next_rate({0.1: 3.0, 0.2: 2.0}) == 0.6
    assert next_rate({0.1: math.nan}) == 0.033
    assert best_rate({0.1: math.inf}) is None


def test_an_optimizer_that_always_diverged_comes_last():
    made = [Outcome(name, 0.1, 1, "x", loss, 0.1, 4, 8, 1.0, []) for name, loss in (("a", math.nan), ("b", 3.0))]
    table = markdown(Comparison(made)).splitlines()
    assert table[2].startswith("| b |")
    assert table[3].startswith("| a | none | diverged |")


@pytest.mark.slow
@pytest.mark.parametrize("optimizers", ["lamb,adamw", "curvature_adamw,lamb"])
def test_a_comparison_of_the_recipe_itself(text_folder, tmp_path, capsys, optimizers):
    """Two real runs of two phases: same data order, so the losses before the first update are the same."""
    small = [
        *("--data", f"{text_folder}/*.txt", "--global_batch", "8", "--micro_batch", "8", "--sequence_length", "16"),
        *("--steps", "2", "data.vocabulary=200", "data.validation_fraction=0.2", "data.validation_sequences=10"),
        *("model.layers=1", "model.hidden=16", "model.intermediate=16", "model.max_positions=32"),
        *("phase_two.steps=1", "phase_two.sequence_length=32", "phase_two.global_batch=8", "phase_two.micro_batch=8"),
    ]
    output = tmp_path / "runs"
    command = ["--optimizers", optimizers, "--lrs", "0.01", "--allow-single-lr", "--output", str(output), *small]
    assert compare.main(command) == 0, capsys.readouterr()
    lines = {path.parent.name: path.read_text().splitlines() for path in output.glob("*/metrics.jsonl")}
    assert sorted(lines) == sorted(f"{name}-lr0.01-seed1" for name in optimizers.split(","))
    first = [next(r["loss"] for r in map(json.loads, of_run) if r["kind"] == "train") for of_run in lines.values()]
    assert first[0] == first[1]
    assert {r["steps"] for r in json.loads((output / "comparison.json").read_text())["runs"]} == {3}
    assert (output / "lamb-lr0.01-seed1" / "report.html").exists()


# The runs that need a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(gpu_evidence.EVIDENCE))
def test_the_gpu_runs_are_commands_that_parse(name, tmp_path):
    evidence = gpu_evidence.EVIDENCE[name]
    lines = gpu_evidence.commands(name, starting_rates(), tmp_path)
    assert len(lines) == len(evidence.batches)
    for line, (batch, steps) in zip(lines, evidence.batches, strict=True):
        options, passed_on = compare.parse(line[2:])
        training = parse_command_line(passed_on).config.training
        assert (training.global_batch, training.steps) == (batch, steps)
        assert batch % training.micro_batch == 0
        assert batch // training.micro_batch >= 8  # groups, for VR-LAMB
        rates = grids(options.optimizers.split(","), options.lrs, options.allow_single_lr)
        assert set(rates) == set(evidence.optimizers)


def test_the_main_runs_take_their_rates_from_the_sweep(tmp_path):
    with pytest.raises(RecipeError, match=r"gpu_evidence\.py sweep"):
        gpu_evidence.sweep_rates(tmp_path)
    runs = [{"optimizer": "lamb", "lr": lr, "loss": loss} for lr, loss in ((0.1, 3.0), (0.2, 2.0), (0.4, None))]
    (tmp_path / "gpu_sweep.json").write_text(json.dumps({"results": [{"runs": runs}]}))
    assert gpu_evidence.sweep_rates(tmp_path) == {"lamb": 0.2}
    line = gpu_evidence.commands("scale", dict.fromkeys(starting_rates(), 0.2), tmp_path)[0]
    assert "lamb=0.28" in line


def test_a_run_over_its_budget_is_stopped_like_ctrl_c(tmp_path):
    code = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    raise SystemExit(130)"
    assert gpu_evidence.run_within([sys.executable, "-c", code], 1.0) == 130


def test_without_a_gpu_the_runs_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_evidence.main(["sweep"]) == 2
    assert "no CUDA device was found" in capsys.readouterr().err
    assert gpu_evidence.main(["sweep", "--dry_run"]) == 0
    assert "--global_batch 65536" in capsys.readouterr().out
