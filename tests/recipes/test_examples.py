"""The programs in docs/examples, started on two ranks as they say themselves, print what one process computes."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trustratio.integrations.layer_norms import main
from trustratio.optimizers import LAMB, CurvatureSGD, Extrapolation

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
OF_WRAPPERS = sorted(FOLDER.glob("with_*.py"))
COMMAND = re.compile(r"(?:DS_ACCELERATOR=cpu deepspeed|torchrun|accelerate launch) .*docs/examples/\w+\.py")
PORT = {"deepspeed": "--master_port", "torchrun": "--master_port", "accelerate": "--main_process_port"}
STEPS = 20

each_example = pytest.mark.parametrize("example", EXAMPLES, ids=[path.stem for path in EXAMPLES])


def command(example: Path) -> list[str]:
    """The example's own command for a machine without a GPU, with a free port and the paths of this environment."""
    launcher, *arguments = shlex.split(COMMAND.findall(example.read_text())[-1].removeprefix("DS_ACCELERATOR=cpu "))
    assert arguments.pop() == f"docs/examples/{example.name}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = [PORT[launcher], str(probe.getsockname()[1])]
    if launcher == "accelerate":  # the `accelerate` command is this module, and imports every model library it finds
        return [sys.executable, "-m", "accelerate.commands.launch", *port, *arguments[1:], str(example)]
    return [sys.executable, str(Path(sys.executable).with_name(launcher)), *port, *arguments, str(example)]


ABORTED_AT_ITS_END = "terminate called without an active exception"
"""What torch says where a thread of gloo outlives Python, as happens to programs without this package too."""


def run(command: list[str], folder: Path, tries: int = 3) -> str:
    """Run a command to its end and return what it printed; no rank outlives it."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)
    try:
        # DeepSpeed compiles an extension in the first one; an end meanwhile would leave a lock that hangs the others.
        printed, errors = launcher.communicate(timeout=1200)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    if launcher.returncode and ABORTED_AT_ITS_END in errors and tries > 1:
        return run(command, folder, tries - 1)
    assert launcher.returncode == 0, printed + errors
    return printed


def printed_steps(text: str) -> tuple[list[float], list[dict[str, float]]]:
    """Losses and trust ratios, of lines of an example's own or of the Trainer's logs."""
    losses = [float(loss) for loss in re.findall(r"^step \d+ loss (\S+)", text, re.MULTILINE)]
    ratios = [ast.literal_eval(line) for line in re.findall(r"^step .* ratios ({.*})$", text, re.MULTILINE)]
    for log in map(ast.literal_eval, re.findall(r"^{.*}$", text, re.MULTILINE)):
        losses += [float(log["loss"])] if "loss" in log else []
        of_layers = {key.removeprefix("trust_ratio/"): float(value) for key, value in log.items() if "." in key}
        ratios += [of_layers] if of_layers else []
    return losses, ratios


def model_and_samples() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
    return model, torch.randn(512, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def expected() -> list[dict[str, float]]:
    """The trust ratios of one process that has all samples."""
    model, x = model_and_samples()
    optimizer = LAMB(model.named_parameters(), lr=0.02, weight_decay=0.0)
    ratios = []
    for _ in range(STEPS):
        torch.nn.functional.mse_loss(model(x), x.sin().sum(1, keepdim=True)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ratios.append(optimizer.trust_ratios())
    return ratios


def test_every_wrapper_has_its_example() -> None:
    assert [path.stem for path in OF_WRAPPERS] == [
        f"with_{n}" for n in ("accelerate", "any_optimizer", "ddp", "deepspeed", "fsdp2", "torchtitan", "trainer")
    ]


@each_example
def test_an_example_is_short(example: Path) -> None:
    assert len(example.read_text().splitlines()) <= 30


# One is quick; the others start other launchers, and DeepSpeed may compile its extension first.
@pytest.mark.parametrize(
    "example",
    [pytest.param(path, marks=() if path.stem == "with_fsdp2" else pytest.mark.slow) for path in OF_WRAPPERS],
    ids=[path.stem for path in OF_WRAPPERS],
)
def test_two_ranks_print_the_ratios_of_one(example: Path, tmp_path: Path, expected: list[dict[str, float]]) -> None:
    if example.stem == "with_torchtitan":
        pytest.importorskip("torchtitan", reason="torchtitan is not installed")
    losses, ratios = printed_steps(run(command(example), tmp_path))
    assert len(losses) == len(ratios) == STEPS
    assert losses[-1] < 0.6 * losses[0]
    for printed, alone in zip(ratios, expected, strict=True):
        assert printed == pytest.approx(alone, rel=1e-3)


@pytest.mark.slow
def test_two_ranks_print_the_norms_of_one_and_leave_a_file(tmp_path: Path) -> None:
    losses, ratios = printed_steps(run(command(FOLDER / "layer_norms.py"), tmp_path))
    assert len(losses) == len(ratios) == STEPS
    assert losses[-1] < 0.6 * losses[0]
    model, x = model_and_samples()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for printed in ratios:
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        torch.nn.functional.mse_loss(model(x), x.sin().sum(1, keepdim=True)).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {name: ((p - before[name]).norm() / before[name].norm()).item() for name, p in model.named_parameters()}
        assert printed == pytest.approx(moved, rel=1e-3)
    assert main(["report", str(tmp_path / "layer_norms.jsonl")]) == 0
    assert "20 measured steps up to step 20; 4 layers" in (tmp_path / "layer_norms.html").read_text()


@pytest.mark.slow
def test_two_ranks_extrapolate_like_one(tmp_path: Path) -> None:
    losses, ratios = printed_steps(run(command(FOLDER / "extrapolation.py"), tmp_path))
    assert len(losses) == len(ratios) == STEPS
    assert losses[-1] < 0.6 * losses[0]
    model, x = model_and_samples()
    optimizer = LAMB(model.named_parameters(), lr=0.02, weight_decay=0.0)
    extrapolation = Extrapolation(optimizer, step_size=0.01)
    for printed in ratios:
        with extrapolation:
            torch.nn.functional.mse_loss(model(x), x.sin().sum(1, keepdim=True)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert printed == pytest.approx(optimizer.trust_ratios(), rel=1e-3)


@pytest.mark.slow
def test_two_ranks_print_the_step_sizes_of_one(tmp_path: Path) -> None:
    losses, ratios = printed_steps(run(command(FOLDER / "curvature.py"), tmp_path))
    assert len(losses) == len(ratios) == STEPS
    assert losses[-1] < 0.6 * losses[0]
    model, x = model_and_samples()
    optimizer = CurvatureSGD(model.named_parameters(), lr=0.3, momentum=0.0, interval=5)

    def backward() -> None:
        torch.nn.functional.mse_loss(model(x), x.sin().sum(1, keepdim=True)).backward()

    for printed in ratios:
        optimizer.zero_grad()
        wanted = optimizer.wants_curvature()
        backward()
        if wanted:
            with optimizer.curvature():
                backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert printed == pytest.approx(optimizer.trust_ratios(), rel=1e-2)


@pytest.mark.slow
def test_barlow_twins_in_lightning_learn(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch", minversion="2.5")
    printed = run(command(FOLDER / "barlow_twins_lightning.py"), tmp_path)
    for rank in range(2):
        losses = [float(loss) for loss in re.findall(rf"step \d+ loss (\S+) on rank {rank}", printed)]
        assert len(losses) == 100
        assert sum(losses[-10:]) < 0.4 * sum(losses[:10])
