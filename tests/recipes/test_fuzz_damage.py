"""A flipped byte or a cut end anywhere in a checkpoint or a prepared folder: refused, with the file's name."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

from tests.fuzzing import examples
from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.common.files import write_sealed
from trustratio.recipes.common.marks import Share
from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.comparison.runs import Run, outcome
from trustratio.recipes.configuration.config import DataConfig, ModelConfig, RecipeConfig
from trustratio.recipes.configuration.overrides import load_config
from trustratio.recipes.configuration.phases import phases_of
from trustratio.recipes.data.preparation import Preparation, mended, prepare, prepare_into
from trustratio.recipes.data.verification import damaged_files, expected_hashes
from trustratio.recipes.runs.checkpoints import CheckpointFolder, describe_checkpoint, find_checkpoint, require_whole
from trustratio.recipes.runs.history import load_history
from trustratio.recipes.runs.report import page_data
from trustratio.recipes.training import session

from .conftest import sentences

QUIET = Reporter(active=False)
PLACE, CUT = st.floats(0, 1, exclude_max=True), "cut"
DAMAGE = st.one_of(st.just(CUT), st.integers(1, 255))


def damaged(content: bytes, where: float, how: str | int) -> bytes:
    """Cut the content short, or change the byte at this share of its length."""
    position = int(where * len(content))
    if how == CUT:
        return content[:position]
    return content[:position] + bytes([content[position] ^ int(how)]) + content[position + 1 :]


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of all files of a folder that are not empty."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): content for path in paths if (content := path.read_bytes())}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder with one checkpoint, of files of all kinds."""
    folder = tmp_path_factory.mktemp("run")

    def save(checkpoint: Path) -> None:
        (checkpoint / "part").mkdir()
        for number, size in enumerate((1, 300, 70_000, 1_500_000)):
            (checkpoint / "part" / f"{number}.pt").write_bytes(bytes(i % 253 for i in range(size)))

    identity = {"model": {"layers": 2}, "seed": 1, "data": "0123", "ranks": 2}
    CheckpointFolder(folder, 1, identity).write(7, save, lambda failure: [str(failure)] if failure else [], first=True)
    write_sealed(folder / "config.json", RecipeConfig().to_dict())
    read_run(folder)
    return folder


def read_run(folder: Path) -> None:
    """What is read of a run before anything of it is loaded."""
    load_config(folder / "config.json")
    checkpoint = find_checkpoint(folder)
    describe_checkpoint(checkpoint)
    require_whole(checkpoint)


@examples(200)
@given(st.data())
def test_a_damaged_checkpoint_is_refused_by_name(run, data):
    contents = files_of(run)
    name, where, how = data.draw(st.sampled_from(sorted(contents))), data.draw(PLACE), data.draw(DAMAGE)
    (run / name).write_bytes(damaged(contents[name], where, how))
    event(name)
    try:
        if name == "checkpoints/latest":  # a help: where it fails, the checkpoint itself is found, or it is named
            with contextlib.suppress(RecipeError):
                assert find_checkpoint(run).name == "step-00000007"
        else:
            with pytest.raises(RecipeError, match=Path(name).name):
                read_run(run)
    finally:
        (run / name).write_bytes(contents[name])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder that `prepare` wrote, of several shards."""
    root = tmp_path_factory.mktemp("prepared")
    texts = [json.dumps({"text": sentences(i, 20)}) for i in range(30)]
    (root / "a.jsonl").write_text("\n".join(texts))
    config = DataConfig(sources=(str(root / "a.jsonl"),), vocabulary=200, validation_fraction=0.1)
    folder = prepare_into(root / "out", config, Preparation(shard_characters=9_000), QUIET)
    read_prepared(folder)
    return folder


def read_prepared(folder: Path) -> None:
    """What is read of a prepared folder at the start of a run."""
    config = DataConfig(sources=(str(folder),), sequence_length=16)
    data = prepare(config, QUIET)
    mended(config, data, damaged_files(folder, expected_hashes(folder), Share()), QUIET)


@examples(200)
@given(st.data())
def test_damaged_data_are_refused_by_name(prepared, data):
    contents = files_of(prepared)
    name, where, how = data.draw(st.sampled_from(sorted(contents))), data.draw(PLACE), data.draw(DAMAGE)
    (prepared / name).write_bytes(damaged(contents[name], where, how))
    event(name.split("-")[0])
    try:
        with pytest.raises(RecipeError, match=name):
            read_prepared(prepared)
    finally:
        (prepared / name).write_bytes(contents[name])


@pytest.mark.parametrize(
    "name", ["train-00001.bin", "shard-00001.json", "index.npz", "tokenizer.json", "manifest.json"]
)
def test_prepare_writes_damaged_files_anew(tmp_path, name):
    texts = [json.dumps({"text": sentences(i, 20)}) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(texts))
    config = DataConfig(sources=(str(tmp_path / "a.jsonl"),), vocabulary=200, validation_fraction=0.1)
    how = Preparation(shard_characters=9_000)
    folder = prepare_into(tmp_path / "out", config, how, QUIET)
    before = files_of(folder)
    (folder / name).write_bytes(damaged(before[name], 0.4, 1))
    prepare_into(folder, config, how, QUIET)
    read_prepared(folder)
    after = files_of(folder)
    assert after.keys() == before.keys()
    if name != "tokenizer.json":  # of which no two training runs are the same
        assert after == before


@pytest.mark.parametrize(
    "name", ["train-00000.bin", "shard-00000.json", "index.npz", "settings.json", "tokenizer.json"]
)
def test_damaged_files_of_the_cache_are_written_anew(tmp_path, name):
    texts = [json.dumps({"text": sentences(i, 20)}) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(texts))
    config = DataConfig((str(tmp_path / "a.jsonl"),), vocabulary=200, validation_fraction=0.1, sequence_length=16)
    data = prepare(config, QUIET)
    folder = Path(data.folder)
    before = files_of(folder)
    (folder / name).write_bytes(damaged(before[name], 0.4, 1))
    data = prepare(config, QUIET)  # a damaged tokenizer it sees itself
    mended(config, data, damaged_files(folder, expected_hashes(folder), Share()), QUIET)
    assert damaged_files(folder, expected_hashes(folder), Share()) == []
    if name != "tokenizer.json":
        assert files_of(folder) == before


@pytest.mark.parametrize("verify", [True, False])
def test_hashes_are_compared_unless_that_is_switched_off(prepared, monkeypatch, verify):
    for name in ("on_each_machine", "on_first_rank"):
        monkeypatch.setattr(session, name, lambda work: work())
    config = DataConfig(sources=(str(prepared),), verify=verify, sequence_length=16)
    contents = files_of(prepared)
    (prepared / "train-00000.bin").write_bytes(damaged(contents["train-00000.bin"], 0.5, 1))
    phase = phases_of(RecipeConfig(model=ModelConfig(), data=config))[0]
    try:
        if verify:
            with pytest.raises(RecipeError, match=r"train-00000\.bin in .* was changed or cut short"):
                session._prepare_phase(config, phase, QUIET)
        else:
            assert session._prepare_phase(config, phase, QUIET).train_rows > 0
    finally:
        (prepared / "train-00000.bin").write_bytes(contents["train-00000.bin"])


@examples(100)
@example(where=0.6875, how=1)  # the name of a number that the report needs
@given(where=PLACE, how=DAMAGE)
def test_damaged_metrics_are_read_as_far_as_they_go(tmp_path_factory, where, how):
    lines = [{"kind": "names", "step": 1, "trust_ratios": ["a", "b"]}]
    for step in (1, 2, 3):
        numbers = {"loss": 3.5 / step, "sequences": 16 * step, "sequences_per_second": 9.5, "trust_ratios": [0.5, 1.0]}
        lines.append({"kind": "train", "step": step, **numbers})
    lines.append({"kind": "validation", "step": 3, "validation_loss": 2.0, "validation_accuracy": 0.1})
    folder = tmp_path_factory.mktemp("run")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_bytes(damaged(text.encode(), where, how))
    try:
        page_data(load_history(folder))
    except RecipeError as error:
        assert "has no logged step yet" in str(error)  # noqa: PT017
    outcome(folder, Run("lamb", 0.1, 1), 3)
