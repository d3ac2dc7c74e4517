"""Named configurations. A preset is one `RecipeConfig` with what it is for and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass

from trustratio.recipes.recipe_config import (
    OptimizerConfig,
    RecipeConfig,
)
from trustratio.recipes.recipe_errors import unknown_name

DEFAULT_PRESET = "lamb-tiny"


@dataclass(frozen=True)
class Preset:
    """A configuration under a name, with what it is for and its source."""

    config: RecipeConfig
    description: str
    source: str


def _named(name: str, description: str, source: str, **sections: object) -> tuple[str, Preset]:
    return name, Preset(RecipeConfig(preset=name, **sections), description, source)  # type: ignore[arg-type]


PRESETS: dict[str, Preset] = dict(
    [
        _named(
            "lamb-tiny",
            "2 x 128 BERT on the installed packages' documentation with LAMB: minutes on two CPU cores",
            "this recipe; of the learning rates 0.008, 0.02 and 0.05, 0.02 gave the lowest validation loss",
            optimizer=OptimizerConfig(name="lamb", lr=0.02),
        ),
        _named(
            "adamw-tiny",
            "the same model, data and schedule with AdamW, as a baseline",
            "this recipe; the learning rate is a common one for models of this size, not tuned here",
            optimizer=OptimizerConfig(name="adamw", lr=0.002),
        ),
    ]
)


def get_preset(name: str) -> RecipeConfig:
    """Return the configuration of a preset.

    Raises:
        RecipeError: no preset has that name; the message gives the nearest ones.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name].config
