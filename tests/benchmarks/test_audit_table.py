"""The table of audits: its cells, its picture, and that the page has the numbers that are stored."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import audit_table
from benchmarks.audit_table import (
    BEGIN,
    COMPARED,
    END,
    OUTPUT,
    PAGE,
    ROWS,
    SHARDINGS,
    Row,
    audit_cell,
    cell_text,
    draw,
    main,
    rows_to_measure,
    table,
)
from trustratio.integrations.audits.ranks import Ranks
from trustratio.integrations.audits.reading import configuration_of


def wrong(factor: Any, error: Any, wrong_layers: int = 1, kind: str = "padding read") -> dict[str, Any]:
    findings = [{"kind": "idle", "is_wrong": False}, {"kind": kind, "is_wrong": True}]
    return {
        "verdict": "wrong",
        "factor": factor,
        "error": error,
        "wrong_layers": wrong_layers,
        "findings": findings,
        "sentence": "",
    }


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ({"verdict": "exact", "sentence": ""}, "exact"),
        ({"verdict": "refused", "sentence": "RuntimeError: no"}, "refuses"),
        ({"verdict": "refused", "sentence": "rank 1 died (exit status -11)"}, "crashes"),
        ({"verdict": "refused", "sentence": "X could not be made: no GPU"}, "not here"),
        ({"verdict": "refused", "sentence": "the optimizer a.B cannot be imported: no a"}, "not here"),
        (wrong(19.55, 13.0), "19.6×"),
        (wrong(1985.2, 13.0), "1,985×"),
        (wrong(1.0007, 0.0123), "1.2 %"),
        (wrong(1.0, 7e-6), "7e-06"),
        (wrong("NaN", "NaN"), "NaN"),
        (wrong(None, 0.0, 0), "padding read"),
    ],
)
def test_cells(cell: dict[str, Any], text: str) -> None:
    assert cell_text(cell) == text


def test_a_missing_package_is_said_and_its_cells_stay(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    names = [row.name for row in rows_to_measure(None)]
    assert "torch AdamW" in names
    assert not any(name.startswith("bitsandbytes") for name in names)
    said = capsys.readouterr().out
    assert "bitsandbytes is not installed, so its rows keep the cells" in said
    assert f"bitsandbytes=={COMPARED['bitsandbytes']}" in said
    with pytest.raises(SystemExit, match="no row has 'nothing' in its name"):
        rows_to_measure("nothing")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(SystemExit):
        main(["--page"])
    assert "this needs matplotlib: pip install" in capsys.readouterr().err


def test_the_versions_are_those_of_the_table() -> None:
    stored = json.loads((OUTPUT / "audit.json").read_text())["versions"]
    assert {package: stored[package] for package in COMPARED} == COMPARED
    install = " ".join(f"{package}=={version}" for package, version in COMPARED.items())
    assert f"pip install --no-deps {install}" in PAGE.read_text()
    assert f"pip install --no-deps {install}" in str(audit_table.__doc__)


def test_the_page_has_the_stored_numbers(tmp_path: Path) -> None:
    result = json.loads((OUTPUT / "audit.json").read_text())
    assert list(result["rows"]) == [row.name for row in ROWS]
    assert all(list(row["cells"]) == list(SHARDINGS) for row in result["rows"].values())
    assert PAGE.read_text().split(BEGIN)[1].split(END)[0].strip() == table(result)
    draw(result, tmp_path / "audit.png")
    assert (tmp_path / "audit.png").stat().st_size > 10_000


def test_ours_are_exact() -> None:
    rows = json.loads((OUTPUT / "audit.json").read_text())["rows"]
    ours = [row for name, row in rows.items() if name.startswith("trustratio ")]
    assert len(ours) >= 14
    assert {cell_text(cell) for row in ours for cell in row["cells"].values()} == {"exact"}


def test_a_cell_is_audited() -> None:
    ranks = Ranks(1, timeout=60.0)
    try:
        cell = audit_cell(Row("AdamW", "torch.optim.AdamW", {"lr": 0.01}), configuration_of("ddp"), ranks)
        nowhere = audit_cell(Row("none", "nowhere.Optimizer"), configuration_of("ddp"), ranks)
    finally:
        ranks.close()
    assert cell_text(cell) == "exact"
    assert json.loads(json.dumps(cell, allow_nan=False)) == cell
    assert nowhere["verdict"] == "refused"
