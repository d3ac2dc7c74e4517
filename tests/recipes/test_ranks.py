"""How ranks start: the launcher's variables, and what is said while ranks wait for each other."""

import os
import time

import pytest

from trustratio.recipes.training import ranks
from trustratio.recipes.training.bert import main

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, "RANK=1, LOCAL_RANK=0, WORLD_SIZE=1: allowed is LOCAL_RANK <= RANK < WORLD_SIZE"),
        ({"RANK": ""}, "RANK='': allowed is a whole number from 0"),
        ({"LOCAL_RANK": "3"}, "RANK=0, LOCAL_RANK=3, WORLD_SIZE=1"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0': allowed is a whole number from 1"),
        ({"LOCAL_SIZE": "x"}, "LOCAL_SIZE='x'"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2 without WORLD_SIZE"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS=8 without WORLD_SIZE"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999: allowed is up to 65535"),
    ],
)
def test_launcher_variables_that_do_not_belong_together_are_named(variables, message, monkeypatch, capsys):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["--steps", "1"]) == 2
    assert message in capsys.readouterr().err


def test_a_shell_that_srun_started_counts_as_one_process(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ranks.LauncherError):
        ranks.require_launcher()
    monkeypatch.setenv("SLURM_PTY_PORT", "40123")  # which srun hands on to its tasks
    with pytest.raises(ranks.LauncherError):
        ranks.require_launcher()
    monkeypatch.setenv("SLURM_STEP_ID", "4294967290")
    ranks.require_launcher()
    assert ranks.world_size() == 1


def test_an_empty_address_counts_as_none(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "")
    monkeypatch.setenv("MASTER_PORT", "")
    monkeypatch.setattr(ranks.deepspeed, "init_distributed", lambda **_: None)
    ranks.require_launcher()
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ranks.LauncherError, match="WORLD_SIZE=2 without MASTER_ADDR, MASTER_PORT"):
        ranks.require_launcher()
    monkeypatch.setenv("WORLD_SIZE", "1")
    ranks.start()
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    assert int(os.environ["MASTER_PORT"]) > 0


@pytest.mark.parametrize("late", [True, False])
def test_a_rank_that_waits_long_for_the_others_says_for_whom(late, monkeypatch, capsys):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    launched = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "nosuchhost", "MASTER_PORT": "29500"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "_PATIENCE", 0.05)
    monkeypatch.setattr(ranks.deepspeed, "init_distributed", lambda **_: time.sleep(0.5 if late else 0))
    ranks.start()
    time.sleep(0.1)
    said = capsys.readouterr().err
    if late:
        assert (
            "rank 1 of 2 has waited 0.05 seconds for the others at nosuchhost:29500 (MASTER_ADDR, MASTER_PORT)" in said
        )
    else:
        assert "waited" not in said
