"""`trustratio export`: a checkpoint becomes a folder of transformers, and nothing that is there is overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from trustratio.recipes.common.errors import BAD_INPUT
from trustratio.recipes.training import export


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Path]]:
    """What the command has exported, which test_trainer_recipe.py does in earnest."""
    calls: list[tuple[Path, Path]] = []
    monkeypatch.setattr(export, "export_checkpoint", lambda path, output, reporter: calls.append((path, output)))
    return calls


def test_the_checkpoint_is_exported_and_the_folder_is_told(tmp_path, exported, capsys):
    run, output = tmp_path / "run", tmp_path / "new" / "model"
    run.mkdir()
    assert export.main([str(run), str(output)]) == 0
    assert exported == [(run, output)]
    assert str(output) in capsys.readouterr().out


def test_a_checkpoint_is_needed(tmp_path, capsys):
    assert export.main([str(tmp_path), str(tmp_path / "model")]) == BAD_INPUT
    assert "checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_what_is_in_the_folder_stays(tmp_path, exported, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("mine")
    assert export.main([str(tmp_path), str(tmp_path / "model")]) == BAD_INPUT
    assert "is not empty: choose another folder" in capsys.readouterr().err
    assert (exported, (tmp_path / "model" / "config.json").read_text()) == ([], "mine")


@pytest.mark.parametrize("folder", [".", "model"])
def test_what_transformers_loads_already_is_named(tmp_path, exported, capsys, folder):
    """The Trainer's runs have it in model/."""
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "config.json").write_text('{"model_type": "bert"}')
    assert export.main([str(tmp_path), str(tmp_path / "new")]) == BAD_INPUT
    assert f"{str(tmp_path / folder)!r} is in transformers' format already" in capsys.readouterr().err
    assert exported == []


@pytest.mark.parametrize("output", ["file", "file/model"])
def test_an_output_that_cannot_be_is_named_before_the_work(tmp_path, exported, capsys, output):
    (tmp_path / "file").write_text("")
    assert export.main([str(tmp_path), str(tmp_path / output)]) == BAD_INPUT
    assert "cannot use output folder" in capsys.readouterr().err
    assert exported == []
