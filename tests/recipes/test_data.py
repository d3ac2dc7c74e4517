import ast
import bz2
import gzip
import importlib
import json
import lzma
import sys
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.recipes.conftest import sentences
from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.configuration.config import DataConfig
from trustratio.recipes.data import docstrings, preparation
from trustratio.recipes.data.documents import expand_sources, read_documents
from trustratio.recipes.data.index import REPEATED, VALIDATION, index_documents
from trustratio.recipes.data.preparation import cache_folder, prepare
from trustratio.recipes.data.shards import unigram_entropy
from trustratio.recipes.data.wordpiece import load_tokenizer, train_wordpiece

QUIET = Reporter(active=False)
LONG = "A sentence that is long enough to be kept as the documentation of something, said in plain words. "


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "package"
    (folder / "tests").mkdir(parents=True)
    (folder / "b.py").write_text(
        f'"""{LONG} Of module b."""\n\ndef f():\n    """{LONG * 3} Of f."""\n\n'
        f'    class Inner:\n        """{LONG} Inner."""\n'
    )
    (folder / "a.py").write_text(f'"""{LONG * 3} Of module a."""\n\nclass C:\n    """{LONG * 3} Of f."""\n')
    (folder / "broken.py").write_bytes(f'"""{LONG * 3} \xe9"""\n'.encode("latin-1"))  # not UTF-8
    (folder / "no_text.py").write_text(f'TEMPLATE = """{LONG * 3}"""\nf(\n    """{LONG * 3}"""\n)\n')
    (folder / "raises.py").write_text(f'"""{LONG * 3} Raises."""\nraise SystemExit("imported")\n')
    (folder / "tests" / "test_a.py").write_text(f'"""{LONG * 3} A test."""\n')
    return folder


def test_harvest_reads_without_importing_and_drops_repeated_docstrings(package):
    documents = list(docstrings.harvest({"package": package}, QUIET.progress))
    assert len(documents) == 3  # a.py, b.py, raises.py in order; no broken file, no other text in quotes, no tests
    assert documents[0].endswith("Of f.")
    assert "Of module b." in documents[1]
    assert "Inner." in documents[1]
    assert "Of f." not in documents[1]
    assert list(docstrings.harvest({"package": package}, QUIET.progress)) == documents


def test_docstrings_are_those_that_python_finds(tmp_path):
    text = "A sentence of sixty characters or more, which is what the harvest takes for {}."
    source = f"""# A comment.
r'''{text.format("a module")} Raw: \\d.'''

class A(B):  # a comment behind the colon
    '''
    {text.format("a class")}

        An example.
    '''
    NAME = '''{text.format("no docstring")}'''

    def f(
        self,
    ) -> None:
        '''{text.format("a function")} An escape: \\u00e9; a quote: ".'''
        return "# no comment"
""".replace("'''", '"' * 3)
    path = tmp_path / "module.py"
    path.write_text(source)
    tree = ast.parse(source)
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    assert docstrings.docstrings(path) == [ast.get_docstring(node) for node in nodes]
    assert len(nodes) == 3
    assert docstrings.docstrings(tmp_path / "none.py") == []


def test_harvest_key_follows_the_versions(monkeypatch):
    folders = docstrings.package_folders()
    assert {"torch", "transformers", docstrings.STANDARD_LIBRARY} <= set(folders)
    key = docstrings.corpus_key(folders)
    assert docstrings.corpus_key(folders) == key
    assert docstrings.corpus_key({name: folders[name] for name in folders if name != "torch"}) != key
    monkeypatch.setattr(docstrings, "_version", lambda package: "0")
    assert docstrings.corpus_key(folders) != key


def test_packages_are_found_wherever_python_finds_them(tmp_path, monkeypatch):
    # As with --system-site-packages, a .pth file or `pip install --user`: not in the environment's own folder.
    for name in ("torch", "pandas"):
        (tmp_path / name).mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    monkeypatch.setattr(docstrings, "PACKAGES", ("torch", "pandas", "no_such_package"))
    monkeypatch.delitem(sys.modules, "pandas", raising=False)
    folders = docstrings.package_folders()
    assert folders["torch"] == tmp_path / "torch"
    assert docstrings.missing_packages(folders) == ["pandas", "no_such_package"]  # any folder is no package


def test_packages_that_the_default_text_lacks_are_named(tmp_path, monkeypatch, package, capsys):
    monkeypatch.setenv("TRUSTRATIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(preparation, "package_folders", lambda: {"numpy": package})
    monkeypatch.setattr(preparation, "require_text", lambda *_: None)
    preparation.prepare_into(tmp_path / "tokens", DataConfig(vocabulary=200), preparation.Preparation(), Reporter())
    assert "not installed and left out are torch, transformers, " in capsys.readouterr().out


def test_a_stripped_installation_is_named():
    with pytest.raises(RecipeError, match="--data FILES"):
        docstrings.require_text({"torch": None}, 10)


def test_text_json_and_parquet_give_the_same_documents(tmp_path):
    texts = ["First document.", "Second one."]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"id": i, "text": t}) for i, t in enumerate(texts)) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert list(read_documents(expand_sources([str(tmp_path / name)]), "text")) == texts


def test_text_files_are_cut_at_blank_lines_into_documents(tmp_path):
    paragraphs = [f"paragraph {i} " + "word " * 300 for i in range(10)]
    (tmp_path / "a.txt").write_text("\n\n\n".join(paragraphs))
    documents = list(read_documents([str(tmp_path / "a.txt")], "text"))
    assert len(documents) == 4  # three paragraphs of 1,500 characters make one of at least 4,000
    assert "\n\n".join(documents).split() == " ".join(paragraphs).split()


@pytest.mark.parametrize("between", ["\n", " ", ""], ids=["sentence per line", "one line", "one word"])
def test_text_without_blank_lines_is_cut_all_the_same(tmp_path, between):
    words = [f"word{i}" for i in range(10_000)]
    (tmp_path / "a.txt").write_text(between.join(words))
    documents = list(read_documents([str(tmp_path / "a.txt")], "text"))
    assert max(map(len, documents)) <= 12_000
    # Nothing is lost, and no word is cut where a space or a line end is near.
    assert [word for text in documents for word in text.split()] == words or not between
    assert "".join("".join(documents).split()) == "".join(words)


def test_short_paragraphs_are_never_cut(tmp_path):
    paragraphs = ["\n".join([f"{i} " + "word " * 20] * 30) for i in range(20)]  # of 3,000 characters
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    documents = list(read_documents([str(tmp_path / "a.txt")], "text"))
    assert [text.count("\n\n") for text in documents] == [1] * 10


def test_large_files_are_not_held_whole(tmp_path):
    line = "A sentence that repeats itself in its own line.\n"
    (tmp_path / "a.txt").write_text(line * 200_000)
    table = pyarrow.table({"text": ["word " * 400] * 5_000})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.txt", "a.parquet"):
        tracemalloc.start()
        for _ in read_documents([str(tmp_path / name)], "text"):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2_000_000, name  # of 10 million characters each


def test_records_without_text_are_skipped_alike(tmp_path):
    texts = ["One.", None, "", "Two."]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert list(read_documents([str(tmp_path / name)], "text")) == ["One.", "Two."]


def test_globs_expand_in_order(text_folder):
    files = expand_sources([f"{text_folder}/*.txt", "hf:some/name"])
    assert [f.rsplit("/", 1)[-1] for f in files] == ["part0.txt", "part1.txt", "part2.txt", "name"]


def bad_sources(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00text")
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "column.jsonl").write_text('{"body": "fine", "id": 3}\n')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "object.jsonl").write_text('{"text": {"a": 1}}\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "broken.parquet").write_text("no parquet")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "column.parquet")
    (tmp_path / "empty.txt").write_text("  \n\n")
    (tmp_path / "wide.txt").write_text("wide\n\n" * 99, encoding="utf-16-le")  # valid UTF-8, for ASCII characters
    (tmp_path / "one.txt").write_text("One short document.")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", "does not exist"),
        ("nothing*.txt", "matches no file"),
        (".", r"is a folder; give files or a glob"),
        ("binary.txt", "not UTF-8 text"),
        ("wide.txt", "is not text: it has NUL bytes"),
        ("broken.jsonl", "not JSON Lines"),
        ("column.jsonl", "line 1: no column 'text'; columns: body, id"),
        ("deep.jsonl", "not JSON Lines"),
        ("object.jsonl", "line 1: column 'text' holds an object and no text; columns: text;"),
        ("list.jsonl", "expected a JSON object, found a list"),
        ("broken.parquet", "cannot read .* as Parquet"),
        ("column.parquet", "no column 'text'; columns: body"),
        ("empty.txt", "no non-empty document"),
        ("one.txt", "single document"),
    ],
)
def test_bad_data_is_named(tmp_path, source, message):
    folder = bad_sources(tmp_path)
    with pytest.raises(RecipeError, match=message):
        prepare(DataConfig(sources=(str(folder / source),)), QUIET)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files_are_read_and_broken_ones_named(tmp_path, suffix):
    lines = "".join(json.dumps({"text": f"Document {i}. " + "word " * 50}) + "\n" for i in range(100))
    path = tmp_path / f"a.jsonl{suffix}"
    if suffix == ".zst":
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(lines.encode())
    else:
        path.write_bytes({".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].compress(lines.encode()))
    assert len(list(read_documents([str(path)], "text"))) == 100
    (tmp_path / f"b.txt{suffix}").write_bytes(path.read_bytes())
    assert "\n".join(read_documents([str(tmp_path / f"b.txt{suffix}")], "text")) + "\n" == lines
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RecipeError, match=f"a.jsonl{suffix}"):
        list(read_documents([str(path)], "text"))


def test_an_unreachable_hub_data_set_is_named(monkeypatch):
    import datasets

    def unreachable(path, configuration, split, streaming):
        raise ConnectionError(f"cannot reach the hub for {path} {configuration} {split}")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(RecipeError, match=r"'org/x:en@test'.*hub for org/x en test.*without a network"):
        list(read_documents(["hf:org/x:en@test"], "text"))


def test_hub_data_sets_are_streamed_by_column(monkeypatch):
    import datasets

    taken = []

    class Endless:
        def __iter__(self):
            for i in range(10**9):
                taken.append(i)
                yield {"body": f"document {i}"}

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, streaming, **options: Endless() if streaming else None)
    documents = read_documents(["hf:x"], "body")
    assert [next(documents) for _ in range(3)] == ["document 0", "document 1", "document 2"]
    assert len(taken) <= 4
    with pytest.raises(
        RecipeError, match=r"no column 'text'; columns: body; choose .* --text_column NAME .*data.text_column=NAME"
    ):
        list(read_documents(["hf:x"], "text"))


def test_a_data_set_folder_is_read_as_the_hub_would_give_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for split, count in (("train", 3), ("test", 2)):
        texts = [f"{split} document {i}" for i in range(count)]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / f"{split}-00000-of-00001.parquet")
    assert list(read_documents([f"hf:{tmp_path}/set"], "text")) == [f"train document {i}" for i in range(3)]
    assert list(read_documents([f"hf:{tmp_path}/set@test"], "text")) == [f"test document {i}" for i in range(2)]


def roles(documents, fraction, tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    index = index_documents([str(path)], "text", fraction)
    return index.roles.tolist()


def test_the_held_out_documents_do_not_depend_on_the_order(tmp_path):
    documents = [f"document {i}" for i in range(100)]
    forward, backward = roles(documents, 0.05, tmp_path), roles(documents[::-1], 0.05, tmp_path)
    assert forward.count(VALIDATION) == 5
    assert forward == backward[::-1]
    assert roles(documents[:3], 0.05, tmp_path).count(VALIDATION) == 1


def test_repeated_documents_are_dropped_before_the_split(tmp_path):
    found = roles([" a ", "b", "a", "", "  ", "c"], 0.01, tmp_path)
    assert [role == REPEATED for role in found] == [False, False, True, False]


def test_unigram_entropy_is_that_of_the_counts():
    assert unigram_entropy(np.array([0, 2, 1, 1])) == pytest.approx(-(0.5 * np.log(0.5) + 2 * 0.25 * np.log(0.25)))


def test_prepare_is_cached_and_keyed_by_content(text_folder, tmp_path):
    config = DataConfig(sources=(f"{text_folder}/*.txt",), vocabulary=200, sequence_length=16, validation_fraction=0.2)
    data = prepare(config, QUIET)
    assert data.rows("train").shape == (data.train_rows, 16)
    train = data.rows("train")[np.arange(data.train_rows)]
    assert train.dtype == np.uint16
    assert data.rows("validation").shape == (data.validation_rows, 16)
    assert (train[:, 0] == data.special_ids[2]).all()
    assert 0 < data.unigram_entropy < np.log(200)
    made = sorted(p.name for p in cache_folder().iterdir())
    assert prepare(config, QUIET) == data
    assert sorted(p.name for p in cache_folder().iterdir()) == made
    (tmp_path / "more.txt").write_text(sentences(9, 200))
    more = prepare(DataConfig(**{**vars(config), "sources": (*config.sources, str(tmp_path / "more.txt"))}), QUIET)
    assert more.fingerprint != data.fingerprint


def test_too_little_text_for_one_row_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one two"}\n{"text": "three"}\n')
    with pytest.raises(RecipeError, match="fill no sequence of 32 tokens"):
        prepare(DataConfig(sources=(str(tmp_path / "a.jsonl"),)), QUIET)


def test_a_trained_tokenizer_loads_from_file_and_folder(tmp_path):
    trained = train_wordpiece([sentences(0, 200)], 150)
    assert trained.size <= 150
    path = tmp_path / "tokenizer.json"
    trained.tokenizer.save(str(path))
    from_file = load_tokenizer(str(path))
    assert from_file.fingerprint == trained.fingerprint
    assert from_file.encode(["Trust ratio"]) == trained.encode(["trust RATIO"])
    from transformers import BertTokenizer

    tokens = sorted(trained.tokenizer.get_vocab().items(), key=lambda item: item[1])
    (tmp_path / "vocab.txt").write_text("\n".join(token for token, _ in tokens))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "saved")
    saved = load_tokenizer(str(tmp_path / "saved"))
    assert (saved.cls_id, saved.sep_id, saved.mask_id) == (trained.cls_id, trained.sep_id, trained.mask_id)


def test_a_missing_or_unfit_tokenizer_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RecipeError, match="cannot load tokenizer '/no/such/folder'"):
        load_tokenizer("/no/such/folder")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"a": 0, "[CLS]": 1}, unk_token="a")).save(str(tmp_path / "t.json"))
    with pytest.raises(RecipeError, match="has no sep, mask token"):
        load_tokenizer(str(tmp_path / "t.json"))


def test_a_corpus_smaller_than_one_batch_is_said(text_folder):
    data = prepare(DataConfig(sources=(f"{text_folder}/*.txt",), vocabulary=200, sequence_length=16), QUIET)
    assert len(data.describe(data.train_rows)) == 2
    warning = data.describe(4 * data.train_rows)[-1]
    assert f"{data.train_rows:,} training sequences, fewer than one global batch of {4 * data.train_rows:,}" in warning
    assert "4.0 times" in warning
