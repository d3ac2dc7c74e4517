"""Layer-wise large-batch optimizers whose trust ratios are exact under every sharding."""

from .cowclip import CowClip
from .lamb import LAMB, LAMBC
from .lars import LARS
from .layerwise import LayerwiseOptimizer
from .layout import LayoutError
from .registry import OPTIMIZERS, create_optimizer

__all__ = ["LAMB", "LAMBC", "LARS", "OPTIMIZERS", "CowClip", "LayerwiseOptimizer", "LayoutError", "create_optimizer"]
