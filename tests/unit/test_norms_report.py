"""The report of layer norms: what it says of any file, and what a real browser shows of it."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trustratio.integrations.norms.command import main
from trustratio.integrations.norms.file import NormsFile
from trustratio.integrations.norms.history import MOST_STEPS, load_history
from trustratio.integrations.norms.records import LayerNorm, MeasuredNorms
from trustratio.integrations.norms.report import write_report
from trustratio.integrations.norms.scalars import NUMBERS

from ..fuzzing import examples

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    *("--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"),
)
PROBE = Path(__file__).with_name("norms_report_probe.js").read_text()
DAMAGE = st.binary(max_size=2) | st.sampled_from(
    (b"null", b"{}", b"[]", b'"x"', b"-1", b"1e999", b'"NaN"', b"\n", b"9" * 400, b'"\\ud800"')
)
EVIL = "</script><script>console.error('broken out')</script><b>"


def numbers(update: float = 0.01, gradient: float = 0.5, weight: float = 2.0) -> LayerNorm:
    return LayerNorm(weight, gradient, update, update / weight, 0.1, 0.1, 0.1, 0.3, 0.3, 0.3, 0.0, 0.25, 0.5)


def write(path: Path, steps: int = 12, layers: int = 4, **more: list[LayerNorm]) -> Path:
    """A file with layers whose ratios differ, and `more` layers whose numbers are given for each step."""
    file = NormsFile(path)
    for step in range(1, steps + 1):
        found = {f"layer.{i}.weight": numbers(0.01 * (1 + i) * math.exp(step / steps)) for i in range(layers)}
        found |= {name.replace("_", "."): of_steps[step - 1] for name, of_steps in more.items()}
        file.write(MeasuredNorms(found, step=step, model=numbers(0.03 / step), clipped=step % 4 == 0), step)
    return path


def data_of(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', page.read_text(), re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def values_of(measure: dict[str, Any], columns: int) -> list[list[float]]:
    raw = base64.b64decode(measure["data"])
    levels = struct.unpack(f"<{len(raw) // 2}H", raw)
    low, high = measure["low"], measure["high"]

    def value(level: int) -> float:
        share = (level - 1) / 65534
        return (
            math.nan if not level else low + share * (high - low) if measure["linear"] else low * (high / low) ** share
        )

    return [[value(level) for level in levels[i : i + columns]] for i in range(0, len(levels), columns)]


def browse(page: Path, folder: Path, width: int = 1200) -> tuple[dict[str, Any], list[str]]:
    """Open the page in Chromium; return what the probe found, and the console's messages."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install --no-install-recommends chromium)")
    probed = folder / "probed.html"
    probed.write_text(page.read_text().replace("</body>", f"<script>{PROBE}</script></body>"))
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, *FLAGS, f"--window-size={width},2600", profile, probed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    assert found is not None, done.stderr
    return json.loads(found[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&")), console


def test_a_browser_shows_it_and_the_page_answers(tmp_path: Path) -> None:
    broken = [numbers(math.nan if step == 11 else 0.01) for step in range(12)]
    page = write_report(write(tmp_path / "norms.jsonl", head_bias=broken))
    found, console = browse(page, tmp_path)
    assert console == []
    assert set(found["charts"]) == {
        *("Relative update", "Gradient norm", "Weight norm", "Update norm", "Largest elements"),
        *("Elements that are zero", "Single layers"),
    }
    assert found["charts"]["Gradient norm"] == {"curves": [12], "dots": 3}  # of which it was clipped
    assert len(found["charts"]["Single layers"]["curves"]) == 5
    assert found["colours"] > 20
    assert re.search(r"layer\.1\.weightstep \d+: 0\.0\d+", found["tip"])
    assert found["toggled"] == 4
    assert found["measures"] == 10
    assert found["switched"] != found["before"]  # another number has another scale
    assert "‖g‖" in found["switched"]
    assert found["notices"][0] == "Not finite from step 12 on: head.bias (step 12)."
    assert found["unsorted"] == ["layer.0.weight", "head.bias"]
    assert found["ascending"][0] == "head.bias"  # by name
    assert found["largest"] == ["head.bias", "layer.3.weight"]  # what is not finite comes first
    assert found["smallest"] == ["head.bias", "layer.0.weight"]
    assert not found["overflow"]


@pytest.mark.slow
def test_a_narrow_window_and_many_layers(tmp_path: Path) -> None:
    page = write_report(write(tmp_path / "norms.jsonl", steps=30, layers=300))
    found, console = browse(page, tmp_path, width=500)
    assert (console, found["overflow"]) == ([], False)


def test_a_page_needs_nothing_else_and_no_name_breaks_out_of_it(tmp_path: Path) -> None:
    page = write_report(write(tmp_path / "norms.jsonl", **{EVIL: [numbers()] * 12}))
    text = page.read_text()
    assert text.count("</script>") == 2
    assert EVIL in data_of(page)["map"]["layers"]
    assert not re.findall(r'(?:src|href)\s*=\s*["\']|@import|@font-face|url\(', text)
    assert [link for link in re.findall(r"https?://[^\s\"'<]+", text) if "www.w3.org" not in link] == []
    assert "default-src 'none'" in text


def test_the_map_has_the_numbers_to_a_thousandth(tmp_path: Path) -> None:
    path = write(tmp_path / "norms.jsonl")
    shown = data_of(write_report(path))["map"]
    assert shown["layers"] == [f"layer.{i}.weight" for i in range(4)]
    assert shown["steps"] == list(range(1, 13))
    by_title = {measure["title"]: values_of(measure, 12) for measure in shown["measures"]}
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for title, number in (("‖Δw‖ / ‖w‖", "ratio"), ("‖Δw‖", "update"), ("share of g that is zero", "zero_gradients")):
        for row, layer in zip(by_title[title], shown["layers"], strict=True):
            assert row == pytest.approx([record["layers"][layer][number] for record in records], rel=1e-3)


def test_what_a_reader_must_know_first(tmp_path: Path) -> None:
    frozen = LayerNorm(1.0, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0, 1.0, 1.0)
    infinite = [numbers(gradient=math.inf if step > 6 else 1.0) for step in range(12)]
    path = write(tmp_path / "norms.jsonl", frozen=[frozen] * 12, still=[numbers(0.0)] * 12, bad=infinite)
    with path.open("a") as file:
        file.write('{"step": 13, "lay')
    assert data_of(write_report(path))["notices"] == [
        "Not finite from step 8 on: bad (step 8).",
        "Not moved in any measured step, though there was a gradient: still.",
        "Without a gradient in any measured step: frozen.",
        "The gradient was clipped in 3 of 12 measured steps.",
        "1 line of the file could not be read and is left out: line 13.",
    ]


def test_of_many_layers_some_are_named(tmp_path: Path) -> None:
    still = {f"still_{i}": [numbers(0.0)] for i in range(30)}
    notice = data_of(write_report(write(tmp_path / "norms.jsonl", steps=1, **still)))["notices"][0]
    assert notice.endswith("still.10, still.11 and 18 more.")


def test_steps_that_come_again_replace_what_came_after_them(tmp_path: Path) -> None:
    path = write(tmp_path / "norms.jsonl", steps=8)
    again = [line for line in path.read_text().splitlines() if json.loads(line)["step"] in (4, 5)]
    path.write_text(path.read_text() + "\n".join(again) + "\n")
    history = load_history(path)
    assert (history.steps, history.measured, history.clipped) == ([1, 2, 3, 4, 5], 5, 1)


def test_a_long_file_makes_a_page_of_less_than_4_mb(tmp_path: Path) -> None:
    path = tmp_path / "norms.jsonl"
    record = {"step": 0, "clipped": False, "model": dict.fromkeys(NUMBERS, 1.0), "layers": {}}
    record["layers"] = {f"model.layers.{i}.weight": {"update": 1e-3, "gradient": 0.1} for i in range(5)}
    line = json.dumps(record)
    steps = 2 * MOST_STEPS + 100
    path.write_text("".join(line.replace('"step": 0', f'"step": {step}') + "\n" for step in range(1, steps + 1)))
    history = load_history(path)
    assert history.measured == steps
    assert history.steps == list(range(1, steps + 1, 4))
    assert history.table("update").shape == (5, len(history.steps))
    page = write_report(path)
    assert page.stat().st_size < 4_000_000
    data = data_of(page)
    assert len(data["model"]["step"]) == 1000
    assert len(data["map"]["steps"]) == 500
    assert f"{steps:,} measured steps" in data["subtitle"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"\n\n", "it is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "no line of it is a measured step"),
        (b'{"step": 1, "lay', "no line of it is a measured step"),
        (b"[" * 100_000, "no line of it is a measured step"),
        (b'{"step": 1}\n["layers"]\n{"step": true, "layers": {}}\n', "no line of it is a measured step"),
        (b'{"step": 1, "layers": {"a": 3}}', "no line of it is a measured step"),
        (b'{"step": 1, "layers": [], "model": 3}', "no line of it is a measured step"),
    ],
)
def test_files_that_are_none(content: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "norms.jsonl"
    path.write_bytes(content)
    assert main(["report", str(path)]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"layer_norms: {str(path)!r} is no file of layer norms: {said}. LayerNorms.write_to(file=...) writes one\n"
    )
    assert not path.with_suffix(".html").exists()


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1, "layers": {}}',
        '{"step": 1, "layers": {"a": {}}, "model": null, "clipped": "yes"}',
        '{"step": 1, "layers": {"a": {"update": "NaN", "gradient": "Infinity", "weight": "?", "ratio": [1]}}}',
        '{"step": 1, "layers": {"\\ud800": {"update": 1e999, "gradient": -1, "weight": 1' + "0" * 400 + "}}}",
        '{"step": 0, "layers": {"a": {"update": 1, "gradient": 1, "ratio": 1}}, "model": {"ratio": 1}}',
    ],
)
def test_records_that_lack_something_are_reported(line: str, tmp_path: Path) -> None:
    path = tmp_path / "norms.jsonl"
    path.write_text(f"{line}\n")
    assert data_of(write_report(path))["subtitle"].startswith("1 measured step up to step ")


@examples(60)
@given(st.data())
def test_damaged_files_end_in_a_page_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = write(tmp_path_factory.mktemp("damaged") / "norms.jsonl", steps=3, layers=1)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        content[start : start + data.draw(st.sampled_from((0, 1, 5, 60)))] = data.draw(DAMAGE)
    path.write_bytes(content)
    said = []
    for use in (lambda: write_report(path), lambda: NormsFile(path, steps_done=2)):
        try:
            use()
        except ValueError as error:
            said.append(str(error))
    assert all(re.search("is no file of layer norms|cannot be continued", sentence) for sentence in said)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "norms.jsonl")
    assert main(["report", str(path)]) == 0
    assert main(["report", str(path), "--output", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "norms.html"), str(tmp_path / "page.html")]
    refused = {
        (str(tmp_path / "none.jsonl"),): "No such file or directory",
        (str(tmp_path),): "Is a directory",
        (str(path), "--output", str(path)): "the page would be written over",
        (str(path), "--output", str(tmp_path / "none" / "page.html")): "page.html': No such file or directory",
        (str(path), "--output", "."): "'.': it is a folder: give the name of a file",
    }
    for arguments, said in refused.items():
        assert main(["report", *arguments]) == 2
        assert said in capsys.readouterr().err
    for arguments in (["report", "--help"], ["--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
        assert "report" in capsys.readouterr().out
    for wrong in ([], ["report"], ["reports", "x"], ["report", str(path), "--out", "x"]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
