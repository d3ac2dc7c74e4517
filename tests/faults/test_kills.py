"""Runs that are killed and continued come to the undisturbed end and leave nothing: `benchmarks.kills`, aimed.

Each case is one run that is killed in life after life.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.kills.chains import Chain, given_kills, undisturbed
from benchmarks.kills.ends import first_difference
from benchmarks.kills.moments import Kill
from benchmarks.kills.runs import CONFIGURATIONS, write_data

pytestmark = pytest.mark.slow

KILLS = {
    "deepspeed-zero3": [
        Kill("data", "all", 1, 0.2, at_once=True),
        Kill("checkpoint", "last rank", 1, 0.3, at_once=True),
        Kill("resume", "inner launcher", 1, 0.5, at_once=True),
        Kill("report", "first rank", 1, 0.5, at_once=False),
    ],
    "accelerate-ddp-trainer": [
        Kill("start", "launcher", 1, 0.5, at_once=True),
        Kill("checkpoint", "all", 2, 0.6, at_once=True),
        Kill("step", "launcher", 1, 0.5, at_once=True),
        Kill("report", "all", 1, 0.2, at_once=True),
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills") / "data"
    write_data(folder)
    return folder


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_comes_to_the_undisturbed_end_and_leaves_nothing(
    data: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, timeline = undisturbed(CONFIGURATIONS[name], data, tmp_path / "undisturbed")
    struck, end = Chain(run.configuration, run, timeline, lambda kill: print(kill.line(kill.life))).carry_out(
        tmp_path / "killed", 1, given_kills(KILLS[name])
    )
    assert end.differences == [], capsys.readouterr().out
    moments = [kill.moment for kill in KILLS[name]]
    # Ranks that have lost their launcher may come to the end before the next life begins.
    assert [kill.moment for kill in struck] in (moments, moments[:-1])


def test_a_difference_of_one_bit_is_found() -> None:
    """What the ends are compared by can fail."""
    one = {"model": [{"weight": torch.tensor([1.0, 2.0])}, 3, "text"]}
    other = {"model": [{"weight": torch.tensor([1.0, torch.nextafter(torch.tensor(2.0), torch.tensor(3.0))])}, 3, "-"]}
    assert first_difference(one, one) is None
    assert first_difference(one, other) == "model.0.weight differs"
    assert first_difference({"step": 3}, {"step": 4}) == "step: 4, undisturbed 3"
    assert first_difference({"step": 3}, {}) == "value has other keys"
