"""What DeepSpeed and torch would print or build in every run, and nobody wants."""

from __future__ import annotations

import logging
import os
import warnings

import deepspeed
from deepspeed.accelerator import get_accelerator
from transformers.utils.logging import disable_progress_bar

_SHARED_MEMORY = "deepspeed_shm_comm"
_BUILD = "DS_BUILD_SHM_COMM"


def quieten() -> None:
    """Leave out DeepSpeed's and transformers' progress, warnings about collectives, and an extension on CPUs.

    DeepSpeed 0.19 compiles the extension, an all-reduce through shared memory, when it joins a process group on a
    CPU: a minute, or many under load, while all ranks wait for one lock. Only its inference engine uses it; gloo does
    what training needs. It is left as it is where DeepSpeed was installed with it, or DS_BUILD_SHM_COMM=1 asks for it.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    disable_progress_bar()  # of a model that is written or read in a moment
    # Under their old names; DeepSpeed calls them through torch's logging wrapper, which counts as the caller.
    warnings.filterwarnings(
        "ignore",
        message=r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
        category=FutureWarning,
        module=r"torch\.distributed\.c10d_logger",
    )
    installed = getattr(deepspeed.git_version_info, "installed_ops", {}).get(_SHARED_MEMORY, False)
    if get_accelerator().device_name() == "cpu" and not installed and os.environ.get(_BUILD, "0") != "1":
        deepspeed.ops.__compatible_ops__[_SHARED_MEMORY] = False
