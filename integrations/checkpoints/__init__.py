"""An optimizer's state in one file that outlives the sharding: written under one wrapper, read under any other."""

from .consolidated import load_optimizer_state, save_optimizer_state

__all__ = ["load_optimizer_state", "save_optimizer_state"]
