"""The launchers that users start the recipe with: accelerate's, and several machines' stood in for by loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from .recipe_runs import losses, recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_all(commands: list[list[str]]) -> list[str]:
    """Start all commands at once and return what they printed."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    processes = [subprocess.Popen(command, **options) for command in commands]
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):  # the launcher's ranks with it
                os.killpg(process.pid, signal.SIGKILL)
    assert [process.returncode for process in processes] == [0] * len(commands), "\n".join(printed)
    return printed


def tool(name: str) -> list[str]:
    return [sys.executable, str(Path(sys.executable).with_name(name))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("launchers")


@pytest.fixture(autouse=True)
def one_cache(folder, monkeypatch):
    monkeypatch.setenv("TRUSTRATIO_CACHE", str(folder / "cache"))


@pytest.fixture(scope="module")
def expected(text_folder, folder):
    """Losses of `python recipes/bert.py`: one process, no launcher."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRUSTRATIO_CACHE", str(folder / "cache"))
        line = recipe(text_folder, folder / "alone", "model.dropout=0")
        run_all([[sys.executable, str(RECIPES / "bert.py"), *line]])
    return losses(folder / "alone")


# One of each kind is quick enough to run always; the others repeat it with another wrapper or launcher.
@pytest.mark.parametrize("config", ["ddp", *(pytest.param(f"zero{n}", marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_accelerate_launch_with_the_shipped_configurations(text_folder, folder, expected, config):
    # `accelerate launch` is this module; the `accelerate` command also imports every model library it finds.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    options = [str(RECIPES / "configs" / f"{config}.yaml"), "--num_processes", "2", "--main_process_port", free_port()]
    line = recipe(text_folder, folder / config, "model.dropout=0")
    run_all([[*launcher, *options, str(RECIPES / "bert_accelerate.py"), *line]])
    assert losses(folder / config) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_nodes_on_loopback_train_like_one_process(text_folder, folder, expected, launcher):
    port, output = free_port(), folder / launcher
    hosts = folder / "hostfile"
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    commands = []
    for rank in ("0", "1"):
        if launcher == "deepspeed":
            options = ["--hostfile", str(hosts), "--no_ssh", "--node_rank", rank]
        else:
            options = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", rank]
        options += ["--master_addr", "127.0.0.1", "--master_port", port]
        line = recipe(text_folder, output, "model.dropout=0")
        commands.append([*tool(launcher), *options, str(RECIPES / "bert.py"), *line])
    printed = run_all(commands)
    assert sum("global = micro x accum x ranks = 4 x 2 x 2" in text for text in printed) == 1  # one rank speaks
    assert losses(output) == pytest.approx(expected, rel=1e-4)
    assert os.listdir(output / "checkpoints" / "step-00000010")


@pytest.mark.slow
def test_the_trainer_under_the_deepspeed_launcher(text_folder, folder, expected):
    options = ["--num_gpus", "2", "--master_port", free_port()]
    line = recipe(text_folder, folder / "trainer", "model.dropout=0")
    run_all([[*tool("deepspeed"), *options, str(RECIPES / "bert_trainer.py"), *line]])
    assert losses(folder / "trainer") == pytest.approx(expected, rel=1e-4)
