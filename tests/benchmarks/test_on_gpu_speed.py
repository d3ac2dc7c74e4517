"""The part "speed" of a run on a GPU: its clocks with a stand-in for torch.cuda, its counts, and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks.contenders import BASELINE, COPY, Contender
from benchmarks.on_gpu.children.limited import Child
from benchmarks.on_gpu.part import Failed, Part
from benchmarks.on_gpu.parts import speed as part_of_speed
from benchmarks.on_gpu.speed import builds
from benchmarks.on_gpu.speed.contenders import BYTES, IN_MICRO_BATCHES, OURS, with_extensions, without_extensions
from benchmarks.on_gpu.speed.devices import Cpu, Cuda, count_on_device
from benchmarks.on_gpu.speed.launches import count_on_cpu
from benchmarks.on_gpu.speed.measuring import Rounds, measure_batch, measure_graph
from benchmarks.on_gpu.speed.page import has_lamb, tables, verdict
from benchmarks.on_gpu.speed.subject import Subject
from benchmarks.timing import alternate
from trustratio.optimizers import LAMB

LAMB_ROW = "trustratio LAMB (triton)"
ROOT = Path(__file__).parents[2]


class FakeCuda:
    """In place of torch.cuda: writes down what is called; a cycle takes a nanosecond, and other work a millisecond."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.now = 0.0

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def _sleep(self, cycles: int) -> None:
        self.calls.append(f"sleep {cycles}")
        self.now += cycles * 1e-9

    def work(self) -> None:
        self.calls.append("work")
        self.now += 1e-3

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace()

        def record() -> None:
            self.calls.append("record")
            event.at = self.now

        event.record = record
        event.elapsed_time = lambda other: 1e3 * (other.at - event.at)
        return event

    def Stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: self.calls.append("side waits"))

    def current_stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: self.calls.append("main waits"))

    @contextmanager
    def stream(self, stream: Any) -> Any:
        self.calls.append("on the side")
        yield

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.calls.append("replay"))

    @contextmanager
    def graph(self, graph: Any) -> Any:
        self.calls.append("capture")
        yield
        self.calls.append("captured")


def test_a_queued_step_is_timed_behind_work_that_lasts() -> None:
    api = FakeCuda()
    device = Cuda(api)
    assert device.queued(api.work, 2e-3) == pytest.approx(1e-3)
    api.calls.clear()
    assert device.queued(api.work, 2e-3) == pytest.approx(1e-3)  # how long a cycle takes is known by now
    assert api.calls == ["synchronize", "sleep 2000000", "record", "work", "record", "synchronize"]


def test_a_step_alone_begins_on_an_idle_device() -> None:
    api = FakeCuda()
    assert Cuda(api).alone(api.work) == pytest.approx(1e-3)
    assert api.calls == ["synchronize", "record", "work", "record", "synchronize"]


def test_the_host_does_not_wait_for_the_device() -> None:
    api = FakeCuda()
    assert Cuda(api).host(lambda: time.sleep(0.01)) >= 0.01
    assert api.calls == ["synchronize"]


def test_a_step_is_captured_after_steps_on_another_stream() -> None:
    api = FakeCuda()
    replay = Cuda(api).capture(api.work)
    warm_up = ["side waits", "on the side", "work", "work", "work", "main waits"]
    assert api.calls == [*warm_up, "capture", "work", "captured"]
    replay()
    assert api.calls[-1] == "replay"


def _event(name: str, kind: DeviceType = DeviceType.CUDA, **more: Any) -> Any:
    return SimpleNamespace(name=name, device_type=kind, **more)


def test_kernels_are_counted_without_ranges_and_copies() -> None:
    events = [
        *(_event("adam"), _event("adam"), _event("_fold"), _event("Memcpy HtoD (Pinned -> Device)")),
        *(_event("Optimizer.step#LAMB.step"), _event("mine", is_user_annotation=True)),
        *(_event("aten::zeros", DeviceType.CPU), _event("Memset (Device)")),
    ]
    assert count_on_device(events) == {"kernels": 3, "copies_and_fills": 2, "by_name": {"adam": 2, "_fold": 1}}
    assert "saw nothing" in count_on_device([_event("aten::zeros", DeviceType.CPU)])["missing"]


def test_launches_and_operations_are_counted_on_a_cpu() -> None:
    pytest.importorskip("triton")
    tensor = torch.ones(3)
    assert count_on_cpu(lambda: tensor.add_(1).mul_(2)) == {"kernels": 0, "tensor_operations": 2, "by_name": {}}
    parameter = torch.nn.Parameter(torch.ones(4, 3))
    parameter.grad = torch.ones(4, 3)
    optimizer = LAMB([parameter], implementation="triton")
    for _ in range(2):
        optimizer.step()
    counted = count_on_cpu(optimizer.step)
    assert counted["by_name"]["adam"] == 2  # measured and applied
    assert counted["kernels"] == sum(counted["by_name"].values())
    assert counted["tensor_operations"] > 0


def test_what_the_interpreter_does_for_a_kernel_is_no_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda executor: torch.ones(3).add_(1))
    launch = object.__new__(interpreter.GridExecutor)
    launch.fn = SimpleNamespace(__name__="adam")
    counted = count_on_cpu(lambda: (launch(), torch.ones(3), launch()))
    assert counted == {"kernels": 2, "tensor_operations": 1, "by_name": {"adam": 2}}


def test_gradients_are_put_back_where_they_were() -> None:
    subject = Subject([(4, 3), (3,)], "cpu")
    kept = [p.grad.clone() for p in subject.parameters if p.grad is not None]
    places = [p.grad.data_ptr() for p in subject.parameters if p.grad is not None]
    shown: list[torch.Tensor] = []
    subject.parameters[0].register_hook(lambda g: shown.append(g.clone()))
    for name in ("other", *IN_MICRO_BATCHES):
        for p in subject.parameters:
            p.grad.fill_(7)  # type: ignore[union-attr]
        subject.prepare(name)
        for p, gradient, place in zip(subject.parameters, kept, places, strict=True):
            torch.testing.assert_close(p.grad, gradient)
            assert p.grad is not None
            assert p.grad.data_ptr() == place
    assert len(shown) == 2  # micro-batches, which differ
    assert not torch.equal(*shown)
    assert [len(group["params"]) for group in subject.groups()] == [1, 1]
    assert subject.groups()[1]["weight_decay"] == 0.0


class Steps:
    def __init__(self, parameters: Any) -> None:
        self.count = 0

    def step(self) -> None:
        self.count += 1


def _contenders() -> list[Contender]:
    def broken(parameters: Any) -> Any:
        raise ImportError("not here")

    makers = {BASELINE: Steps, COPY: Steps, LAMB_ROW: Steps, "broken": broken}
    return [Contender(name, "lamb", make, 0) for name, make in makers.items()]


class Clockwork(Cpu):
    """Every step takes 10 ms of the device and 2 of the host, and a copy of the weights 2 ms."""

    def __init__(self) -> None:
        self.ahead: list[float] = []

    def host(self, work: Any) -> float:
        work()
        return 2e-3

    def alone(self, work: Any) -> float:
        work()
        return 12e-3

    def queued(self, work: Any, ahead: float) -> float:
        self.ahead.append(ahead)
        work()
        return 2e-3 if work.__self__ is self.copy else 10e-3

    copy: Any = None


def test_a_batch_has_times_shares_and_reasons() -> None:
    told: list[int] = []
    device = Clockwork()
    contenders = _contenders()

    def make_copy(parameters: Any) -> Any:
        device.copy = Steps(parameters)
        return device.copy

    contenders[1] = Contender(COPY, "copy", make_copy, 0)
    rows = measure_batch(
        Subject([(4, 3)], "cpu"), contenders, "cpu", device, Rounds(3, 1), lambda rows: told.append(len(rows))
    )
    row = rows[LAMB_ROW]
    assert row["milliseconds"] == pytest.approx(10.0)
    assert row["alone"]["milliseconds"] == pytest.approx(12.0)
    assert row["host"]["milliseconds"] == pytest.approx(2.0)
    assert row["copied_bytes_per_parameter"] == pytest.approx(40.0)  # five times a copy's
    assert row["share_of_copy"] == pytest.approx(1.0)
    assert row["launches"]["kernels"] == 0
    assert row["extra_bytes"] == 0
    assert rows["broken"]["missing"] == "ImportError: not here"
    assert device.ahead == [pytest.approx(3e-3)] * len(device.ahead)  # longer than the host needs
    assert len(told) > 10  # whoever stops it later, something is kept


def test_a_batch_and_a_graph_with_a_devices_clocks(recwarn: pytest.WarningsRecorder) -> None:
    pytest.importorskip("triton")
    api = FakeCuda()

    class Working(Steps):
        def step(self) -> None:
            api.work()

    contenders = [Contender(name, "lamb", Working, 0) for name in (BASELINE, COPY, LAMB_ROW)]
    subject = Subject([(4, 3), (3,)], "cpu")
    rows = measure_batch(subject, contenders, "cpu", Cuda(api), Rounds(2, 1), lambda rows: None)
    assert rows[LAMB_ROW]["milliseconds"] == pytest.approx(1.0)
    assert rows[LAMB_ROW]["alone"]["milliseconds"] == pytest.approx(1.0)
    assert rows[LAMB_ROW]["share_of_copy"] == pytest.approx(5.0)  # as fast as a copy of a fifth
    assert "saw nothing" in rows[LAMB_ROW]["launches"]["missing"]  # as there is no device
    graph = measure_graph(LAMB_ROW, subject, "cpu", Cuda(api), Rounds(1, 0))
    assert set(graph) == {"milliseconds", "host_milliseconds"}
    assert api.calls.count("replay") == 2


def test_a_step_that_cannot_be_captured_says_why() -> None:
    pytest.importorskip("triton")

    class Refusing(Clockwork):
        def capture(self, work: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

    found = measure_graph(LAMB_ROW, Subject([(4, 3)], "cpu"), "cpu", Refusing(), Rounds(1, 0))
    assert found == {"missing": "RuntimeError: operation not permitted when stream is capturing"}


def test_a_clock_says_what_counts() -> None:
    timings = alternate({"a": lambda: None}, "a", 3, clock=lambda work: 5.0)
    assert timings["a"].seconds == [5.0, 5.0, 5.0]


# Builds -------------------------------------------------------------------------------------------------------------

PROGRAMS = {
    "FusedAdamBuilder": "pass",
    "FusedLambBuilder": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])",
}


def test_builds_end_at_their_limit_with_all_they_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(builds, "python", lambda module, builder: [sys.executable, "-c", PROGRAMS[builder]])
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "elsewhere")
    running = builds.Builds(tmp_path, 60.0, tmp_path / "build")
    hanging = running.running["DeepSpeed FusedLamb"].process
    while not (started := psutil.Process(hanging.pid).children()):
        time.sleep(0.02)
    outcomes = running.finish(20.0 if running.running["DeepSpeed FusedAdam"].wait() else 0.0)
    assert outcomes["DeepSpeed FusedAdam"] == ""
    assert outcomes["DeepSpeed FusedLamb"].startswith("not finished after")
    psutil.wait_procs(started, timeout=10)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in started)
    assert [c.name for c in with_extensions(outcomes)][-1] == "DeepSpeed FusedAdam"
    assert with_extensions(dict.fromkeys(outcomes, "status 1")) == []


def test_a_program_that_fails_says_how_it_ended(tmp_path: Path) -> None:
    def outcome(program: str) -> str:
        return Child.start([sys.executable, "-c", program], 60, tmp_path / f"{len(program)}.log").wait()

    assert outcome("raise SystemExit('no compiler')") == "status 1: no compiler"
    assert outcome("import os; os.kill(os.getpid(), 9)") == "SIGKILL: it wrote nothing"


def test_all_of_ours_have_their_bytes() -> None:
    batches = [[contender.name for contender in batch] for batch in without_extensions()]
    assert all(names[:2] == [COPY, BASELINE] for names in batches)
    assert LAMB_ROW in batches[0]
    assert set(OURS) <= {*batches[0], *batches[1]} & set(BYTES)


# The part -----------------------------------------------------------------------------------------------------------


def test_a_case_that_fails_takes_nothing_from_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_of_speed, "measure_batch", lambda *_: 1 / 0)
    monkeypatch.setattr(part_of_speed, "measure_graph", lambda *_: {"milliseconds": 1.0, "host_milliseconds": 1.0})
    part = Part("speed", tmp_path, 60.0, rehearse=True)
    cases = part_of_speed._Cases(part)
    cases.measure(SimpleNamespace(finish=lambda seconds: {}))  # type: ignore[arg-type]
    found = json.loads((tmp_path / "speed.json").read_text())
    batches = [f"{what} at {size}" for what in ("lamb", "others") for size in ("bert-base", "bert-large")]
    assert found["failed"] == dict.fromkeys(batches, "ZeroDivisionError: division by zero")
    assert len(found["sizes"]["bert-base"]["graphs"]) == len(OURS)
    assert found["verdict"] == "LAMB was not measured; in a graph 1.00 ms there, host 1.00 ms; 4 failed"


def test_a_part_without_lambs_times_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part_of_speed, "Builds", lambda *_: SimpleNamespace(end=lambda: None))
    for variable in ("DS_ACCELERATOR", "TRITON_INTERPRET"):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))  # the part sets them for its own process
    with pytest.raises(Failed, match="LAMB was not measured; 9 did not fit"):
        part_of_speed.run(Part("speed", tmp_path, 3.0, rehearse=True))
    assert has_lamb(_found())


def test_what_is_built_is_measured_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[int, list[str]]] = []

    def measure(subject: Subject, contenders: list[Contender], *_: Any) -> None:
        measured.append((subject.elements, [contender.name for contender in contenders]))

    monkeypatch.setattr(part_of_speed, "measure_batch", measure)
    cases = part_of_speed._Cases(Part("speed", tmp_path, 60.0, rehearse=True))
    outcomes = {"DeepSpeed FusedAdam": "not finished after 3 s", "DeepSpeed FusedLamb": ""}
    cases._extensions(SimpleNamespace(finish=lambda seconds: outcomes))  # type: ignore[arg-type]
    assert [names for _, names in measured] == [[COPY, BASELINE, LAMB_ROW, "DeepSpeed FusedLamb"]] * 2
    assert measured[0][0] > measured[1][0]  # the larger one first, which the verdict is about
    assert cases.part.found["builds"] == outcomes


def test_what_is_not_built_is_listed(tmp_path: Path) -> None:
    cases = part_of_speed._Cases(Part("speed", tmp_path, 60.0, rehearse=True))
    cases.sizes.update(_found()["sizes"])
    outcomes = {"DeepSpeed FusedAdam": "not finished after 60 s", "DeepSpeed FusedLamb": "status 1: no nvcc"}
    cases._extensions(SimpleNamespace(finish=lambda seconds: outcomes))  # type: ignore[arg-type]
    assert "not there: DeepSpeed FusedAdam, DeepSpeed FusedLamb, apex FusedLAMB" in verdict(cases.part.found)
    for outcome in outcomes.values():
        assert tables(cases.part.found).count(f"| not measured | not built: {outcome} |") == 2 - (outcome[0] == "s")


def test_a_toy_is_called_one_and_compared_with_nothing() -> None:
    found = {**_found(), "toy": True}
    assert verdict(found) == (
        "LAMB 2.00 ms at a toy for bert-large; host 0.90 ms; in a graph 0.45 ms there, host 0.01 ms; "
        "not there: apex FusedLAMB"
    )
    assert "BERT-" not in verdict(found) + tables(found)


def test_a_step_that_asks_the_host_is_in_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = IN_MICRO_BATCHES
    assert "on the host" in measure_graph(name, *[None] * 4)["missing"]  # type: ignore[arg-type]


def test_a_program_that_does_not_go_is_not_waited_for(tmp_path: Path) -> None:
    """It waits for a driver, and no signal ends it."""
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
    waited: list[float] = []

    def wait(timeout: float) -> int:
        waited.append(timeout)
        raise subprocess.TimeoutExpired("it", timeout)

    process: Any = SimpleNamespace(pid=started.pid, wait=wait, poll=lambda: None)
    assert Child(process, 0.0, tmp_path / "log").outcome() == "not finished after 0 s"
    assert waited
    assert started.wait(20) == -9


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    part = Part("speed", tmp_path, 3.0, rehearse=True)
    part_of_speed._Cases(part).measure(SimpleNamespace(finish=lambda seconds: {}))  # type: ignore[arg-type]
    assert len(part.found["did_not_fit"]) == 4 + len(OURS) + 1
    assert part.found["did_not_fit"][0].startswith("lamb at bert-base: needs 5 s")
    assert tables(part.found) == "not measured"


def _row(milliseconds: float, host: float, ratio: float = 1.0, **more: Any) -> dict[str, Any]:
    times = {"milliseconds": milliseconds, "milliseconds_low": milliseconds, "milliseconds_high": milliseconds}
    others = {"alone": {"milliseconds": milliseconds}, "host": {"milliseconds": host}, "each": [milliseconds]}
    return {"kind": "lamb", "ratio": ratio, **times, **others, **more}


def _found() -> dict[str, Any]:
    main = {
        BASELINE: _row(1.0, 0.2),
        LAMB_ROW: _row(2.0, 0.9, 2.0, share_of_copy=0.874, bytes_per_parameter=40, launches={"kernels": 6}),
        "apex FusedLAMB": {"kind": "lamb", "missing": "ModuleNotFoundError: No module named 'apex'\nmore"},
    }
    extensions = {LAMB_ROW: _row(2.0, 0.9), "DeepSpeed FusedLamb": _row(6.2, 5.0)}
    size = {"elements": 1000, "layers": 10, "groups": 2, "batches": [main, extensions], "graphs": {}}
    base = {**size, "batches": [{LAMB_ROW: _row(0.5, 0.6)}]}
    base["graphs"] = {LAMB_ROW: {"milliseconds": 0.45, "host_milliseconds": 0.01}}
    return {"machine": {"device": "a device", "torch": "2"}, "sizes": {"bert-large": size, "bert-base": base}}


def test_the_verdict_is_made_of_what_was_measured() -> None:
    assert verdict(_found()) == (
        "LAMB 2.00 ms at BERT-large: 87 % of copy bandwidth, 0.50x AdamW fused, 3.10x FusedLamb; host 0.90 ms; "
        "bound by Python at BERT-base: LAMB 0.60 > 0.50 ms; in a graph 0.45 ms there, host 0.01 ms; "
        "not there: apex FusedLAMB"
    )
    found = _found()
    found["sizes"]["bert-base"]["batches"][0][LAMB_ROW]["host"]["milliseconds"] = 0.5
    assert "host <= device at BERT-base" in verdict(found)
    assert verdict({}) == "LAMB was not measured"


def test_the_tables_have_every_row() -> None:
    written = tables(_found())
    assert f"| {LAMB_ROW} | 2.00 (2.00 to 2.00) | 2.00 | 40 | 0.87 | 2.00 | 0.90 | 6 | – |" in written
    assert "| apex FusedLAMB | not measured | ModuleNotFoundError: No module named 'apex' |" in written
    assert "BERT-large: 1,000 parameters in 10 layers and 2 groups." in written
    widths = {line.count(" | ") for line in written.splitlines() if line.startswith("| ")}
    assert len(widths) == 1
    assert tables({}) == "not measured"


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.on_gpu.part", "speed", "--output", str(tmp_path), "--rehearse"]
    subprocess.run([*command, "--limit", "600"], cwd=ROOT, check=True)
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["failed"] == {}
    assert found["did_not_fit"] == []
    assert found["verdict"].startswith("LAMB ")
    for name in OURS:
        graph = found["sizes"]["bert-base"]["graphs"][name]
        assert ("missing" in graph) if name in IN_MICRO_BATCHES else graph["milliseconds"] > 0
        for size in found["sizes"].values():
            row = next(batch[name] for batch in size["batches"] if name in batch)
            assert row["launches"]["kernels"] >= 3  # two groups together
            assert {"alone", "host", "share_of_copy", "extra_bytes"} <= set(row)
    assert set(found["builds"]) == set(builds.BUILDERS)
    assert tables(found).count("trustratio LAMB (triton)") == 2
