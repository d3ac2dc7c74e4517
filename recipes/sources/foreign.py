"""Formats that are not read, known by content or name, each with the way from it to one that is."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from pathlib import Path

from .compressed import beginning, suffix_of

_UNPACK = "unpack it and give the files in it"
_JSON_LINES = 'write the text as .jsonl, one {"text": "..."} per line'
_SNIFFED = 1024  # bytes


@dataclass(frozen=True)
class Format:
    """A format that is refused.

    Attributes:
        name: what it is, as in "is NAME".
        remedy: what to do instead.
        suffixes: of file names, in lower case.
        marks: regular expressions for how such files begin, whatever they are called.
    """

    name: str
    remedy: str
    suffixes: tuple[str, ...] = ()
    marks: tuple[bytes, ...] = ()


_TAR = Format(
    "a tar archive (WebDataset's shards are such)", f"tar -xf unpacks it: {_UNPACK}", (".tar", ".tgz", ".tbz2", ".txz")
)

FORMATS = (
    _TAR,
    Format(
        "a Word or OpenDocument text",
        "pandoc -t plain makes text of it",
        (".docx", ".odt", ".doc", ".rtf"),
        (rb"{\\rtf",),
    ),
    Format("an e-book", "pandoc -t plain makes text of it", (".epub", ".mobi")),
    Format("a spreadsheet", "save it as .csv", (".xlsx", ".xls", ".ods")),
    Format("a NumPy file", f"numbers are not text: {_JSON_LINES}", (".npy", ".npz"), (rb"\x93NUMPY",)),
    Format("a zip archive", _UNPACK, (".zip",), (rb"PK\x03\x04", rb"PK\x05\x06")),
    Format("a 7z archive", _UNPACK, (".7z",), (rb"7z\xbc\xaf\x27\x1c",)),
    Format("a RAR archive", _UNPACK, (".rar",), (rb"Rar!\x1a\x07",)),
    Format("a PDF file", "pdftotext makes text of it", (".pdf",), (rb"%PDF-",)),
    Format("a PostScript file", "ps2ascii makes text of it", (".ps", ".eps"), (rb"%!PS",)),
    Format(
        "an archive of web pages (WARC)",
        f"take the text out with trafilatura or resiliparse and {_JSON_LINES}, or take a data set that has it: "
        "hf:HuggingFaceFW/fineweb-edu",
        (".warc", ".wet", ".wat", ".arc"),
        (rb"WARC/\d",),
    ),
    Format(
        "an XML file",
        "take the text out first; Wikipedia's is there as hf:wikimedia/wikipedia:20231101.en, and wikiextractor --json "
        "makes files of its dumps that are .jsonl under other names",
        (".xml",),
        (rb"\s*<\?xml", rb"\s*<mediawiki"),
    ),
    Format(
        "a web page",
        f"take the text out with trafilatura or html2text, or {_JSON_LINES}",
        (".html", ".htm", ".xhtml", ".mhtml"),
        (rb"\s*(?i:<!doctype html|<html)",),
    ),
    Format(
        "a file of TFRecords",
        f"read it with tf.data.TFRecordDataset and {_JSON_LINES}; token ids cannot be taken without their text",
        (".tfrecord", ".tfrecords", ".tfrec"),
    ),
    Format(
        "a file of token ids, of Megatron's or of a prepared folder",
        "give the .jsonl that Megatron's preprocess_data.py was given, or the prepared folder itself",
        (".bin", ".idx"),
        (rb"MMIDIDX\0\0",),
    ),
    Format(
        "a shard of MosaicML's streaming",
        f"read the folder with streaming.StreamingDataset and {_JSON_LINES}",
        (".mds",),
    ),
    Format(
        "a pickle or a file of torch.save",
        f"such files run code when they are read: load it where you trust it and {_JSON_LINES}",
        (".pkl", ".pickle", ".pt", ".pth", ".joblib"),
        (rb"\x80[\x02-\x05]",),
    ),
    Format("a file of weights", "give text", (".safetensors", ".ckpt", ".onnx", ".gguf"), (rb"GGUF[\x01-\x09]\0",)),
    Format(
        "a database",
        "export its table as .csv (sqlite3 FILE -header -csv 'select text from TABLE')",
        (".sqlite", ".sqlite3", ".db", ".mdb", ".lmdb", ".duckdb"),
        (rb"SQLite format 3\0",),
    ),
    Format("an ORC file", "pyarrow.orc reads and pyarrow.parquet writes it", (".orc",), ()),
    Format("an Avro file", f"read it with fastavro and {_JSON_LINES}", (".avro",), (rb"Obj\x01",)),
    Format("a MATLAB or R file", f"numbers are not text: {_JSON_LINES}", (".mat", ".rds", ".rdata")),
    Format(
        "a picture, a sound or a film",
        "give text",
        (".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp3", ".wav", ".mp4"),
        (rb"\x89PNG", rb"\xff\xd8\xff", rb"GIF8[79]a", rb"RIFF.{4}(WAVE|WEBP|AVI )", rb"OggS\0"),
    ),
    Format("a program or library", "give text", (".exe", ".so", ".dll"), (rb"\x7fELF", rb"MZ\x90")),
    Format(
        "text of 16 or 32 bits per character and not UTF-8 text",
        "iconv -t UTF-8 converts it",
        (),
        (rb"\xff\xfe", rb"\xfe\xff"),
    ),
)
"""In the order in which they are looked for: what is a zip archive inside stands before the zip archive."""

_COMPRESSED = {
    rb"\x1f\x8b": ".gz",
    rb"BZh[1-9]1AY&SY": ".bz2",
    rb"\xfd7zXZ\0": ".xz",
    rb"\x28\xb5\x2f\xfd": ".zst",
}
_READ_AS_TEXT = {
    rb"PAR1\x15": ".parquet",
    rb"ARROW1\0\0": ".arrow",
    rb"\x89HDF\r\n\x1a\n": ".hdf5",
}
"""Beginnings of files that are read, if they are called so."""


def refusal(path: Path) -> str | None:
    """Return why a file that is not known by its name cannot be read and what to do, or None: it may be text."""
    head = beginning(path, _SNIFFED).removeprefix(codecs.BOM_UTF8)
    found = next((one for one in FORMATS if _is(one, path, head)), None)
    if found is not None:
        return f"{path} is {found.name}, which is not read: {found.remedy}"
    for mark, suffix in {**_COMPRESSED, **_READ_AS_TEXT}.items():
        if re.match(mark, head):
            return f"{path} is {suffix} by its content: give it a name that ends so"
    return None


def _is(one: Format, path: Path, head: bytes) -> bool:
    if suffix_of(path) in one.suffixes or path.suffix.lower() in one.suffixes:
        return True
    if one is _TAR:
        return head[257:262] == b"ustar"
    return any(re.match(mark, head, re.DOTALL) for mark in one.marks)


def wholly_compressed(path: Path) -> str:
    """Return why a table that compresses itself is not read when it is compressed once more."""
    return f"{path} is a {suffix_of(path)} file that was compressed as a whole: decompress it, it is compressed inside"
