"""An optimizer's state in one file that outlives the sharding, and the state of other packages' optimizers."""

from .consolidated import load_optimizer_state, save_optimizer_state
from .conversion import convert_state

__all__ = ["convert_state", "load_optimizer_state", "save_optimizer_state"]
