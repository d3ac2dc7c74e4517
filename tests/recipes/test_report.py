"""The report: in a real browser, of long runs, and of runs that broke down."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.common.files import write_json
from trustratio.recipes.configuration.presets import get_preset
from trustratio.recipes.runs import plots, report
from trustratio.recipes.runs.history import bins, load_history, short_name
from trustratio.recipes.runs.metrics import MetricsLog

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    *("--window-size=1200,2600", "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom"),
)
PROBE = Path(__file__).with_name("report_probe.js").read_text()


def write_run(folder, steps, layers, ratios=True, loss=None, last_step=None, **sections):
    """Write a run's folder as the recipe does: smooth curves, ratios that differ by layer and step."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    names = [f"bert.encoder.layer.{i}.output.dense.weight" for i in range(layers)] + ["cls.predictions.bias"]
    spread = np.append(np.exp(random.normal(-2, 0.7, layers)), 1.0)
    log = MetricsLog(folder, active=True)
    for step in range(1, steps + 1):
        values = spread * np.exp(np.append(np.sin(np.arange(layers) + 3 * step / steps), 0))
        record = {
            "kind": "train",
            "step": step,
            "sequences": 16 * step,
            "lr": 0.01 * (1 - step / (steps + 1)),
            "loss": (loss or (lambda s: 5 + 4 * math.exp(-3 * s / steps)))(step),
            "seconds": 0.1,
            "data_wait_seconds": 0.01,
            "sequences_per_second": 160.0,
            "tokens_per_second": 2560.0,
            "model_flops_per_second": 1e12,
            "host_memory_bytes": 10**9,
        }
        if ratios:
            record["trust_ratios"] = dict(zip(names, values.tolist(), strict=True))
            record |= {"trust_ratio_min": values.min(), "trust_ratio_max": values.max(), "trust_ratio_median": 0.1}
        log.write(record)
        if step % max(1, steps // 10) == 0:
            log.write(
                {
                    "kind": "validation",
                    "step": step,
                    "validation_loss": 5.2,
                    "validation_accuracy": 0.2,
                    "unigram_entropy": 6.0,
                }
            )
    log.close()
    config = get_preset("lamb-tiny").to_dict()
    for section, fields in sections.items():
        config[section].update(fields)
    write_json(folder / "config.json", config)
    write_json(folder / "environment.json", {"torch": "2.13.0", "ranks": 2, "last_step": last_step or steps})
    return folder


def page(folder):
    report.make_report(folder)
    return (folder / "report.html").read_text()


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="run-data">(.*?)</script>', text, re.S)[1])


def browse(path, tmp_path):
    """Open the page in Chromium; return what the probe found, the DOM's text and the console's messages."""
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (apt-get install --no-install-recommends chromium)")
    probed = tmp_path / "probed.html"
    probed.write_text(path.read_text().replace("</body>", f"<script>{PROBE}</script></body>"))
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", probed.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    return (json.loads(found[1].replace("&gt;", ">").replace("&lt;", "<")) if found else None), done.stdout, console


def test_a_browser_shows_every_plot_and_the_page_answers(tmp_path):
    folder = write_run(tmp_path / "run", steps=40, layers=7)
    page(folder)
    found, dom, console = browse(folder / "report.html", tmp_path)
    assert console == []
    assert set(found["charts"]) == {
        *("Loss against steps", "Loss against samples", "Learning rate", "Masked accuracy", "Range over the layers"),
        *("Single layers", "Throughput", "Model FLOP/s", "Waiting for data", "Memory"),
    }
    for name, chart in found["charts"].items():
        assert min(chart["points"]) >= 2, name
        assert chart["width"] > 300, name
        assert chart["height"] > 150, name
        assert chart["texts"] > 5, name
    for name in ("Loss against steps", "Loss against samples"):
        assert found["charts"][name]["points"] == [40, 10, 2]  # training, validation, unigram line
    assert len(found["charts"]["Single layers"]["points"]) == 6
    assert found["canvases"]["heat-map"] > 100
    assert found["canvases"]["scale"] > 100
    assert re.search(r"step \d+training: \d", found["chartTip"])
    assert "unigram entropy 6.000: 6" in found["chartTip"]
    assert re.search(r"bert\.encoder\.layer\.2\.output\.dense\.weightstep \d+: 0\.\d+", found["heatTip"])
    assert abs(found["toggled"][1] - found["toggled"][0]) == 1
    assert (found["hidden"], found["shown"]) == (0, 1)
    assert found["legend"] == [3, 2]
    assert not found["overflow"]
    assert "lamb-tiny: run" in dom
    assert "2.13.0" in dom
    assert "optimizer" in dom


def test_the_browser_would_notice_a_broken_page(tmp_path):
    folder = write_run(tmp_path / "run", steps=5, layers=2)
    broken = page(folder).replace("drawAll();", "drawNothing();")
    (folder / "report.html").write_text(broken)
    found, _, console = browse(folder / "report.html", tmp_path)
    assert any("drawNothing is not defined" in line for line in console)
    assert not found["charts"]["Learning rate"]["points"]


def test_a_page_needs_nothing_else(tmp_path):
    text = page(write_run(tmp_path / "run", steps=5, layers=2))
    assert not re.findall(r'(?:src|href)\s*=\s*["\']', text)
    assert not re.findall(r"@import|@font-face|url\(", text)
    assert [link for link in re.findall(r"https?://[^\s\"'<]+", text) if "www.w3.org" not in link] == []
    assert "default-src 'none'" in text


def test_a_run_of_10000_steps_and_200_layers_makes_a_page_of_less_than_2_mb(tmp_path):
    folder = write_run(tmp_path / "long", steps=10_000, layers=200)
    text = page(folder)
    assert len(text) < 2_000_000
    data = data_of(text)
    assert len(data["series"]["loss"]) == 1000
    assert data["series"]["step"][-1] == 10_000
    assert data["series"]["loss_low"][0] <= data["series"]["loss"][0] <= data["series"]["loss_high"][0]
    assert (len(data["ratios"]["layers"]), len(data["ratios"]["steps"])) == (200, 500)
    assert (folder / "metrics.jsonl").stat().st_size < 40_000_000
    found, _, console = browse(folder / "report.html", tmp_path)
    assert console == []
    assert found["canvases"]["heat-map"] > 100


def test_the_heat_map_has_the_ratios_to_a_thousandth(tmp_path):
    import base64

    folder = write_run(tmp_path / "run", steps=30, layers=4)
    data, history = data_of(page(folder))["ratios"], load_history(folder)
    assert data["layers"] == history.layers == [f"bert.encoder.layer.{i}.output.dense.weight" for i in range(4)]
    [measure] = data["measures"]
    levels = np.frombuffer(base64.b64decode(measure["data"]), dtype="<u2").reshape(4, 30)
    shown = measure["low"] * np.exp((levels - 1.0) / 65534 * math.log(measure["high"] / measure["low"]))
    np.testing.assert_allclose(shown, history.ratios.T, rtol=1e-3)
    assert data["names"][0] == short_name(data["layers"][0]) == "layer 0 feed-forward out"


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("ratios", [True, False])
def test_a_report_of_any_run(tmp_path, steps, ratios):
    folder = write_run(tmp_path / "run", steps=steps, layers=3, ratios=ratios)
    assert (data_of(page(folder))["ratios"] is not None) == ratios
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "trust_ratios.png").exists() == ratios


def test_a_run_that_diverged_and_was_killed_is_reported(tmp_path):
    folder = write_run(tmp_path / "run", 9, 3, loss=lambda s: math.nan if s > 6 else 5.0, last_step=100)
    for name in ("config.json", "environment.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text if name == "environment.json" else "{")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 10, "lo')
    data = data_of(page(folder))
    assert data["notices"] == [
        "The loss was not finite at step 7: the run diverged.",
        "The run ended at step 9 of 100.",
    ]
    assert data["series"]["loss"][5:] == [5, None, None, None]
    found, dom, console = browse(folder / "report.html", tmp_path)
    assert console == []
    assert found["charts"]["Loss against steps"]["points"][0] == 6
    assert "the run diverged" in dom


def test_names_and_settings_cannot_break_out_of_the_page(tmp_path):
    evil = "</script><script>console.error('broken out')</script><b>"
    folder = write_run(tmp_path / "run", steps=3, layers=2, data={"sources": [evil]})
    text = page(folder)
    assert text.count("</script>") == 2
    assert evil in json.dumps(data_of(text)["tables"])
    found, _, console = browse(folder / "report.html", tmp_path)
    assert found is not None
    assert console == []


def test_a_resumed_run_is_read_once(tmp_path):
    write_run(tmp_path / "run", steps=6, layers=2)
    history = load_history(write_run(tmp_path / "run", steps=4, layers=2, loss=lambda s: 1.0))
    assert history.train["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert history.train["loss"].tolist()[:4] == [1.0] * 4


def test_the_table_of_stages(tmp_path, capsys):
    folder = write_run(tmp_path / "run", 4, 2)
    assert report.main([str(folder), "--stages"]) == 2
    assert "the run has not come to its end" in capsys.readouterr().err
    stages = {"imports": {"seconds": 5.0, "cpu_seconds": 4.0}, "steps": {"seconds": 120.25, "cpu_seconds": 110.0}}
    write_json(folder / "environment.json", {"ranks": 2, "stages": stages})
    assert report.main([str(folder), "--stages"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| imports | 5.0 | 4.0 |",
        "| steps | 120.2 | 110.0 |",
        "| together | 125.2 | 114.0 |",
    ]


def test_other_folders_are_refused(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "it has no metrics.jsonl" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(RecipeError, match="no logged step"):
        load_history(tmp_path)
    assert report.write_report(tmp_path).startswith("no report: ")


def test_bins_cover_every_step_once():
    for count, most in ((0, 5), (3, 5), (5, 5), (17, 5), (1000, 7)):
        pieces = bins(count, most)
        assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(count))
        assert len(pieces) <= most


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 300])
def test_nothing_is_drawn_across_the_legend_of_the_losses(tmp_path, steps):
    """Also of runs that have hardly begun: all losses are close to the first."""
    figure, axes = plots.plt.subplots(figsize=(6, 4.5), layout="constrained")
    history = load_history(write_run(tmp_path, steps, 2, loss=lambda step: 9.2 - 0.3 * step / steps))
    plots._draw_loss(axes, history.train, history, "step")
    figure.canvas.draw()
    legend = axes.get_legend()
    assert any("last 5.200, accuracy 20.0%" in text.get_text() for text in legend.get_texts())
    assert not axes.texts
    inside = legend.get_window_extent()
    for line in axes.lines[:2]:
        places = axes.transData.transform(line.get_xydata())
        between = np.linspace(places[:-1], places[1:], 50).reshape(-1, 2)
        assert not any(inside.contains(*place) for place in np.concatenate([places, between])), steps
    plots.plt.close(figure)
