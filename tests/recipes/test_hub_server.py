"""`prepare` against a server that answers as the hub does: streamed by HTTP, killed in the middle, continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.recipes.conftest import sentences
from tests.recipes.fake_hub import FakeHub
from trustratio.recipes.data.wordpiece import load_tokenizer, train_wordpiece

SCRIPT = Path(__file__).resolve().parents[2] / "recipes" / "prepare.py"
TEXTS = [f"text {number} {sentences(number, 2)}" for number in range(900)]


@pytest.fixture
def repository(tmp_path):
    folder = tmp_path / "repository" / "data"
    folder.mkdir(parents=True)
    for part in range(6):
        table = pyarrow.table({"url": ["u"] * 150, "text": TEXTS[150 * part : 150 * part + 150]})
        pyarrow.parquet.write_table(table, folder / f"train-{part:05d}-of-00006.parquet")
    return folder.parent


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill"])
def test_a_preparation_that_was_stopped_while_it_streamed_goes_on(tmp_path, repository, stop):
    reached, go_on = threading.Event(), threading.Event()

    def before(name):
        if name.startswith("data/train-00005") and not go_on.is_set():
            reached.set()
            go_on.wait(60)

    train_wordpiece(TEXTS, 300).tokenizer.save(str(tmp_path / "tokenizer.json"))
    server = FakeHub(repository, before)
    environment = {**os.environ, "HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, str(SCRIPT), "--data", "hf:org/set", "--output", str(tmp_path / "tokens")]
    command += ["--tokenizer", str(tmp_path / "tokenizer.json"), "--max_documents", "800"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert reached.wait(120)
    process.send_signal(stop)
    assert process.wait(60) == (130 if stop == signal.SIGINT else -signal.SIGKILL)
    go_on.set()
    server.sent.clear()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if stop == signal.SIGINT:
        assert "going on with org/set behind the 750 documents that are there already" in done.stdout
        # The first file has the columns; `datasets` goes back to the one before that in which it was.
        assert not {f"data/train-0000{part}-of-00006.parquet" for part in (1, 2)} & set(server.sent)
    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_text())
    assert (manifest["documents"], manifest["repeated_documents"]) == (800, 0)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    stream = np.fromfile(tmp_path / "tokens" / "train-00000.bin", np.uint16)
    expected = [i for text in TEXTS[:800] for i in [*tokenizer.encode([text.strip()])[0], tokenizer.sep_id]]
    assert len(stream) + manifest["tokens"]["validation"] == len(expected)
    assert stream[:200].tolist() in (expected[:200], expected[len(expected) - len(stream) :][:200])


@pytest.mark.slow
def test_a_data_set_that_is_not_there_is_one_sentence(tmp_path, repository):
    server = FakeHub(repository)
    environment = {**os.environ, "HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, str(SCRIPT), "--data", "hf:org/other", "--output", str(tmp_path / "tokens")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot load the Hugging Face data set 'org/other': ")
    assert "Traceback" not in done.stderr
