"""What libraries keep in a process, so that no test finds what an earlier one left there.

Accelerate keeps what the first Accelerator was, and refuses another precision in the second; transformers keeps
DeepSpeed's configuration, by which the next model's weights are cut up; DeepSpeed's stage 3 leaves a linear layer of
its own, which rounds bf16 otherwise; all of them write into the environment what the next one reads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch


@contextmanager
def fresh_libraries() -> Iterator[None]:
    """Begin as in a new process, and put everything back at the end."""
    _forget()
    linear = mock.patch.object(torch.nn.functional, "linear", torch.nn.functional.linear)
    try:
        with mock.patch.dict(os.environ), linear:
            yield
    finally:
        _forget()


def _forget() -> None:
    """Of libraries that nobody has imported there is nothing to forget."""
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
    if deepspeed := sys.modules.get("transformers.integrations.deepspeed"):
        deepspeed.unset_hf_deepspeed_config()
