"""The notebook runs from its first to its last cell, and its stored outputs are those of such a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="the extra [docs] is not installed")

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "notebooks" / "trust_ratios.ipynb"


def printed(notebook: Any) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text", "") for output in outputs)


def check_what_it_shows(notebook: Any) -> None:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    errors = re.findall(r"^(textbook|trustratio) +(ZeRO-1|FSDP2) +worst layer: (\S+)$", printed(notebook), re.MULTILINE)
    assert len(errors) == 4
    for optimizer, sharding, error in errors:
        assert float(error) > 0.1 if optimizer == "textbook" else float(error) < 2e-6, (optimizer, sharding)
    ratios = re.findall(r"^(.*?, (?:textbook|trustratio).*?) {2,}([\d. na]+)$", printed(notebook), re.MULTILINE)
    right = {numbers for title, numbers in ratios if "trustratio" in title}
    assert len(ratios) == 10
    assert len(right) == 1
    assert len({numbers for title, numbers in ratios if "textbook" in title} - right) == 4
    assert "step 40/40" in printed(notebook)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3


def test_the_stored_outputs_are_those_of_a_run_and_small() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    check_what_it_shows(notebook)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert NOTEBOOK.stat().st_size < 400_000
    assert not re.search(r"/(?:tmp|home|root|usr|work)\b", printed(notebook))


def test_other_outputs_are_seen() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "trustratio FSDP2" in output.get("text", ""):
                output.text = re.sub(r"(trustratio FSDP2 .*: ).*", r"\g<1>1.0e-05", output.text)
    with pytest.raises(AssertionError):
        check_what_it_shows(notebook)


@pytest.mark.slow
def test_it_runs_from_beginning_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("TRUSTRATIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    check_what_it_shows(notebook)
