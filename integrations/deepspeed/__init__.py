"""DeepSpeed's optimizer wrappers. Importing this makes the registered optimizers pass DeepSpeed's check for ZeRO."""

from ..guards import deepspeed_schedulers  # noqa: F401  (its check, for the first step)
from .backend import DeepSpeedBackend

__all__ = ["DeepSpeedBackend"]
