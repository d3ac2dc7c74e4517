"""Published presets against the numbers of their sources, their twins' proportions, and the page that lists them."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.configuration.batch_growth import describe_growth, growths_of, updates_of
from trustratio.recipes.configuration.command_line import parse_command_line
from trustratio.recipes.configuration.config import MODEL_SIZES, ModelConfig
from trustratio.recipes.configuration.phases import describe_plan, learning_rate, phases_of
from trustratio.recipes.configuration.presets import PRESETS, PUBLISHED, get_preset
from trustratio.recipes.configuration.twins import TWIN_SIZES, twin
from trustratio.recipes.model.optimizer import build_optimizer
from trustratio.recipes.training.bert import main
from trustratio.recipes.training.checks import check_run

DOCS = Path(__file__).resolve().parents[2] / "docs"

# preset: (batch, tokens, updates) of its phases, and (update, learning rate) as the source's formula gives them
NUMBERS = {
    "lamb-64k-32k": (
        [(65536, 128, 7038), (32768, 512, 1563)],
        [
            (0, 6e-3 / 2001),
            (2000, 6e-3),
            (2001, 6e-3 * (1 - 2002 / 7038) ** 0.5),  # falls to 0.846 of the peak where the warm-up ends
            (7037, 0.0),
            (7038, 4e-3 / 200),
            (7237, 4e-3),
            (7238, 4e-3 * (1 - 201 / 1563) ** 0.5),
        ],
    ),
    "lamb-64k-32k-deepspeed": (
        [(65536, 128, 6150), (32768, 512, 610)],
        [
            (0, 1e-3),
            (225, 1e-3 + 11e-3 / 4),
            (450, 12e-3),
            (700, 1e-3 + 11e-3 * 0.9),
            (6150, 0.0),
            (6300, 2e-3),
            (6450, 2e-3 * 0.9),
        ],
    ),
    "lamb-32k": ([(32768, 128, 14063), (32768, 512, 1562)], [(3124, 5e-3), (9375, 5e-3 / 2), (15624, 5e-3 / 12500)]),
    "lans-96k-33k": (
        [(98304, 128, 3519), (33792, 512, 782)],
        [(1500, 6.75e-3), (2400, 6.75e-3), (3519 - 528, 6.75e-3 / 2), (3519 + 149, 5e-3), (3519 + 233, 5e-3)],
    ),
    "vr-lamb-64k-32k": ([(65536, 128, 7037), (32768, 512, 1562)], [(2000, 6e-3), (7037 + 199, 4e-3)]),
    "vr-lamb-96k": ([(98304, 128, 4693), (98304, 512, 521)], [(1333, 6e-3 * 1.5**0.5), (4693 + 66, 4e-3 * 3**0.5)]),
    "vr-lamb-128k-64k": ([(131072, 128, 3519), (65536, 512, 782)], [(999, 6e-3 * 2**0.5), (3618, 4e-3 * 2**0.5)]),
    "adamw-64k": ([(65536, 128, 7037), (32768, 512, 1562)], [(2000, 1e-3), (7037 + 199, 5e-4)]),
    "lans-96k-gluonnlp": (
        [(98304, 128, 3870)],
        [(0, 5e-3 / 194), (193, 5e-3), (194 + 967, 5e-3), (3870 - 1354, 5e-3 / 2), (3869, 5e-3 / 2708)],
    ),
    "mlperf-8192": (
        [(8192, 512, 600)],
        [(0, 2.88293e-3 * 77 / 287), (210, 2.88293e-3), (211, 2.88293e-3 * (1 - 212 / 600)), (599, 0.0)],
    ),
    "mlperf-16384": ([(16384, 512, 600)], [(0, 3.3e-3 * 101 / 290), (189, 3.3e-3), (190, 3.3e-3 * (1 - 191 / 600))]),
}
# Composer's schedules count what was trained on before the update, in tokens or samples; the warm-up here is one ahead.
NUMBERS |= {
    "mosaicbert-base": (
        [(4096, 128, 70000)],
        [(4199, 5e-4), (4200 + 32900, 5e-4 * 0.51), (69999, 5e-4 * (0.02 + 0.98 / 65800))],
    ),
    "lamb-mosaicbert-64k": ([(65536, 128, 4375)], [(874, 6e-3), (875 + 1750, 6e-3 * 0.51)]),
    "modernbert-base": (
        [(4608, 1024, round(1.719e12 / 1024 / 4608)), (576, 8192, round(300e9 / 8192 / 576))],
        [
            (317, 8e-4 * 318 / (3e9 / 1024 / 4608)),
            (round(3e9 / 1024 / 4608) - 1, 8e-4),
            (364303, 8e-4),
            (364304, 3e-4),
            (364304 + round(250e9 / 8192 / 576) - 1, 3e-4),
            (364304 + round(275e9 / 8192 / 576), 3e-4 * (0.001 + 0.999 * (1 - 0.5**0.5))),
        ],
    ),
    "modernbert-large": (
        [(4928, 1024, 340648), (616, 8192, 59450)],
        [(395, 5e-4 * 396 / (2e9 / 1024 / 4928)), (340647, 5e-4), (340648, 5e-5), (340648 + 49540, 5e-5)],
    ),
    "lamb-modernbert-32k": ([(32768, 1024, 51230), (4096, 8192, 8941)], [(1489, 6e-3 / 2**0.5), (51230, 1.591e-3)]),
    "lamb-modernbert-64k": ([(65536, 1024, 25615), (8192, 8192, 4470)], [(1489, 6e-3), (25615, 2.25e-3)]),
    "lans-modernbert-64k": ([(65536, 1024, 25615), (8192, 8192, 4470)], [(1489, 5e-3), (25615, 1.875e-3)]),
}
# MLPerf's other reference points: batch, rate, betas, decay, updates, warm-up and its start, as the file has them
REFERENCE_POINTS = [
    (256, 3.5e-4, 0.9, 0.999, 0.01, 13700, 0, 0),
    (448, 4.25e-4, 0.9, 0.999, 0.01, 6700, 0, 0),
    (1536, 2e-3, 0.66, 0.996, 0.01, 2254, 0, 0),
    (3072, 2e-3, 0.66, 0.998, 0.01, 1141, 100, 0),
    (4096, 2.4e-3, 0.66, 0.998, 0.01, 855, 0, 0),
    (4608, 3.5e-3, 0.62, 0.9, 0.01, 700, 0, 0),
    (6144, 2.9293e-3, 0.7206, 0.78921, 0.001, 700, 0, -700),
    (6912, 2.9293e-3, 0.7206, 0.78921, 0.001, 700, 0, -700),
    (8192, 2.88293e-3, 0.88, 0.88, 0.0166629, 600, 287, -76),
    (8704, 2.971656225e-3, 0.88, 0.88, 0.0166629, 600, 287, -76),
    (12288, 3.1e-3, 0.8, 0.925, 0.0166629, 500, 300, -100),
    (13056, 3.19540686e-3, 0.8, 0.925, 0.0166629, 500, 300, -100),
    (16384, 3.3e-3, 0.75, 0.9, 0.0166629, 600, 290, -100),
]
for batch, rate, _, _, _, steps, warmup, start in REFERENCE_POINTS:
    expected = [
        (step, rate * (step + 1 - start) / warmup if step + 1 - start <= warmup else rate * (1 - (step + 1) / steps))
        for step in (0, 50, steps // 2, steps - 1)
    ]
    NUMBERS.setdefault(f"mlperf-{batch}", ([(batch, 512, steps)], expected))
OTHER_MODELS = {
    "lans-96k-gluonnlp": ("base", 28996),
    **dict.fromkeys(("mosaicbert-base", "lamb-mosaicbert-64k"), ("base", 30522)),
    "modernbert-large": ("modernbert-large", 50368),
    **dict.fromkeys(
        ("modernbert-base", "lamb-modernbert-32k", "lamb-modernbert-64k", "lans-modernbert-64k"),
        ("modernbert-base", 50368),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_presets_have_their_sources_numbers(name):
    config = get_preset(name)
    batches, rates = NUMBERS[name]
    assert [(p.global_batch, p.sequence_length, p.steps) for p in phases_of(config)] == batches
    for step, rate in rates:
        assert learning_rate(config, step) == pytest.approx(rate, rel=2e-4, abs=1e-12), step
    size, vocabulary = OTHER_MODELS.get(name, ("large", 30522))
    assert (config.model.layers, config.model.hidden) == (MODEL_SIZES[size].layers, MODEL_SIZES[size].hidden)
    assert (config.model.max_positions, config.data.vocabulary) == (8192 if "modern" in size else 512, vocabulary)


@pytest.mark.parametrize("point", REFERENCE_POINTS, ids=lambda point: str(point[0]))
def test_mlperfs_reference_points_have_the_files_optimizer(point):
    batch, rate, beta1, beta2, decay, *_ = point
    preset = PUBLISHED[f"mlperf-{batch}"]
    optimizer = preset.config.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay) == ("lamb", rate, decay)
    assert optimizer.options == {"betas": [beta1, beta2], "eps": 1e-6}
    assert preset.config.training.gradient_clipping == 1.0
    assert not preset.unverified


def test_lamb_of_nvidia_and_deepspeed_differ_as_documented():
    assert get_preset("lamb-64k-32k").optimizer.options == {}
    deepspeed = get_preset("lamb-64k-32k-deepspeed").optimizer.options
    assert deepspeed == {"bias_correction": False, "trust_bounds": [0.01, 0.3], "eps": 1e-8}


@pytest.mark.parametrize("name", PRESETS)
def test_published_presets_run_as_they_are_on_1_to_64_ranks_and_others_on_1_to_4(name):
    config = get_preset(name)
    for ranks in (1, 2, 4, 8, 16, 32, 64) if name in PUBLISHED else (1, 2, 4):
        if name == "modernbert-large" and ranks > 8:  # its second phase's 616 = 8 x 7 x 11
            with pytest.raises(RecipeError, match="global batch 616 is not divisible"):
                list(describe_growth(config, ranks))
            continue
        if growths_of(config):
            printed = "\n".join(describe_growth(config, ranks))
            assert f" to {config.training.global_batch:,} sequences = {config.training.micro_batch} x " in printed
        else:
            printed = "\n".join(describe_plan(config, ranks))
            assert f" x {ranks} = {config.training.global_batch:,} sequences" in printed


@pytest.mark.parametrize("name", PRESETS)
def test_unverified_values_exist(name):
    preset = PRESETS[name]
    for key, why in preset.unverified.items():
        section, field = key.split(".")
        part = getattr(preset.config, section)
        assert why
        assert hasattr(part, field) or field in ("eps", "betas"), key


def test_modernberts_stages_are_its_authors():
    for name, smallest, billions, second in (("base", 768, 50, 3e-4), ("large", 448, 10, 5e-5)):
        config = get_preset(f"modernbert-{name}")
        assert dataclasses.replace(config.model, global_rope_theta=1.6e5) == ModelConfig().of_size(f"modernbert-{name}")
        assert (config.model.global_rope_theta, config.phase_two.global_rope_theta) == (1e4, 1.6e5)
        assert (config.data.mask_probability, config.training.gradient_clipping) == (0.3, 0.0)
        warmup = growths_of(config)[0]
        assert (warmup.smallest, warmup.largest) == (smallest, config.training.global_batch)
        assert warmup.warmup == pytest.approx(billions * 1e9 / 1024, rel=1e-5)
        assert config.phase_two.lr == second
        assert config.optimizer.name == "stableadamw"
        assert config.optimizer.options == {"betas": [0.9, 0.98], "eps": 1e-6}


@pytest.mark.parametrize(
    ("name", "peak"), [("mosaicbert-base", 5e-4), ("modernbert-base", 8e-4), ("modernbert-large", 5e-4)]
)
def test_a_decay_beside_the_rate_is_the_same_at_the_peak(name, peak):
    """Composer multiplies a weight by 1 - 1e-5 x rate / peak: what AdamW does with 1e-5 / peak."""
    optimizer = get_preset(name).optimizer
    assert optimizer.lr == peak
    assert optimizer.lr * optimizer.weight_decay == pytest.approx(1e-5, rel=1e-12)


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.config.run.batch_warmup])
def test_a_warmed_up_batch_begins_small_in_twins_too(name):
    config = get_preset(name)
    growth = growths_of(config)[0]
    assert growth.smallest % 4 == growth.largest % growth.smallest == 0
    assert growth.warmup == pytest.approx(config.run.batch_warmup * growth.phase.sequences, abs=1)
    updates = updates_of(config)[0][0]
    assert growth.phase.steps < updates < 1.1 * growth.phase.steps


def test_every_optimizer_of_a_preset_takes_its_options():
    import torch

    for preset in PUBLISHED.values():
        build_optimizer(preset.config.optimizer, torch.nn.Linear(2, 2))


@pytest.mark.parametrize("size", TWIN_SIZES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_twins_keep_the_proportions(name, size):
    full, small = get_preset(name), twin(PUBLISHED[name], size).config
    assert PRESETS[f"{name}-{size}"].config == small
    scale = TWIN_SIZES[size]
    for one, other in zip(phases_of(full), phases_of(small), strict=True):
        assert one.sequence_length == other.sequence_length * scale.sequence_divisor
        # A batch's share of the corpus: the corpus shrinks by 683 in tokens, so batches do by that over the divisor.
        share = one.global_batch * scale.sequence_divisor * 3 / 2048
        assert abs(other.global_batch - share) <= 6 or other.global_batch == 12  # the nearest multiple of 12
        assert one.steps / other.steps == pytest.approx(scale.step_divisor, rel=0.02)
        # The learning rate follows the same curve.
        for part in (0.5, 0.9):
            expected = learning_rate(full, one.first + int(part * one.steps))
            found = learning_rate(small, other.first + int(part * other.steps))
            assert found == pytest.approx(expected, abs=0.1 * full.optimizer.lr)
    assert small.optimizer == full.optimizer
    family = "" if full.model.architecture == "bert" else "modernbert-"
    assert small.model == full.model.of_size(f"{family}{size}")


def test_the_page_lists_the_presets_as_they_are():
    spec = importlib.util.spec_from_file_location("preset_table", DOCS / "preset_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (DOCS / "presets.md").read_text(encoding="utf-8")
    assert module.written(page) == page, "run: python docs/preset_table.py"


def test_list_presets_prints_sources_and_what_is_unverified(capsys):
    assert main(["--list_presets"]) == 0
    printed = capsys.readouterr().out
    for name in PRESETS:
        assert re.search(rf"^{name}: ", printed, re.MULTILINE)
    assert "    source: NVIDIA DeepLearningExamples" in printed
    assert "    unverified: optimizer.lr (quoted from memory, not read in the source)" in printed


def test_the_plan_of_both_phases_is_printed(capsys):
    assert main(["--preset", "lamb-64k-32k", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "phase 1: global = micro x accum x ranks = 256 x 256 x 1 = 65,536 sequences (8,388,608 tokens)" in printed
    assert "phase 2: global = micro x accum x ranks = 32 x 1024 x 1 = 32,768 sequences (16,777,216 tokens)" in printed
    assert "updates 7,039 to 8,601; learning rate 2e-05, highest 0.004 at update 7,238, 0 at the end" in printed
    assert "weights kept; moments kept; optimizer's step count begins anew; learning rate begins anew" in printed


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_model_sizes_by_name(size):
    model = check_run(parse_command_line(["--model", size, "model.dropout=0.1"])).config.model
    shape = MODEL_SIZES[size]
    assert (model.architecture, model.layers, model.hidden, model.heads, model.intermediate) == shape[:5]
    assert model.heads * 64 == model.hidden
    assert model.dropout == 0.1
    if size.startswith("modernbert"):
        assert (model.max_positions, model.local_attention) == (8192, shape.local_attention)
        assert (model.global_attention_every, model.global_rope_theta, model.local_rope_theta) == (3, 160e3, 10e3)
    else:
        assert (model.max_positions, model.intermediate) == (512, 4 * model.hidden)
