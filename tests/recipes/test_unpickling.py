"""A file that would run code when it is unpickled: no reader of the recipes or of the package runs it."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig

from trustratio.integrations.checkpoints import load_optimizer_state
from trustratio.integrations.checkpoints.ranks import OptimizerStateError
from trustratio.optimizers import LAMB
from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.common.reporter import Reporter
from trustratio.recipes.comparison.runs import Run, outcome
from trustratio.recipes.configuration.command_line import parse_command_line
from trustratio.recipes.configuration.config import ModelConfig
from trustratio.recipes.configuration.overrides import load_config
from trustratio.recipes.data.documents import read_source
from trustratio.recipes.data.index import DocumentIndex
from trustratio.recipes.data.prepared import open_prepared
from trustratio.recipes.data.wordpiece import load_tokenizer
from trustratio.recipes.fine_tuning.data import load_data
from trustratio.recipes.fine_tuning.fine_tune import _build, pretrained_folder
from trustratio.recipes.model.masked_language_model import build_model
from trustratio.recipes.runs.history import load_history
from trustratio.recipes.runs.report import main as report
from trustratio.recipes.training.deepspeed_settings import load_file
from trustratio.recipes.training.engines import DataParallelTraining, DeepSpeedTraining
from trustratio.recipes.training.export import trained_weights

MODEL = "mp_rank_00_model_states"


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def exploit(path: Path, trace: Path) -> Path:
    """Write a file that torch.load would unpickle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"module": {}, "model": {}, "optimizer_state_dict": {}, "extra": Malicious(trace)}, path)
    return path


def model_folder(folder: Path, trace: Path) -> Path:
    """A model in transformers' format, whose weights are a pickle."""
    BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, intermediate_size=8).save_pretrained(folder)
    exploit(folder / "pytorch_model.bin", trace)
    return folder


def pickled_index(path: Path, trace: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    arrays = {name: np.zeros(1) for name in ("ends", "digests", "characters", "roles")}
    np.savez(path, sources=np.array([Malicious(trace)], dtype=object), **arrays)
    assert "sources.npy" in zipfile.ZipFile(path).namelist()
    return path


def prepared_folder(folder: Path, trace: Path) -> Path:
    for name in ("manifest.json", "settings.json", "tokenizer.json"):
        exploit(folder / name, trace)
    return folder


class _LikeAnEngine:
    """Loads as DeepSpeed 0.19.8 does: with `weights_only=False`."""

    def load_checkpoint(self, folder: str, tag: str, **options: Any) -> Any:
        return folder, torch.load(Path(folder, tag, "mp_rank_00_model_states.pt"), weights_only=False)


def resumed_by_deepspeed(folder: Path) -> None:
    training = object.__new__(DeepSpeedTraining)
    training.engine = _LikeAnEngine()  # type: ignore[assignment]
    training.load(folder)


READERS: dict[str, Callable[[Path, Path], Any]] = {
    "save_optimizer_state's file": lambda path, trace: load_optimizer_state(
        LAMB([torch.nn.Parameter(torch.ones(2, 2))]), exploit(path / "state", trace)
    ),
    "resume, DeepSpeed": lambda path, trace: resumed_by_deepspeed(exploit(path / "step" / f"{MODEL}.pt", trace).parent),
    "resume, DDP": lambda path, trace: object.__new__(DataParallelTraining).load(
        exploit(path / "step" / "training_state.pt", trace).parent
    ),
    "export, DDP": lambda path, trace: trained_weights(exploit(path / "training_state.pt", trace).parent),
    "export, stage 0": lambda path, trace: trained_weights(exploit(path / f"{MODEL}.pt", trace).parent),
    "export, ZeRO": lambda path, trace: trained_weights(
        min(exploit(path / f"{name}.pt", trace) for name in ("zero_pp_rank_0_mp_rank_00_optim_states", MODEL)).parent
    ),
    "--checkpoint": lambda path, trace: _build(
        __import__("transformers").AutoModelForSequenceClassification,
        pretrained_folder(str(model_folder(path, trace)), path / "out", Reporter(active=False)),
        random_start=False,
    ),
    "model.initial_weights": lambda path, trace: build_model(
        ModelConfig(1, 8, 1, 8, initial_weights=str(model_folder(path, trace))), 64
    ),
    "--resume": lambda path, trace: parse_command_line(
        ["--resume", str(exploit(path / "checkpoints" / "step-00000001" / "checkpoint.json", trace).parent)]
    ),
    "config.json": lambda path, trace: load_config(exploit(path / "config.json", trace)),
    "--deepspeed_config": lambda path, trace: load_file(str(exploit(path / "ds.json", trace))),
    "--tokenizer": lambda path, trace: load_tokenizer(str(exploit(path / "tokenizer.json", trace))),
    "--tokenizer FOLDER": lambda path, trace: load_tokenizer(str(exploit(path / "tokenizer.model", trace).parent)),
    "--data, prepared": lambda path, trace: open_prepared(prepared_folder(path, trace), 16),
    "index.npz": lambda path, trace: DocumentIndex.load(pickled_index(path / "index.npz", trace)),
    "--data, jsonl": lambda path, trace: list(read_source(str(exploit(path / "a.jsonl", trace)), "text")),
    "--data, parquet": lambda path, trace: list(read_source(str(exploit(path / "a.parquet", trace)), "text")),
    "--data, arrow": lambda path, trace: list(read_source(str(exploit(path / "a.arrow", trace)), "text")),
    "--data, csv": lambda path, trace: list(read_source(str(exploit(path / "a.csv", trace)), "text")),
    "--data, hdf5": lambda path, trace: list(read_source(str(exploit(path / "a.hdf5", trace)), "text")),
    "--data, text": lambda path, trace: list(read_source(str(exploit(path / "a.txt", trace)), "text")),
    "--tokenizer vocab.txt": lambda path, trace: load_tokenizer(str(exploit(path / "vocab.txt", trace))),
    "--data_folder": lambda path, trace: load_data("sst2", exploit(path / "train.jsonl", trace).parent),
    "report.py": lambda path, trace: load_history(exploit(path / "metrics.jsonl", trace).parent),
}
"""What reads a file that the user names: given a folder and the trace that a file in it would leave."""


@pytest.mark.parametrize("reader", READERS)
def test_no_reader_runs_what_it_reads(reader: str, tmp_path: Path) -> None:
    trace = tmp_path / "it ran"
    with pytest.raises((RecipeError, OptimizerStateError, ValueError)) as refusal:
        READERS[reader](tmp_path / "given", trace)
    assert str(tmp_path) in str(refusal.value) or refusal.type is ValueError
    assert not trace.exists()


def test_the_files_do_run_where_they_are_unpickled(tmp_path: Path) -> None:
    torch.load(exploit(tmp_path / "a.pt", tmp_path / "one"), weights_only=False)
    np.load(pickled_index(tmp_path / "a.npz", tmp_path / "two"), allow_pickle=True)["sources"].tolist()
    assert (tmp_path / "one").exists()
    assert (tmp_path / "two").exists()


def test_a_comparison_and_a_report_of_such_a_folder_run_nothing(tmp_path: Path) -> None:
    trace = tmp_path / "it ran"
    exploit(tmp_path / "metrics.jsonl", trace)
    assert outcome(tmp_path, Run("lamb", 0.1, 1), 3) is None
    assert report([str(tmp_path)]) == 2
    assert not trace.exists()


def test_a_rank_without_a_gpu_loads_what_its_trainer_wrote(tmp_path: Path) -> None:
    """The Trainer of transformers 5.17 and older asks torch.load for the place "cpu:0"."""
    torch.save({"momentum": torch.arange(3.0)}, tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt", map_location=torch.device("cpu", 0), weights_only=True)
    assert loaded["momentum"].tolist() == [0.0, 1.0, 2.0]
