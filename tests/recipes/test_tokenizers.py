"""Tokenizers that a run can be given: a vocab.txt, a tokenizer.json, a folder, a name in the local cache of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer, Tokenizer, normalizers
from transformers import AutoTokenizer, BertConfig, BertTokenizer, BertTokenizerFast, PreTrainedTokenizerFast

from tests.recipes.conftest import sentences
from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.configuration.config import DataConfig
from trustratio.recipes.data import prepare as command
from trustratio.recipes.data.choices import check_data
from trustratio.recipes.data.encoding import tokenizes_words_alone
from trustratio.recipes.data.preparation import prepare
from trustratio.recipes.data.wordpiece import load_tokenizer
from trustratio.recipes.training.export import save_tokenizer

QUIET = Reporter(active=False)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["the", "Trust", "trust", "ratio", "##s", "cafe", "café", "a", "##b", ".", ",", "漢", "字", "n", "##o", "o"]
TEXTS = [
    "The trust ratios, a café.",
    "Trust RATIO 漢字 cafe\u0301 ab\tnoo",
    "unknown [MASK] ab [SEP] \u00a0 the\u200bratio",
    "",
]


def vocabulary(folder: Path, words: list[str], settings: dict | None = None, name: str = "vocab.txt") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join([*SPECIAL, *words]) + "\n", encoding="utf-8")
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder / name


UNCASED = [word for word in WORDS if word != "Trust"]


@pytest.mark.parametrize(
    ("words", "settings", "lowercase", "expected"),
    [
        (UNCASED, None, None, True),
        (WORDS, None, None, False),  # a capital letter: no tokenizer that lower-cases would have it
        (WORDS, {"do_lower_case": True}, None, True),
        (UNCASED, {"do_lower_case": False, "tokenizer_class": "BertTokenizer"}, None, False),
        (UNCASED, {"do_lower_case": False}, True, True),
        (UNCASED, None, False, False),
    ],
)
def test_a_vocabulary_file_gives_the_ids_of_transformers(tmp_path, words, settings, lowercase, expected):
    path = vocabulary(tmp_path / "of a model", words, settings)
    theirs = BertTokenizerFast(str(path), do_lower_case=expected)
    for name in (str(path), str(path.parent)):
        ours = load_tokenizer(name, lowercase)
        assert ours.size == len(words) + 5
        assert (ours.cls_id, ours.sep_id, ours.mask_id, ours.special_ids) == (2, 3, 4, (0, 1, 2, 3, 4))
        assert ours.encode(TEXTS) == theirs(TEXTS, add_special_tokens=False)["input_ids"]
        assert tokenizes_words_alone(ours)
    assert ("trust" in ours.tokenizer.encode("TRUST").tokens) == expected


@pytest.mark.parametrize("name", ["strip_accents", "tokenize_chinese_chars"])
def test_what_a_configuration_says_besides_is_heeded(tmp_path, name):
    path = vocabulary(tmp_path / "model", UNCASED, {name: False, "do_lower_case": True})
    theirs = BertTokenizerFast(str(path), do_lower_case=True, **{name: False})
    assert load_tokenizer(str(path)).encode(TEXTS) == theirs(TEXTS, add_special_tokens=False)["input_ids"]
    plain = vocabulary(tmp_path / "plain", UNCASED)
    assert load_tokenizer(str(plain)).encode(TEXTS) != load_tokenizer(str(path)).encode(TEXTS)


def test_windows_lines_and_a_byte_order_mark_change_nothing(tmp_path):
    path = vocabulary(tmp_path / "plain", UNCASED)
    other = vocabulary(tmp_path / "windows", UNCASED)
    other.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    unfinished = vocabulary(tmp_path / "unfinished", UNCASED)
    unfinished.write_bytes(path.read_bytes()[:-1])
    assert len({load_tokenizer(str(file)).fingerprint for file in (path, other, unfinished)}) == 1


def test_a_vocabulary_may_hold_line_separators_of_unicode(tmp_path):
    path = vocabulary(tmp_path / "model", [*UNCASED, "\u2028", "\x85", "last"])
    assert load_tokenizer(str(path)).tokenizer.token_to_id("last") == 5 + len(UNCASED) + 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "\n".join([*SPECIAL, "a", "b", "a"]),
            r"holds the token 'a' twice, in lines 6 and 8: ids are the numbers",
        ),
        ("\n".join([*SPECIAL, "", "a", "", "b"]), r"holds the token '' twice, in lines 6 and 8"),
        ("some text\nand more", r"is no vocabulary of BERT's: it has no line \[UNK\]"),
        ("", r"is no vocabulary of BERT's"),
        ("\n".join(SPECIAL[:-1]), r"has no mask token; masked language modelling needs"),
        (b"\xff\xfe\0", r"cannot read the vocabulary .*vocab.txt"),
    ],
)
def test_what_is_no_vocabulary_is_named(tmp_path, content, message):
    path = tmp_path / "vocab.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecipeError, match=message) as no:
        load_tokenizer(str(path))
    assert str(path) in str(no.value)


def test_a_damaged_configuration_beside_it_is_named(tmp_path):
    path = vocabulary(tmp_path / "model", UNCASED)
    (tmp_path / "model" / "tokenizer_config.json").write_text("{")
    with pytest.raises(RecipeError, match=r"cannot read .*tokenizer_config.json"):
        load_tokenizer(str(path))


def test_lower_casing_is_asked_of_a_vocabulary_file_alone(tmp_path):
    path = vocabulary(tmp_path / "model", UNCASED)
    load_tokenizer(str(path)).tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(RecipeError, match=r"data.lowercase=false is for a vocab.txt, and the tokenizer .* says itself"):
        load_tokenizer(str(tmp_path / "tokenizer.json"), lowercase=False)
    with pytest.raises(RecipeError, match=r"data.lowercase=true is for a vocab.txt that --tokenizer names"):
        check_data(DataConfig(lowercase=True))


def test_a_folder_with_its_own_tokenizer_is_left_to_it(tmp_path):
    BertTokenizer(str(vocabulary(tmp_path / "model", UNCASED))).save_pretrained(tmp_path / "saved")
    vocabulary(tmp_path / "saved", ["other"])
    assert load_tokenizer(str(tmp_path / "saved")).size == 5 + len(UNCASED)


def test_a_name_is_found_in_the_local_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "hub" / "models--org--model"
    (model / "snapshots").mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    saved = BertTokenizer(str(vocabulary(tmp_path / "model", UNCASED)))
    saved.save_pretrained(model / "snapshots" / commit)
    BertConfig().save_pretrained(model / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    loaded = load_tokenizer("org/model")
    assert loaded.encode(TEXTS) == saved(TEXTS, add_special_tokens=False)["input_ids"]
    with pytest.raises(RecipeError, match=r"cannot load tokenizer 'org/other'.*give a vocab.txt, a tokenizer.json"):
        load_tokenizer("org/other")


def text_file(folder: Path) -> str:
    (folder / "a.txt").write_text(sentences(0, 400))
    return str(folder / "a.txt")


def byte_level(folder: Path) -> str:
    """A tokenizer like RoBERTa's: other special tokens, words that keep their spaces."""
    bpe = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe.train_from_iterator([sentences(0, 400)], vocab_size=400, special_tokens=special)
    names = {"cls": "<s>", "bos": "<s>", "sep": "</s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, **{f"{name}_token": token for name, token in names.items()}
    )
    fast.save_pretrained(folder / "bpe")
    return str(folder / "bpe")


@pytest.mark.parametrize("kind", ["vocab.txt", "tokenizer.json", "byte level"])
def test_what_was_trained_with_a_tokenizer_is_saved_with_it(tmp_path, kind):
    from transformers import BertConfig

    words = sorted({word.lower() for word in sentences(0, 400).replace(".", "").split()} | {"."})
    name = str(vocabulary(tmp_path / "model", words))
    if kind == "tokenizer.json":
        load_tokenizer(name).tokenizer.save(str(tmp_path / "tokenizer.json"))
        name = str(tmp_path / "tokenizer.json")
    elif kind == "byte level":
        name = byte_level(tmp_path)
    config = DataConfig(sources=(text_file(tmp_path),), tokenizer=name, sequence_length=16, validation_fraction=0.3)
    data = prepare(config, QUIET)
    save_tokenizer(data, 64, tmp_path / "export")
    BertConfig().save_pretrained(tmp_path / "export")
    exported, given = AutoTokenizer.from_pretrained(tmp_path / "export"), load_tokenizer(name)
    text = "layer wise trust ratio."
    ids = given.encode([text])[0]
    found = exported([text, text + " step"], padding=True)
    assert found["input_ids"][0][: len(ids) + 2] == [given.cls_id, *ids, given.sep_id]
    assert found["input_ids"][0][-1] == exported.pad_token_id
    assert found["attention_mask"][0][-1] == 0
    assert exported(text, text)["input_ids"] == [given.cls_id, *ids, given.sep_id, *ids, given.sep_id]
    assert exported.mask_token_id == given.mask_id
    rows = data.rows("train")[np.arange(data.train_rows)]
    assert (rows[:, 0] == given.cls_id).all()
    assert len(exported) == data.vocabulary_size


def test_a_tokenizer_whose_ids_have_gaps_is_named(tmp_path):
    words = {**{token: number for number, token in enumerate(SPECIAL)}, "a": 5, "b": 9}
    tokenizer = json.loads(load_tokenizer(str(vocabulary(tmp_path / "model", UNCASED))).tokenizer.to_str())
    tokenizer["model"]["vocab"] = words
    Tokenizer.from_str(json.dumps(tokenizer)).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(RecipeError, match=r"numbers its 7 tokens up to 9: ids with gaps are not supported"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_the_command_takes_a_vocabulary_and_its_case(tmp_path, capsys):
    path = vocabulary(tmp_path / "model", UNCASED)
    arguments = ["--data", text_file(tmp_path), "--tokenizer", str(path), "--output", str(tmp_path / "out")]
    assert command.main([*arguments, "--lowercase", "false"]) == 0
    assert command.main(arguments) == 2
    assert "other settings (tokenizer differ)" in capsys.readouterr().err
    assert command.main([*arguments[:-1], str(tmp_path / "other"), "--lowercase", "maybe"]) == 2
    assert "invalid choice: 'maybe'" in capsys.readouterr().err


LONG = " ".join(["trust ratio"] * 50)


def with_lengths(folder: Path) -> Tokenizer:
    """A tokenizer.json as sentence-transformers writes it: cut to a length, and filled up to it."""
    tokenizer = load_tokenizer(str(vocabulary(folder / "words", UNCASED))).tokenizer
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    (folder / "model").mkdir()
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    return tokenizer


@pytest.mark.parametrize("config", [None, {"tokenizer_class": "BertTokenizer", "do_lower_case": True}, {}])
def test_no_document_is_cut_or_filled_up(tmp_path, config):
    plain = load_tokenizer(str(vocabulary(tmp_path / "plain", UNCASED)))
    with_lengths(tmp_path)
    name = tmp_path / "model" / "tokenizer.json"
    if config is not None:
        tokens = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("pad", "unk", "cls", "sep", "mask")}
        (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({**config, **tokens}))
        name = tmp_path / "model"
    loaded = load_tokenizer(str(name))
    assert loaded.encode([LONG, "trust"]) == plain.encode([LONG, "trust"])
    assert (loaded.tokenizer.truncation, loaded.tokenizer.padding) == (None, None)
    assert tokenizes_words_alone(loaded)


def exported_tokenizer(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {kind: tokenizer.token_to_id(f"[{kind.upper()}]") for kind in ("cls", "sep", "mask", "pad", "unk")}
    save_tokenizer(SimpleNamespace(folder=str(folder), special_tokens=lambda: ids), 512, folder / "export")
    return folder / "export"


def test_a_folder_of_before_is_exported_without_lengths(tmp_path):
    exported = AutoTokenizer.from_pretrained(exported_tokenizer(with_lengths(tmp_path), tmp_path / "prepared"))
    assert [len(exported(text)["input_ids"]) for text in (LONG, "trust")] == [102, 3]


CASES = {"cased": {"lowercase": False}, "uncased": {"lowercase": True}}
CASES["accents"] = {"lowercase": True, "strip_accents": False}
CASES["characters"] = {"lowercase": False, "handle_chinese_chars": False}


@pytest.fixture(params=sorted(CASES))
def of_a_case(request, tmp_path):
    tokenizer = load_tokenizer(str(vocabulary(tmp_path / "words", [*WORDS, "漢字"]))).tokenizer
    tokenizer.normalizer = normalizers.BertNormalizer(**CASES[request.param])
    return tokenizer


def ids_of(tokenizer: Tokenizer) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(TEXTS, add_special_tokens=False)]


@pytest.mark.parametrize("config", [None, {}, {"tokenizer_class": "BertTokenizer"}, {"strip_accents": None}], ids=str)
def test_a_folder_is_read_as_its_tokenizer_says(of_a_case, tmp_path, config):
    """BertTokenizer makes the normalizer anew, and lower-cases where nothing says that it should not."""
    BertConfig().save_pretrained(tmp_path / "model")
    of_a_case.save(str(tmp_path / "model" / "tokenizer.json"))
    if config is not None:
        (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(str(tmp_path / "model"))
    assert loaded.encode(TEXTS) == ids_of(of_a_case)
    assert tokenizes_words_alone(loaded)


def test_what_a_folder_says_besides_its_tokenizer_is_heeded(tmp_path):
    cased = load_tokenizer(str(vocabulary(tmp_path / "words", WORDS))).tokenizer
    BertConfig().save_pretrained(tmp_path / "model")
    cased.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")(TEXTS, add_special_tokens=False)["input_ids"]
    assert load_tokenizer(str(tmp_path / "model")).encode(TEXTS) == theirs != ids_of(cased)


def test_the_usual_folder_is_left_as_transformers_reads_it(tmp_path):
    saved = BertTokenizer(str(vocabulary(tmp_path / "words", UNCASED)))
    saved.save_pretrained(tmp_path / "model")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model").backend_tokenizer
    assert load_tokenizer(str(tmp_path / "model")).tokenizer.to_str() == theirs.to_str()


@pytest.mark.parametrize("reader", [AutoTokenizer, BertTokenizer])
def test_an_exported_tokenizer_keeps_its_case_whatever_reads_it(of_a_case, tmp_path, reader):
    exported = reader.from_pretrained(exported_tokenizer(of_a_case, tmp_path / "prepared"))
    assert exported(TEXTS, add_special_tokens=False)["input_ids"] == ids_of(of_a_case)
