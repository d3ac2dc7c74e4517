"""Every optimizer by name, with its paper and needs. Generic tests run over this table: an entry is a tested entry."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch

from .adabelief import AdaBelief, FastAdaBelief
from .adashift import AdaShift
from .cblr import CBLR
from .clars import CLARS
from .cowclip import CowClip
from .curvature import CurvatureAdamW, CurvatureSGD
from .lamb import LAMB, LAMBC
from .lans import LANS
from .lars import LARS
from .layerwise import LayerwiseOptimizer
from .mclr import MCLR
from .novograd import NovoGrad
from .options.common import options_of
from .options.unknown import nearest, why_refused
from .sngm import SNGM
from .stableadamw import StableAdamW
from .trust_ratio import TrustRatio
from .tvlars import TVLARS
from .vrgd import VRLAMB, VRLARS, VRSGD, VRAdam

__all__ = ["OPTIMIZERS", "OptimizerEntry", "create_optimizer", "register_optimizer"]

WITH_A_BASE = "trust_ratio"
"""Made by name too, but no entry: what it computes is said by the class that it is given."""


@dataclass(frozen=True)
class OptimizerEntry:
    """What users, tests and recipes need to know of an optimizer; no other list has optimizers by name.

    Attributes:
        optimizer_class: The class.
        paper: Where its equations come from.
        sums: fp64 numbers per layer, sums or maxima, in each all-reduce of one `step()` call on sharded layers, with
            default options.
        starting_rate: Learning rate to try first, for models as small as the recipes' tiny presets: a guess.
        variants: Options that the generic tests try besides the defaults.
        extra_wire: What is sent besides the gradient, the weights and a few numbers per layer.
        waits: Option that says how many updates a layer gets before it moves at all; None if none.
        verified: What its equations were compared with, and what could not be; for docs/seeds.md.
        not_under: Shardings of docs/seeds.md under which it is not exact or refused, besides those that
            `group_statistics` implies; or what of it is not, under which.
    """

    optimizer_class: type[LayerwiseOptimizer]
    paper: str
    sums: tuple[int, ...]
    starting_rate: float
    variants: tuple[dict[str, Any], ...] = field(default=())
    extra_wire: str = "none"
    waits: str | None = None
    verified: str = ""
    not_under: tuple[str, ...] = ()

    @property
    def collectives(self) -> int:
        """All-reduces per `step()` call on sharded layers, with default options."""
        return len(self.sums)

    @property
    def unsharded_collectives(self) -> int:
        """All-reduces per `step()` call where layers are whole and samples are not (DDP, ZeRO-0).

        One adds up the norms of the groups' gradients, another one their squares.
        """
        return {None: 0, "norms": 1, "squares": 2}[self.group_statistics]

    @property
    def group_statistics(self) -> str | None:
        """What it takes of group gradients in backward: None, "norms" or "squares".

        Its step needs a backward pass. Where layers are sharded, squares are reduced besides what `sums` has (see
        `GradientStatistics`).
        """
        return self.optimizer_class.group_statistics

    @property
    def defaults(self) -> dict[str, Any]:
        """The constructor's options and their defaults, without `params`; a required one is absent."""
        return {
            name: default
            for name, default in options_of(self.optimizer_class).items()
            if default is not inspect.Parameter.empty and not (name == "lr" and default is None)
        }


OPTIMIZERS: dict[str, OptimizerEntry] = {
    "lars": OptimizerEntry(
        LARS,
        "You, Gitman, Ginsburg 2017, arXiv 1708.03888",
        verified="MLPerf's optimizer term by term (`scaled`); timm's results (`gradient`)",
        sums=(2,),
        starting_rate=5.0,
        variants=(
            {"momentum_form": "gradient"},
            {"momentum_form": "unscaled"},
            {"nesterov": True, "momentum_form": "scaled", "weight_decay": 0.01},
            {"nesterov": True, "momentum_form": "gradient", "eps": 1e-8},
            {"momentum": 0.0, "adapt": True},
        ),
    ),
    "lamb": OptimizerEntry(
        LAMB,
        "You et al. 2019, arXiv 1904.00962",
        verified="timm's results, with and without bias correction and clipping",
        sums=(3,),
        starting_rate=0.02,
        variants=(
            {"bias_correction": False},
            {"grad_averaging": False, "adapt": True},
            {"trust_bounds": (0.01, 0.3), "weight_decay": 0.1},
            {"update_clip": 0.7, "betas": (0.5, 0.9)},
        ),
    ),
    "lambc": OptimizerEntry(
        LAMBC,
        "Fong, Chen, Chen 2020, arXiv 2011.13584",
        verified="the clip is where the authors' code has it; whether the paper has a lower bound is not known",
        sums=(3,),
        starting_rate=0.02,
        variants=({"trust_clip": 0.5, "bias_correction": False}, {"update_clip": 0.5, "adapt": True}),
    ),
    "cowclip": OptimizerEntry(
        CowClip,
        "Zheng et al. 2022, arXiv 2204.06240",
        verified="threshold, counts and L2 term of the authors' code; the paper's printed threshold is from memory",
        sums=(1,),
        starting_rate=0.001,
        extra_wire="4 bytes per embedding row",
        not_under=("clipped embeddings under FSDP1",),
        variants=({"weight_decay": 0.1, "betas": (0.8, 0.99)},),
    ),
    "lans": OptimizerEntry(
        LANS,
        "Zheng et al. 2020, arXiv 2006.13484",
        verified="the authors' kernel term by term",
        sums=(1, 4),
        starting_rate=0.02,
        variants=({"normalize_grad": False}, {"adapt": True, "betas": (0.9, 0.99)}, {"update_clip": 0.9}),
    ),
    "novograd": OptimizerEntry(
        NovoGrad,
        "Ginsburg et al. 2019, arXiv 1905.11286",
        verified="results of NVIDIA's Jasper example and of timm",
        sums=(1,),
        starting_rate=0.01,
        variants=({"grad_averaging": True, "lr": 0.5}, {"betas": (0.8, 0.5), "eps": 0.01}),
    ),
    "sngm": OptimizerEntry(
        SNGM,
        "Zhao, Xie, Li 2020, arXiv 2007.13985",
        verified="nothing: Algorithm 1 as another text quotes it; where the decay goes is a reading",
        sums=(1,),
        starting_rate=0.1,
        variants=({"momentum": 0.0}, {"momentum": 0.5, "weight_decay": 0.0}),
    ),
    "tvlars": OptimizerEntry(
        TVLARS,
        "Do et al. 2023, arXiv 2309.14053",
        verified="results of the authors' released code (`released`); the paper's form (`paper`) is a reading",
        sums=(3,),
        starting_rate=5.0,
        variants=(
            {"form": "released"},
            {"decay": 0.7, "delay": 3, "alpha": 0.5, "floor": 0.01},
            {"momentum": 0.0, "adapt": True},
        ),
    ),
    "mclr": OptimizerEntry(
        MCLR,
        "after Gao, Zhong 2020, arXiv 2012.08795 (reconstruction)",
        verified="nothing: reconstructed from the paper's abstract",
        sums=(1 + 256,) * 4,  # ‖g‖² and a histogram
        starting_rate=1e-4,
        extra_wire="4 histograms of 2 KB per layer",
        variants=({"momentum": 0.0, "eps": 0.1}, {"adapt": True}),
    ),
    "cblr": OptimizerEntry(
        CBLR,
        "after Gao, Zhong 2020, arXiv 2012.08795 (reconstruction)",
        verified="nothing beyond the abstract, which has LARS as a special case; the statistics are readings",
        sums=(1 + 256,) * 4,  # as MCLR; one all-reduce of 3 or 2 numbers for the mean or the norm
        starting_rate=1e-4,
        extra_wire="4 histograms of 2 KB per layer",
        variants=(
            {"statistic": "mean"},
            {"statistic": "mean", "momentum": 0.0, "eps": 0.1, "adapt": True},
            {"statistic": "norm"},
        ),
    ),
    "curvature_sgd": OptimizerEntry(
        CurvatureSGD,
        "after Bahamou, Goldfarb 2023, arXiv 2305.13664 (equations unverified)",
        verified="nothing beyond the abstract: the equations are readings",
        sums=(1,),
        starting_rate=0.1,
        variants=({"momentum": 0.0, "cap": 0.5}, {"interval": None, "adapt": None}),
    ),
    "curvature_adamw": OptimizerEntry(
        CurvatureAdamW,
        "after Bahamou, Goldfarb 2023, arXiv 2305.13664 (equations unverified)",
        verified="nothing beyond the abstract: the equations are readings",
        sums=(1,),
        starting_rate=0.3,
        variants=({"betas": (0.8, 0.9), "cap": 0.5}, {"adapt": None, "cap": 0.2}),
    ),
    "clars": OptimizerEntry(
        CLARS,
        "Huo, Gu, Huang 2020, arXiv 2002.01576",
        verified="nothing: both forms are readings of the abstract",
        sums=(6,),
        starting_rate=0.5,
        variants=({"statistic": "square"}, {"statistic": "square", "momentum": 0.0, "adapt": True}),
    ),
    "vrsgd": OptimizerEntry(
        VRSGD,
        "Jiang et al. 2023, arXiv 2309.13681",
        verified="Algorithm 1 of the paper, but for the ε that it lacks",
        sums=(6,),
        starting_rate=0.5,
        extra_wire="one more reduction of the gradient's size",
        variants=({"momentum": 0.9, "lr": 0.5}, {"gsnr_floor": 0.4}),
    ),
    "vradam": OptimizerEntry(
        VRAdam,
        "Jiang et al. 2023, arXiv 2309.13681",
        verified="the paper's text; bias correction of the ratio's average and where the decay goes are readings",
        sums=(6,),
        starting_rate=0.001,
        extra_wire="one more reduction of the gradient's size",
        variants=(
            {"second_moment": "mean", "gsnr_beta": 0.5},
            {"gsnr_floor": 0.5, "betas": (0.8, 0.9)},
            {"update_clip": 0.8, "second_moment": "mean"},
        ),
    ),
    "vrlars": OptimizerEntry(
        VRLARS,
        "Jiang et al. 2023, arXiv 2309.13681",
        verified="the paper's text, which adapts the gradient's mean first; that LARS's norm is of that is a reading",
        sums=(6, 2),
        starting_rate=5.0,
        extra_wire="one more reduction of the gradient's size",
        variants=({"momentum_form": "unscaled", "gsnr_floor": 0.3}, {"nesterov": True, "adapt": True}),
    ),
    "vrlamb": OptimizerEntry(
        VRLAMB,
        "Jiang et al. 2023, arXiv 2309.13681",
        verified="the paper's text; readings as in VRAdam",
        sums=(6, 3),
        starting_rate=0.02,
        extra_wire="one more reduction of the gradient's size",
        variants=(
            {"second_moment": "mean", "gsnr_floor": 0.3},
            {"bias_correction": False, "grad_averaging": False, "adapt": True, "gsnr_beta": 0.0},
            {"update_clip": 0.8, "betas": (0.8, 0.9)},
        ),
    ),
    "adabelief": OptimizerEntry(
        AdaBelief,
        "Zhuang et al. 2020, arXiv 2010.07468",
        verified="the authors' code (adabelief_pytorch 0.2.0) term by term",
        sums=(1,),
        starting_rate=0.01,
        variants=(
            {"rectify": False, "adapt": None},
            {"rectify": False, "amsgrad": True, "decoupled": False, "adapt": True},
            {"rectify": False, "fixed_decay": True, "eps": 1e-8, "betas": (0.8, 0.9)},
            {"degenerated_to_sgd": False, "decoupled": False, "betas": (0.5, 0.9)},
        ),
    ),
    "fastadabelief": OptimizerEntry(
        FastAdaBelief,
        "Zhou et al. 2021, arXiv 2104.13790",
        verified="nothing of the authors; three codes of others agree in m, s and the missing root",
        sums=(1,),
        starting_rate=0.03,
        variants=(
            {"adapt": None, "decoupled": True},
            {"constant_lr": True, "running_maximum": False, "gamma": 0.5, "delta": 0.1},
        ),
    ),
    "adashift": OptimizerEntry(
        AdaShift,
        "Zhou et al. 2018, arXiv 1810.00143",
        verified="the authors' TensorFlow code: exact window of gradients, maximum over the layer",
        sums=(2,),  # maxima
        waits="keep",
        starting_rate=0.03,
        variants=(
            {"keep": 2, "reduction": "mean", "adapt": None},
            {"keep": 1, "reduction": None, "betas": (0.5, 0.9)},
            {"keep": 2, "adapt": True},
        ),
    ),
    "stableadamw": OptimizerEntry(
        StableAdamW,
        "Wortsman et al. 2023, arXiv 2304.13013",
        verified="steps of torch-optimi 0.3.3; the paper itself was not at hand",
        sums=(2,),
        starting_rate=0.01,
        variants=(
            {"update_clip": 0.5, "decay_form": "unclipped", "betas": (0.5, 0.9)},
            {"update_clip": None, "decay_form": "fixed", "eps": 1e-3},
        ),
    ),
}


def register_optimizer(name: str, entry: OptimizerEntry) -> None:
    """Make an optimizer from outside the package known by name, in this process, to whatever takes one.

    Args:
        name: In lower case.
        entry: See `OptimizerEntry`.

    Raises:
        ValueError: If the name is not in lower case, or another class has it.
    """
    if name != name.lower():
        raise ValueError(f"name must be in lower case, got {name!r}")
    known = OPTIMIZERS.get(name)
    if known is not None and known.optimizer_class is not entry.optimizer_class:
        raise ValueError(f"name must be a new one, got {name!r}, which {known.optimizer_class.__name__} has")
    OPTIMIZERS[name] = entry


def create_optimizer(name: str, params: Any, **options: Any) -> LayerwiseOptimizer:
    """Construct an optimizer by its registered name.

    Args:
        name: A key of `OPTIMIZERS`, in any case, or "trust_ratio", which needs the option ``base_class``.
        params: Parameters, named parameters or groups.
        options: The class's own options, e.g. ``lr``.

    Raises:
        ValueError: If the name or an option is unknown (the nearest ones are named), or an option is out of range.
    """
    entry = OPTIMIZERS.get(name.lower())
    if name.lower() in (WITH_A_BASE, TrustRatio.__name__.lower()):
        return _with_a_base(params, options)
    if entry is None:
        advice = nearest(name.lower(), (*OPTIMIZERS, WITH_A_BASE))
        raise ValueError(f"unknown optimizer {name!r}; {_of_torch(name)}{advice}")
    allowed = options_of(entry.optimizer_class)
    for option in options:
        if option not in allowed:
            advice = why_refused(entry.optimizer_class, option) or nearest(option, allowed)
            raise ValueError(f"{name} has no option {option!r}; {advice}")
    return entry.optimizer_class(params, **options)


def _of_torch(name: str) -> str:
    """Return what to say of a name, in any case, that torch's own optimizers have; else nothing."""
    classes = {known.lower(): known for known, value in vars(torch.optim).items() if inspect.isclass(value)}
    if name.lower() not in classes or name.lower() == "optimizer":
        return ""
    own = f"torch.optim.{classes[name.lower()]}"
    return f"{own} is torch's own: construct it yourself, or give {WITH_A_BASE!r} with base_class={own}; "


def _with_a_base(params: Any, options: dict[str, Any]) -> TrustRatio:
    if "base_class" not in options:
        raise ValueError(f"{WITH_A_BASE} needs the option base_class: an optimizer class such as torch.optim.AdamW")
    try:
        return TrustRatio(params=params, **options)
    except TypeError as error:
        raise ValueError(str(error)) from error
