"""Token shards: the same stream however it is made, resumed after a kill, and broken files named and repaired."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.recipes.conftest import sentences
from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.configuration.config import DataConfig
from trustratio.recipes.data import preparation
from trustratio.recipes.data.encoding import Block, StreamEncoder, encode_blocks, tokenizes_words_alone
from trustratio.recipes.data.preparation import Preparation, prepare, prepare_into
from trustratio.recipes.data.prepare import main
from trustratio.recipes.data.prepared import check_sources, open_prepared, read_manifest
from trustratio.recipes.data.rows import MaskedRows, RowOrder
from trustratio.recipes.data.shards import SPLITS, BrokenShard, TokenFile, TokenRows
from trustratio.recipes.data.wordpiece import TextTokenizer, load_tokenizer, train_wordpiece

QUIET = Reporter(active=False)
SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "prepare.py"


class Lines(Reporter):
    """Keeps what would be printed."""

    def __init__(self):
        super().__init__(active=False)
        self.lines = []

    def line(self, text):
        self.lines.append(text)


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([sentences(0, 300), "naïve café ΣΑΣ straße 漢字 0123456789 .,;:!?-_()[]{}'\"/\\@#%&*"], 300)


@pytest.fixture(scope="module")
def vocabulary_file(tokenizer, tmp_path_factory):
    """Given, since `tokenizers` does not train the same vocabulary twice: it breaks ties at random."""
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    tokenizer.tokenizer.save(str(path))
    return str(path)


@pytest.fixture
def documents(tmp_path):
    """Forty documents of some 1,500 characters, one of them twice, in two files."""
    texts = [sentences(i, 40) for i in range(40)]
    for name, part in (("a", texts[:25]), ("b", [texts[3], *texts[25:]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return tmp_path


def config_of(folder, **values):
    return DataConfig(sources=(f"{folder}/*.jsonl",), vocabulary=200, validation_fraction=0.1, **values)


def written(folder):
    """Return the files' modification times: a shard that is written again has another."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.bin")}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \t\n\r\x0b\x0c\x1c\x85\xa0\u2028\u0301[]"))),
        max_size=4,
    )
)
def test_word_by_word_encoding_is_the_tokenizers_own(tokenizer, texts):
    encoder = StreamEncoder(tokenizer)
    assert encoder.by_word
    expected = [i for text in [*texts, "[SEP] a[MASK]b"] for i in [*tokenizer.encode([text])[0], tokenizer.sep_id]]
    assert encoder.encode([*texts, "[SEP] a[MASK]b"]).tolist() == expected


def test_a_small_word_table_gives_the_same(tokenizer):
    texts = [sentences(i, 30) for i in range(6)]
    small = StreamEncoder(tokenizer, most_words=20)
    for _ in range(2):
        for text in texts:
            assert np.array_equal(small.encode([text]), StreamEncoder(tokenizer).encode([text]))


def test_other_tokenizers_see_whole_documents():
    bpe = Tokenizer(models.BPE({"a": 0, "b": 1, " ": 2, "a b": 3, " b": 4}, [(" ", "b"), ("a", " b")]))
    assert bpe.encode("a b").ids == [3]
    encoder = StreamEncoder(TextTokenizer(bpe, 0, 1, 2, (0,)))
    assert not encoder.by_word
    assert encoder.encode(["a b", "b"]).tolist() == [3, 1, 1, 1]
    word_level = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    assert not tokenizes_words_alone(TextTokenizer(word_level, 0, 1, 2, (0,)))


def test_workers_do_not_change_the_stream(tokenizer):
    def blocks():
        for number in range(6):
            block = Block(number // 2, ("train", "validation"))
            block.documents["train"] += [sentences(number, 20), sentences(number + 10, 20)]
            block.documents["validation"] += [sentences(number + 20, 5)] * (number % 2)
            yield block

    alone, spread = (list(encode_blocks(blocks(), tokenizer, workers)) for workers in (0, 2))
    assert [block.shard for block, _ in spread] == [0, 0, 1, 1, 2, 2]
    for (_, one), (_, other) in zip(alone, spread, strict=True):
        assert all(np.array_equal(one[split], other[split]) for split in ("train", "validation"))


def test_rows_are_the_packed_stream_across_files_of_any_size(tmp_path):
    stream = np.arange(5, 205, dtype=np.uint16)
    cuts = [0, 3, 3, 50, 51, 52, 120, 200]
    files = []
    for i, (a, b) in enumerate(itertools.pairwise(cuts)):
        stream[a:b].tofile(tmp_path / f"{i}.bin")
        files.append(TokenFile(f"{i}.bin", b - a, ""))
    for length in (4, 6, 32, 130):
        rows = TokenRows(tmp_path, files, np.dtype("uint16"), length, 2, 3, 300)
        count = 200 // (length - 2)
        assert rows.shape == (count, length)
        order = np.random.default_rng(0).permutation(count)
        body = stream[: count * (length - 2)].reshape(count, length - 2)
        assert np.array_equal(rows[order][:, 1:-1], body[order])
        assert (rows[order][:, 0] == 2).all()
        assert (rows[order][:, -1] == 3).all()
    assert rows.counts().tolist() == np.bincount(stream, minlength=300).tolist()
    assert not rows._mapped  # what counting has read need not stay in memory


def test_shards_hold_every_document_once_and_serve_every_length(documents, vocabulary_file):
    config = config_of(documents, tokenizer=vocabulary_file)
    folder = prepare_into(documents / "out", config, Preparation(shard_characters=9_000), QUIET)
    one = prepare_into(documents / "one", config, Preparation(), QUIET)
    data, whole = open_prepared(folder, 32), open_prepared(one, 32)
    assert (data.documents, data.validation_documents) == (40, 4)
    assert len(list(folder.glob("train-*.bin"))) > 4
    assert len(list(one.glob("train-*.bin"))) == 1
    assert data.fingerprint == whole.fingerprint  # the number of shards is no property of the data
    for split in ("train", "validation"):
        count = len(data.rows(split))
        assert np.array_equal(data.rows(split)[np.arange(count)], whole.rows(split)[np.arange(count)])
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    texts = [json.loads(line)["text"].strip() for name in "ab" for line in (documents / f"{name}.jsonl").open()]
    stream = np.fromfile(one / "train-00000.bin", dtype=np.uint16)
    held_out = np.fromfile(one / "validation-00000.bin", dtype=np.uint16)
    encoded = [[*ids, tokenizer.sep_id] for ids in tokenizer.encode(list(dict.fromkeys(texts)))]
    assert len(stream) + len(held_out) == sum(map(len, encoded))
    separators = np.flatnonzero(stream == tokenizer.sep_id)
    assert len(separators) == 36
    away = [piece.tolist() for piece in np.split(held_out, np.flatnonzero(held_out == tokenizer.sep_id) + 1)[:-1]]
    assert stream.tolist() == [i for ids in encoded if ids not in away for i in ids]
    longer = data.at_length(128)
    assert longer.fingerprint == data.fingerprint
    assert longer.train_rows == len(stream) // 126
    assert np.array_equal(longer.rows("train")[np.asarray([1])][0, 1:-1], stream[126:252])


def test_an_interrupted_run_continues_with_the_missing_shards(documents, vocabulary_file, monkeypatch):
    config, how = config_of(documents, tokenizer=vocabulary_file), Preparation(shard_characters=9_000)
    whole = prepare_into(documents / "whole", config, how, QUIET)
    real, calls = preparation.write_shard, []

    def failing(folder, number, *rest):
        if number == 3:
            raise KeyboardInterrupt
        calls.append(number)
        return real(folder, number, *rest)

    monkeypatch.setattr(preparation, "write_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare_into(documents / "out", config, how, QUIET)
    assert calls == [0, 1, 2]
    with pytest.raises(RecipeError, match=r"not prepared to its end.*`prepare` again"):
        check_sources([str(documents / "out")])
    before = written(documents / "out")
    (documents / "out" / ".writing-train-00003.bin").write_bytes(b"half")
    monkeypatch.setattr(preparation, "write_shard", real)
    reporter = Lines()
    folder = prepare_into(documents / "out", config, how, reporter)
    assert any("3 of" in line and "there already" in line for line in reporter.lines)
    after = written(folder)
    assert {name: after[name] for name in before} == before
    assert not list(folder.glob(".writing*"))
    for path in whole.glob("*.bin"):
        assert path.read_bytes() == (folder / path.name).read_bytes()
    assert open_prepared(folder, 16).fingerprint == open_prepared(whole, 16).fingerprint


def test_the_command_survives_a_kill(documents):
    texts = [json.dumps({"text": sentences(100 + i, 60)}) for i in range(600)]
    (documents / "c.jsonl").write_text("\n".join(texts))
    folder = documents / "out"
    command = [sys.executable, str(SCRIPT), "--data", f"{documents}/*.jsonl", "--output", str(folder)]
    command += ["--vocabulary", "200", "--shard_megabytes", "0.01"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("shard-*.json"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path.stem[6:] for path in folder.glob("shard-*.json")}
    before = {name: when for name, when in written(folder).items() if name[-9:-4] in finished}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    after = written(folder)
    assert {name: after[name] for name in before} == before
    assert "training sequences: " in done.stdout
    assert f"--data {folder}" in done.stdout
    assert open_prepared(folder, 32).documents == 640


MEASURED = """
import resource, sys
from trustratio.recipes.data.prepare import main
status = main(sys.argv[1:])
own = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""
"""`prepare`, then the peaks of its own process and of the largest of its workers, in KiB."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_text(tmp_path, vocabulary_file):
    base = sentences(0, 20_000)
    peaks = []
    for megabytes in (16, 48):
        source = tmp_path / f"{megabytes}.jsonl"
        with source.open("w") as file:
            for number in range(megabytes * 250):  # documents of 4,000 characters, no two the same
                begin = number * 37 % (len(base) - 4000)
                file.write(json.dumps({"text": f"{number} {base[begin : begin + 4000]}"}) + "\n")
        command = [sys.executable, "-c", MEASURED, "--data", source, "--output", tmp_path / f"of-{megabytes}"]
        command += ["--tokenizer", vocabulary_file, "--workers", "1", "--shard_megabytes", "2"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        peaks.append([int(word) / 1024 for word in done.stdout.splitlines()[-1].split()])
    for small, large in zip(*peaks, strict=True):
        assert large < small + 10, peaks  # MiB, where the text grew by 32


def break_file(path, how):
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-2])
    elif how == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "missing", "changed"])
def test_a_broken_shard_is_named_and_written_anew(documents, how):
    config, small_shards = config_of(documents), Preparation(shard_characters=9_000)
    folder = prepare_into(documents / "out", config, small_shards, QUIET)
    before = written(folder)
    original = (folder / "train-00002.bin").read_bytes()
    break_file(folder / "train-00002.bin", how)
    if how != "changed":  # a changed byte shows only when the content is hashed
        with pytest.raises(BrokenShard, match=r"train-00002.bin .*`prepare` again"):
            prepare(DataConfig(sources=(str(folder),)), QUIET)
    prepare_into(folder, config, small_shards, QUIET)
    assert (folder / "train-00002.bin").read_bytes() == original
    after = written(folder)
    assert {name for name in before if after[name] != before[name]} == {"train-00002.bin", "validation-00002.bin"}


def test_ids_outside_the_vocabulary_are_named(documents):
    data = prepare(config_of(documents, sequence_length=16), QUIET)
    path = Path(data.folder) / "train-00000.bin"
    content = np.fromfile(path, dtype=np.uint16)
    content[20] = 60_000
    content.tofile(path)
    with pytest.raises(BrokenShard, match=r"train-00000.bin holds the id 60000, beyond the vocabulary of"):
        data.rows("train")[np.arange(3)]


def test_a_file_cut_while_it_is_read_is_named_and_kills_no_process(documents):
    data = prepare(config_of(documents, sequence_length=16), QUIET)
    rows = data.rows("train")
    assert len(rows[np.arange(3)]) == 3
    break_file(Path(data.folder) / "train-00000.bin", "cut")
    with pytest.raises(BrokenShard, match=r"has [\d,]+ bytes instead of [\d,]+"):
        rows[np.arange(3)]


def test_broken_sources_stop_or_are_left_out(documents, capsys):
    (documents / "c.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(RecipeError, match=r"c\.jsonl is not JSON Lines \(.*\): .*, line 2 column 1"):
        prepare_into(documents / "out", config_of(documents), Preparation(), QUIET)
    arguments = ["--data", f"{documents}/*.jsonl", "--output", str(documents / "left"), "--vocabulary", "200"]
    assert main(arguments) == 2
    assert "c.jsonl is not JSON Lines" in capsys.readouterr().err
    arguments[3] = str(documents / "other")
    assert main([*arguments, "--skip_broken"]) == 0
    printed = capsys.readouterr().out
    assert "warning: left out" in printed
    assert "40 documents (1 repeated ones left out)" in printed
    manifest = json.loads((documents / "other" / "manifest.json").read_text())
    assert [Path(source).name for source in manifest["skipped_sources"]] == ["c.jsonl"]


def test_a_manifest_that_is_no_object_is_named(documents):
    (documents / "manifest.json").write_text("[]")
    with pytest.raises(RecipeError, match=r"cannot read .*manifest\.json: expected a JSON object, found a list"):
        read_manifest(documents)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (None, "fingerprint, dtype, documents"),
        ({"vocabulary_size": "200"}, "see vocabulary_size:"),
        ({"dtype": "text"}, "see shards:"),
        ({"shards": [{}]}, "see shards:"),
        ({"shards": [{"files": {"train": {"name": "a"}}}]}, "see shards:"),
        ({"shards": [{"files": {s: {"name": "a", "tokens": "9", "sha256": ""} for s in SPLITS}}]}, "see shards:"),
    ],
)
def test_a_damaged_manifest_is_named(documents, values, named):
    folder = prepare_into(documents / "out", config_of(documents), Preparation(), QUIET)
    path = folder / "manifest.json"
    manifest = {"format": 3} if values is None else json.loads(path.read_text()) | values
    manifest.pop("digest", None)  # as one of an earlier release, which had none
    path.write_text(json.dumps(manifest))
    with pytest.raises(RecipeError, match=r"manifest\.json is damaged, ") as no:
        check_sources([str(folder)])
    assert named in str(no.value)


@pytest.mark.parametrize("damage", ["", None, "other"])
def test_a_prepared_folder_that_lost_its_tokenizer_is_named(documents, damage):
    """Training reads tokens alone; the model would be saved without a tokenizer, or with one of other words."""
    folder = prepare_into(documents / "out", config_of(documents), Preparation(), QUIET)
    path = folder / "tokenizer.json"
    if damage is None:
        path.unlink()
    else:
        path.write_text(train_wordpiece([sentences(5, 100)], 120).tokenizer.to_str() if damage else "")
    wrong = r"has 120 tokens instead of \d+" if damage else r"cannot be read \(.*\)"
    with pytest.raises(RecipeError, match=rf"tokenizer\.json {wrong}: the folder was prepared with another tokenizer"):
        open_prepared(folder, 16)


def test_bad_data_that_were_mended_go_into_the_same_folder(tmp_path):
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text('{"text": \n')
    config = DataConfig(sources=(str(path),), vocabulary=200)
    with pytest.raises(RecipeError, match="not JSON Lines"):
        prepare_into(out, config, Preparation(), QUIET)
    path.write_text("".join(json.dumps({"text": sentences(i, 20)}) + "\n" for i in range(20)))
    prepare_into(out, config, Preparation(), QUIET)
    assert json.loads((out / "manifest.json").read_text())["documents"] == 20


def test_a_folder_of_other_data_is_not_overwritten(documents):
    config = config_of(documents)
    folder = prepare_into(documents / "out", config, Preparation(), QUIET)
    with pytest.raises(RecipeError, match=r"other settings \(tokenizer differ\); give another folder"):
        prepare_into(folder, DataConfig(**{**vars(config), "vocabulary": 150}), Preparation(), QUIET)
    with pytest.raises(RecipeError, match="no prepared data; give an empty or a new folder"):
        prepare_into(documents, config, Preparation(), QUIET)


def test_a_prepared_folder_is_a_source_of_its_own(documents):
    folder = prepare_into(documents / "out", config_of(documents), Preparation(), QUIET)
    check_sources([str(folder)])
    with pytest.raises(RecipeError, match="has to be the only source"):
        check_sources([str(folder), f"{documents}/a.jsonl"])
    other = train_wordpiece([sentences(5, 100)], 120)
    other.tokenizer.save(str(documents / "other.json"))
    with pytest.raises(RecipeError, match="prepared with another tokenizer"):
        prepare(DataConfig(sources=(str(folder),), tokenizer=str(documents / "other.json")), QUIET)
    own = DataConfig(sources=(str(folder),), tokenizer=str(folder / "tokenizer.json"), sequence_length=16)
    assert prepare(own, QUIET).train_rows > 0


def test_a_full_disk_is_named_and_keeps_what_is_done(documents, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preparation, "write_shard", full)
    with pytest.raises(RecipeError, match="is full; the finished shards stay"):
        prepare_into(documents / "out", config_of(documents), Preparation(), QUIET)


def test_a_hub_data_set_is_streamed_once(documents, monkeypatch):
    import datasets

    texts, streams = [sentences(i, 30) for i in range(30)], []

    def load(*args, streaming, **options):
        streams.append(args)
        return [{"text": text} for text in texts]

    monkeypatch.setattr(datasets, "load_dataset", load)
    config = DataConfig(sources=("hf:org/set",), vocabulary=200, validation_fraction=0.1, sequence_length=16)
    data = prepare(config, QUIET)
    assert data.documents == 30
    assert prepare(config, QUIET) == data
    assert streams == [("org/set", None)]
    assert not list(Path(data.folder).glob("hub-*"))


@pytest.mark.parametrize("rows", [1, 2, 3, 50, 64, 65, 1000])
def test_the_row_order_is_a_permutation_that_needs_no_memory(rows):
    order = RowOrder(rows, seed=3)
    epochs = [np.concatenate([ids for _, ids in order.epoch_rows(rows * e, rows)]) for e in range(3)]
    assert all(sorted(visited.tolist()) == list(range(rows)) for visited in epochs)
    ((epoch, far),) = RowOrder(10**12, seed=3).epoch_rows(5 * 10**12 + 7, 4)
    assert epoch == 5
    assert len(set(far.tolist())) == 4


def test_the_row_order_looks_random():
    rows = 20_000
    ((_, visited),) = RowOrder(rows, seed=1).epoch_rows(0, rows)
    ((_, other),) = RowOrder(rows, seed=1).epoch_rows(rows, rows)
    places = np.arange(rows)
    for one, two in ((places, visited), (visited[:-1], visited[1:]), (visited, other), (visited[:-141], visited[141:])):
        assert abs(np.corrcoef(one, two)[0, 1]) < 0.03
    # Tenths of the epoch against tenths of the data: chi-square with 81 degrees of freedom.
    counts = np.histogram2d(places, visited, bins=10)[0]
    assert ((counts - rows / 100) ** 2 / (rows / 100)).sum() < 140
    assert np.sum(np.diff(visited) == 1) < 10


def test_masked_rows_take_shards_as_they_take_arrays(documents):
    from trustratio.recipes.rules.global_batch import BatchPlan

    data = prepare(config_of(documents, sequence_length=16), QUIET)
    rows = data.rows("train")
    array = rows[np.arange(len(rows))]
    plan = BatchPlan(8, 2, 1)
    for one, two in zip(
        MaskedRows(rows, data.vocabulary(), 0.15, 1).step_batches(3, plan, 0),
        MaskedRows(array, data.vocabulary(), 0.15, 1).step_batches(3, plan, 0),
        strict=True,
    ):
        assert np.array_equal(one.input_ids, two.input_ids)
        assert np.array_equal(one.labels, two.labels)


def test_a_broken_file_in_the_cache_is_written_anew(documents):
    config = config_of(documents, sequence_length=16)
    data = prepare(config, QUIET)
    path = Path(data.folder) / "train-00000.bin"
    original = path.read_bytes()
    break_file(path, "cut")
    reporter = Lines()
    assert prepare(config, reporter) == data
    assert path.read_bytes() == original
    assert any("train-00000.bin has" in line for line in reporter.lines)


@pytest.mark.parametrize(
    ("known", "line"), [(1000, None), (99, "1.00% of the training tokens are [UNK]"), (2, "warning")]
)
def test_the_share_of_unknown_words_is_told(tmp_path, capsys, known, line):
    """In both documents, of which one is trained on, every word of 100 is another; a vocabulary has the first ones."""
    words = [chr(0x4E00 + number) for number in range(100)]  # BERT takes each of these letters for a word
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": " ".join(w)}) + "\n" for w in (words, words[::-1]))
    )
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words[:known]]
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens))
    arguments = ["--data", tmp_path / "text.jsonl", "--tokenizer", tmp_path / "vocab.txt", "--output", tmp_path / "out"]
    assert main([*map(str, arguments), "--sequence_lengths", "16"]) == 0
    shown = [text for text in capsys.readouterr().out.splitlines() if "[UNK]" in text]
    if line is None:
        assert shown == []
    elif line == "warning":
        assert shown[0].startswith("warning: 98.0% of the training tokens are [UNK]; much text is lost")
    else:
        assert shown == [line]
