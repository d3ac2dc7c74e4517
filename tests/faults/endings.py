"""What every run that a fault ended owes its user: one sentence, a whole checkpoint, and the undisturbed end."""

from __future__ import annotations

import re
from pathlib import Path

from .faulty_runs import Ending, checkpoints, finished, losses, same, show, trained_state


def require_said_once(ending: Ending, sentence: str, folder: Path, traceback: bool = False) -> None:
    """Check that one error was printed, this one, and that it ends with the checkpoint to go on from.

    Args:
        ending: of the run.
        sentence: how the error begins, a regular expression.
        folder: of the run.
        traceback: whether there has to be one; else there must not be.
    """
    errors = re.findall(r"^error: .*", ending.printed, flags=re.MULTILINE)
    assert len(errors) == 1, show(ending)
    assert re.match(f"error: {sentence}", errors[0]), errors[0]
    good = folder / "checkpoints" / checkpoints(folder)[-1]
    assert errors[0].endswith(f"the last good checkpoint, {good}, is whole: continue with --resume {good}"), errors[0]
    assert ending.printed.count("Traceback (most recent call last)") == traceback, show(ending)


def require_resumable(folder: Path, data: Path, undisturbed: Path, script: str = "bert.py") -> None:
    """Continue a run that a fault ended after its first checkpoint; check that it ends as the undisturbed one."""
    assert checkpoints(folder)[0] == "step-00000004"
    finished(data, folder, "--resume", str(folder), script=script)
    assert losses(folder) == losses(undisturbed)
    assert same(trained_state(folder), trained_state(undisturbed))
