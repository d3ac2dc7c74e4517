"""Data sets of the hub: streamed once, in as many runs as it takes, and what happens when the connection is lost."""

from __future__ import annotations

import json
import random

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.recipes.conftest import sentences
from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.configuration.config import DataConfig
from trustratio.recipes.data.preparation import Preparation, prepare_into
from trustratio.recipes.sources import hub
from trustratio.recipes.sources.hub import HubName, HubStream, Position, fetch_hub
from trustratio.recipes.sources.limit import UNLIMITED, Limit

QUIET = Reporter(active=False)
TEXTS = [f"text {n} {sentences(n, 3)}" for n in range(60)]


class Lines(Reporter):
    """Keeps what would be printed."""

    def __init__(self):
        super().__init__(active=False)
        self.lines = []

    def line(self, text):
        self.lines.append(text)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    waited = []
    monkeypatch.setattr(hub, "_wait", waited.append)
    monkeypatch.setattr(hub, "_RECORDS_BETWEEN_STATES", 7)
    monkeypatch.setattr(HubName, "revision", lambda self: None)
    return waited


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data set of three files in the form of the hub's."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    data = tmp_path / "set" / "data"
    data.mkdir(parents=True)
    for part in range(3):
        texts = TEXTS[20 * part : 20 * part + 20]
        path = data / f"train-{part:05d}-of-00003.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"id": range(20), "text": texts}), path, row_group_size=6)
    return tmp_path / "set"


class Breaking:
    """A stream of `datasets` that fails before given records; it counts what is read of it."""

    def __init__(self, data, failures, read):
        self.data, self.failures, self.read = data, failures, read

    def __iter__(self):
        for record in self.data:
            if self.failures and self.failures[0][0] == record["text"]:
                raise self.failures.pop(0)[1]
            self.read.append(record["text"])
            yield record

    def state_dict(self):
        return self.data.state_dict()

    def load_state_dict(self, state):
        self.data.load_state_dict(state)


@pytest.fixture
def breaking(folder, monkeypatch):
    """Return a function that makes the next streams fail, and the list of all that was read of them."""
    load, failures, read = datasets.load_dataset, [], []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: Breaking(load(*a, **o), failures, read))

    def break_at(*places):
        failures[:] = [(TEXTS[number], error) for number, error in places]

    return break_at, read


def fetched(path, column="text"):
    return [json.loads(line)[column] for line in path.read_text().splitlines()]


def fetch(folder, path, limit=UNLIMITED):
    said = []
    fetch_hub(str(folder), "text", path, limit, said.append)
    return said


def test_a_data_set_is_written_whole(folder, tmp_path):
    assert fetch(folder, tmp_path / "hub-a.jsonl") == []
    assert fetched(tmp_path / "hub-a.jsonl") == TEXTS
    assert [path.name for path in tmp_path.glob("hub-*")] == ["hub-a.jsonl"]


@pytest.mark.parametrize("number", [0, 1, 6, 7, 8, 19, 20, 21, 47, 59])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("a feature does not fit")], ids=["Ctrl-C", "error"])
def test_an_interrupted_stream_goes_on_where_it_was(folder, tmp_path, breaking, number, error):
    break_at, read = breaking
    break_at((number, error))
    with pytest.raises((KeyboardInterrupt, RecipeError)):
        fetch(folder, tmp_path / "hub-a.jsonl")
    assert not (tmp_path / "hub-a.jsonl").exists()
    assert read == TEXTS[:number]
    said = fetch(folder, tmp_path / "hub-a.jsonl")
    assert fetched(tmp_path / "hub-a.jsonl") == TEXTS
    assert len(read) <= len(TEXTS) + 6  # at most what was read after the data set's last state
    assert (f"behind the {number} documents" in said[0]) if number else not said


def test_a_kill_loses_what_was_not_saved_and_nothing_comes_twice(folder, tmp_path, breaking, monkeypatch):
    monkeypatch.setattr(hub, "_CHARACTERS_BETWEEN_SAVES", 2000)
    save, saves = hub._GrowingFile._save, []

    def counted(growing):
        saves.append(growing.mark.documents)
        if len(saves) < 4:
            save(growing)

    monkeypatch.setattr(hub._GrowingFile, "_save", counted)  # the later ones do not happen: as after a kill
    breaking[0]((50, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fetch(folder, tmp_path / "hub-a.jsonl")
    monkeypatch.setattr(hub._GrowingFile, "_save", save)
    assert 0 < saves[2] < 50
    assert len((tmp_path / "hub-a.part").read_bytes()) > json.loads((tmp_path / "hub-a.position").read_text())["size"]
    said = fetch(folder, tmp_path / "hub-a.jsonl")
    assert f"behind the {saves[2]} documents" in said[0]
    assert fetched(tmp_path / "hub-a.jsonl") == TEXTS


@pytest.mark.parametrize("damage", ["shorter", "position", "gone"])
def test_a_damaged_beginning_is_read_anew(folder, tmp_path, breaking, damage):
    breaking[0]((30, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fetch(folder, tmp_path / "hub-a.jsonl")
    if damage == "shorter":
        (tmp_path / "hub-a.part").write_bytes((tmp_path / "hub-a.part").read_bytes()[:-9])
    elif damage == "position":
        (tmp_path / "hub-a.position").write_text((tmp_path / "hub-a.position").read_text().replace('"since"', '"once"'))
    else:
        (tmp_path / "hub-a.part").unlink()
    assert fetch(folder, tmp_path / "hub-a.jsonl") == []
    assert fetched(tmp_path / "hub-a.jsonl") == TEXTS


LOST = [ConnectionResetError(104, "Connection reset by peer"), TimeoutError("timed out"), ConnectionError("gone")]


def test_a_lost_connection_is_taken_up_again(folder, tmp_path, breaking, no_waiting):
    import httpx

    places = [5, 5, 5, 20, 21, 44]
    errors = random.Random(0).choices([*LOST, httpx.ReadError("no more bytes")], k=6)
    breaking[0](*zip(places, errors, strict=True))
    said = fetch(folder, tmp_path / "hub-a.jsonl")
    assert fetched(tmp_path / "hub-a.jsonl") == TEXTS
    assert len(said) == 6
    assert "was lost" in said[0]
    assert no_waiting == [1, 2, 5, 1, 1, 1]  # from the first again where it went on in between


def test_an_error_inside_that_another_hides_is_a_lost_connection_too(folder, tmp_path, breaking):
    def wrapped():
        try:
            raise ConnectionResetError("reset")
        except ConnectionResetError as error:
            return datasets.exceptions.DatasetGenerationError("failed").with_traceback(error.__traceback__), error

    outer, inner = wrapped()
    outer.__cause__ = inner
    breaking[0]((9, outer))
    assert len(fetch(folder, tmp_path / "hub-a.jsonl")) == 1
    assert fetched(tmp_path / "hub-a.jsonl") == TEXTS


def test_a_connection_that_stays_lost_is_one_sentence_and_the_next_run_goes_on(folder, tmp_path, breaking, no_waiting):
    breaking[0](*[(33, ConnectionResetError(104, "Connection reset by peer"))] * 6)
    with pytest.raises(RecipeError) as no:
        fetch(folder, tmp_path / "hub-a.jsonl")
    assert str(no.value) == (
        f"the connection to the data set '{folder}' was lost after 33 records and 5 more attempts failed: [Errno 104] "
        "Connection reset by peer; the 33 documents that were read stay, and the same command goes on"
    )
    assert no_waiting == [1, 2, 5, 15, 30]
    fetch(folder, tmp_path / "hub-a.jsonl")
    assert fetched(tmp_path / "hub-a.jsonl") == TEXTS


def test_other_errors_are_not_tried_again(folder, tmp_path, breaking, no_waiting):
    breaking[0]((9, ValueError("a feature does not fit")))
    with pytest.raises(RecipeError, match=r"cannot load .*: a feature does not fit .*the 9 documents"):
        fetch(folder, tmp_path / "hub-a.jsonl")
    assert no_waiting == []


def test_a_record_that_cannot_be_taken_is_not_passed_over_by_the_next_run(tmp_path, monkeypatch):
    records = [{"text": "One."}, {"text": "Two."}, {"text": 3}, {"text": "Four."}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: records)
    for _ in range(2):
        with pytest.raises(RecipeError, match=r"data set 'x': column 'text' holds a number .*the 2 documents that"):
            fetch("x", tmp_path / "hub-a.jsonl")


def test_a_data_set_without_a_state_is_read_from_its_beginning(tmp_path, monkeypatch):
    """As whatever is no stream of `datasets`: the records that are there already are passed over."""
    records = [{"text": text} for text in TEXTS]

    def interrupted(*a, **o):
        yield from records[:25]
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets, "load_dataset", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("x", tmp_path / "hub-a.jsonl")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: records)
    fetch("x", tmp_path / "hub-a.jsonl")
    assert fetched(tmp_path / "hub-a.jsonl") == TEXTS


def test_only_as_much_as_wanted_is_read(folder, tmp_path, breaking):
    fetch(folder, tmp_path / "hub-a.jsonl", Limit(documents=23))
    assert fetched(tmp_path / "hub-a.jsonl") == breaking[1] == TEXTS[:23]
    breaking[1].clear()
    fetch(folder, tmp_path / "hub-b.jsonl", Limit(characters=sum(map(len, TEXTS[:4])) + 1))
    assert fetched(tmp_path / "hub-b.jsonl") == breaking[1] == TEXTS[:5]


def test_empty_records_do_not_count_and_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: [{"text": t} for t in ["a", None, "", " ", "b", "c"]])
    fetch("x", tmp_path / "hub-a.jsonl", Limit(documents=2))
    assert fetched(tmp_path / "hub-a.jsonl") == ["a", None, "", " ", "b"]


def test_a_stream_goes_on_with_the_commit_that_it_began_with(tmp_path, monkeypatch):
    asked, newest = [], ["abc", "def"]

    def load(path, configuration, split, streaming, revision):
        asked.append((path, configuration, split, revision))
        if len(asked) == 1:
            return iter(Interrupted())
        return [{"text": text} for text in TEXTS]

    class Interrupted:
        def __iter__(self):
            yield {"text": TEXTS[0]}
            raise KeyboardInterrupt

    monkeypatch.setattr(HubName, "revision", lambda self: newest.pop(0))
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(KeyboardInterrupt):
        fetch("org/x:en@test", tmp_path / "hub-a.jsonl")
    fetch("org/x:en@test", tmp_path / "hub-a.jsonl")
    assert asked == [("org/x", "en", "test", "abc")] * 2
    assert newest == ["def"]
    assert fetched(tmp_path / "hub-a.jsonl") == TEXTS


def test_every_position_leads_to_the_records_behind_it(folder):
    stream = HubStream(str(folder), Position(), print)
    positions = [stream.position for _ in stream]
    assert len({(p.state is None, p.since) for p in positions}) > 6
    for number, position in enumerate(positions, start=1):
        assert position.records == number
        rest = [record["text"] for record in HubStream(str(folder), json_of(position), print)]
        assert rest == TEXTS[number:]


def json_of(position):
    from dataclasses import asdict

    return Position(**json.loads(json.dumps(asdict(position))))


def test_an_interrupted_preparation_goes_on(folder, tmp_path, breaking):
    config = DataConfig(sources=(f"hf:{folder}",), vocabulary=200, max_documents=50)
    breaking[0]((40, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare_into(tmp_path / "tokens", config, Preparation(), QUIET)
    reporter = Lines()
    prepare_into(tmp_path / "tokens", config, Preparation(), reporter)
    assert any("behind the 40 documents that are there already" in line for line in reporter.lines)
    assert sorted(breaking[1]) == sorted([*TEXTS[:50], *TEXTS[35:40]])
    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_text())
    assert manifest["documents"] == 50
    assert not list((tmp_path / "tokens").glob("hub-*"))


def test_a_full_disk_is_named_and_keeps_what_was_streamed(folder, tmp_path, breaking, monkeypatch):
    real, written = hub._GrowingFile.add, []

    def add(growing, *arguments):
        if len(written) == 30:
            raise OSError(28, "No space left on device")
        written.append(arguments)
        real(growing, *arguments)

    config = DataConfig(sources=(f"hf:{folder}",), vocabulary=200)
    monkeypatch.setattr(hub._GrowingFile, "add", add)
    with pytest.raises(RecipeError, match="is full; the finished shards stay: free some space and run the same again"):
        prepare_into(tmp_path / "tokens", config, Preparation(), QUIET)
    monkeypatch.setattr(hub._GrowingFile, "add", real)
    reporter = Lines()
    prepare_into(tmp_path / "tokens", config, Preparation(), reporter)
    assert any("behind the 30 documents that are there already" in line for line in reporter.lines)
    assert json.loads((tmp_path / "tokens" / "manifest.json").read_text())["documents"] == 60


def test_a_configuration_or_split_that_is_missing_is_answered_with_those_there_are(folder, tmp_path):
    names = ("english", "german")
    lines = [f"- config_name: {name}\n  data_files: data/train-*.parquet" for name in names]
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(lines) + "\n---\n")
    with pytest.raises(RecipeError, match=r"cannot load .*onfig.*english.*german"):
        fetch(folder, tmp_path / "hub-a.jsonl")
    fetch(f"{folder}:german", tmp_path / "hub-a.jsonl")
    assert fetched(tmp_path / "hub-a.jsonl") == TEXTS
    with pytest.raises(RecipeError, match=r"cannot load .*split.*train"):
        fetch(f"{folder}:german@training", tmp_path / "hub-b.jsonl")


def test_several_data_sets_share_the_limit(folder, tmp_path, breaking):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"other {n}"}) + "\n" for n in range(10)))
    sources = (f"{tmp_path}/a.jsonl", f"hf:{folder}", f"hf:{folder}@train")
    config = DataConfig(sources=sources, vocabulary=200, max_documents=30)
    prepare_into(tmp_path / "tokens", config, Preparation(), QUIET)
    assert breaking[1] == TEXTS[:20]  # and nothing of the third


def test_what_was_streamed_is_streamed_again_if_it_is_gone_before_the_end(folder, tmp_path, breaking, monkeypatch):
    from trustratio.recipes.data import preparation

    def interrupted(*arguments):
        raise KeyboardInterrupt

    config = DataConfig(sources=(f"hf:{folder}",), vocabulary=200, max_documents=50)
    write = preparation.write_shard
    monkeypatch.setattr(preparation, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_into(tmp_path / "tokens", config, Preparation(), QUIET)
    (gone,) = (tmp_path / "tokens").glob("hub-*")
    gone.unlink()
    breaking[1].clear()
    monkeypatch.setattr(preparation, "write_shard", write)
    prepare_into(tmp_path / "tokens", config, Preparation(), QUIET)
    assert breaking[1] == TEXTS[:50]
