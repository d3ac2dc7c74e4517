"""Megatron's tensor parallelism, and megatron-core's DistributedOptimizer."""

from .backend import MegatronBackend, use_mpu
from .distributed_optimizer import megatron_optimizer

__all__ = ["MegatronBackend", "megatron_optimizer", "use_mpu"]
