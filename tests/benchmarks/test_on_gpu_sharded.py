"""The part "sharded" of a run on a GPU: what is judged exact, what becomes of ranks that hang, and what it says."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.on_gpu.part import Failed, Part
from benchmarks.on_gpu.parts import sharded as part_of_sharded
from benchmarks.on_gpu.sharded import crews, sanitizer
from benchmarks.on_gpu.sharded.crews import RunningCrew
from benchmarks.on_gpu.sharded.page import is_good, tables, verdict
from benchmarks.on_gpu.sharded.sanitizer import Memcheck
from benchmarks.on_gpu.sharded.settings import BOUND, CREWS, Crew, Setting
from trustratio.optimizers import OPTIMIZERS

ROOT = Path(__file__).parents[2]


# What is judged -----------------------------------------------------------------------------------------------------


def _answers(ranks: int, spoil: Callable[[dict[str, Any], int], None]) -> dict[str, Any]:
    """What `judge` says of ranks that have the reference's numbers, but for what `spoil` does to each."""
    pytest.importorskip("deepspeed")
    from benchmarks.on_gpu.sharded.training import judge
    from tests.distributed.exactness import expected

    case = Setting("", "lamb", 1).case(rehearse=True)
    answers = []
    for rank in range(ranks):
        weights, ratios = expected(case, ranks)
        answer = {"weights": weights, "masters": {}, "ratios": ratios, "collectives": [2, 1, 1, 1]}
        spoil(answer, rank)
        answers.append(answer)
    return judge(case, answers)


def test_the_references_numbers_are_exact() -> None:
    found = _answers(2, lambda answer, rank: None)
    assert found["exact"]
    assert found["error"] == found["ratio_error"] == 0.0
    assert found["collectives"] == [1]  # of the second step, which has two calls


def _move(answer: dict[str, Any], rank: int, by: float, layer: str = "conv") -> None:
    if rank == 1:
        answer["weights"][layer] = answer["weights"][layer] + by


def test_weights_of_any_rank_that_are_off_are_not_exact() -> None:
    for by in (1e-3, float("nan")):
        found = _answers(2, lambda answer, rank, by=by: _move(answer, rank, by))  # type: ignore[misc]
        assert not found["exact"]
        assert found["layer"] == "conv"
        assert not found["error"] <= BOUND


def test_ratios_that_are_off_or_missing_are_not_exact() -> None:
    def scale(answer: dict[str, Any], rank: int) -> None:
        answer["ratios"][-1]["dense"] *= 1 + 1e-5

    def forget(answer: dict[str, Any], rank: int) -> None:
        del answer["ratios"][0]["dense"]

    def disagree(answer: dict[str, Any], rank: int) -> None:
        answer["ratios"][-1]["dense"] *= 1 + 1e-9 * rank

    for spoil in (scale, forget, disagree):
        assert not _answers(2, spoil)["exact"], spoil


@pytest.mark.usefixtures("one_rank")
def test_one_rank_sends_its_sums_to_itself() -> None:
    pytest.importorskip("deepspeed")
    from benchmarks.on_gpu.sharded.training import sending_to_itself
    from trustratio.integrations.audits.collectives import CollectiveCount
    from trustratio.optimizers.sharding.layout import Layer, Layout, Shard

    p = torch.nn.Parameter(torch.ones(3))
    assert dist.group.WORLD is not None
    reductions = ((dist.group.WORLD, (0,)),)
    layout = Layout("test", (p,), (0,), (Layer("layer", (3,), 0, p),), (Shard(0, 0, 0, 3),), reductions)
    sums = torch.tensor([[5.0]], dtype=torch.float64)
    with CollectiveCount() as before:
        layout.reduce(sums)
    with sending_to_itself(), CollectiveCount() as inside:
        layout.reduce(sums)
        layout.reduce(sums, largest=True)
    with CollectiveCount() as after:
        layout.reduce(sums)
    assert (before.total, inside.total, after.total) == (0, 2, 0)
    assert sums.item() == 5.0
    assert layout.copies.item() == 1.0


@pytest.mark.usefixtures("one_rank")
def test_two_ranks_on_one_device_shard_over_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    from benchmarks.on_gpu.sharded.training import mesh_of_all

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert mesh_of_all("cpu").get_group() is dist.group.WORLD


def test_settings_have_names_and_optimizers() -> None:
    for crew in CREWS:
        names = [setting.name for setting in crew.settings]
        assert len(set(names)) == len(names)
        assert {setting.optimizer for setting in crew.settings} <= set(OPTIMIZERS)
        assert 0 < crew.rehearsed <= len(names)


# Ranks that hang ----------------------------------------------------------------------------------------------------

RANK = """
import json, os, sys, time
crew, rank, device, answers, *names = sys.argv[1:]
def tell(**what):
    print(json.dumps(what), file=open(answers, "a"))
def told(path):
    return open(path).read() if os.path.exists(path) else ""
if crew == "does not start":
    sys.exit("no device")
tell(ready=True)
for name in names:
    tell(began=name)
    if name == "hangs" and rank == "1":
        time.sleep(99)
    if name == "dies" and rank == "1":
        os.abort()
    if name in ("hangs", "dies"):
        time.sleep(99)
    if rank == "0":
        tell(setting=name, found={"error": 0.0, "tries": len(names)})
    while '"setting": "%s"' % name not in told(answers.replace("rank1", "rank0")):  # as the ranks' barrier does
        time.sleep(0.01)
"""


def _run_crew(name: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunningCrew:
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    monkeypatch.setattr(crews, "python", lambda module, *arguments: [sys.executable, str(program), *arguments])
    monkeypatch.setattr(crews, "SETTING_SECONDS", 4.0)
    settings = tuple(Setting(one, "lamb", 1) for one in names)
    running = RunningCrew(Crew(name, 2, "nccl", settings, 0), "cuda", tmp_path / "log", tmp_path)
    try:
        while not running.done:
            running.poll()
            time.sleep(0.02)
    finally:
        running.end()
    return running


def test_a_setting_that_hangs_or_dies_takes_nothing_from_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = _run_crew("crew", ["first", "hangs", "second", "dies", "third"], tmp_path, monkeypatch)
    assert running.found["hangs"] == {"missing": "not finished after 4 s"}
    assert running.found["dies"]["missing"].startswith("SIGABRT")
    assert [running.found[name]["tries"] for name in ("first", "second", "third")] == [5, 3, 1]
    assert all(child.process.poll() is not None for child in running.children)


def test_ranks_that_do_not_start_are_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = _run_crew("does not start", ["first", "second"], tmp_path, monkeypatch)
    assert set(running.found) == {"first", "second"}
    assert running.found["first"]["missing"] == "the ranks did not start: status 1: no device"


# memcheck -----------------------------------------------------------------------------------------------------------

REPORT = """#!/bin/sh
echo "$@"
echo "========= Invalid __global__ write of size 4 bytes"
echo "stepped 5 optimizers"
echo "========= ERROR SUMMARY: 2 errors"
exit 86
"""


def _wait(memcheck: Memcheck) -> dict[str, Any]:
    while not memcheck.done:
        memcheck.poll()
        time.sleep(0.02)
    return memcheck.found


def test_what_memcheck_reports_is_read(tmp_path: Path) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(REPORT)
    tool.chmod(0o755)
    found = _wait(Memcheck("cuda", tmp_path / "log", str(tmp_path)))
    assert found == {"errors": 2, "first": "Invalid __global__ write of size 4 bytes"}
    arguments = (tmp_path / "log").read_text().splitlines()[0]
    assert arguments.startswith("--tool memcheck --target-processes application-only --report-api-errors no")
    assert arguments.endswith(f"{sys.executable} -m benchmarks.on_gpu.sharded.one_step cuda")


STEPPED, NO_ERRORS = "stepped 5 optimizers", "========= ERROR SUMMARY: 0 errors"
WRONG, KILLED = (
    "========= Invalid __global__ read of size 2 bytes",
    "RuntimeError: CUDA error: unspecified launch failure",
)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ((STEPPED, NO_ERRORS), {"errors": 0}),
        ((NO_ERRORS,), {"failed": "status 86: ========= ERROR SUMMARY: 0 errors"}),  # nothing ran
        ((STEPPED,), {"failed": "status 86: stepped 5 optimizers"}),
        (("AssertionError: lamb made numbers",), {"failed": "status 86: AssertionError: lamb made numbers"}),
        ((sanitizer.BEGUN, "AssertionError: lamb", "exit 1"), {"failed": "status 1: AssertionError: lamb"}),
        (("Error: no injection library", "exit 1"), {"missing": "status 1: Error: no injection library"}),
        # A wrong access ends the steps.
        ((WRONG, KILLED, "========= ERROR SUMMARY: 3 errors"), {"errors": 3, "first": WRONG[10:]}),
        ((WRONG, KILLED), {"errors": 1, "first": WRONG[10:]}),
        ((NO_ERRORS, STEPPED, "========= ERROR SUMMARY: 2 errors"), {"errors": 2}),  # a child's comes first
    ],
)
def test_errors_are_told_though_the_steps_have_not_ended(said: Sequence[str], found: Any, tmp_path: Path) -> None:
    tool = tmp_path / "compute-sanitizer"
    lines = (line if line == "exit 1" else f"echo '{line}'" for line in said)
    tool.write_text("\n".join(("#!/bin/sh", *lines, "exit 86")))
    tool.chmod(0o755)
    assert _wait(Memcheck("cuda", tmp_path / "log", str(tmp_path))) == found


def test_a_tool_that_is_slow_has_failed_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "SECONDS", 0.0)
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    assert _wait(Memcheck("cuda", tmp_path / "log", str(tmp_path))) == {"missing": "not finished after 0 s"}


def test_without_the_tool_nothing_is_started(tmp_path: Path) -> None:
    memcheck = Memcheck("cuda", tmp_path / "log", str(tmp_path))
    assert memcheck.found == {"missing": "compute-sanitizer is not installed"}
    assert memcheck.todo == []
    memcheck.end()


# The part -----------------------------------------------------------------------------------------------------------


class FakeCrew:
    """Finds what is given to it at the second look."""

    exact = True

    def __init__(self, crew: Crew, device: str, log: Path, folder: Path) -> None:
        assert folder.is_dir()
        self.crew, self.todo, self.ended = crew, ["ZeRO-1, lamb", "hangs"], False
        self.found: dict[str, Any] = {}

    def poll(self) -> bool:
        self.found["ZeRO-1, lamb"] = {"error": 1e-7, "layer": "conv", "ratio_error": 0.0, "exact": self.exact}
        self.todo = ["hangs"]
        return True

    done = False

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("exact", [True, False])
def test_the_part_keeps_what_came_out_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
    made: list[FakeCrew] = []

    def make(*arguments: Any) -> FakeCrew:
        made.append(FakeCrew(*arguments))
        made[-1].exact = exact
        return made[-1]

    monkeypatch.setattr(part_of_sharded, "RunningCrew", make)
    monkeypatch.setattr(part_of_sharded, "Memcheck", lambda device, log: Memcheck("cuda", log, ""))
    part = Part("sharded", tmp_path, part_of_sharded.RESERVE + 0.3, rehearse=True)
    with nullcontext() if exact else pytest.raises(Failed, match=r"NOT EXACT: ZeRO-1, lamb"):
        said = part_of_sharded.run(part)
        assert said.startswith("2 of 2 exact to 2e-06; worst 1.0e-07 (ZeRO-1, lamb); 2 did not fit")
    found = json.loads((tmp_path / "sharded.json").read_text())
    assert found["did_not_fit"] == [f"{crew.name}: hangs" for crew in CREWS]
    assert found["memcheck"]["missing"] == "compute-sanitizer is not installed"
    assert all(crew.ended for crew in made)


def test_what_hangs_at_the_end_takes_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part is killed then, and its verdict is on disk."""

    class Hanging(FakeCrew):
        def end(self) -> None:
            raise SystemExit("killed")

    monkeypatch.setattr(part_of_sharded, "RunningCrew", Hanging)
    monkeypatch.setattr(part_of_sharded, "Memcheck", lambda device, log: Memcheck("cuda", log, ""))
    with pytest.raises(SystemExit):
        part_of_sharded.run(Part("sharded", tmp_path, part_of_sharded.RESERVE + 0.3, rehearse=True))
    found = json.loads((tmp_path / "sharded.json").read_text())
    assert found["verdict"].startswith("2 of 2 exact")
    assert len(found["did_not_fit"]) == 2


def test_nothing_compared_is_nothing_good() -> None:
    exact = {"crews": {"one": {"ZeRO-1": {"exact": True}}}}
    assert is_good(exact)
    assert not is_good({**exact, "memcheck": {"errors": 1}})
    assert not is_good({"crews": {"one": {"ZeRO-1": {"missing": "no device"}}}})
    assert is_good({**exact, "memcheck": {"missing": "not finished after 90 s"}})
    crashed = {**exact, "memcheck": {"failed": "status 1: AssertionError: lamb made numbers that are not finite"}}
    assert not is_good(crashed)
    assert "memcheck: FAILED: status 1: AssertionError" in verdict(crashed)


def test_what_cannot_be_had_is_a_failure_where_all_has_to_be() -> None:
    found = _found()
    del found["crews"]["two gloo ranks on one device"]["ZeRO-2, lamb"]
    assert is_good(found)
    assert not is_good({**found, "optional": []})
    found["crews"]["one NCCL rank"]["ZeRO-2, lamb"] = {"missing": "rank 0: RuntimeError: illegal access\nmore"}
    assert not is_good(found)
    assert "; failed: ZeRO-2, lamb (rank 0: RuntimeError: illegal access); 2 could not be had" in verdict(found)
    assert [crew.backend for crew in CREWS if crew.optional] == ["gloo"]


NOT_CARRIED = "rank 0: RuntimeError: Backend gloo does not support reduce_scatter_tensor; rank 1: the same"
ILLEGAL = "rank 1: RuntimeError: Triton Error [CUDA]: an illegal memory access was encountered"


@pytest.mark.parametrize(
    ("reasons", "good"),
    [
        ([NOT_CARRIED, NOT_CARRIED], True),
        ([NOT_CARRIED, None], True),
        (["rank 0: KeyError: 'exp_avg'", None], True),  # one setting that cannot be had
        (["rank 0: KeyError: 'exp_avg'", NOT_CARRIED], False),
        (["SIGSEGV: it wrote nothing", "not finished after 25 s"], False),
        ([ILLEGAL, None], False),
        (["rank 0: AcceleratorError: CUDA error: operation not supported", NOT_CARRIED], False),
    ],
)
def test_what_an_optional_crew_may_lack(reasons: Sequence[str | None], good: bool) -> None:
    exact = {"error": 6e-7, "layer": "bias", "ratio_error": 3e-8, "collectives": [1], "exact": True}
    rows = {str(number): {"missing": why} if why else exact for number, why in enumerate(reasons)}
    found = {"optional": ["gloo"], "crews": {"nccl": {"ZeRO-1": exact}, "gloo": rows}}
    assert is_good(found) == good
    assert ("failed: " in verdict(found)) != good


def test_a_crew_that_had_no_time_lacks_nothing() -> None:
    exact = {"error": 6e-7, "layer": "bias", "ratio_error": 3e-8, "collectives": [1], "exact": True}
    slow = {"optional": ["gloo"], "crews": {"nccl": {"ZeRO-1": exact}, "gloo": {"DDP": {"missing": "not finished"}}}}
    assert not is_good(slow)
    assert is_good({**slow, "did_not_fit": ["ZeRO-1"]})


# What it says -------------------------------------------------------------------------------------------------------


def _found() -> dict[str, Any]:
    good = {"error": 6e-7, "layer": "bias", "ratio_error": 3e-8, "collectives": [1], "exact": True}
    bad = {**good, "error": float("nan"), "layer": "conv", "exact": False}
    rows = {"ZeRO-1, lamb": good, "ZeRO-3, lamb": {**good, "error": 9e-7}}
    others = {"DDP, lamb": good, "FSDP2, lamb": {"missing": "rank 0: RuntimeError: gloo | no CUDA\nmore"}}
    return {
        "bound": BOUND,
        "machine": {"device": "a device", "torch": "2"},
        "crews": {"one NCCL rank": rows, "two gloo ranks on one device": {**others, "ZeRO-2, lamb": bad}},
        "memcheck": {"errors": 0},
        "optional": ["two gloo ranks on one device"],
        "did_not_fit": ["memcheck"],
    }


def test_the_verdict_names_what_is_not_exact() -> None:
    assert verdict(_found()) == (
        "3 of 4 exact to 2e-06; worst nan (ZeRO-2, lamb); NOT EXACT: ZeRO-2, lamb; 1 could not be had, 1 did not fit; "
        "memcheck: 0 errors"
    )
    found = _found()
    del found["crews"]["two gloo ranks on one device"], found["did_not_fit"]
    assert verdict(found) == "2 of 2 exact to 2e-06; worst 9.0e-07 (ZeRO-3, lamb); memcheck: 0 errors"
    assert verdict({}) == "0 of 0 exact to 2e-06"


def test_the_tables_have_every_row() -> None:
    written = tables(_found())
    assert "| ZeRO-3, lamb | 9.0e-07 | 3.0e-08 | 1 | exact |" in written
    assert "| ZeRO-2, lamb | nan | 3.0e-08 | 1 | **not exact**: conv |" in written
    assert (
        "| FSDP2, lamb | not measured | not measured | not measured | rank 0: RuntimeError: gloo \\| no CUDA |"
        in written
    )
    assert "memcheck: 0 errors." in written
    assert tables({}) == tables({"crews": {"one NCCL rank": {}}}) == "not measured"


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.on_gpu.part", "sharded", "--output", str(tmp_path), "--rehearse"]
    subprocess.run([*command, "--limit", "900"], cwd=ROOT, check=True)
    found = json.loads((tmp_path / "sharded.json").read_text())
    assert found["did_not_fit"] == []
    for crew in CREWS:
        rows = found["crews"][crew.name]
        assert list(rows) == [setting.name for setting in crew.settings[: crew.rehearsed]]
        for name, row in rows.items():
            assert row.get("exact"), (name, row)
            assert row["collectives"] == [0 if name.startswith("DDP") else 1], name
    assert "the steps ran" in found["memcheck"]["missing"]
    assert tables(found).count("| exact |") == sum(crew.rehearsed for crew in CREWS)
