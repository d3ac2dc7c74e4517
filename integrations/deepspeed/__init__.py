"""DeepSpeed's optimizer wrappers. Importing this makes the registered optimizers pass DeepSpeed's check for ZeRO."""

from .backend import DeepSpeedBackend

__all__ = ["DeepSpeedBackend"]
