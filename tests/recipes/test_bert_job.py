"""The job as a user starts it: the real launcher, two ranks, gloo, a few steps on a small text.

Three launches in all; the first one's run serves several tests.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.configuration.overrides import load_config
from trustratio.recipes.data.preparation import prepare
from trustratio.recipes.data.rows import MaskedRows
from trustratio.recipes.model.masked_language_model import build_model, padded_vocabulary
from trustratio.recipes.model.optimizer import build_optimizer
from trustratio.recipes.rules.global_batch import BatchPlan
from trustratio.recipes.runs.metrics import read_metrics

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "bert.py"
STEPS, HALF = 6, 3
SMALL = (
    *("--global_batch", "16", "--micro_batch", "4", "--sequence_length", "16"),
    *("data.vocabulary=200", "data.validation_fraction=0.2", "data.validation_sequences=10"),
    *("model.hidden=32", "model.intermediate=64", "model.max_positions=16", "run.validate_every=3"),
)


def command(text_folder: Path, *arguments: object) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(port)]
    return [*launcher, str(SCRIPT), "--data", f"{text_folder}/*.txt", *SMALL, *map(str, arguments)]


def launch(text_folder: Path, *arguments: object) -> str:
    """Run the job to its end and return what it printed."""
    done = subprocess.run(
        command(text_folder, *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("job-cache")


@pytest.fixture(autouse=True)
def own_cache(cache, monkeypatch):
    monkeypatch.setenv("TRUSTRATIO_CACHE", str(cache))


@pytest.fixture(scope="module")
def run(text_folder, tmp_path_factory, cache):
    """A run of six steps with dropout, a checkpoint in the middle and one at the end."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRUSTRATIO_CACHE", str(cache))
        printed = launch(
            text_folder,
            *("--output", folder, "--steps", STEPS, "--zero_stage", 1, "model.dropout=0.1"),
            f"run.checkpoint_every={HALF}",
        )
    return folder, printed


def of_kind(folder: Path, kind: str) -> list[dict]:
    return [record for record in read_metrics(folder) if record["kind"] == kind]


def test_the_run_prints_what_it_does(run):
    folder, printed = run
    assert (
        printed.count("global = micro x accum x ranks = 4 x 2 x 2 = 16 sequences (256 tokens)") == 1
    )  # one rank speaks
    assert "unigram entropy" in printed
    assert "steps per epoch" in printed
    assert f"report: {folder / 'report.html'}" in printed
    assert "training.zero_stage=1" in printed
    assert "built successfully" not in printed
    assert "FutureWarning" not in printed


def test_the_run_saves_its_configuration(run):
    folder, _ = run
    config = load_config(folder / "config.json")
    assert (config.training.global_batch, config.training.steps, config.model.hidden) == (16, STEPS, 32)
    settings = json.loads((folder / "deepspeed_config.json").read_text())
    assert settings["zero_optimization"]["stage"] == 1
    assert settings["gradient_accumulation_steps"] == 2
    assert json.loads((folder / "environment.json").read_text())["ranks"] == 2


def test_metrics_have_every_step_and_validation(run):
    folder, _ = run
    training, validation = of_kind(folder, "train"), of_kind(folder, "validation")
    assert [record["step"] for record in training] == list(range(1, STEPS + 1))
    assert [record["step"] for record in validation] == [3, 6]
    for record in training:
        assert record["sequences"] == record["step"] * 16
        assert record["tokens_per_second"] > 0
        assert record["masked_tokens"] > 0
        assert record["trust_ratios"]["bert.encoder.layer.0.output.dense.weight"] != 1.0
        assert record["trust_ratios"]["cls.predictions.bias"] == 1.0
    for record in validation:
        assert record["unigram_entropy"] > 0
        assert 0 <= record["validation_accuracy"] <= 1


def test_the_report_is_a_page_and_pictures(run):
    folder, _ = run
    assert "</html>" in (folder / "report.html").read_text()
    for name in ("report.png", "trust_ratios.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_the_first_update_is_that_of_one_process_without_a_wrapper(stopped):
    """Loss, gradient norm and trust ratios of 2 ranks x 2 micro-batches against plain torch on the whole batch."""
    folder, _ = stopped
    config = load_config(folder / "config.json")
    data = prepare(config.data, Reporter(active=False))
    torch.manual_seed(config.training.seed)
    model = build_model(config.model, padded_vocabulary(data.vocabulary_size)).eval()
    (batch,) = MaskedRows(
        data.rows("train"), data.vocabulary(), config.data.mask_probability, config.training.seed
    ).step_batches(0, BatchPlan(16, 1, 1), 0)
    first = of_kind(folder, "train")[0]
    assert first["masked_tokens"] == len(batch.labels)
    optimizer = build_optimizer(config.optimizer, model)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = first["lr"]
    loss, _ = model(batch.input_ids, batch.positions, batch.labels)
    loss = loss / len(batch.labels)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.gradient_clipping)
    optimizer.step()
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert first["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert first["trust_ratios"] == pytest.approx(optimizer.trust_ratios(), rel=1e-4)


@pytest.mark.slow
def test_a_resumed_run_continues_bit_for_bit(run, text_folder, tmp_path):
    folder, _ = run
    resumed = tmp_path / "resumed"
    launch(
        text_folder,
        *("--resume", folder / "checkpoints" / f"step-{HALF:08d}", "--output", resumed),
        *("model.dropout=0.1", f"run.checkpoint_every={HALF}"),
    )
    expected = [(r["step"], r["loss"], r["lr"], r["trust_ratios"]) for r in of_kind(folder, "train")][HALF:]
    assert [(r["step"], r["loss"], r["lr"], r["trust_ratios"]) for r in of_kind(resumed, "train")] == expected
    assert of_kind(resumed, "validation") == of_kind(folder, "validation")[1:]
    for name in sorted(p.name for p in (folder / "checkpoints" / f"step-{STEPS:08d}").glob("*.pt")):
        straight, continued = (
            torch.load(path / "checkpoints" / f"step-{STEPS:08d}" / name, weights_only=False)
            for path in (folder, resumed)
        )
        assert same_tensors(straight, continued), name
    assert (folder / "checkpoints" / "latest").read_text() == f"step-{STEPS:08d}\n"


def same_tensors(one: object, other: object) -> bool:
    """Compare the tensors of two nested checkpoints bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict) and one.keys() == other.keys() and all(same_tensors(one[k], other[k]) for k in one)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_tensors, one, other))
    return True


@pytest.fixture(scope="module")
def stopped(text_folder, tmp_path_factory, cache):
    """A long run under ZeRO-3 whose process group got a SIGTERM after its second step."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    environment = {**os.environ, "TRUSTRATIO_CACHE": str(cache)}
    arguments = ("--output", folder, "--steps", 100_000, "--zero_stage", 3, "run.validate_every=0", "run.log_every=1")
    process = subprocess.Popen(
        command(text_folder, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run made no step"
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)
    # The output ends when the last of the launcher and the ranks has closed it.
    printed, _ = process.communicate(timeout=120)
    return folder, printed


def test_sigterm_writes_a_checkpoint_and_a_report(stopped):
    folder, printed = stopped
    last = of_kind(folder, "train")[-1]["step"]
    assert 2 <= last < 100_000
    assert f"stopped on request after step {last} of 100000; continue with --resume {folder}" in printed
    assert (folder / "checkpoints" / "latest").read_text() == f"step-{last:08d}\n"
    assert len(list((folder / "checkpoints" / f"step-{last:08d}").glob("*optim_states.pt"))) == 2
    assert (folder / "report.html").exists()
    assert "Traceback" not in printed
