"""What is left out of every run, and nothing else."""

from __future__ import annotations

import warnings

import deepspeed
import pytest
from deepspeed.comm.torch import build_shm_op

from trustratio.recipes.training.quiet import quieten

CALLER = "torch.distributed.c10d_logger"
OLD_NAMES = ("all_gather_into_tensor", "reduce_scatter_tensor")


@pytest.fixture
def extension(monkeypatch):
    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", {"deepspeed_shm_comm": True, "cpu_adam": True})
    monkeypatch.delenv("DS_BUILD_SHM_COMM", raising=False)
    return deepspeed.ops.__compatible_ops__


def test_deprecated_names_in_deepspeed_are_not_told_and_others_are(extension):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        quieten()
        for name, module in (*((name, CALLER) for name in OLD_NAMES), ("reduce_op", CALLER), (OLD_NAMES[0], "mine")):
            text = f"`torch.distributed.{name}` is deprecated. Please use another."
            warnings.warn_explicit(text, FutureWarning, "file.py", 1, module=module)
    assert [str(warning.message).split("`")[1] for warning in told] == [
        "torch.distributed.reduce_op",
        "torch.distributed.all_gather_into_tensor",
    ]


def test_no_extension_is_compiled_on_a_cpu_unless_asked(extension, monkeypatch):
    monkeypatch.setenv("DS_BUILD_SHM_COMM", "1")
    quieten()
    assert extension["deepspeed_shm_comm"]
    monkeypatch.delenv("DS_BUILD_SHM_COMM")
    with warnings.catch_warnings():
        quieten()
    assert extension == {"deepspeed_shm_comm": False, "cpu_adam": True}
    assert build_shm_op() is None
