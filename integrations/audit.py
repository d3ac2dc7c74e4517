"""Does an optimizer, sharded as somebody shards it, take the step that one process would?

    python -m trustratio.integrations.audit --optimizer torch.optim.AdamW --options lr=0.01 --deepspeed ds_config.json

    from trustratio.integrations.audit import assert_exact
    assert_exact(make_model, make_optimizer, "ds_config.json", ranks=2)

It trains a model for some steps with injected gradients, in one process and sharded, and compares how far every layer
has moved. docs/audit.md says how to read the outcome.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from .audits.command import run_command
from .audits.configurations import Configuration
from .audits.errors import CannotAudit
from .audits.examination import STEPS, audited_device, check_ranks, check_steps, examine
from .audits.optimizer_section import chosen_subject
from .audits.printing import described
from .audits.ranks import check_timeout, started_ranks
from .audits.reading import configuration_of
from .audits.verdict import EXACT, AuditedLayer, Finding, Report

__all__ = ["AuditedLayer", "CannotAudit", "Finding", "Report", "assert_exact", "audit"]


def audit(
    make_model: Callable[[], nn.Module] | str | None,
    make_optimizer: Callable[..., Any] | str | None,
    config: dict[str, Any] | str | Path | Configuration,
    ranks: int = 2,
    timeout: float = 600.0,
    steps: int = STEPS,
) -> Report:
    """Train some steps in one process and on several, and compare.

    The processes stay for the next audit, until this process ends or asks for another number of them. A script that
    calls this has to keep its own beginning under ``if __name__ == "__main__"``, since they import it.

    Args:
        make_model: Without arguments, at the top of a module; or "package.module:function". None: a small BERT-like
            model. Its weights are replaced by seeded ones, and its forward by one whose gradients are known; a model
            may name parameters that get none in an attribute `without_gradient`.
        make_optimizer: Of a list of the model's trainable parameters; of the model, if its only required parameter is
            called `model` or `module`. At the top of a module, or "package.module.Class", or the name of one of this
            package's. None: what the "optimizer" section of DeepSpeed's settings says.
        config: "ddp", {"fsdp": 1} or {"fsdp": 2} with further arguments of the wrapper, DeepSpeed's settings as a dict,
            or the path of a DeepSpeed JSON or an accelerate YAML.
        ranks: Number of processes: each gets a GPU if there are so many, else they share the CPU over gloo.
        timeout: Seconds after which ranks that do not answer are ended, at most a million.
        steps: Number of steps that are compared, at least 3. Take more for an optimizer that does something later, as
            after a warm-up of its own, or every tenth step: half as many again go on from a checkpoint.

    Returns:
        Every layer's movement, what the checks found, and the verdict: "exact", "wrong", or "refused" where the wrapper
        or the optimizer raised an error.

    Raises:
        CannotAudit: If model, optimizer or configuration cannot be had, the optimizer needs a closure or is not
            deterministic, a rank died or did not answer, or anything else stops the audit.
    """
    given = configuration_of(config)
    check_ranks(ranks, given)
    check_timeout(timeout)
    check_steps(steps)
    subject, configuration = chosen_subject(make_optimizer, make_model, {}, given)
    device = audited_device(ranks)
    try:
        return examine(subject, configuration, started_ranks(ranks, device, timeout), device, steps)
    except CannotAudit:
        raise
    except Exception as error:
        raise CannotAudit(f"{type(error).__name__}: {error}") from error


def assert_exact(
    make_model: Callable[[], nn.Module] | str | None,
    make_optimizer: Callable[..., Any] | str | None,
    config: dict[str, Any] | str | Path | Configuration,
    ranks: int = 2,
    timeout: float = 600.0,
    steps: int = STEPS,
) -> None:
    """Fail, in a test, if the optimizer does not take the steps of one process; see `audit` for the arguments.

    Raises:
        AssertionError: If it does not, or the wrapper refuses it, with the table of layers.
        CannotAudit: As `audit`.
    """
    report = audit(make_model, make_optimizer, config, ranks, timeout, steps)
    if report.verdict != EXACT:
        raise AssertionError(described(report))


if __name__ == "__main__":
    sys.exit(run_command())
