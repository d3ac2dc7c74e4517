"""The formats that text comes in: the same text gives the same tokens, and what cannot be read is named."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from tests.recipes.conftest import sentences
from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.configuration.command_line import parse_command_line
from trustratio.recipes.configuration.config import DataConfig
from trustratio.recipes.data import prepare as command
from trustratio.recipes.data.choices import check_data
from trustratio.recipes.data.documents import expand_sources, read_documents
from trustratio.recipes.data.index import index_documents
from trustratio.recipes.data.preparation import Preparation, prepare, prepare_into
from trustratio.recipes.data.prepared import open_prepared
from trustratio.recipes.data.wordpiece import train_wordpiece
from trustratio.recipes.sources.limit import Limit

QUIET = Reporter(active=False)

ODD = [
    'He said "quotes, and commas", twice.',
    "Two lines\nand a third\n\nafter a blank one.",
    "Windows\r\nlines",
    "tabs\tand; semicolons",
    "naïve café ΣΑΣ straße 漢字 🙂",
    '"',
    "\ufeffa mark inside",
    "ends with a backslash \\",
]
"""Texts that a careless writer or reader of tables changes."""


def texts_of(seed: int = 0) -> list[str]:
    texts = [sentences(100 * seed + number, 30) for number in range(24)] + ODD
    random.Random(seed).shuffle(texts)
    return texts


def csv_of(texts: list[str | None], delimiter: str = ",", column: str = "text") -> str:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerow(["id", column, "other"])
    writer.writerows([number, text, "x"] for number, text in enumerate(texts))
    return file.getvalue()


def table(texts: list[str | None], kind: pyarrow.DataType | None = None) -> pyarrow.Table:
    return pyarrow.table({"id": list(range(len(texts))), "text": pyarrow.array(texts, kind or pyarrow.string())})


def write_stream(path: Path, texts: list[str | None], kind: pyarrow.DataType | None = None) -> None:
    data = table(texts, kind)
    with pyarrow.ipc.new_stream(str(path), data.schema) as writer:
        writer.write_table(data, max_chunksize=7)


def write_saved(folder: Path, texts: list[str | None], shards: int = 3) -> None:
    datasets.Dataset.from_dict({"id": list(range(len(texts))), "text": texts}).save_to_disk(folder, num_shards=shards)


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def lines(texts: list[str | None]) -> str:
    return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts))


def write(path: Path, texts: list[str | None]) -> str:
    """Write the texts in the format of a name, and return what --data is given."""
    suffix = path.suffix
    if suffix in (".gz", ".bz2", ".xz"):
        inner = path.with_suffix("")
        write(inner, texts)
        path.write_bytes(COMPRESS[suffix](inner.read_bytes()))
        inner.unlink()
    elif suffix == ".zst":
        inner = path.with_suffix("")
        write(inner, texts)
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(inner.read_bytes())
        inner.unlink()
    elif suffix in (".jsonl", ".ndjson"):
        path.write_text(lines(texts), newline="")
    elif suffix in (".csv", ".CSV"):
        path.write_text(csv_of(texts, ";" if "semicolon" in path.name else ","), newline="")
    elif suffix == ".tsv":
        path.write_text(csv_of(texts, "\t"), newline="")
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(table(texts), path, row_group_size=5)
    elif suffix == ".feather":
        pyarrow.feather.write_feather(table(texts), path, chunksize=5)
    elif suffix == ".arrow":
        kind = pyarrow.dictionary(pyarrow.int32(), pyarrow.string()) if "categories" in path.name else None
        write_stream(path, texts, pyarrow.large_string() if "large" in path.name else kind)
    elif path.name == "saved":
        write_saved(path, texts)
    elif path.name == "splits":
        datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": texts})}).save_to_disk(path)
    else:
        folder = path / "data"
        folder.mkdir(parents=True)
        for part in range(2):
            piece = texts[part * 10 : 10 if part == 0 else None]
            pyarrow.parquet.write_table(table(piece), folder / f"train-{part:05d}-of-00002.parquet")
        return f"hf:{path}"
    return str(path)


NAMES = (
    *("a.jsonl", "a.ndjson", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.CSV", "semicolon.csv", "a.csv.gz", "a.csv.bz2"),
    *("a.csv.xz", "a.tsv", "a.tsv.zst", "a.parquet", "a.feather", "a.arrow", "large.arrow", "categories.arrow"),
    *("saved", "splits", "hub"),
)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    train_wordpiece(texts_of(), 300).tokenizer.save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def expected(vocabulary, tmp_path_factory):
    """The tokens of the texts, as the tokenizer itself gives them, and the data's fingerprint as JSON Lines."""
    folder = tmp_path_factory.mktemp("expected")
    config = DataConfig(sources=(write(folder / "b.jsonl", texts_of()),), tokenizer=vocabulary)
    prepared = prepare_into(folder / "tokens", config, Preparation(), QUIET)
    return files_of(prepared), open_prepared(prepared, 4).fingerprint


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_text_gives_the_same_tokens_however_it_is_stored(tmp_path, monkeypatch, vocabulary, expected, name):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    source = write(tmp_path / name, texts_of())
    config = DataConfig(sources=(source,), tokenizer=vocabulary)
    check_data(config)
    folder = prepare_into(tmp_path / "tokens", config, Preparation(), QUIET)
    assert (files_of(folder), open_prepared(folder, 4).fingerprint) == expected


def test_the_tokens_are_those_of_the_texts(expected, vocabulary):
    """The other formats are compared with JSON Lines, which this compares with the texts themselves."""
    from trustratio.recipes.data.wordpiece import load_tokenizer

    tokenizer = load_tokenizer(vocabulary)
    stream = np.frombuffer(expected[0]["train-00000.bin"], np.uint16)
    held_out = np.frombuffer(expected[0]["validation-00000.bin"], np.uint16)
    texts = [[*tokenizer.encode([text.strip()])[0], tokenizer.sep_id] for text in texts_of()]
    assert held_out.tolist() in texts
    texts.remove(held_out.tolist())
    assert stream.tolist() == [i for ids in texts for i in ids]


WITHOUT_TEXT = ["One.", None, "", " \n", "Two.", None, "Three."]


@pytest.mark.parametrize("name", NAMES)
def test_records_without_text_are_left_out_and_counted(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    texts = WITHOUT_TEXT * 4 + [f"Number {n} of words." for n in range(40)]
    source = write(tmp_path / name, texts)
    index = index_documents([*expand_sources([source])], "text", 0.1)
    assert (len(index.roles), index.without_text) == (52, 16)
    assert command.main(["--data", source, "--output", str(tmp_path / "out"), "--vocabulary", "100"]) == 0
    assert "16 records without text (null, empty, white space) were left out" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["records_without_text"] == 16


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.csv.gz", "a.tsv", "vocab.jsonl.xz"])
def test_a_byte_order_mark_and_windows_lines_are_no_text(tmp_path, name):
    plain = write(tmp_path / name, ["One.", "Two."]) if "txt" not in name else str(tmp_path / name)
    path = Path(plain)
    if name == "a.txt":
        path.write_text("One.\r\n\r\nTwo.", newline="")
    content = path.read_bytes() if path.suffix not in COMPRESS else None
    opened = {".gz": gzip.decompress, ".xz": lzma.decompress}.get(path.suffix, lambda data: data)(path.read_bytes())
    windows = b"\xef\xbb\xbf" + opened.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    path.write_bytes(windows if content is not None else COMPRESS[path.suffix](windows))
    found = list(read_documents([plain], "text"))
    assert found == (["One.\n\nTwo."] if name == "a.txt" else ["One.", "Two."])


def test_a_field_may_be_a_book(tmp_path):
    book = 'word "and" word,\n' * 100_000
    found = list(read_documents([write(tmp_path / "a.csv", ["One.", book])], "text"))
    assert found == ["One.", book]


def test_half_a_character_is_replaced(tmp_path, vocabulary):
    """JSON can say what no other text can; the tokenizer would end with a traceback."""
    (tmp_path / "a.jsonl").write_text(r'{"text": "a \ud83d\ude42 and \ud83d cut\ude42"}' + "\n" + lines(texts_of()))
    assert next(iter(read_documents([str(tmp_path / "a.jsonl")], "text"))) == "a 🙂 and \ufffd cut\ufffd"
    for tokenizer in (None, vocabulary):
        config = DataConfig(sources=(str(tmp_path / "a.jsonl"),), tokenizer=tokenizer, sequence_length=4)
        assert prepare(config, QUIET).documents == len(texts_of()) + 1


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt", "a.jsonl", "a.arrow"])
def test_files_without_a_byte_hold_no_document(tmp_path, name):
    (tmp_path / name).touch()
    assert list(read_documents([str(tmp_path / name)], "text")) == []


TABLES = {
    "no header.csv": (
        "1,first text\n2,second text\n",
        r"first line of .*no header.csv.* has no column 'text'; columns: 1, first text; choose",
    ),
    "other.csv": (
        "id,body\n1,some words\n",
        r"has no column 'text'; columns: id, body; choose one with --text_column NAME",
    ),
    "other.tsv": ("id\tbody\n1\tsome words\n", r"columns: id, body;"),
    "commas.tsv": ("id,text\n1,some words\n", r"columns: id,text;"),
    "twice.csv": ("text,id,text\na,1,b\n", r"has 2 columns called 'text'"),
    "more.csv": (
        "id,text\n1,words, and others\n",
        r"line 2: a row of 3 fields under a header of 2; a field that holds",
    ),
    "fewer.csv": ("id,text\n1,words\n\n2\n", r"line 4: a row of 1 fields under a header of 2"),
    "open.csv": ('id,text\n1,"words\n2,words\n', r"line 3: not a table: unexpected end of data; quotes"),
    "quotes.csv": ('id,text\n1,"a "quoted" word"\n', r"line 2: not a table: .*expected after"),
    "nul.csv": ("id,text\n1,wor\0ds\n", r"nul.csv is not text: it has NUL bytes"),
    "numbers.csv": ("id,text\n1,12\n2,1e5\n3,\n", r"column 'text' holds numbers and no text; choose another"),
    "latin.csv": ("id,text\n1,caf\xe9\n".encode("latin-1"), r"latin.csv is not UTF-8 text \(byte 13: .*iconv"),
    "cut.csv.gz": (gzip.compress(b"id,text\n" + b"1,words\n" * 999)[:-20], r"cannot read .*cut.csv.gz"),
    "array.json": ('[\n{"text": "a"}\n]', r"array.json is not JSON Lines .*jq -c '.\[\]' array.json makes lines"),
    "array in a line.json": ('[{"text": "a"}]', r"line 1: expected a JSON object, found a list; .*jq -c"),
    "object.json": ('{\n"text": "a"\n}', r"object.json is not JSON Lines .*jq -c . object.json makes lines"),
    "number.jsonl": ('{"text": 5}\n', r"line 1: column 'text' holds a number and no text"),
    "nested.jsonl": ('{"text": ["a"]}\n', r"line 1: column 'text' holds a list and no text"),
}


@pytest.mark.parametrize("name", TABLES)
def test_what_is_no_table_of_text_is_named(tmp_path, name):
    content, message = TABLES[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError, match=message):
        prepare(DataConfig(sources=(str(path),)), QUIET)


def test_a_quote_that_is_never_closed_takes_no_whole_file(tmp_path, monkeypatch):
    from trustratio.recipes.sources import delimited

    monkeypatch.setattr(delimited, "_LONGEST_FIELD", 10_000)
    path = tmp_path / "a.csv"
    path.write_text('id,text\n1,"words\n' + "2,words\n" * 100_000)
    with pytest.raises(RecipeError, match=r"a.csv, line \d+: not a table: field larger than field limit"):
        list(read_documents([str(path)], "text"))


COLUMNS = {
    "int64": [1, 2],
    "double": [0.5, 2.0],
    "bool": [True, False],
    "binary": [b"a", b"b"],
    "list<element: string>": [["a"], ["b"]],
    "list<item: string>": [["a"], ["b"]],
    "struct<body: string>": [{"body": "a"}],
}


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_columns_that_hold_no_text_are_named(tmp_path, kind, suffix):
    data, path = pyarrow.table({"id": [0] * len(COLUMNS[kind]), "text": COLUMNS[kind]}), tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(data, path)
    elif suffix == ".feather":
        pyarrow.feather.write_feather(data, path)
    else:
        with pyarrow.ipc.new_stream(str(path), data.schema) as writer:
            writer.write_table(data)
    shown = str(data.schema.field("text").type) if kind.startswith("list") and suffix != ".parquet" else kind
    with pytest.raises(RecipeError, match=r"column 'text' holds .* and no text; columns: id, text;") as no:
        list(read_documents([str(path)], "text"))
    assert f"holds {shown} and" in str(no.value) or kind.startswith("list")
    with pytest.raises(RecipeError, match="no column 'words'; columns: id, text"):
        list(read_documents([str(path)], "words"))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_a_column_of_nulls_alone_is_no_error(tmp_path, suffix):
    assert list(read_documents([write(tmp_path / f"a{suffix}", [None, None])], "text")) == []


@pytest.mark.parametrize("end", [1, 8, 40, 200])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_tables_that_were_cut_are_named(tmp_path, suffix, end):
    path = Path(write(tmp_path / f"a{suffix}", [sentences(n, 3) for n in range(40)]))
    path.write_bytes(path.read_bytes()[:-end])
    with pytest.raises(RecipeError, match=f"cannot read .*a{suffix} as (Parquet|Arrow)"):
        list(read_documents([str(path)], "text"))


def test_an_arrow_stream_that_was_cut_between_two_batches_is_named(tmp_path):
    """It would read as a shorter one."""
    data = table([f"text {n}" for n in range(30)])
    file = pyarrow.BufferOutputStream()
    writer = pyarrow.ipc.new_stream(file, data.schema)
    writer.write_table(data, max_chunksize=10)  # and no end
    (tmp_path / "a.arrow").write_bytes(file.getvalue().to_pybytes())
    with pytest.raises(RecipeError, match="its end is missing"):
        list(read_documents([str(tmp_path / "a.arrow")], "text"))


@pytest.mark.parametrize("wrong", [[0, 50, 2**30, 150, 2**30], [0, 50, 100, 150, 206], [0, 50, 40, 150, 200]])
@pytest.mark.parametrize("suffix", [".arrow", ".feather"])
def test_damaged_offsets_are_not_followed(tmp_path, suffix, wrong):
    kind = {".arrow": write_stream, ".feather": None}[suffix]
    path = tmp_path / f"a{suffix}"
    texts = ["x" * 50] * 4
    if kind:
        kind(path, texts)
    else:
        pyarrow.feather.write_feather(table(texts), path, compression="uncompressed")
    offsets = np.asarray([0, 50, 100, 150, 200], np.int32).tobytes()
    content = path.read_bytes()
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, np.asarray(wrong, np.int32).tobytes()))
    with pytest.raises(RecipeError, match=f"cannot read .*a{suffix} as Arrow"):
        list(read_documents([str(path)], "text"))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_column_is_read_by_its_whole_name(tmp_path, suffix):
    """A field of a struct has a name of the same form in Parquet."""
    columns = {"meta": [{"text": "no", "id": 1}] * 3, "meta.text": ["a", None, "b"], "text.meta": [1, 2, 3]}
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    else:
        pyarrow.feather.write_feather(pyarrow.table(columns), str(path), compression="uncompressed")
    assert list(read_documents([str(path)], "meta.text")) == ["a", "b"]
    with pytest.raises(RecipeError, match=r"has no column 'meta.id'; columns: meta, meta.text, text.meta"):
        list(read_documents([str(path)], "meta.id"))


def test_a_saved_data_set_with_several_splits_asks_for_one(tmp_path):
    parts = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    with pytest.raises(RecipeError, match=r"holds the splits train, test; give one of them, e.g. .*/set/train"):
        expand_sources([str(tmp_path / "set")])
    assert list(read_documents(expand_sources([str(tmp_path / "set" / "test")]), "text")) == ["test"]


def test_a_saved_data_set_that_lacks_a_file_is_named(tmp_path):
    write_saved(tmp_path / "set", ["a", "b", "c", "d"], shards=2)
    (tmp_path / "set" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(RecipeError, match=r"data-00001-of-00002.arrow' does not exist"):
        expand_sources([str(tmp_path / "set")])


def test_a_saved_index_of_rows_is_not_passed_over(tmp_path):
    write_saved(tmp_path / "set", ["a", "b"], shards=1)
    state = json.loads((tmp_path / "set" / "state.json").read_text())
    (tmp_path / "set" / "state.json").write_text(
        json.dumps({**state, "_indices_data_files": [{"filename": "i.arrow"}]})
    )
    with pytest.raises(RecipeError, match="saved by an old version of datasets"):
        expand_sources([str(tmp_path / "set")])


def test_a_shuffled_data_set_is_saved_in_its_order(tmp_path):
    data = datasets.Dataset.from_dict({"text": [f"text {n}" for n in range(50)]}).shuffle(seed=3)
    data.save_to_disk(tmp_path / "set")
    assert list(read_documents(expand_sources([str(tmp_path / "set")]), "text")) == data["text"][:]


def test_the_first_so_many_documents_are_read(tmp_path):
    texts = [f"text number {n}" for n in range(30)]
    for name, part in (("a", texts[:10]), ("b", texts[10:20]), ("c", texts[20:])):
        write(tmp_path / f"{name}.jsonl", part)
    sources = expand_sources([f"{tmp_path}/*.jsonl"])

    def read(limit):
        index = index_documents(sources, "text", 0.1, limit=limit)
        return [text for _, text in index.read(index.roles >= 0, "text")], index.ends.tolist()

    assert read(Limit(documents=13)) == (texts[:13], [10, 13, 13])
    assert read(Limit(documents=10)) == (texts[:10], [10, 10, 10])
    assert read(Limit(documents=99)) == (texts, [10, 20, 30])
    assert read(Limit(characters=27)) == (texts[:3], [3, 3, 3])  # of 13 characters each: the third begins before
    assert read(Limit(characters=26)) == (texts[:2], [2, 2, 2])
    assert read(Limit(documents=2, characters=10**6)) == (texts[:2], [2, 2, 2])


def test_a_limit_is_part_of_what_a_folder_holds(tmp_path, capsys):
    source = write(tmp_path / "a.jsonl", texts_of())
    arguments = ["--data", source, "--output", str(tmp_path / "out"), "--vocabulary", "200"]
    assert command.main([*arguments, "--max_documents", "20"]) == 0
    assert "stopped after 20 documents" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["documents"], manifest["skipped_sources"]) == (20, [])
    assert command.main(arguments) == 2
    assert "other settings (max_documents differ)" in capsys.readouterr().err
    assert command.main([*arguments, "--max_documents", "0"]) == 2
    assert "--max_documents 0 is out of range: allowed is from 1" in capsys.readouterr().err


def test_a_prepared_folder_takes_no_limit(tmp_path):
    config = DataConfig(sources=(write(tmp_path / "a.jsonl", texts_of()),), vocabulary=200)
    folder = prepare_into(tmp_path / "out", config, Preparation(), QUIET)
    with pytest.raises(RecipeError, match=r"data.max_documents bounds .*, and .* is prepared already"):
        check_data(DataConfig(sources=(str(folder),), max_documents=5))


def test_the_recipe_takes_the_column_as_an_option(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,body\n" + "".join(f"{n},some words {n}\n" for n in range(50)))
    config = parse_command_line(["--data", str(path), "--text-column", "body"]).config.data
    assert config.text_column == "body"
    assert len(list(read_documents(expand_sources(config.sources), config.text_column))) == 50


def test_folders_of_before_stay_as_they_are(tmp_path):
    """Settings that were added later are there only if they are set; .csv was once read as plain text."""
    from trustratio.recipes.data.settings import settings_of

    for name in ("a.jsonl", "a.csv"):
        write(tmp_path / name, ["a", "b"])
    lines, commas = (settings_of(DataConfig(), [str(tmp_path / name)], "text", None) for name in ("a.jsonl", "a.csv"))
    assert set(lines) == {"format", "sources", "text_column", "tokenizer", "validation_fraction"}
    assert [len(settings["sources"][0]) for settings in (lines, commas)] == [3, 4]
