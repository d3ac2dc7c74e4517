"""Every optimizer by name, with its paper and needs. Generic tests run over this table: an entry is a tested entry."""

from __future__ import annotations

import difflib
import inspect
from dataclasses import dataclass, field
from typing import Any

from .clars import CLARS
from .cowclip import CowClip
from .lamb import LAMB, LAMBC
from .lans import LANS
from .lars import LARS
from .layerwise import LayerwiseOptimizer
from .mclr import MCLR
from .novograd import NovoGrad
from .sngm import SNGM
from .tvlars import TVLARS
from .vrgd import VRLAMB, VRLARS, VRSGD, VRAdam

__all__ = ["OPTIMIZERS", "OptimizerEntry", "create_optimizer"]


@dataclass(frozen=True)
class OptimizerEntry:
    """What users and tests need to know of an optimizer.

    Attributes:
        optimizer_class: The class.
        paper: Where its equations come from.
        collectives: All-reduces per `step()` call on sharded layers, with default options.
        variants: Options that the generic tests try besides the defaults.
        unsharded_collectives: All-reduces per `step()` call where layers are whole and samples are not (DDP, ZeRO-0).
        group_statistics: What the optimizer takes of group gradients in backward: None, "norms" or "squares". Its step
            needs a backward pass; squares are reduced besides what is counted here (see `GradientStatistics`).
        extra_wire: What is sent besides the gradient, the weights and a few numbers per layer.
    """

    optimizer_class: type[LayerwiseOptimizer]
    paper: str
    collectives: int
    variants: tuple[dict[str, Any], ...] = field(default=())
    unsharded_collectives: int = 0
    extra_wire: str = "none"

    @property
    def group_statistics(self) -> str | None:
        return self.optimizer_class.group_statistics

    @property
    def defaults(self) -> dict[str, Any]:
        """The constructor's options and their defaults, without `params`; a required one is absent."""
        parameters = inspect.signature(self.optimizer_class).parameters
        return {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}


OPTIMIZERS: dict[str, OptimizerEntry] = {
    "lars": OptimizerEntry(
        LARS,
        "You, Gitman, Ginsburg 2017, arXiv 1708.03888",
        collectives=1,
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
        collectives=1,
        variants=(
            {"bias_correction": False},
            {"grad_averaging": False, "adapt": True},
            {"trust_bounds": (0.01, 0.3), "weight_decay": 0.1},
        ),
    ),
    "lambc": OptimizerEntry(
        LAMBC,
        "Fong, Chen, Chen 2020, arXiv 2011.13584",
        collectives=1,
        variants=({"trust_clip": 0.5, "bias_correction": False},),
    ),
    "cowclip": OptimizerEntry(
        CowClip,
        "Zheng et al. 2022, arXiv 2204.06240",
        collectives=1,
        extra_wire="4 bytes per embedding row",
        variants=({"weight_decay": 0.1, "betas": (0.8, 0.99)},),
    ),
    "lans": OptimizerEntry(
        LANS,
        "Zheng et al. 2020, arXiv 2006.13484",
        collectives=2,
        variants=({"normalize_grad": False}, {"adapt": True, "betas": (0.9, 0.99)}),
    ),
    "novograd": OptimizerEntry(
        NovoGrad,
        "Ginsburg et al. 2019, arXiv 1905.11286",
        collectives=1,
        variants=({"grad_averaging": True, "lr": 0.5}, {"betas": (0.8, 0.5), "eps": 0.01}),
    ),
    "sngm": OptimizerEntry(
        SNGM,
        "Zhao, Xie, Li 2020, arXiv 2007.13985",
        collectives=1,
        variants=({"momentum": 0.0}, {"momentum": 0.5, "weight_decay": 0.0}),
    ),
    "tvlars": OptimizerEntry(
        TVLARS,
        "Do et al. 2023, arXiv 2309.14053",
        collectives=1,
        variants=(
            {"form": "released"},
            {"decay": 0.7, "delay": 3, "alpha": 0.5, "floor": 0.01},
            {"momentum": 0.0, "adapt": True},
        ),
    ),
    "mclr": OptimizerEntry(
        MCLR,
        "after Gao, Zhong 2020, arXiv 2012.08795 (reconstruction)",
        collectives=4,
        extra_wire="4 histograms of 2 KB per layer",
        variants=({"momentum": 0.0, "eps": 0.1}, {"adapt": True}),
    ),
    "clars": OptimizerEntry(
        CLARS,
        "Huo, Gu, Huang 2020, arXiv 2002.01576",
        collectives=1,
        unsharded_collectives=1,
        variants=({"statistic": "square"}, {"statistic": "square", "momentum": 0.0, "adapt": True}),
    ),
    "vrsgd": OptimizerEntry(
        VRSGD,
        "Jiang et al. 2023, arXiv 2309.13681",
        collectives=1,
        extra_wire="one more reduction of the gradient's size",
        unsharded_collectives=2,
        variants=({"momentum": 0.9, "lr": 0.5}, {"gsnr_floor": 0.4}),
    ),
    "vradam": OptimizerEntry(
        VRAdam,
        "Jiang et al. 2023, arXiv 2309.13681",
        collectives=1,
        extra_wire="one more reduction of the gradient's size",
        unsharded_collectives=2,
        variants=({"second_moment": "mean", "gsnr_beta": 0.5}, {"gsnr_floor": 0.5, "betas": (0.8, 0.9)}),
    ),
    "vrlars": OptimizerEntry(
        VRLARS,
        "Jiang et al. 2023, arXiv 2309.13681",
        collectives=2,
        extra_wire="one more reduction of the gradient's size",
        unsharded_collectives=2,
        variants=({"momentum_form": "unscaled", "gsnr_floor": 0.3}, {"nesterov": True, "adapt": True}),
    ),
    "vrlamb": OptimizerEntry(
        VRLAMB,
        "Jiang et al. 2023, arXiv 2309.13681",
        collectives=2,
        extra_wire="one more reduction of the gradient's size",
        unsharded_collectives=2,
        variants=(
            {"second_moment": "mean", "gsnr_floor": 0.3},
            {"bias_correction": False, "grad_averaging": False, "adapt": True, "gsnr_beta": 0.0},
        ),
    ),
}


def create_optimizer(name: str, params: Any, **options: Any) -> LayerwiseOptimizer:
    """Construct an optimizer by its registered name.

    Args:
        name: A key of `OPTIMIZERS`, in any case.
        params: Parameters, named parameters or groups.
        options: The class's own options, e.g. ``lr``.

    Raises:
        ValueError: If the name or an option is unknown (the nearest ones are named), or an option is out of range.
    """
    entry = OPTIMIZERS.get(name.lower())
    if entry is None:
        raise ValueError(f"unknown optimizer {name!r}; {_nearest(name.lower(), list(OPTIMIZERS))}")
    allowed = [key for key in inspect.signature(entry.optimizer_class).parameters if key != "params"]
    for option in options:
        if option not in allowed:
            raise ValueError(f"{name} has no option {option!r}; {_nearest(option, allowed)}")
    return entry.optimizer_class(params, **options)


def _nearest(given: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(given, allowed, n=3)
    return f"nearest: {', '.join(close)}" if close else f"known: {', '.join(allowed)}"
