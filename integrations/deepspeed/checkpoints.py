"""DeepSpeed's ways to load a checkpoint that leave out what these optimizers keep of each layer. Read from 0.19.8."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from trustratio.optimizers.sharding.layout import LayoutError

from .parallelism import find_engine

__all__ = ["refuse_lossy_checkpoints"]

INSTEAD = (
    "and what is loaded would train wrongly. Remove the entry; save_engine_state and load_engine_state of "
    "trustratio.integrations.checkpoints.deepspeed_engine go to any number of ranks and any stage, and "
    "engine.save_checkpoint and engine.load_checkpoint to the same ones"
)


def refuse_lossy_checkpoints(wrapper: DeepSpeedOptimizer, optimizer: Any) -> None:
    """Raise LayoutError if the engine's checkpoints are of a kind that loses state per layer, and it has any.

    Elastic ones give every rank the first rank's numbers of layers. Of universal ones ZeRO-3 reads Adam's moments, one
    step for all layers and one group's options; ZeRO-1 and 2 no numbers of layers.
    """
    if not optimizer.layer_state:
        return
    if isinstance(wrapper, DeepSpeedZeroOptimizer) and wrapper.elastic_checkpoint:
        raise LayoutError(f"zero_optimization.elastic_checkpoint keeps no state per layer of other ranks, {INSTEAD}")
    engine = find_engine(optimizer)
    if engine is not None and engine.load_universal_checkpoint():
        raise LayoutError(f"checkpoint.load_universal reads no state per layer, {INSTEAD}")
