"""recipes/launch/sweep.yaml: what wandb's agent starts is a command of the recipe, its metric one that is logged."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from wandb.sdk.launch.sweeps import utils

from trustratio.optimizers import OPTIMIZERS
from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.configuration.command_line import parse_command_line
from trustratio.recipes.model.optimizer import BASELINES
from trustratio.recipes.runs.loggers import scalars
from trustratio.recipes.training.records import Records

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "recipes" / "launch" / "sweep.yaml"


def sweep() -> dict[str, Any]:
    content = utils.load_sweep_config(str(FILE))
    assert content is not None
    return content


def command_line(values: dict[str, Any]) -> list[str]:
    """What the agent starts for one point of the grid: wandb's own replacement of its macros."""
    content = sweep()
    arguments = {name: {"value": value} for name, value in values.items()}
    made = utils.create_sweep_command_args({"args": arguments})
    macros = {"env": ["/usr/bin/env"], "program": [content["program"]], **made}
    words = utils.create_sweep_command(list(content["command"]))
    line = [macros[word[2:-1]] if str(word).startswith("${") else [word] for word in words]
    return list(itertools.chain(*line))


def grid() -> list[dict[str, Any]]:
    parameters = sweep()["parameters"]
    return [
        dict(zip(parameters, point, strict=True))
        for point in itertools.product(*(p["values"] for p in parameters.values()))
    ]


@pytest.mark.parametrize("values", grid(), ids=str)
def test_every_point_is_a_command_of_the_recipe(values):
    line = command_line(values)
    start = line.index("recipes/bert.py")
    assert line[:start] == ["/usr/bin/env", "deepspeed", "--num_gpus", "2"]
    assert (ROOT / line[start]).exists()
    parsed = parse_command_line(line[start + 1 :])
    assert set(values) <= parsed.given
    assert parsed.config.optimizer.name == values["optimizer.name"]
    assert parsed.config.optimizer.lr == values["optimizer.lr"]
    assert parsed.config.run.loggers == ("wandb",)


def test_the_grid_is_over_optimizers_and_rates_that_exist():
    content = sweep()
    assert content.keys() == {"program", "method", "metric", "parameters", "command"}
    assert content["method"] == "grid"
    assert all(set(parameter) == {"values"} for parameter in content["parameters"].values())
    names = content["parameters"]["optimizer.name"]["values"]
    assert set(names) <= {*OPTIMIZERS, *BASELINES}
    rates = content["parameters"]["optimizer.lr"]["values"]
    assert all(isinstance(rate, float) and math.isfinite(rate) for rate in rates)
    assert all(2 < larger / smaller < 5 for smaller, larger in itertools.pairwise(rates))


def test_the_metric_is_one_that_the_recipe_logs():
    class Metrics(list):
        write = list.append

    class Display:
        reporter = Reporter(active=False)

    metrics = Metrics()
    Records(metrics, Display()).validation(10, 1.5, 0.25, 3.0)  # type: ignore[arg-type]
    metric = sweep()["metric"]
    assert metric == {"name": metric["name"], "goal": "minimize"}
    assert dict(scalars(metrics[0]))[metric["name"]] == 1.5
