"""Megatron's tensor parallelism, and megatron-core's DistributedOptimizer."""

from .backend import MegatronBackend
from .distributed_optimizer import megatron_optimizer
from .mpu import use_mpu

__all__ = ["MegatronBackend", "megatron_optimizer", "use_mpu"]
