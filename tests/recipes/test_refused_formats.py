"""Formats that are not read: known by name or content, refused before any work, with the way to one that is read."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import pickle
import sqlite3
import tarfile
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.configuration.config import DataConfig
from trustratio.recipes.data import prepare as command
from trustratio.recipes.data.choices import check_data
from trustratio.recipes.data.documents import check_format, read_documents
from trustratio.recipes.data.preparation import prepare
from trustratio.recipes.sources.foreign import FORMATS

TEXT = b"Plain words, and more of them.\n" * 40


def zipped(name="a.txt"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, TEXT)
    return file.getvalue()


def tarred():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("000.txt")
        member.size = len(TEXT)
        archive.addfile(member, io.BytesIO(TEXT))
    return file.getvalue()


def of_numpy():
    file = io.BytesIO()
    np.save(file, np.arange(9))
    return file.getvalue()


def of_torch():
    file = io.BytesIO()
    torch.save({"text": [1, 2]}, file)
    return file.getvalue()


def database(tmp_path):
    path = tmp_path / "database"
    with sqlite3.connect(path) as connection:
        connection.execute("create table t (text text)")
    return path.read_bytes()


def parquet():
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), file)
    return file.getvalue()


def arrow():
    file = io.BytesIO()
    with pyarrow.ipc.new_file(file, pyarrow.schema([("text", pyarrow.string())])):
        pass
    return file.getvalue()


CONTENTS = {
    "zip": (zipped(), "is a zip archive, which is not read: unpack it"),
    "tar": (tarred(), "is a tar archive .*: tar -xf unpacks it"),
    "npy": (of_numpy(), "is a NumPy file, .*write the text as .jsonl"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3", "is a PDF file, .*: pdftotext"),
    "warc": (b"WARC/1.0\r\nWARC-Type: warcinfo\r\n", r"archive of web pages \(WARC\), .*trafilatura"),
    "xml": (b'<?xml version="1.0"?>\n<a/>', "is an XML file, .*wikiextractor --json"),
    "wikipedia": (b'\xef\xbb\xbf<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/">', "is an XML file"),
    "html": (b"\n<!DOCTYPE html>\n<html>", "is a web page"),
    "index": (b"MMIDIDX\0\0\1\0\0\0\0\0\0\0", "token ids, of Megatron's or .*preprocess_data.py"),
    "pickle": (pickle.dumps(["a", "b"]), "is a pickle or .*run code"),
    "old pickle": (pickle.dumps(["a", "b"], protocol=2), "is a pickle or .*run code"),
    "torch": (of_torch(), "is a zip archive"),  # by its content alone
    "sqlite": (None, "is a database, .*sqlite3 FILE -header -csv"),
    "avro": (b"Obj\x01\x04\x14avro.codec", "is an Avro file"),
    "rtf": (rb"{\rtf1\ansi", "pandoc -t plain"),
    "png": (b"\x89PNG\r\n\x1a\n", "is a picture"),
    "wave": (b"RIFF\x24\0\0\0WAVEfmt ", "is a picture, a sound"),
    "program": (b"\x7fELF\x02\x01\x01\0", "is a program"),
    "gguf": (b"GGUF\x03\0\0\0", "is a file of weights"),
    "utf-16": ("Words".encode("utf-16"), "16 or 32 bits per character .*iconv -t UTF-8"),
    "gzip": (gzip.compress(TEXT), "is .gz by its content: give it a name that ends so"),
    "bzip2": (bz2.compress(TEXT), "is .bz2 by its content"),
    "parquet": (parquet(), "is .parquet by its content"),
    "arrow": (arrow(), "is .arrow by its content"),
    "hdf5": (b"\x89HDF\r\n\x1a\n\0\0", "is .hdf5 by its content"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_foreign_formats_are_known_by_their_content(tmp_path, name):
    content, message = CONTENTS[name]
    path = tmp_path / "data.txt"
    path.write_bytes(database(tmp_path) if content is None else content)
    for refused in (check_data, lambda config: prepare(config, Reporter(active=False))):
        with pytest.raises(RecipeError, match=message) as no:
            refused(DataConfig(sources=(str(path),)))
        assert str(no.value).startswith(str(path))
    (tmp_path / "data.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(RecipeError, match=message):
        check_format(str(tmp_path / "data.txt.gz"))


@pytest.mark.parametrize("suffix", sorted({suffix for one in FORMATS for suffix in one.suffixes}))
def test_foreign_formats_are_known_by_their_names(tmp_path, suffix):
    for name in (f"data{suffix}", f"DATA{suffix.upper()}", f"data{suffix}.gz"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(TEXT) if name.endswith(".gz") else TEXT)
        with pytest.raises(RecipeError) as no:
            check_format(str(path))
        what = next(one for one in FORMATS if suffix in one.suffixes)
        assert str(no.value) == f"{path} is {what.name}, which is not read: {what.remedy}"


def test_every_refusal_is_one_sentence():
    for one in FORMATS:
        assert one.remedy
        assert not one.name.endswith(".")
        assert not one.remedy.endswith(".")
        assert one.suffixes or one.marks


@pytest.mark.parametrize(
    "text",
    [
        "PARty and ARROW1 are words",
        "ORCs are no format",
        "RIFF raff",
        "BZh is short",
        "WARC is a word",
        "7z and Rar! too",
        "GIF87 was a year",
        "MZ",
        "<b>marked up</b> text",
        "%PDF is no file",
        "[CLS]",
        "\u200bzero width",
        "ID3 and more",
        "",
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "README", "a.md", "a.py", "a.v1"])
def test_text_is_not_refused(tmp_path, text, name):
    (tmp_path / name).write_text(text)
    check_format(str(tmp_path / name))
    assert list(read_documents([str(tmp_path / name)], "text")) == ([text] if text else [])


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.arrow.zst", "a.hdf5.xz", "a.feather.bz2"])
def test_tables_that_were_compressed_as_a_whole_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(RecipeError, match=r"was compressed as a whole: decompress it"):
        check_format(str(tmp_path / name))


def test_broken_sources_of_foreign_formats_can_be_left_out(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"words number {n}"}) + "\n" for n in range(40)))
    (tmp_path / "b.zip").write_bytes(zipped())
    (tmp_path / "c.txt").write_bytes(zipped())
    arguments = ["--data", f"{tmp_path}/*.*", "--output", str(tmp_path / "out"), "--vocabulary", "100"]
    assert command.main(arguments) == 2
    assert "b.zip is a zip archive" in capsys.readouterr().err
    assert not (tmp_path / "out" / "index.npz").exists()
    assert command.main([*arguments, "--skip_broken"]) == 0
    assert capsys.readouterr().out.count("left out") >= 2
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [source[-5:] for source in manifest["skipped_sources"]] == ["b.zip", "c.txt"]


def test_folders_are_answered_with_what_is_in_them(tmp_path):
    for names, message in (
        (["a.parquet", "b.parquet", "c.txt"], r"is a folder; give files or a glob, e.g. .*/\*.parquet, a folder that"),
        (["a.jsonl.gz", "b.jsonl.gz", "c.md"], r"e.g. .*/\*.jsonl.gz"),
        ([], r"e.g. .*/\*.txt"),
        (["index.json", "shard.00000.mds"], r"a folder of MosaicML's streaming, .*StreamingDataset"),
    ):
        folder = tmp_path / str(len(names) + len(message))
        folder.mkdir()
        for name in names:
            (folder / name).write_text("{}")
        with pytest.raises(RecipeError, match=message):
            check_data(DataConfig(sources=(str(folder),)))
