"""Data sets of the hub: streamed once, in as many runs as it takes, and what happens when the connection is lost."""

from __future__ import annotations

import json
import os
import random

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tests.recipes.conftest import sentences
from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.configuration.config import DataConfig
from trustratio.recipes.data.choices import check_data
from trustratio.recipes.data.preparation import Preparation, prepare, prepare_into
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


# Folders on this machine ---------------------------------------------------------------------------------------------


REVISION = HubName.revision


@pytest.fixture
def own_revision(monkeypatch):
    monkeypatch.setattr(HubName, "revision", REVISION)


def local(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def test_folders_of_one_name_are_different_data(tmp_path, monkeypatch, own_revision):
    monkeypatch.setenv("TRUSTRATIO_CACHE", str(tmp_path / "cache"))
    local(tmp_path / "a" / "set", TEXTS)
    local(tmp_path / "b" / "set", TEXTS[:50])
    prepared = []
    for parent in "ab":
        monkeypatch.chdir(tmp_path / parent)
        prepared.append(prepare(DataConfig(sources=("hf:set",), vocabulary=200, sequence_length=8), QUIET))
    assert [data.documents for data in prepared] == [60, 50]
    assert prepared[0].folder != prepared[1].folder


@pytest.mark.parametrize("change", ["content", "time", "another file"])
def test_a_changed_folder_is_other_data(tmp_path, own_revision, change):
    folder = local(tmp_path / "set", TEXTS)
    config = DataConfig(sources=(f"hf:{folder}",), vocabulary=200)
    for _ in range(2):
        prepare_into(tmp_path / "tokens", config, Preparation(), QUIET)
    if change == "content":
        local(folder, TEXTS[:50])
    elif change == "time":
        os.utime(folder / "train.jsonl", ns=(0, 0))
    else:
        local(folder / "data", TEXTS)
    with pytest.raises(RecipeError, match=r"prepared with other settings \(sources differ\)"):
        prepare_into(tmp_path / "tokens", config, Preparation(), QUIET)


@pytest.mark.parametrize("known", [True, False])
def test_a_stream_of_a_changed_folder_begins_anew(tmp_path, breaking, own_revision, monkeypatch, known):
    folder = local(tmp_path / "own", TEXTS)
    breaking[0]((30, KeyboardInterrupt))
    with monkeypatch.context() as patch:
        if not known:  # the position of an earlier release
            patch.setattr(HubName, "revision", lambda self: None)
        with pytest.raises(KeyboardInterrupt):
            fetch(folder, tmp_path / "hub-a.jsonl")
    others = [f"another {text}" for text in TEXTS]
    local(folder, others)
    assert fetch(folder, tmp_path / "hub-a.jsonl") == []
    assert fetched(tmp_path / "hub-a.jsonl") == others


def test_a_stream_of_an_unchanged_folder_goes_on(tmp_path, breaking, own_revision):
    folder = local(tmp_path / "own", TEXTS)
    breaking[0]((30, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fetch(folder, tmp_path / "hub-a.jsonl")
    assert "behind the 30 documents" in fetch(folder, tmp_path / "hub-a.jsonl")[0]
    assert fetched(tmp_path / "hub-a.jsonl") == TEXTS


def test_links_in_a_folder_are_followed_once(tmp_path, own_revision):
    folder, other = local(tmp_path / "own", TEXTS), local(tmp_path / "other", TEXTS)
    (folder / "data").symlink_to(other)
    (folder / "loop").symlink_to(folder)
    before = HubName.parse(str(folder)).revision()
    assert HubName.parse(str(folder)).revision() == before
    local(other, TEXTS[:50])
    assert HubName.parse(str(folder)).revision() != before


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("r@2/set", ("r@2/set", None, "train")),
        ("r@2/set@test", ("r@2/set", None, "test")),
        ("r@2/set:en@test", ("r@2/set", "en", "test")),
        ("./r@2/a:b", ("./r@2/a:b", None, "train")),
        ("org/x:en@test", ("org/x", "en", "test")),
        ("org/x@test", ("org/x", None, "test")),
        ("x", ("x", None, "train")),
        ("", ("", None, "train")),
    ],
)
def test_a_name_may_be_a_folder_with_any_name(tmp_path, monkeypatch, name, parts):
    (tmp_path / "r@2" / "set").mkdir(parents=True)
    (tmp_path / "r@2" / "a:b").mkdir()
    monkeypatch.chdir(tmp_path)
    parsed = HubName.parse(name)
    assert (parsed.path, parsed.configuration, parsed.split) == parts


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:./nosuch", r"hf:./nosuch is no folder that exists, and no name on the hub"),
        ("hf:/no/such@train", r"hf:/no/such is no folder that exists"),
        ("hf:a/b/c", r"hf:a/b/c is no folder that exists"),
        ("hf:./a.jsonl", r"hf:./a.jsonl is a file: give it without hf:"),
        ("hf:org/x@train[:10%]", r"hf:org/x@train\[:10%\]: splits are streamed.*--max_documents"),
        ("hf:org/x@train+test", r"names several splits; give each of its own: hf:org/x@train hf:org/x@test"),
    ],
)
def test_what_is_no_name_is_refused_without_a_network(tmp_path, monkeypatch, name, message):
    (tmp_path / "a.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: pytest.fail("the hub was asked"))
    with pytest.raises(RecipeError, match=message):
        check_data(DataConfig(sources=(name,)))
