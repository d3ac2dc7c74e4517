"""timm: every optimizer here by name in timm's factory, `create_optimizer_v2(model, "trustratio-lamb")`.

timm has a LAMB and a LARS of its own, so ours have a prefix. There is no underscore in their names, since timm takes
what stands behind the last one for the name (`lookahead_trustratio-lamb`). Read from timm 1.0.31.
"""

from __future__ import annotations

from typing import Any

from trustratio.optimizers import OPTIMIZERS
from trustratio.optimizers.registry import OptimizerEntry

__all__ = ["PREFIX", "register_optimizers"]

PREFIX = "trustratio-"


def register_optimizers(registry: Any = None) -> list[str]:
    """Make all optimizers known to timm's factory, and so to programs with its `--opt`; may be called again.

    timm's factory gives momentum 0.9 to those that have one, unless told otherwise, and no rate of its own: the class's
    default holds where `lr` is None.

    Args:
        registry: A `timm.optim.OptimizerRegistry`; None: the one that `create_optimizer_v2` uses.

    Returns:
        The names, in the order of `OPTIMIZERS`: ``"trustratio-lars"``, ``"trustratio-lamb"``, ..., with "-" for "_".

    Raises:
        ImportError: If timm is not installed, or has no registry (before 1.0.12).
    """
    from timm.optim import OptimInfo
    from timm.optim._optim_factory import default_registry

    registry = default_registry if registry is None else registry
    known = set(registry.list_optimizers())
    names = {PREFIX + name.replace("_", "-"): entry for name, entry in OPTIMIZERS.items()}
    for name in names.keys() - known:  # timm warns of a name that is registered again
        registry.register(OptimInfo(**_info(name, names[name])))
    return list(names)


def _info(name: str, entry: OptimizerEntry) -> dict[str, Any]:
    """What timm's factory has to know of the constructor's options."""
    return {
        "name": name,
        "opt_class": entry.optimizer_class,
        "description": f"trustratio's {entry.optimizer_class.__name__}, exact under every sharding: {entry.paper}",
        "has_eps": "eps" in entry.defaults,
        "has_momentum": "momentum" in entry.defaults,
        "has_betas": "betas" in entry.defaults,
    }
