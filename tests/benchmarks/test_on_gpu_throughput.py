"""The part `throughput`: its cases, its micro-batch, and what a device that is too small or too slow makes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks.on_gpu.part import Failed, Part
from benchmarks.on_gpu.parts import throughput
from benchmarks.on_gpu.runner.shares import SHARES
from benchmarks.on_gpu.table import NOT_MEASURED
from benchmarks.on_gpu.throughput import engine as engines
from benchmarks.on_gpu.throughput import measure
from benchmarks.on_gpu.throughput.cases import CASES, REAL
from benchmarks.on_gpu.throughput.engine import Bench, compiled_or_not, random_batch
from benchmarks.on_gpu.throughput.page import tables, verdict
from trustratio.recipes.configuration.overrides import with_model_size
from trustratio.recipes.configuration.presets import get_preset

GIB = 2**30


class PartWithTime(Part):
    """Says that so much time is left."""

    seconds = 1000.0

    def left(self) -> float:
        return self.seconds


def part_of(folder: Path, rehearse: bool = True) -> PartWithTime:
    return PartWithTime("throughput", folder, limit=1000.0, rehearse=rehearse)


def bench_of(size: str) -> Bench:
    config = with_model_size(get_preset("lamb-64k-32k"), size)
    engine: Any = SimpleNamespace(device=torch.device("cpu"), engine=SimpleNamespace(optimizer=Cleared()))
    return Bench(config, REAL, engine)


class Cleared:
    """In the place of DeepSpeed's optimizer."""

    times = 0

    def zero_grad(self) -> None:
        self.times += 1


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> throughput.Cases:
    """The cases, of engines that are never run."""
    monkeypatch.setattr(throughput, "build", lambda case, sizes: bench_of(case.size))
    monkeypatch.setattr(throughput, "memory_for", lambda device: 80 * GIB)
    found = throughput.Cases(part_of(tmp_path))
    found.sizes = REAL
    return found


def measured(sequences: float = 100.0, **more: Any) -> dict[str, Any]:
    return {"seconds": 1.0, "sequences_per_second": sequences, "micro_batch": 8, "planned_bytes": GIB, **more}


def test_every_model_length_and_way_is_a_case_the_most_wanted_first() -> None:
    assert len({case.name for case in CASES}) == len(CASES) == 8
    assert CASES[0].name == "large-128-compiled"


@pytest.mark.parametrize(("length", "micro"), [(128, 512), (512, 128)])
def test_the_micro_batch_is_the_plans(length: int, micro: int) -> None:
    bench = bench_of("large")
    plan = bench.plan(length, 80 * GIB)
    assert (plan.micro, plan.fits) == (micro, True)
    assert bench.plan(length, 40 * GIB).micro < micro
    assert bench.plan(length, 10_000 * GIB).micro == REAL.most_sequences
    assert 0.15 * REAL.most_sequences * 128 * 30528 < 2**31


def test_a_micro_batch_that_does_not_fit_is_halved(cases: throughput.Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def at(bench: Bench, case: Any, micro: int, length: int) -> dict[str, Any]:
        tried.append(micro)
        if micro > 128:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measured(micro_batch=micro)

    monkeypatch.setattr(cases, "at", at)
    found = cases.measure(CASES[0])
    assert tried == [512, 256, 128]
    assert (found["micro_batch"], found["too_large"]) == (128, [512, 256])
    engine: Any = cases.benches["large"].engine
    assert engine.engine.optimizer.times == 2


def test_one_that_never_fits_fails_and_the_next_is_measured(
    cases: throughput.Cases, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at(bench: Bench, case: Any, micro: int, length: int) -> dict[str, Any]:
        if case.size == "large":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measured()

    monkeypatch.setattr(cases, "at", at)
    cases.run()
    found = json.loads((cases.part.output / "throughput.json").read_text())["cases"]
    assert found["large-128-compiled"]["failed"].startswith("RuntimeError: out of memory at micro-batches of [512, 256")
    assert found["base-512-eager"]["sequences_per_second"] == 100.0
    said = verdict({"cases": found})
    assert "failed: large-128-compiled (RuntimeError: out of memory at micro-batches of [512, 256" in said
    assert said.endswith("), large-512-compiled, large-128-eager, large-512-eager")
    assert "out of memory at micro-batches" in tables({"cases": found})


def test_other_models_memory_is_left_out_of_the_plan(cases: throughput.Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "at", lambda *_: measured())
    alone = cases.measure(CASES[0])["planned_bytes"]
    cases.measure(CASES[1])
    assert set(cases.held) == {"base", "large"}
    assert cases.held["base"] < cases.held["large"] < alone
    cases.memory = int(cases.held["base"] + alone)
    assert cases.measure(CASES[0])["planned_bytes"] == alone + cases.held["base"]  # as the device's peak has both
    cases.memory -= 1
    assert cases.measure(CASES[0])["planned_bytes"] < alone


def test_what_has_no_time_is_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "memory_for", lambda device: 80 * GIB)
    part = part_of(tmp_path, rehearse=False)
    found = throughput.Cases(part)

    def measure_one(case: Any) -> dict[str, Any]:
        part.seconds = 2.0
        return measured()

    monkeypatch.setattr(found, "measure", measure_one)
    found.run()
    assert verdict(part.found).startswith(
        "BERT-large, 128 tokens: 100 sequences/s (0.17x NVIDIA's 580 on an A100); no time for base"
    )
    assert "large-512-eager" in verdict(part.found)


def test_a_case_is_begun_where_there_is_time_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "memory_for", lambda device: 80 * GIB)
    part = part_of(tmp_path, rehearse=False)
    found = throughput.Cases(part)
    monkeypatch.setattr(found, "measure", lambda case: measured())
    part.seconds = 20.0  # too short for compiling
    found.run()
    assert set(part.found["cases"]) == {case.name for case in CASES if not case.compiled}
    part.seconds = 1.0 + throughput.RESERVE + throughput.FIRST_SECONDS[True]
    found.run()
    assert len(part.found["cases"]) == len(CASES)
    assert SHARES["throughput"].least > 15.0 + part.seconds  # after the imports


@pytest.fixture
def without_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "start", lambda: None)
    monkeypatch.setattr(throughput.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(throughput, "memory_for", lambda device: 80 * GIB)


@pytest.mark.usefixtures("without_a_group")
def test_where_nothing_was_measured_the_part_has_failed(tmp_path: Path) -> None:
    part = part_of(tmp_path, rehearse=False)
    part.seconds = 5.0
    with pytest.raises(Failed, match=r"^no time for large-128-compiled, base-128-compiled"):
        throughput.run(part)
    assert tables(part.found) == NOT_MEASURED


@pytest.mark.usefixtures("without_a_group")
def test_a_case_that_fails_fails_the_part_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure_one(cases: throughput.Cases, case: Any) -> dict[str, Any]:
        if case.name == "base-128-eager":
            raise ValueError("no such kernel")
        return measured()

    monkeypatch.setattr(throughput.Cases, "measure", measure_one)
    with pytest.raises(Failed, match=r"failed: base-128-eager \(ValueError: no such kernel\)$"):
        throughput.run(part_of(tmp_path))
    monkeypatch.setattr(throughput.Cases, "measure", lambda *_: measured())
    assert throughput.run(part_of(tmp_path)).startswith(
        "toy large, 16 tokens: 100 sequences/s; toy base, 16 tokens: 100"
    )


@pytest.mark.parametrize(("share", "listed"), [(0.3, True), (0.6, False), (None, True)])
def test_kernels_are_listed_where_the_goal_is_missed(
    cases: throughput.Cases, monkeypatch: pytest.MonkeyPatch, share: float | None, listed: bool
) -> None:
    bench = bench_of("base")
    bench.engine.set_batch_plan = lambda plan: None
    monkeypatch.setattr(Bench, "batches", lambda self, micro, length: [])
    monkeypatch.setattr(throughput, "measure_updates", lambda *_: {"model_flops_per_second": 1e12 * (share or 1.0)})
    monkeypatch.setattr(throughput, "peak_of", lambda *_: None if share is None else 1e12)
    monkeypatch.setattr(throughput, "kernels", lambda *_: ["a kernel"])
    found = cases.at(bench, CASES[1], 4, 128)
    assert found["utilisation"] == share
    assert ("kernels" in found) is listed


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUPTI")])
def test_a_profiler_that_fails_costs_no_numbers(
    cases: throughput.Cases, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    bench = bench_of("base")
    bench.engine.set_batch_plan = lambda plan: None
    monkeypatch.setattr(Bench, "batches", lambda self, micro, length: [])
    monkeypatch.setattr(throughput, "measure_updates", lambda *_: {"model_flops_per_second": 1e12, "seconds": 1.0})
    monkeypatch.setattr(throughput, "kernels", fail)
    found = cases.at(bench, CASES[1], 4, 128)
    assert found["seconds"] == 1.0
    assert found["kernels_missing"] == f"{type(error).__name__}: {error}"


def test_times_of_kernels_are_counted_once() -> None:
    """The host's events have the time of what they launched, too, and so have ranges."""
    events = [
        SimpleNamespace(
            key="aten::mm", device_type=DeviceType.CPU, self_device_time_total=60.0, self_cpu_time_total=5.0, count=1
        ),
        SimpleNamespace(
            key="gemm", device_type=DeviceType.CUDA, self_device_time_total=60.0, self_cpu_time_total=0.0, count=1
        ),
        SimpleNamespace(
            key="norm", device_type=DeviceType.CUDA, self_device_time_total=20.0, self_cpu_time_total=0.0, count=4
        ),
        SimpleNamespace(
            key="Torch-Compiled Region: 0/0",
            device_type=DeviceType.CUDA,
            self_device_time_total=80.0,
            self_cpu_time_total=0.0,
            count=1,
            is_user_annotation=True,
        ),
        SimpleNamespace(
            key="Optimizer.step#LAMB.step", device_type=DeviceType.CUDA, self_device_time_total=20.0, count=1
        ),
    ]
    on_gpu = measure.most_time(events, on_gpu=True)
    assert [(row["name"], row["share"], row["calls"]) for row in on_gpu] == [("gemm", 0.75, 1), ("norm", 0.25, 4)]
    assert measure.most_time(events[:3], on_gpu=False)[0] == {
        "name": "aten::mm",
        "milliseconds": 0.005,
        "share": 1.0,
        "calls": 1,
    }
    assert measure.most_time([], on_gpu=True) == []


def test_memory_is_asked_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: asked.append(device))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (50, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 20)
    device = torch.device("cuda", 0)
    measure.reset_peak(device)
    assert asked == [device]
    assert measure.peak_memory(device) == 7
    assert engines.memory_for("cuda") == 70
    measure.reset_peak(torch.device("cpu"))
    assert measure.peak_memory(torch.device("cpu")) is None
    assert len(asked) == 1


def test_updates_are_timed_after_warming_up(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, done = bench_of("base"), []
    monkeypatch.setattr(measure, "accumulate_step", lambda *_, **__: done.append(1))
    batch = random_batch(4, 32, 100, 0.5, torch.device("cpu"))
    found = measure.measure_updates(bench, [batch, batch])
    assert len(done) == 2 + found["updates"]
    assert found["sequences_per_second"] == pytest.approx(8 / found["seconds"])
    assert found["model_flops_per_second"] == pytest.approx(bench.flops([batch, batch]) / found["seconds"])


def test_random_batches_predict_what_they_show() -> None:
    torch.manual_seed(0)
    batch = random_batch(8, 32, 100, 0.15, torch.device("cpu"))
    assert batch.input_ids.shape == (8, 32)
    assert int(batch.input_ids.min()) >= 5
    assert 0 < len(batch.positions) < 80
    assert torch.equal(batch.labels, batch.input_ids.reshape(-1)[batch.positions])


@pytest.mark.parametrize("compiled", [True, False])
def test_a_compiled_function_is_run_as_asked(compiled: bool) -> None:
    graphs = []
    torch._dynamo.reset()
    function = torch.compile(lambda x: x + 1, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    with compiled_or_not(compiled):
        assert function(torch.ones(2)).tolist() == [2.0, 2.0]
    assert len(graphs) == compiled


def test_tables_hold_every_case() -> None:
    kernel = {"name": "gemm", "milliseconds": 2.0, "share": 0.5, "calls": 3}
    found = {
        "cases": {"large-128-compiled": measured(1160.0, utilisation=0.4, peak_memory_bytes=GIB, kernels=[kernel])}
    }
    assert "| large | 128 | yes | 8 | 1,160 | 580 | 40.0% | 1.00 GiB | 1.00 GiB |" in tables(found)
    assert "| base | 512 | no |  | not measured |  |  |  |  |" in tables(found)
    assert "| `gemm` | 2.00 | 50.0% | 3 |" in tables(found)
    assert "(2.00x NVIDIA's 580 on an A100), MFU 40%" in verdict(found)
    assert tables({}) == NOT_MEASURED


def test_a_toy_is_called_one_and_compared_with_nothing() -> None:
    found = {"toy": True, "cases": {"large-128-compiled": measured(1160.0)}}
    assert verdict(found).startswith("toy large, 16 tokens: 1,160 sequences/s; no time for ")
    assert "| large | 128 | yes | 8 | 1,160 |  |  |  | 1.00 GiB |" in tables(found)
    for text in (verdict(found), tables(found)):
        assert "580" not in text
        assert "BERT-" not in text


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "benchmarks.on_gpu.part", "throughput", "--output", str(tmp_path), "--limit", "900"]
    subprocess.run([*line, "--rehearse"], check=True)
    found = json.loads((tmp_path / "throughput.json").read_text())
    assert set(found["cases"]) == {case.name for case in CASES}
    assert all(case["kernels"] for case in found["cases"].values())
    assert "failed" not in found["verdict"]
    assert "no time" not in found["verdict"]
