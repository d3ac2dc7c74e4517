"""What DeepSpeed and torch would print or build in every run, and nobody wants."""

from __future__ import annotations

import logging
import warnings

from transformers.utils.logging import disable_progress_bar

from trustratio.integrations.deepspeed.building import leave_out_shared_memory


def quieten() -> None:
    """Leave out DeepSpeed's and transformers' progress, warnings about collectives, and an extension on CPUs."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    disable_progress_bar()  # of a model that is written or read in a moment
    # Under their old names; DeepSpeed calls them through torch's logging wrapper, which counts as the caller.
    warnings.filterwarnings(
        "ignore",
        message=r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
        category=FutureWarning,
        module=r"torch\.distributed\.c10d_logger",
    )
    leave_out_shared_memory()
