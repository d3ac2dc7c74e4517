"""What DeepSpeed would compile at its start, and training does not need."""

from __future__ import annotations

import os

import deepspeed
from deepspeed.accelerator import get_accelerator

__all__ = ["leave_out_shared_memory"]

_SHARED_MEMORY = "deepspeed_shm_comm"
_BUILD = "DS_BUILD_SHM_COMM"


def leave_out_shared_memory() -> None:
    """Keep DeepSpeed from compiling, on CPUs, an all-reduce through shared memory.

    DeepSpeed 0.19 compiles the extension when it joins a process group on a CPU: a minute, or many under load, while
    all ranks wait for one lock. Only its inference engine uses it; gloo does what training needs. It is left as it is
    where DeepSpeed was installed with it, or DS_BUILD_SHM_COMM=1 asks for it.
    """
    installed = getattr(deepspeed.git_version_info, "installed_ops", {}).get(_SHARED_MEMORY, False)
    if get_accelerator().device_name() == "cpu" and not installed and os.environ.get(_BUILD, "0") != "1":
        deepspeed.ops.__compatible_ops__[_SHARED_MEMORY] = False
