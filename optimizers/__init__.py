"""Layer-wise large-batch optimizers whose trust ratios are exact under every sharding."""

from .clars import CLARS
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
from .statistics import StatisticsError
from .tvlars import TVLARS
from .vrgd import VRLAMB, VRLARS, VRSGD, VRAdam

__all__ = [
    "CLARS",
    "LAMB",
    "LAMBC",
    "LANS",
    "LARS",
    "MCLR",
    "OPTIMIZERS",
    "SNGM",
    "TVLARS",
    "VRLAMB",
    "VRLARS",
    "VRSGD",
    "CowClip",
    "LayerwiseOptimizer",
    "LayoutError",
    "NovoGrad",
    "StatisticsError",
    "VRAdam",
    "create_optimizer",
]
