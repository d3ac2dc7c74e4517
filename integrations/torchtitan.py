"""torchtitan: a container whose parameter groups may name any optimizer here, beside torchtitan's own.

Read from torchtitan 0.3.0, which makes one optimizer for each name and each part of a model that is cut into pipeline
stages. Its parameters are DTensors, which the FSDP2 backend explains; its checkpoints know layers by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from trustratio.optimizers import OPTIMIZERS, LayerwiseOptimizer, create_optimizer
from trustratio.optimizers.options.unknown import nearest
from trustratio.optimizers.sharding.internals import Internals

__all__ = ["LayerwiseOptimizersContainer", "layerwise"]

INTERNALS = Internals("its OptimizersContainer", "torchtitan", "0.3.0")
FACTORIES = "_resolve_optimizer_factory"
"""The method of the container that knows optimizers by name, which ours takes the place of."""

THEIR_OWN = ("Adam", "AdamW", "DistMuon")


class LayerwiseOptimizersContainer(OptimizersContainer):
    """An OptimizersContainer whose `ParamGroupConfig.optimizer_name` may be a name of `OPTIMIZERS`, such as "lamb".

    `optimizer_kwargs` are options of the constructor, and may differ by group. `implementation` concerns torchtitan's
    own optimizers; choose with the option of that name in `optimizer_kwargs` how ours are computed.

    Raises:
        ValueError: An unknown name or option; ``implementation="fused_opt_states_bf16"`` with an optimizer of ours,
            which has ``state_dtype="bfloat16"`` in its place; one that needs the norm of the whole model's gradient,
            which a container of a pipeline stage does not see.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """As torchtitan's."""

    def __init__(self, config: Any, **runtime: Any) -> None:
        INTERNALS.read(OptimizersContainer, FACTORIES)  # else names of ours would not be asked for
        super().__init__(config, **runtime)
        ours = [optimizer for optimizer in self.optimizers if isinstance(optimizer, LayerwiseOptimizer)]
        if ours and config.implementation == "fused_opt_states_bf16":
            raise ValueError(
                'implementation="fused_opt_states_bf16" concerns Adam and AdamW alone: put state_dtype="bfloat16" into '
                f'optimizer_kwargs of {type(ours[0]).__name__}, and leave implementation at "fused"'
            )
        for optimizer in ours:
            _refuse_model_norm(optimizer)

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        if name.lower() in OPTIMIZERS:
            return partial(create_optimizer, name)
        if name in THEIR_OWN:
            return INTERNALS.read(OptimizersContainer, FACTORIES)(name)
        raise ValueError(f"unknown optimizer_name {name!r}; {nearest(name.lower(), (*OPTIMIZERS, *THEIR_OWN))}")


def layerwise(name: str, **options: Any) -> Any:
    """Return a configuration in which one optimizer here trains all parameters.

    Layers of one dimension (norms, biases) are not adapted, whatever their group: see the option `adapt`.

    Args:
        name: As in `OPTIMIZERS`.
        options: Of the constructor, `lr` among them.
    """
    group = ParamGroupConfig(pattern=r".*", optimizer_name=name, optimizer_kwargs=options)
    return LayerwiseOptimizersContainer.Config(param_groups=[group])


def _refuse_model_norm(optimizer: LayerwiseOptimizer) -> None:
    for group in optimizer.param_groups:
        if optimizer.needs_model_norm(group):
            raise ValueError(
                f"{type(optimizer).__name__} with these options needs the norm of the whole model's gradient, and a "
                "pipeline stage's optimizer does not see it: leave max_grad_norm at None and set torchtitan's "
                "training.max_norm, or choose another optimizer than SNGM"
            )
