"""What a trust ratio around other optimizers costs, and which classes it can be put around.

    python -m benchmarks.bases              processor time of a step around AdamW, and the classes of torch.optim
    python -m benchmarks.bases --module pytorch_optimizer      the classes of a package that is installed

Prints both; docs/trust-ratio.md has them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from trustratio.optimizers import LAMB, TrustRatio
from trustratio.optimizers.layerwise import LayerwiseOptimizer
from trustratio.optimizers.proposals.base import check_base_class, refuse_hooks
from trustratio.optimizers.proposals.nature import nature_of

LAYERS = [(1024, 1024)] * 8
ROUNDS = 7
MOST_SECONDS = 30
"""For the trial of one class."""


def processor_times(layers: list[tuple[int, int]], rounds: int) -> dict[str, float]:
    """Seconds of processor time of one step, the least of some rounds: AdamW, a ratio around it, and LAMB."""
    makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3),
        "TrustRatio(AdamW)": lambda params: TrustRatio(torch.optim.AdamW, params, lr=1e-3),
        "LAMB": lambda params: LAMB(params, lr=1e-3),
    }
    return {name: _processor_time(make, layers, rounds) for name, make in makers.items()}


def _processor_time(make: Callable[[Any], torch.optim.Optimizer], layers: list[tuple[int, int]], rounds: int) -> float:
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in layers]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = make(parameters)
    optimizer.step()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        optimizer.step()
        times.append(time.process_time() - start)
    return min(times)


def kind(base_class: type[torch.optim.Optimizer]) -> str:
    """Where a class may be used, with its default options, as a word or two that docs/trust-ratio.md explains."""
    maker: Any = base_class
    try:
        check_base_class(base_class)
        with contextlib.redirect_stdout(io.StringIO()):
            refuse_hooks(maker([torch.nn.Parameter(torch.ones(4, 4))]))
    except Exception as error:  # whatever a constructor may raise
        return f"refused: {type(error).__name__}"
    nature = nature_of(base_class, {}, torch.device("cpu"))
    if nature.hidden is not None:
        return "refused: hidden state"
    if nature.follows_weights:
        return "refused: copies of weights"
    if nature.writes_rate:
        return "refused: writes the rate"
    if nature.is_element_wise:
        rate = "any rate" if nature.is_proportional else "at its own rate"
        return f"everywhere, {rate}{', one group under ZeRO' * nature.goes_by_groups}"
    return "whole layers alone" if nature.is_layer_wise else "whole models alone"


class TooSlow(BaseException):
    """No Exception, which the trial would take for the class's own."""


def kind_in_time(base_class: type[torch.optim.Optimizer]) -> str:
    """The same, or that the trial took too long."""

    def stop(*_: Any) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(MOST_SECONDS)
    try:
        return kind(base_class)
    except TooSlow:
        return f"trial took more than {MOST_SECONDS} s"
    finally:
        signal.alarm(0)


def classes_of(module: str) -> list[type[torch.optim.Optimizer]]:
    """The optimizer classes that a module has by name."""
    named = vars(importlib.import_module(module))
    found = {
        value
        for value in named.values()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    return sorted((one for one in found if not issubclass(one, LayerwiseOptimizer)), key=lambda one: one.__name__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", default="torch.optim", help="whose classes are tried (default: torch.optim)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, and only the times")
    given = parser.parse_args()
    torch.set_num_threads(1)
    layers, rounds = ([(8, 8)], 1) if given.smoke else (LAYERS, ROUNDS)
    elements = sum(rows * columns for rows, columns in layers)
    for name, seconds in processor_times(layers, rounds).items():
        print(f"{name}: {1000 * seconds:.0f} ms of processor time for {elements / 1e6:.1f} million weights")
    if given.smoke:
        return
    package = given.module.split(".")[0]
    print(f"\n{given.module} ({package} {importlib.metadata.version(package)}), with default options:")
    kinds: dict[str, list[str]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for base_class in classes_of(given.module):
            print(f"  {base_class.__name__}: {(where := kind_in_time(base_class))}", flush=True)
            kinds.setdefault(where, []).append(base_class.__name__)
    for where, names in sorted(kinds.items()):
        print(f"{where} ({len(names)}): {', '.join(names)}")


if __name__ == "__main__":
    main()
