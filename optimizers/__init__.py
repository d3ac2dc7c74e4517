"""Layer-wise large-batch optimizers whose trust ratios are exact under every sharding."""

from .cowclip import CowClip
from .lamb import LAMB, LAMBC
from .lans import LANS
from .lars import LARS
from .layerwise import LayerwiseOptimizer
from .layout import LayoutError
from .mclr import MCLR
from .novograd import NovoGrad
from .registry import OPTIMIZERS, create_optimizer
from .sngm import SNGM
from .tvlars import TVLARS

__all__ = [
    "LAMB",
    "LAMBC",
    "LANS",
    "LARS",
    "MCLR",
    "OPTIMIZERS",
    "SNGM",
    "TVLARS",
    "CowClip",
    "LayerwiseOptimizer",
    "LayoutError",
    "NovoGrad",
    "create_optimizer",
]
