"""What is measured per step: right, and without waiting for the device; where the records go."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import time
from statistics import median
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trustratio.optimizers import LAMB, OPTIMIZERS
from trustratio.optimizers.noise_scale import RunningNoise, gradient_noise
from trustratio.recipes.common.errors import RecipeError, TrainingFailure
from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.configuration.config import ModelConfig, OptimizerConfig, RecipeConfig, RunConfig
from trustratio.recipes.configuration.overrides import apply_overrides
from trustratio.recipes.configuration.phases import Phase
from trustratio.recipes.data.rows import MaskedRows
from trustratio.recipes.model.flops import ModelFlops, device_peak, peak_of
from trustratio.recipes.model.masked_language_model import build_model
from trustratio.recipes.planning.demands import check_demands, check_groups
from trustratio.recipes.rules.global_batch import BatchPlan
from trustratio.recipes.runs import loggers as metric_loggers
from trustratio.recipes.runs.loggers import MetricLoggers, check_loggers, scalars
from trustratio.recipes.runs.metrics import read_metrics
from trustratio.recipes.training.batches import Batches
from trustratio.recipes.training.bert import main
from trustratio.recipes.training.loop import TrainingLoop
from trustratio.recipes.training.phase_data import PhaseData
from trustratio.recipes.training.records import Records, open_records
from trustratio.recipes.training.step_metrics import StepMetrics, Update, measures_noise

SHAPE = ModelConfig(layers=2, hidden=16, heads=2, intermediate=40, max_positions=16)
PLAN = BatchPlan(micro=4, accumulation=3, ranks=1)
PHASE = Phase(1, 0, steps=9, sequence_length=16, global_batch=12, micro_batch=4, sequences_before=0)
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


class OneProcess:
    """The training loop's engine on one process, without a wrapper."""

    rank, ranks, device = 0, 1, torch.device("cpu")

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer
        self.micro_batches = 0
        self.stepping = False

    def set_batch_plan(self, plan):
        pass

    def applied(self):
        return True

    def wants_second_pass(self):
        return False

    def begin_micro_batch(self, last):
        pass

    def require_updates(self, most_skipped):
        pass

    def loss(self, batch):
        return self.model(batch.input_ids, batch.positions, batch.labels)

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.micro_batches += 1
        if self.micro_batches % PLAN.accumulation == 0:
            self.stepping = True
            self.optimizer.step()
            self.stepping = False
            self.optimizer.zero_grad()

    def train(self, training):
        self.model.train(training)

    def sum_over_ranks(self, values):
        return values.clone()

    def learning_rate(self):
        return 0.01

    def gradient_norm(self):
        return None


class Kept(list):
    """Takes records instead of a file."""

    write = list.append

    def close(self):
        pass


def make_loop(rows, vocabulary, noise=False, log_every=10, last=9):
    torch.manual_seed(0)
    model = build_model(SHAPE, 104)
    engine = OneProcess(model, LAMB(list(model.named_parameters()), lr=0.01))
    flops = ModelFlops(SHAPE.layers, SHAPE.hidden, SHAPE.intermediate, 104)
    display = SimpleNamespace(update=lambda record, left: None, reporter=Reporter(active=False))
    return TrainingLoop(
        engine=engine,
        batches=Batches((PHASE,), (PLAN,), 0, last),
        data=PhaseData(PHASE, PLAN, MaskedRows(rows, vocabulary, 0.15, 1), validation_batches=[], unigram_entropy=4.0),
        config=RunConfig(log_every=log_every, validate_every=0, checkpoint_every=0),
        seed=1,
        step_metrics=StepMetrics(engine, flops, peak=1e9, measure_noise=noise),
        records=Records(Kept(), display),
        checkpoint=lambda step: None,
        stop_requested=lambda: False,
    )


def one_update(data_wait=0.0):
    """The first one of the phase."""
    loss = torch.tensor(3.0)
    return Update(1, PHASE, PLAN, learning_rate=0.1, loss=loss, masked_tokens=5, data_wait=data_wait, sequences=12)


def update(loop, step):
    """Do one update as the loop does."""
    batches = loop.data.training_rows.step_batches(step, PLAN, 0)
    return loop._update(SimpleNamespace(take=lambda: batches, failure=None, wait_seconds=0.01))


def count_reads(monkeypatch, engine, work):
    """Count how often `work` reads a tensor's value, which on an accelerator makes the host wait.

    The optimizer's own step is left out: on a CPU, and only there, it looks which layers have a gradient.
    """
    reads = []
    with monkeypatch.context() as patch:
        for name in READS:
            original = getattr(torch.Tensor, name)

            def counted(tensor, *arguments, _name=name, _original=original, **options):
                if not engine.stepping:
                    reads.append(_name)
                return _original(tensor, *arguments, **options)

            patch.setattr(torch.Tensor, name, counted)
        work()
    return len(reads)


def reads_per_step(monkeypatch, loop):
    """Return the reads that one more step between two logs costs."""
    loop.config = RunConfig(log_every=1000, validate_every=0, checkpoint_every=0)
    loop.step_metrics.begin()
    update(loop, 0)  # the first step finds the layout
    few = count_reads(monkeypatch, loop.engine, lambda: [update(loop, step) for step in (1, 2)])
    many = count_reads(monkeypatch, loop.engine, lambda: [update(loop, step) for step in range(3, 9)])
    assert len(loop.step_metrics.fetch()) == 9
    return (many - few) / 4


# The loop reads the masked tokens and the stop flags of a step, which were copied to the host before the step began.
EARLY_READS = 2


@pytest.mark.parametrize("noise", [False, True])
def test_no_step_between_two_logs_waits_for_the_device(rows, vocabulary, monkeypatch, noise):
    assert reads_per_step(monkeypatch, make_loop(rows, vocabulary, noise)) == EARLY_READS


def test_a_ratio_that_is_read_at_every_step_would_be_seen(rows, vocabulary, monkeypatch):
    loop = make_loop(rows, vocabulary)
    original = loop.engine.optimizer.trust_ratio_vector

    def synchronous():
        names, ratios = original()
        return names, torch.tensor(ratios.tolist(), dtype=torch.float64)

    loop.engine.optimizer.trust_ratio_vector = synchronous
    assert reads_per_step(monkeypatch, loop) > EARLY_READS


def test_a_log_reads_once(rows, vocabulary, monkeypatch):
    loop = make_loop(rows, vocabulary, noise=True)
    for step in range(7):
        update(loop, step)
    assert count_reads(monkeypatch, loop.engine, loop.step_metrics.fetch) == 1


def test_records_hold_what_the_optimizer_says_after_every_step(rows, vocabulary):
    """The same run with every value read at once, step by step."""
    loop = make_loop(rows, vocabulary, noise=True, log_every=4, last=6)
    loop.run()
    reference = make_loop(rows, vocabulary, noise=True)
    optimizer, running = reference.engine.optimizer, RunningNoise()
    records = [record for record in loop.records.metrics if record["kind"] == "train"]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    for step, record in enumerate(records):
        seen = []
        original = reference.step_metrics.add
        reference.step_metrics.add = seen.append
        update(reference, step)
        reference.step_metrics.add = original
        loss = float(seen[0].loss)
        ratios, noise = optimizer.trust_ratios(), gradient_noise(optimizer, PLAN.micro)
        average = running.update(noise.model)
        assert record["loss"] == pytest.approx(loss, rel=1e-6)
        assert record["trust_ratios"] == pytest.approx(ratios, rel=1e-9)
        adapted = [ratios[name] for name, p in reference.engine.model.named_parameters() if p.dim() > 1]
        assert (record["trust_ratio_min"], record["trust_ratio_max"]) == pytest.approx((min(adapted), max(adapted)))
        assert record["trust_ratio_median"] == pytest.approx(median(adapted))
        assert record["gradient_signal"] == pytest.approx(noise.model.signal, rel=1e-9)
        assert record["gradient_noise"] == pytest.approx(noise.model.noise, rel=1e-9)
        assert record["noise_scale"] == pytest.approx(average.scale, rel=1e-9)
        assert set(record["noise_scales"]) == set(ratios)
        assert record["sequences"] == (step + 1) * PLAN.sequences
        assert record["lr"] == 0.01
        assert record["masked_tokens"] > 0


def test_an_adapted_ratio_of_exactly_one_counts():
    """LAMBC clips the large matrix's ratio to 1.0; the small one's is far below, the vector has none."""
    weights = {"large": torch.full((4, 4), 100.0), "small": torch.full((4, 4), 1e-3), "bias": torch.ones(4)}
    parameters = {name: torch.nn.Parameter(weight) for name, weight in weights.items()}
    optimizer = OPTIMIZERS["lambc"].optimizer_class(list(parameters.items()), lr=0.1)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    metrics = StepMetrics(OneProcess(None, optimizer), ModelFlops(1, 1, 1, 1))
    metrics.add(one_update())
    (record,) = metrics.fetch()
    small = record["trust_ratios"]["small"]
    assert record["trust_ratios"] == {"large": 1.0, "small": small, "bias": 1.0}
    assert (record["trust_ratio_min"], record["trust_ratio_max"]) == (small, 1.0)
    assert record["trust_ratio_median"] == pytest.approx((1 + small) / 2)
    assert small < 0.1


def test_rates_follow_from_time_and_batch(rows, vocabulary):
    loop = make_loop(rows, vocabulary, log_every=3, last=3)
    loop.run()
    records = [record for record in loop.records.metrics if record["kind"] == "train"]
    for record in records:
        seconds = record["seconds"]
        flops = loop.step_metrics.flops.update(12 * 16, record["masked_tokens"], 16)
        assert record["sequences_per_second"] == pytest.approx(12 / seconds)
        assert record["tokens_per_second"] == pytest.approx(12 * 16 / seconds)
        assert record["model_flops_per_second"] == pytest.approx(flops / seconds)
        assert record["utilisation"] == pytest.approx(flops / seconds / 1e9)
        assert 0 <= record["data_wait_seconds"] < seconds
        assert record["host_memory_bytes"] > 1e7


def test_validation_is_not_training(rows, vocabulary):
    metrics = make_loop(rows, vocabulary).step_metrics
    began = time.perf_counter()
    metrics.begin()
    with metrics.not_training():
        time.sleep(0.2)
    time.sleep(0.05)
    metrics.add(one_update(data_wait=0.03))
    (record,) = metrics.fetch()
    assert record["seconds"] >= 0.05
    assert record["seconds"] < time.perf_counter() - began - 0.2
    assert record["data_wait_seconds"] == 0.03
    assert record["trust_ratios"] == {}  # no step was made
    assert metrics.fetch() == []


def test_flops_are_those_that_torch_counts():
    torch.manual_seed(0)
    model = build_model(SHAPE, 104)
    model.config._attn_implementation = "eager"  # torch's counter does not know the CPU's fused attention
    ids = torch.randint(5, 100, (6, 16))
    positions = torch.arange(3, 96, 7)
    with FlopCounterMode(display=False) as counter:
        loss, _ = model(ids, positions, ids.flatten()[positions])
        loss.backward()
    flops = ModelFlops(SHAPE.layers, SHAPE.hidden, SHAPE.intermediate, 104)
    assert flops.update(tokens=96, predicted=len(positions), length=16) == counter.get_total_flops()


def test_peaks_are_found_by_the_devices_name():
    assert device_peak("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert device_peak("NVIDIA H100 PCIe", "bf16") == 756e12
    assert device_peak("NVIDIA B200", "bf16") == 2250e12
    assert device_peak("NVIDIA GB200", "bf16") == 2500e12
    assert device_peak("NVIDIA H200", "bf16") == device_peak("NVIDIA GH200 480GB", "bf16") == 989e12
    assert device_peak("NVIDIA A100-SXM4-40GB", "fp32") == 19.5e12
    assert device_peak("NVIDIA L40S", "fp16") == 362e12
    assert device_peak("NVIDIA A10G", "bf16") == 70e12
    assert device_peak("a new one", "bf16") is None
    assert peak_of(torch.device("cpu"), "fp32", None) is None
    assert peak_of(torch.device("cpu"), "fp32", 2.5) == 2.5e12


# Noise and loggers are checked before training ------------------------------------------------------------------------


def test_a_noise_scale_that_cannot_be_measured_is_refused():
    config = RecipeConfig(run=RunConfig(noise_scale=True))
    check_demands(config)
    check_groups(config, PLAN)
    with pytest.raises(RecipeError, match=r"1 x 1 = 4 .* has 1: halve --micro_batch"):
        check_groups(config, BatchPlan(4, 1, 1))
    with pytest.raises(RecipeError, match="'adamw' does not"):
        check_demands(RecipeConfig(run=config.run, optimizer=OptimizerConfig(name="adamw")))


def test_noise_is_measured_by_default_where_it_can_be():
    one = BatchPlan(4, 1, 1)
    assert measures_noise(RecipeConfig(), [PLAN, PLAN])
    assert not measures_noise(RecipeConfig(), [PLAN, one])
    assert not measures_noise(RecipeConfig(optimizer=OptimizerConfig(name="adamw")), [PLAN])
    assert not measures_noise(RecipeConfig(optimizer=OptimizerConfig(options={"segments": 2})), [PLAN])
    assert not measures_noise(RecipeConfig(run=RunConfig(noise_scale=False)), [PLAN])


def test_loggers_are_named_without_quotes():
    for text in ("run.loggers=[tensorboard,wandb]", 'run.loggers=["tensorboard", "wandb"]'):
        assert apply_overrides(RecipeConfig(), [text]).run.loggers == ("tensorboard", "wandb")
    assert apply_overrides(RecipeConfig(), ["run.loggers=wandb"]).run.loggers == ("wandb",)
    assert apply_overrides(RecipeConfig(), ["run.noise_scale=true"]).run.noise_scale is True
    with pytest.raises(RecipeError, match="takes true or false"):
        apply_overrides(RecipeConfig(), ["run.noise_scale=3"])


def test_a_missing_package_is_named_before_any_work(monkeypatch, capsys, text_folder, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else found(name, *rest)
    )
    output = tmp_path / "run"
    arguments = ["--data", f"{text_folder}/*.txt", "--output", str(output), "run.loggers=[wandb]"]
    assert main(arguments) == 2
    assert "the package wandb is not installed: pip install wandb" in capsys.readouterr().err
    assert not output.exists()
    with pytest.raises(RecipeError, match=r"unknown logger 'tensorbord'; nearest: tensorboard"):
        check_loggers(["tensorbord"])


RECORDS = [
    {"kind": "train", "step": 1, "loss": 4.0, "trust_ratios": {"w": 0.5, "b": 1.0}, "gradient_norm": None},
    {"kind": "train", "step": 2, "loss": 3.0, "trust_ratios": {"w": 0.25, "b": 1.0}},
    {"kind": "validation", "step": 2, "validation_loss": 3.5},
]


def test_scalars_of_a_record():
    assert dict(scalars(RECORDS[0])) == {"train/loss": 4.0, "trust_ratios/w": 0.5, "trust_ratios/b": 1.0}


def test_tensorboard_files_hold_the_records(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loggers = MetricLoggers(tmp_path, ["tensorboard"], {"optimizer": {"lr": 0.1}}, active=True)
    for record in RECORDS:
        loggers.write(record)
    loggers.close()
    read = events.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(1, 4.0), (2, 3.0)]
    assert [(e.step, e.value) for e in read.Scalars("trust_ratios/w")] == [(1, 0.5), (2, 0.25)]
    assert [(e.step, e.value) for e in read.Scalars("validation/validation_loss")] == [(2, 3.5)]
    assert read_metrics(tmp_path) == RECORDS  # metrics.jsonl always


def test_wandb_writes_offline_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # what earlier tests in this process have set up reads no environment any more
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for part in (RECORDS[:1], RECORDS[1:]):
        loggers = MetricLoggers(tmp_path, ["wandb"], {"optimizer": {"lr": 0.1}}, active=True)
        for record in part:
            loggers.write(record)
        loggers.close()
    identity = (tmp_path / "wandb_id.txt").read_text().strip()
    logs = sorted((tmp_path / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert logs  # one per process; of both here, if they began in the same second
    written = b"".join(log.read_bytes() for log in logs)
    assert b"train/loss" in written
    assert b"trust_ratios/w" in written
    assert len(read_metrics(tmp_path)) == len(RECORDS)


class Refusing:
    """A logger whose service refuses at a step, or at once."""

    def __init__(self, *arguments):
        if arguments:
            raise RuntimeError("no key")

    def write(self, record):
        raise KeyError("gone")


def test_whatever_a_logger_raises_all_ranks_are_told(tmp_path, monkeypatch):
    """It is raised on the first rank alone, while the others wait for what it has to say."""
    monkeypatch.setitem(metric_loggers.LOGGERS, "tensorboard", ("tensorboard", Refusing))
    config = dataclasses.replace(RecipeConfig(), run=RunConfig(loggers=("tensorboard",)))
    run = SimpleNamespace(config=config, first=0, last=1)
    with (
        pytest.raises(RecipeError, match=r"the metrics cannot be written \(rank 0: RuntimeError: no key\)"),
        open_records(run, tmp_path, Reporter()),
    ):
        pass
    records = Records(Refusing(), Reporter().training_bar(0, 1, 1))
    records.validation(1, 2.0, 0.5, 3.0)
    with pytest.raises(TrainingFailure, match=r"the metrics could not be written \(rank 0: KeyError: 'gone'\)"):
        records.require_written()


def test_other_ranks_log_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(metric_loggers.LOGGERS, "tensorboard", ("tensorboard", lambda *a: pytest.fail("was opened")))
    loggers = MetricLoggers(tmp_path, ["tensorboard"], {}, active=False)
    loggers.write(RECORDS[0])
    loggers.close()
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_are_logged(tmp_path):
    loggers = MetricLoggers(tmp_path, [], {}, active=True)
    loggers.write({"kind": "train", "step": 1, "loss": math.nan})
    loggers.close()
    assert math.isnan(read_metrics(tmp_path)[0]["loss"])
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1
    assert np.isnan(read_metrics(tmp_path)[0]["loss"])
