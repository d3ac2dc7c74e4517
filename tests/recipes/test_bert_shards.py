"""NVIDIA's HDF5 shards: the original tokens come back, with new masks or with their own."""

from __future__ import annotations

import builtins
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.configuration.config import DataConfig
from trustratio.recipes.data import prepare as command
from trustratio.recipes.data.choices import check_data
from trustratio.recipes.data.given_masks import MOST_TOKENS, original, pack, shown
from trustratio.recipes.data.masking import masked_as_given
from trustratio.recipes.data.preparation import Preparation, prepare, prepare_into
from trustratio.recipes.data.prepared import open_prepared
from trustratio.recipes.data.rows import MaskedRows
from trustratio.recipes.rules.global_batch import BatchPlan
from trustratio.recipes.sources.bert_shards import read_bert_shard, require_vocabulary

h5py = pytest.importorskip("h5py")

QUIET = Reporter(active=False)
PAD, UNK, CLS, SEP, MASK = range(5)
SIZE = 300


@pytest.fixture
def vocabulary(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(SIZE - 5))]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    return str(tmp_path / "vocab.txt")


@dataclasses.dataclass
class Samples:
    """Samples as NVIDIA's script makes them: pairs of segments, some short, masked 80 / 10 / 10."""

    count: int = 40
    length: int = 32
    predictions: int = 6
    seed: int = 0

    def __post_init__(self):
        random = np.random.default_rng(self.seed)
        self.original, self.masked, self.positions, self.labels, self.segments = [], [], [], [], []
        for _ in range(self.count):
            total = self.length if random.random() < 0.7 else int(random.integers(8, self.length))
            first = int(random.integers(1, total - 4))
            body = random.integers(5, SIZE, total - 3)
            ids = np.concatenate([[CLS], body[:first], [SEP], body[first:], [SEP]])
            ordinary = np.flatnonzero(ids >= 5)
            chosen = np.sort(random.choice(ordinary, min(self.predictions, max(1, len(ids) // 7)), replace=False))
            action = random.random(len(chosen))
            drawn = random.integers(0, SIZE, len(chosen))
            put = np.where(action < 0.8, MASK, np.where(action < 0.9, ids[chosen], drawn))
            masked = ids.copy()
            masked[chosen] = put
            self.original.append(ids)
            self.masked.append(masked)
            self.positions.append(chosen)
            self.labels.append(ids[chosen])
            self.segments.append(np.repeat([0, 1], [first + 2, total - first - 2]))

    @property
    def stream(self) -> list[int]:
        """What a stream of all samples holds: each without [CLS], with the separators inside and at the end."""
        return [int(i) for ids in self.original for i in ids[1:]]

    def arrays(self) -> dict[str, np.ndarray]:
        def filled(rows, length, kind="i4"):
            array = np.zeros((self.count, length), kind)
            for number, row in enumerate(rows):
                array[number, : len(row)] = row
            return array

        return {
            "input_ids": filled(self.masked, self.length),
            "input_mask": filled([np.ones(len(ids)) for ids in self.masked], self.length, "i1"),
            "segment_ids": filled(self.segments, self.length, "i1"),
            "masked_lm_positions": filled(self.positions, self.predictions),
            "masked_lm_ids": filled(self.labels, self.predictions),
            "next_sentence_labels": np.zeros(self.count, "i1"),
        }

    def write(self, path, **changed) -> str:
        with h5py.File(path, "w") as file:
            for name, values in {**self.arrays(), **changed}.items():
                if values is not None:
                    file.create_dataset(name, data=values, compression="gzip")
        return str(path)

    def write_ragged(self, path) -> str:
        """As MLPerf's shards of variable length: rows as long as they are, no input_mask."""
        rows = {"input_ids": self.masked, "segment_ids": self.segments}
        rows |= {"masked_lm_positions": self.positions, "masked_lm_ids": self.labels}
        with h5py.File(path, "w") as file:
            for name, values in rows.items():
                data = file.create_dataset(name, (self.count,), dtype=h5py.vlen_dtype(np.dtype("i2")))
                for number, row in enumerate(values):
                    data[number] = row
            file.create_dataset("next_sentence_labels", data=np.zeros(self.count, "i1"))
        return str(path)


def test_a_small_shard_by_hand(tmp_path):
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        file["input_ids"] = np.asarray([[2, 4, 11, 3, 4, 99, 3, 0], [2, 7, 4, 3, 0, 0, 0, 0]])
        file["input_mask"] = np.asarray([[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0, 0]])
        file["segment_ids"] = np.zeros((2, 8))
        file["masked_lm_positions"] = np.asarray([[1, 4, 5, 0], [2, 0, 0, 0]])
        file["masked_lm_ids"] = np.asarray([[10, 12, 13, 0], [8, 0, 0, 0]])
        file["next_sentence_labels"] = np.zeros(2)
    one, two = read_bert_shard(path)
    assert one.tolist() == [[10, 11, 3, 12, 13], [4, -1, -1, 4, 99]]
    assert two.tolist() == [[7, 8], [-1, 4]]


@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "variable length"])
def test_the_original_tokens_come_back(tmp_path, ragged):
    samples = Samples()
    path = (samples.write_ragged if ragged else samples.write)(tmp_path / "a.h5")
    found = list(read_bert_shard(tmp_path / "a.h5"))
    assert [sample[0].tolist() for sample in found] == [ids[1:-1].tolist() for ids in samples.original]
    for sample, masked, positions in zip(found, samples.masked, samples.positions, strict=True):
        assert np.flatnonzero(sample[1] >= 0).tolist() == (positions - 1).tolist()
        assert np.where(sample[1] >= 0, sample[1], sample[0]).tolist() == masked[1:-1].tolist()
    assert path


def stream_of(folder, split="train"):
    manifest = json.loads((folder / "manifest.json").read_text())
    return np.concatenate([np.fromfile(p, manifest["dtype"]) for p in sorted(folder.glob(f"{split}-*.bin"))])


@pytest.mark.parametrize("length", [8, 32, 128])
def test_shards_become_rows_of_any_length_with_new_masks(tmp_path, vocabulary, length):
    one, two = Samples(seed=1, count=60), Samples(seed=2, count=60, length=64)
    sources = (one.write(tmp_path / "a.hdf5"), two.write(tmp_path / "b.hdf5"))
    config = DataConfig(sources=sources, tokenizer=vocabulary, sequence_length=length, validation_fraction=0.1)
    check_data(config)
    data = prepare(config, QUIET)
    assert (data.documents, data.given_masks, data.counted_in) == (120, False, "token ids")
    assert "million token ids" in data.describe(8)[0]
    held_out = stream_of(Path(data.folder), "validation").tolist()
    stream = stream_of(Path(data.folder)).tolist()
    samples = [ids[1:].tolist() for ids in one.original + two.original]
    rest = [ids for ids in samples if not contains(held_out, ids)]
    assert len(rest) == 108
    assert stream == [i for ids in rest for i in ids]
    rows = data.rows("train")
    assert rows[np.arange(len(rows))][:, 1:-1].reshape(-1).tolist() == stream[: len(rows) * (length - 2)]
    (batch,) = MaskedRows(rows, data.vocabulary(), 0.15, 1).step_batches(0, BatchPlan(4, 1, 1), 0)
    assert len(batch.positions)
    assert (batch.labels >= 5).all()


def contains(stream, ids):
    return any(stream[start : start + len(ids)] == ids for start in range(len(stream)))


@pytest.mark.parametrize("length", [8, 32, 64])
def test_masks_go_into_rows_of_any_length_as_they_were_given(tmp_path, vocabulary, length):
    samples = Samples(count=50)
    source = samples.write(tmp_path / "a.hdf5")
    config = DataConfig(sources=(source,), tokenizer=vocabulary, sequence_length=length, masks="as_given")
    data = prepare(dataclasses.replace(config, validation_fraction=0.1), QUIET)
    assert data.given_masks
    rows = data.rows("train")
    masked = MaskedRows(rows, data.vocabulary(), 0.15, 1, as_given=True)
    body, labels = [], []
    for number in range(len(rows)):
        batch = masked._batch([(0, np.asarray([number]))])
        ids, original_ids = batch.input_ids[0].numpy(), batch.input_ids[0].numpy().copy()
        original_ids[batch.positions] = batch.labels
        assert (original_ids[0], original_ids[-1]) == (ids[0], ids[-1]) == (CLS, SEP)
        predicted = np.zeros(length, bool)
        predicted[batch.positions] = True
        body += list(zip(original_ids[1:-1].tolist(), ids[1:-1].tolist(), predicted[1:-1].tolist(), strict=True))
        labels += batch.labels.tolist()
        again = masked._batch([(5, np.asarray([number]))])
        assert again.input_ids.equal(batch.input_ids)  # the same in every epoch
        assert rows[np.asarray([number])][0].tolist() == original_ids.tolist()
    expected = []
    for ids, shown_ids, positions in zip(samples.original, samples.masked, samples.positions, strict=True):
        chosen = np.isin(np.arange(len(ids)), positions)
        expected.append(list(zip(ids[1:].tolist(), shown_ids[1:].tolist(), chosen[1:].tolist(), strict=True)))
    held_out = stream_of(Path(data.folder), "validation")
    expected = [part for part in expected if not contains(original(held_out).tolist(), [one[0] for one in part])]
    assert len(expected) == 45
    assert body == [one for part in expected for one in part][: len(body)]
    assert len(labels) > 20
    renewed = MaskedRows(rows, data.vocabulary(), 0.15, 1)  # the same folder with masks of the recipe's own
    (one,), (other,) = (renewed.step_batches(step, BatchPlan(4, 1, 1), 0) for step in (0, 1))
    assert not one.input_ids.equal(other.input_ids)


def test_a_token_that_was_replaced_by_padding_is_shown_so():
    """Their script draws replacements from the whole vocabulary, id 0 too."""
    batch = masked_as_given(np.asarray([[2, 9, 8, 7, 3]]), np.asarray([[-1, 0, -1, 4, -1]]))
    assert batch.input_ids.tolist() == [[2, 0, 8, 4, 3]]
    assert (batch.positions.tolist(), batch.labels.tolist()) == ([1, 3], [9, 7])


def test_packing_loses_nothing():
    sample = np.asarray([[5, MOST_TOKENS - 1, 0], [-1, 0, MOST_TOKENS - 1]])
    assert pack(sample).dtype == np.uint32
    assert original(pack(sample)).tolist() == sample[0].tolist()
    assert shown(pack(sample)).tolist() == sample[1].tolist()


def test_the_unigram_entropy_is_that_of_the_original_tokens(tmp_path, vocabulary):
    source = Samples(count=80).write(tmp_path / "a.hdf5")
    found = [
        prepare(DataConfig(sources=(source,), tokenizer=vocabulary, sequence_length=16, masks=masks), QUIET)
        for masks in ("anew", "as_given")
    ]
    assert found[0].unigram_entropy == found[1].unigram_entropy
    assert found[0].fingerprint == found[1].fingerprint
    assert found[0].folder != found[1].folder


def test_samples_with_the_same_tokens_are_kept_once(tmp_path, vocabulary):
    """Whatever their masks are: one of them might be held out."""
    one = Samples(count=20)
    two = Samples(count=20)
    for number in range(20):
        two.masked[number] = two.original[number].copy()
        two.masked[number][two.positions[number]] = MASK
    sources = (one.write(tmp_path / "a.hdf5"), two.write(tmp_path / "b.hdf5"))
    data = prepare(DataConfig(sources=sources, tokenizer=vocabulary, sequence_length=16), QUIET)
    assert data.documents == 20


def test_text_and_shards_go_into_one_stream(tmp_path, vocabulary):
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"w{n} w1 w2 nothing"}) + "\n" for n in range(30)))
    sources = (Samples().write(tmp_path / "a.hdf5"), str(tmp_path / "b.jsonl"))
    folder = prepare_into(tmp_path / "out", DataConfig(sources=sources, tokenizer=vocabulary), Preparation(), QUIET)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["documents"], "counted_in" in manifest) == (70, False)
    assert stream_of(folder).tolist()[-5:] == [34, 6, 7, UNK, SEP]


def changed(name, change):
    arrays = Samples().arrays()
    values = arrays[name]
    change(values)
    return {name: values}


def set_at(place, value):
    def change(values):
        values[place] = value

    return change


BROKEN = {
    "no masks": (
        {"masked_lm_ids": None},
        r"no shard of NVIDIA's BERT .*: it has no masked_lm_ids but input_ids",
    ),
    "no input_mask": ({"input_mask": None}, r"has no input_mask, which tells its padding"),
    "lengths": ({"masked_lm_ids": Samples().arrays()["masked_lm_ids"][:9]}, r"its data sets have different lengths"),
    "widths": ({"masked_lm_ids": Samples().arrays()["masked_lm_ids"][:, :4]}, r"sample 0: 6 masked_lm_positions for 4"),
    "gap": (changed("input_mask", set_at((3, 2), 0)), r"sample 3: its input_mask is not ones and then zeros"),
    "beyond": (changed("masked_lm_positions", set_at((5, 0), 31)), r"sample 5: a masked_lm_position lies outside of"),
    "negative": (changed("masked_lm_positions", set_at((5, 0), -2)), r"sample 5: a masked_lm_position lies outside of"),
    "twice": (changed("masked_lm_positions", set_at((7, slice(0, 2)), 2)), r"sample 7: a position is masked twice"),
    "id": (changed("input_ids", set_at((2, 3), -7)), r"sample 2: it holds numbers that are no token ids"),
    "label": (changed("masked_lm_ids", set_at((2, 0), 2**30)), r"sample 2: it holds numbers that are no token ids"),
    "empty": (changed("input_mask", set_at(4, 0)), r"sample 4: it has no \[CLS\] at its start and \[SEP\] at its end"),
    "fractions": ({"input_ids": Samples().arrays()["input_ids"] + 0.5}, r"cannot read .* as HDF5"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_shards_that_contradict_themselves_are_named(tmp_path, vocabulary, name, capsys):
    changes, message = BROKEN[name]
    source = Samples().write(tmp_path / "a.hdf5", **changes)
    with pytest.raises(RecipeError, match=message) as no:
        prepare(DataConfig(sources=(source,), tokenizer=vocabulary), QUIET)
    assert "a.hdf5" in str(no.value)
    whole = Samples(seed=3).write(tmp_path / "b.hdf5")
    arguments = ["--data", source, whole, "--tokenizer", vocabulary, "--output", str(tmp_path / "out"), "--skip_broken"]
    assert command.main(arguments) == 0
    assert "left out" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["skipped_sources"] == [source]


@pytest.mark.parametrize("content", [b"", b"no HDF5", b"\x89HDF\r\n\x1a\n" + b"\0" * 200])
def test_files_that_are_no_hdf5_are_named(tmp_path, vocabulary, content):
    (tmp_path / "a.hdf5").write_bytes(content)
    with pytest.raises(RecipeError, match=r"cannot read .*a.hdf5 as HDF5"):
        prepare(DataConfig(sources=(str(tmp_path / "a.hdf5"),), tokenizer=vocabulary), QUIET)


def test_a_shard_that_was_cut_is_named(tmp_path, vocabulary):
    path = tmp_path / "a.hdf5"
    Samples(count=400).write(path)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(RecipeError, match=r"cannot read .*a.hdf5 as HDF5"):
        prepare(DataConfig(sources=(str(path),), tokenizer=vocabulary), QUIET)


def test_a_vocabulary_has_to_be_given(tmp_path, vocabulary):
    source = Samples().write(tmp_path / "a.hdf5")
    with pytest.raises(RecipeError, match=r"a.hdf5 holds token ids, .*--tokenizer vocab.txt"):
        check_data(DataConfig(sources=(source,)))
    check_data(DataConfig(sources=(source,), tokenizer=vocabulary))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ((101, SEP, MASK, SIZE), r"its samples begin with 2, and \[CLS\] is 101"),
        ((CLS, 102, MASK, SIZE), r"its samples end with 3, and \[SEP\] is 102"),
        ((CLS, SEP, 103, SIZE), r"masked tokens is 103, which is \[MASK\]"),
        ((CLS, SEP, MASK, 200), r"it holds the id \d+, and there are 200 tokens"),
    ],
)
def test_another_vocabulary_is_noticed(tmp_path, ids, message):
    Samples(length=128, predictions=20).write(tmp_path / "a.hdf5")
    with pytest.raises(RecipeError, match=rf"a.hdf5 was made with another vocabulary than --tokenizer: .*{message}"):
        require_vocabulary(tmp_path / "a.hdf5", *ids)
    require_vocabulary(tmp_path / "a.hdf5", CLS, SEP, MASK, SIZE)


def test_an_id_beyond_the_vocabulary_far_behind_the_first_samples_is_named(tmp_path, vocabulary):
    samples = Samples(count=200)
    samples.masked[150][1] = 299 + 2**16  # which 16 bits would take for 299
    samples.positions[150], samples.labels[150] = samples.positions[150][:0], samples.labels[150][:0]
    source = samples.write(tmp_path / "a.hdf5")
    for masks in ("anew", "as_given"):
        with pytest.raises(RecipeError, match=r"hold the id 65835, and --tokenizer has 300 tokens"):
            prepare(DataConfig(sources=(source,), tokenizer=vocabulary, masks=masks), QUIET)


def test_given_masks_are_of_shards_alone(tmp_path, vocabulary):
    (tmp_path / "a.jsonl").write_text('{"text": "w1 w2"}\n')
    with pytest.raises(RecipeError, match=r"data.masks=as_given is for shards .*a.jsonl is text; leave it out"):
        check_data(DataConfig(sources=(str(tmp_path / "a.jsonl"),), masks="as_given"))
    with pytest.raises(RecipeError, match=r"the documentation is text"):
        check_data(DataConfig(masks="as_given"))
    config = DataConfig(sources=(Samples().write(tmp_path / "a.hdf5"),), tokenizer=vocabulary)
    folder = prepare_into(tmp_path / "out", config, Preparation(), QUIET)
    given = DataConfig(sources=(str(folder),), masks="as_given", sequence_length=16)
    for check in (check_data, lambda config: prepare(config, QUIET)):
        with pytest.raises(RecipeError, match=r"was prepared without the masks of its source; .*--masks as_given"):
            check(given)
    folder = prepare_into(tmp_path / "with", dataclasses.replace(config, masks="as_given"), Preparation(), QUIET)
    assert open_prepared(folder, 16).given_masks
    check_data(dataclasses.replace(given, sources=(str(folder),)))


def test_a_vocabulary_too_large_for_given_masks_is_named(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(2**16))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    source = Samples().write(tmp_path / "a.hdf5")
    config = DataConfig(sources=(source,), tokenizer=str(tmp_path / "vocab.txt"), masks="as_given", sequence_length=16)
    with pytest.raises(RecipeError, match=r"data.masks=as_given takes vocabularies of up to 65,535 tokens"):
        prepare(config, QUIET)
    data = prepare(dataclasses.replace(config, masks="anew"), QUIET)
    assert data.rows("train").dtype == np.uint32


def test_without_h5py_it_is_said_what_to_install(tmp_path, vocabulary, monkeypatch):
    source = Samples().write(tmp_path / "a.hdf5")
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "h5py":
            raise ImportError("No module named 'h5py'")
        return real(name, *arguments, **options)

    monkeypatch.delitem(sys.modules, "h5py")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RecipeError, match=r"a.hdf5 is HDF5, which h5py reads: pip install 'trustratio\[hdf5\]'"):
        prepare(DataConfig(sources=(source,), tokenizer=vocabulary), QUIET)


def test_shards_are_prepared_by_the_command(tmp_path, vocabulary, capsys):
    source = Samples().write(tmp_path / "a.hdf5")
    arguments = ["--data", source, "--tokenizer", vocabulary, "--masks", "as_given", "--output", str(tmp_path / "out")]
    assert command.main(arguments) == 0
    assert "million token ids, 1 shards" in capsys.readouterr().out
    assert command.main(arguments) == 0
    assert "is complete" in capsys.readouterr().out
    assert command.main([*arguments[:4], "--output", str(tmp_path / "out")]) == 2
    assert "other settings (masks differ)" in capsys.readouterr().err
