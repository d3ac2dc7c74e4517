"""A smoke run of the measurements: that they run and count right, never how fast anything is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional_collectives

from benchmarks.__main__ import main
from benchmarks.collectives import CollectiveCount
from benchmarks.shapes import SHAPES
from benchmarks.tables import PARTS, markdown
from benchmarks.timing import Timing, alternate


def test_smoke_run_measures_this_package_and_torch(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--smoke", "--device", "cpu", "bert-base", "layers", "parameters", "memory"])
    printed = capsys.readouterr().out
    for part in ("bert-base", "layers", "parameters", "memory"):
        assert PARTS[part][0] in printed
    for contender in ("trustratio LAMB (cpu)", "trustratio LARS (eager)", "torch AdamW foreach", "timm Lamb"):
        line = next(line for line in printed.splitlines() if line.startswith(f"| {contender} "))
        assert "Error" not in line


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


def test_shapes_are_berts() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"bert-base": {}, "bert-large": {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096}}
    for name, changes in sizes.items():
        with torch.device("meta"):
            model = transformers.BertForMaskedLM(
                transformers.BertConfig(num_attention_heads=16 if changes else 12, **changes)
            )
        assert sorted(SHAPES[name]) == sorted(tuple(p.shape) for p in model.parameters())


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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
    assert (docs / "benchmarks.md").read_text() == markdown(json.loads((docs / "benchmarks.json").read_text()))
