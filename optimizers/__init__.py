"""Layer-wise large-batch optimizers whose trust ratios are exact under every sharding."""

from .adabelief import AdaBelief, FastAdaBelief
from .adashift import AdaShift
from .cblr import CBLR
from .clars import CLARS
from .cowclip import CowClip
from .curvature import CurvatureAdamW, CurvatureSGD
from .extrapolation import Extrapolation
from .gradient_statistics.norms import StatisticsError
from .lamb import LAMB, LAMBC
from .lans import LANS
from .lars import LARS
from .layerwise import LayerwiseOptimizer
from .mclr import MCLR
from .novograd import NovoGrad
from .registry import OPTIMIZERS, OptimizerEntry, create_optimizer, register_optimizer
from .sharding.layout import LayoutError
from .sngm import SNGM
from .stableadamw import StableAdamW
from .trust_ratio import TrustRatio
from .tvlars import TVLARS
from .vrgd import VRLAMB, VRLARS, VRSGD, VRAdam

__all__ = [
    "CBLR",
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
    "AdaBelief",
    "AdaShift",
    "CowClip",
    "CurvatureAdamW",
    "CurvatureSGD",
    "Extrapolation",
    "FastAdaBelief",
    "LayerwiseOptimizer",
    "LayoutError",
    "NovoGrad",
    "OptimizerEntry",
    "StableAdamW",
    "StatisticsError",
    "TrustRatio",
    "VRAdam",
    "create_optimizer",
    "register_optimizer",
]
