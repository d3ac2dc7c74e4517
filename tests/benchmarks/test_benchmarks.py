"""A smoke run of the measurements: that they run and count right, never how fast anything is."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional_collectives

from benchmarks import __main__ as command
from benchmarks import bases
from benchmarks.__main__ import main
from benchmarks.contenders import BASELINE, COPY, Contender, dense_contenders
from benchmarks.dense import measure_dense, time_steps
from benchmarks.memory import step_memory
from benchmarks.on_gpu.page import benchmarks_section, found_in
from benchmarks.shapes import SHAPES, equal_layers, make_parameters
from benchmarks.tables import PARTS, dense_table, markdown
from benchmarks.targets import BLOCK_BYTES, ratio, targets_section
from benchmarks.timing import Timing, alternate
from trustratio.integrations.audits.collectives import CollectiveCount


def test_smoke_run_measures_this_package_and_torch(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--smoke", "--device", "cpu", "bert-base", "layers", "parameters", "memory"])
    printed = capsys.readouterr().out
    for part in ("bert-base", "layers", "parameters", "memory"):
        assert PARTS[part][0] in printed
    for contender in ("trustratio LAMB (cpu)", "trustratio LARS (eager)", "torch AdamW foreach", "timm Lamb"):
        line = next(line for line in printed.splitlines() if line.startswith(f"| {contender} "))
        assert "Error" not in line


@pytest.mark.parametrize(("device", "told"), [("cpu", "cpu"), ("cuda", None)])
def test_deepspeed_is_kept_on_the_cpu_where_that_is_measured(
    device: str, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU it has to find its own FusedLamb."""
    monkeypatch.setenv("DS_ACCELERATOR", "")  # to be put back
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(command, "describe_machine", lambda device: {})
    monkeypatch.setattr(command, "copy_bandwidth", lambda *_: 1e9)
    monkeypatch.setattr(command, "measurements", lambda device, smoke: {})
    monkeypatch.setattr(command, "sharded", importlib.reload(command.sharded))
    main(["--smoke", "--device", device])
    assert os.environ.get("DS_ACCELERATOR") == told


@pytest.mark.slow
def test_smoke_run_of_several_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("deepspeed")
    main(["--smoke", "--device", "cpu", "zero", "rivals"])
    rows = {line.split(" | ")[0].strip("| "): line for line in capsys.readouterr().out.splitlines() if " | " in line}
    zero, lamb, timm = (rows[name] for name in ("ZeRO-2", "FSDP2 + trustratio LAMB", "FSDP2 + timm Lamb"))
    assert "not measured" not in zero  # the step alone has numbers
    assert lamb.split(" | ")[3] == "1"  # one all-reduce in a step
    assert int(timm.split(" | ")[3]) > 50


def test_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bert-huge"])
    assert "unknown parts bert-huge" in capsys.readouterr().err


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    timings = alternate({name: lambda name=name: calls.append(name) for name in "abc"}, "a", rounds=8, warmup=1)
    rounds = ["".join(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert len(rounds) == 9
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 2  # no contender always follows the same one
    assert all(len(timing.seconds) == 8 for timing in timings.values())


def test_ratio_is_taken_round_by_round() -> None:
    # The machine slows down threefold; the ratio does not change.
    summary = Timing([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]).summary()
    assert summary["ratio"] == summary["ratio_low"] == summary["ratio_high"] == 2.0
    assert summary["milliseconds"] == 4000.0


def test_preparation_comes_before_every_turn() -> None:
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in "ab"}
    alternate(contenders, "a", rounds=2, warmup=1, prepare=lambda name: calls.append(f"before {name}"))
    assert [f"before {name}" for name in calls[1::2]] == calls[::2]


def test_all_contenders_find_the_same_gradients() -> None:
    found: list[float] = []

    class Spoiler(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            found.append(sum(p.grad.double().sum().item() for p in self.param_groups[0]["params"]))
            for p in self.param_groups[0]["params"]:
                p.grad.mul_(2)

    parameters = make_parameters(equal_layers(2, 64))
    total = sum(p.grad.double().sum().item() for p in parameters)
    spoilers = [Contender(name, "adam", Spoiler, 0) for name in (BASELINE, "other")]
    time_steps(spoilers, parameters, rounds=2)
    assert len(found) == 2 + 2 * 4
    assert found == [total] * len(found)
    assert sum(p.grad.double().sum().item() for p in parameters) == total


def test_contenders_of_a_kind_have_the_same_weight_decay() -> None:
    # Without it some take no norms at all.
    for contender in dense_contenders("cpu"):
        if contender.compiles or contender.kind == "copy":
            continue
        try:
            optimizer = contender.make(make_parameters(equal_layers(2, 64)))
        except ImportError:
            continue
        (group,) = optimizer.param_groups  # type: ignore[attr-defined]
        assert group["weight_decay"] == (1e-4 if contender.kind == "lars" else 0.01), contender.name


def test_batches_repeat_what_the_others_are_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    contenders = [c for c in dense_contenders("cpu") if c.name.startswith(("torch", "trustratio"))]
    monkeypatch.setattr("benchmarks.dense.available_memory", lambda device: 1)
    part = measure_dense(equal_layers(2, 64), "cpu", 2, contenders)
    assert len(part["batches"]) == 3
    assert all({BASELINE, "trustratio LAMB (cpu)"} < set(rows) for rows in part["batches"])
    assert dense_table(part).count(f"| {BASELINE} |") == 3


def _row(kind: str, *each: float) -> dict[str, object]:
    return {"kind": kind, "ratio": 0.0, "each": list(each)}


def test_targets_are_judged_by_ratios_of_the_same_rounds() -> None:
    part = {
        "batches": [
            {BASELINE: _row("adam", 1, 10), "trustratio LAMB (cpu)": _row("lamb", 2, 20)},
            {"timm Lamb": _row("lamb", 12, 120), "trustratio LAMB (cpu)": _row("lamb", 2, 20)},
        ]
    }
    assert ratio(part, "trustratio LAMB (cpu)", BASELINE) == (2, 2, 2)
    assert ratio(part, "timm Lamb", BASELINE) is None  # never in one round
    lines = targets_section({"bert-base": part}).splitlines()
    assert "| CPU, BERT-base: LAMB / torch AdamW fused | ≤ 1.5 | 2.00 (2.00 to 2.00) | **short** |" in lines
    assert "| CPU, BERT-base: fastest peer LAMB / ours | ≥ 5 | 6.00 (6.00 to 6.00), timm Lamb | met |" in lines
    assert sum("not measured: no GPU in this run" in line for line in lines) == 3
    assert any(line.startswith("- CPU, BERT-base: LAMB / torch AdamW fused: LAMB has to move 40") for line in lines)


def test_targets_of_a_gpu() -> None:
    rows = {
        COPY: _row("copy", 9),
        "trustratio LAMB (triton)": _row("lamb", 50),
        BASELINE: _row("", 40),
    }
    lines = targets_section({"bert-large": {"batches": [rows]}}).splitlines()
    assert any("share of a copy's bandwidth | ≥ 0.85 | 0.90 (0.90 to 0.90) | met" in line for line in lines)
    assert any("torch AdamW fused / LAMB | ≥ 0.67 | 0.80 (0.80 to 0.80) | met" in line for line in lines)
    assert sum("not measured: no CPU in this run" in line for line in lines) == 4


def test_memory_of_a_step_does_not_grow_with_the_elements() -> None:
    layers, small, large = 20, 1 << 20, 1 << 23  # eager works through chunks: both are larger than one
    for contender in dense_contenders("cpu"):
        if contender.name.startswith(("trustratio", "torch AdamW foreach")):
            least, most = (step_memory(contender, equal_layers(layers, size), "cpu") for size in (small, large))
            growth = (most - least) / (large - small)
            assert (growth > BLOCK_BYTES) == (contender.name == "torch AdamW foreach"), contender.name


def test_shapes_are_berts() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"bert-base": {}, "bert-large": {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096}}
    for name, changes in sizes.items():
        with torch.device("meta"):
            model = transformers.BertForMaskedLM(
                transformers.BertConfig(num_attention_heads=16 if changes else 12, **changes)
            )
        assert sorted(SHAPES[name]) == sorted(tuple(p.shape) for p in model.parameters())


@pytest.mark.usefixtures("one_rank")
def test_collectives_and_bytes_are_counted() -> None:
    with CollectiveCount() as count:
        dist.all_reduce(torch.ones(3, dtype=torch.float64))
        dist.barrier()
    assert (count.total, count.bytes) == (1, 24)
    with CollectiveCount() as count:
        functional_collectives.all_reduce(torch.ones(3), "sum", dist.group.WORLD).sum()  # what DTensor calls
    assert (count.total, count.bytes) == (1, 12)


def test_committed_page_belongs_to_its_numbers() -> None:
    docs = Path(__file__).parents[2] / "docs"
    results, kills = (json.loads((docs / "results" / f"{name}.json").read_text()) for name in ("benchmarks", "kills"))
    gpu = benchmarks_section(found_in(docs / "results" / "gpu"))
    assert (docs / "benchmarks.md").read_text() == markdown(results, "results/benchmarks.json", kills, gpu)


def test_bases_are_timed_and_sorted() -> None:
    assert set(bases.processor_times([(4, 4)], 1)) == {"AdamW", "TrustRatio(AdamW)", "LAMB"}
    kinds = [bases.kind_in_time(one) for one in (torch.optim.AdamW, torch.optim.ASGD, torch.optim.Muon)]
    assert kinds == ["everywhere, any rate", "refused: copies of weights", "whole layers alone"]
    assert torch.optim.AdamW in bases.classes_of("torch.optim")
