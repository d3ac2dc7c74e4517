"""A batch that warms up: sizes and updates, the job on two ranks and its resume, what is refused and planned."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from trustratio.recipes.common.errors import NothingToDo, RecipeError
from trustratio.recipes.comparison.compare import main as compare
from trustratio.recipes.configuration.batch_growth import describe_growth, growths_of, most_updates
from trustratio.recipes.configuration.command_line import parse_command_line
from trustratio.recipes.configuration.overrides import apply_overrides
from trustratio.recipes.configuration.phases import learning_rate, phases_of
from trustratio.recipes.configuration.presets import get_preset
from trustratio.recipes.planning.plan import main as plan
from trustratio.recipes.rules.batch_warmup import BatchWarmup
from trustratio.recipes.runs.history import load_history
from trustratio.recipes.runs.report import notices, page_data, title
from trustratio.recipes.training.batches import WarmedUpBatches
from trustratio.recipes.training.checks import check_run
from trustratio.recipes.training.other_ranks import shared_anew

from .recipe_runs import WARMED_UP, losses, recipe, records, train, trained_tensors
from .test_wrappers import WRAPPERS

SIZES = [4, 4, 8, 8, 12, 12, 16, 16, 16, 8, 8, 8, 8]
"""Of the updates of `WARMED_UP`."""

# The rule -------------------------------------------------------------------------------------------------------------


def sizes_of(warmup: BatchWarmup, sequences: int) -> list[int]:
    """Walk through a run, update by update."""
    sizes, read = [], 0
    while read < sequences:
        sizes.append(min(warmup.batch_at(read), sequences - read))
        read += sizes[-1]
    return sizes


def test_every_size_has_as_many_updates():
    assert sizes_of(BatchWarmup(4, 16, 48), 96) == SIZES[:9]
    sizes = sizes_of(BatchWarmup(768, 4608, 48_828_125), 48_828_125)
    counts = [sizes.count(768 * k) for k in range(1, 6)]
    assert max(counts) - min(counts) <= 1
    assert sum(sizes[: sum(counts)]) == pytest.approx(48_828_125, rel=1e-3)


def test_the_last_step_up_may_be_smaller():
    assert sizes_of(BatchWarmup(6, 16, 36), 60) == [6, 6, 12, 12, 16, 8]


@pytest.mark.parametrize("case", [(768, 4608, 48_828_125), (448, 4928, 9_765_625), (3, 16, 5), (1, 2, 1), (5, 5, 1)])
def test_thresholds_are_those_of_the_authors_rule(case):
    """Warner et al.: in steps of one size, a batch of `size` ends after its share of the sum of all smaller ones."""
    smallest, largest, sequences = case
    below = range(smallest, largest, smallest)
    for read in {0, 1, *(sequences * part // 97 + shift for part in range(98) for shift in (-1, 0, 1))}:
        ends = [math.ceil(sequences * sum(below[: k + 1]) / sum(below) - 1e-9) for k in range(len(below))]
        expected = next((size for size, end in zip(below, ends, strict=True) if read < end), largest)
        assert BatchWarmup(*case).batch_at(max(read, 0)) == (expected if read >= 0 else smallest)


@pytest.mark.parametrize("smallest", [1, 3, 7])
@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("sequences", [1, 10, 97, 300])
def test_updates_are_counted_without_walking(smallest, steps, sequences):
    warmup = BatchWarmup(smallest, smallest * (steps + 1), sequences)
    for length in (1, 50, 96, 97, 500):
        assert warmup.updates(length) == len(sizes_of(warmup, length))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 4, 4), "smallest must be"), ((4, 2, 4), "at most largest, got 4 and 2"), ((1, 4, 2.5), "sequences must be")],
)
def test_a_rule_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchWarmup(*arguments)


# The job --------------------------------------------------------------------------------------------------------------

REFERENCE = "deepspeed-zero-1"
SLOW = ("accelerate-zero-1", "accelerate-zero-2", "trainer-zero-2", "trainer-zero-3")
OVERRIDES = (
    *("training.global_batch=16", "training.steps=6", "optimizer.lr=0.002", "data.sequence_length=16"),
    *("phase_two.steps=4", "phase_two.global_batch=8", "model.max_positions=32", "schedule.shape=wsd"),
)
"""The schedule of these runs, spelt out."""


@pytest.fixture(scope="module")
def launch(text_folder, pools, tmp_path_factory):
    """Run the recipe on so many ranks; return its folder and how it ended on each."""
    root = tmp_path_factory.mktemp("warmup")

    def start(name: str, wrapper: str, *arguments: str, ranks: int = 2, report: bool = False):
        environment, script, own = WRAPPERS[wrapper]
        line = recipe(text_folder, root / name, *own, *arguments, settings=WARMED_UP)
        endings = pools.get(ranks).run(train, str(root / "cache"), environment, script, line, "", report)
        assert endings == ["finished"] * ranks
        return root / name

    return start


@pytest.fixture(scope="module")
def runs(launch):
    """The folder of a finished run per wrapper, made when first asked for."""
    made: dict[str, Path] = {}

    def run(wrapper: str) -> Path:
        if wrapper not in made:
            made[wrapper] = launch(wrapper, wrapper, report=wrapper == REFERENCE)
        return made[wrapper]

    return run


def batches(folder: Path) -> list[int]:
    return [record["batch"] for record in records(folder)]


def checkpoint_of(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def test_sizes_and_rates_follow_the_sequences(runs):
    config = apply_overrides(get_preset("lamb-tiny"), list(OVERRIDES))
    steps = records(runs(REFERENCE))
    assert [r["batch"] for r in steps] == SIZES
    for record in steps:
        before = record["sequences"] - record["batch"]
        step = before / 16 if before < 96 else 6 + (before - 96) / 8
        assert record["lr"] == pytest.approx(learning_rate(config, step), rel=1e-12)


def test_the_rows_are_those_of_a_run_whose_batch_stays(runs, launch):
    plain = launch("plain", REFERENCE, "run.batch_warmup=0", "run.smallest_batch=null")
    assert batches(plain) == [16] * 6 + [8] * 4
    masked = [
        [sum(r["masked_tokens"] for r in part) for part in (steps[:-4], steps[-4:])]
        for steps in (records(runs(REFERENCE)), records(plain))
    ]
    assert masked[0] == masked[1]


@pytest.mark.parametrize(
    "wrapper",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in WRAPPERS if name != REFERENCE],
)
def test_every_wrapper_warms_up_alike(runs, wrapper):
    expected, folder = runs(REFERENCE), runs(wrapper)
    assert batches(folder) == SIZES
    assert losses(folder) == pytest.approx(losses(expected), rel=1e-4)
    assert [r["lr"] for r in records(folder)] == [r["lr"] for r in records(expected)]


@pytest.mark.parametrize("step", [3, 9])
@pytest.mark.parametrize("wrapper", [REFERENCE, "accelerate-ddp", "trainer-zero-1"])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(runs, launch, wrapper, step):
    """In the middle of a size, and at the border of the phases."""
    straight = runs(wrapper)
    resumed = launch(f"{wrapper}-{step}", wrapper, "--resume", str(checkpoint_of(straight, step)))
    same = ("loss", "batch", "sequences", "lr", "masked_tokens")
    assert [[r[key] for key in same] for r in records(resumed)] == [
        [r[key] for key in same] for r in records(straight)[step:]
    ]
    one, other = (trained_tensors(checkpoint_of(folder, len(SIZES))) for folder in (straight, resumed))
    assert len(one) > 20
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("wrapper", [REFERENCE, "accelerate-ddp"])
def test_another_number_of_ranks_goes_on_with_the_same_batches(runs, launch, wrapper):
    straight = runs(wrapper)
    resumed = launch(f"{wrapper}-one", wrapper, "--resume", str(checkpoint_of(straight, 3)), ranks=1)
    assert batches(resumed) == SIZES[3:]
    assert losses(resumed) == pytest.approx(losses(straight)[3:], rel=1e-4)
    assert [r["masked_tokens"] for r in records(resumed)] == [r["masked_tokens"] for r in records(straight)][3:]
    back = launch(f"{wrapper}-back", wrapper, "--resume", str(checkpoint_of(resumed, 5)))
    assert batches(back) == SIZES[5:]
    assert losses(back) == pytest.approx(losses(straight)[5:], rel=1e-4)


def test_a_finished_run_has_nothing_left_to_do(runs):
    line = recipe("nowhere", runs(REFERENCE), "--resume", str(runs(REFERENCE)), settings=WARMED_UP)
    with pytest.raises(NothingToDo, match="is at step 13 and the run ends at step 13"):
        check_run(parse_command_line(line))


def test_a_checkpoint_of_another_warmup_is_refused(runs, tmp_path):
    checkpoint = checkpoint_of(runs(REFERENCE), 3)
    for changed in ("run.batch_warmup=0.25", "run.smallest_batch=8", "run.batch_warmup=0 run.smallest_batch=null"):
        line = recipe("nowhere", tmp_path / "run", "--resume", str(checkpoint), *changed.split(), settings=WARMED_UP)
        with pytest.raises(
            RecipeError, match=r"batch_warmup: checkpoint \{'smallest': 4, 'largest': 16, 'sequences': 48"
        ):
            check_run(parse_command_line(line))


def test_the_report_shows_the_batch(runs):
    history = load_history(runs(REFERENCE))
    assert page_data(history)["series"]["batch"] == SIZES
    assert "4 to 16 sequences per step" in title(history)
    assert not list(notices(history))
    assert (runs(REFERENCE) / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("options", [("--zero_stage", "2", "--precision", "bf16"), ("optimizer.name=vrlamb",)])
def test_other_stages_precisions_and_optimizers_warm_up_too(launch, options):
    folder = launch("-".join(options), REFERENCE, *options)
    assert batches(folder) == SIZES
    assert all(math.isfinite(loss) for loss in losses(folder))


def test_an_update_that_is_skipped_counts_its_sequences(launch):
    """fp16 begins at a loss scale that overflows."""
    folder = launch("fp16", REFERENCE, "--precision", "fp16")
    assert batches(folder) == SIZES


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        ("modernbert-base-tiny", [4, 8, 12, 16, 20, 12, 12, 12, 12]),
        pytest.param("lans-modernbert-64k-tiny", [24, 72, 120, 192, 240, 312, 192], marks=pytest.mark.slow),
        pytest.param("mosaicbert-base-tiny", [24] * 3, marks=pytest.mark.slow),
        pytest.param("lamb-mosaicbert-64k-tiny", [384] * 3, marks=pytest.mark.slow),
    ],
)
def test_twins_of_berts_successors_train(pools, text_folder, tmp_path, preset, sizes):
    """Their model, optimizer, schedule, batches and second phase, on short sequences and few of them."""
    short = ("--sequence_length", "16", "--steps", "3", "data.vocabulary=200", "data.validation_sequences=8")
    second = ("phase_two.steps=3", "phase_two.sequence_length=32", "phase_two.cooldown=2") if "modern" in preset else ()
    warmed = ("run.batch_warmup=0.8", "phase_two.global_batch=12", "phase_two.micro_batch=3") if second else ()
    line = recipe(text_folder, tmp_path / "run", *short, *second, *warmed, settings=("--preset", preset))
    assert pools.get(2).run(train, str(tmp_path / "cache"), {}, "bert.py", line) == ["finished"] * 2
    assert batches(tmp_path / "run")[: len(sizes)] == sizes
    config = get_preset(preset)
    seen = [record["lr"] for record in records(tmp_path / "run")]
    assert max(seen) == pytest.approx(config.optimizer.lr, rel=1e-3)
    assert seen[-1] < max(seen[-3:])
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run"))


# Without training -----------------------------------------------------------------------------------------------------


def positions(first: int = 0) -> WarmedUpBatches:
    config = parse_command_line(recipe("nowhere", Path("run"), settings=WARMED_UP)).config
    plans = [growth.plan(2) for growth in growths_of(config)]
    return WarmedUpBatches(config, phases_of(config), plans, first, most_updates(config))


class First:
    rank = 0


def test_positions_and_what_is_read_ahead():
    batches, sizes = positions(), []
    while not batches.is_over:
        batches.enter_phase()
        sizes.append((batches.plan.sequences, batches.most_next, batches.position))
        batches.advance()
    assert [size for size, _, _ in sizes] == SIZES
    assert [ahead for _, ahead, _ in sizes[:8]] == SIZES[1:9]
    assert [position for *_, position in sizes] == [n / 16 for n in (0, 4, 8, 16, 24, 36, 48, 64, 80)] + [6, 7, 8, 9]
    assert batches.step == batches.expected_last == 13


def test_a_position_goes_on_from_its_file(tmp_path):
    batches = positions()
    for _ in range(3):
        batches.advance()
    batches.save(tmp_path, First())
    assert json.loads((tmp_path / "batch_growth.json").read_text()) == {"phase": 1, "read": 16}
    resumed = positions(3)
    resumed.load(tmp_path)
    assert (resumed.plan.sequences, resumed.position, resumed.sequences) == (8, 1.0, 16)
    (tmp_path / "batch_growth.json").unlink()
    with pytest.raises(RecipeError, match=r"cannot go on with the batch of .*batch_growth\.json: "):
        resumed.load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run.smallest_batch=null",), r"run.batch_warmup=0.5 grows from run.smallest_batch, which is not given"),
        (("run.smallest_batch=16",), r"which is 16, to the global batch: give one below 16"),
        (("run.largest_batch=32",), r"grows to the global batch of 16: leave run.largest_batch=32 out"),
        (("run.batch_from_noise=true",), r"run.batch_warmup=0.5 and run.batch_from_noise=true both say how"),
        (("run.batch_warmup=7",), r"run.batch_warmup=7 in updates is 112 sequences, and the first phase has 96"),
        (("run.batch_warmup=1e-9",), r"run.batch_warmup=1e-09 in updates is 0 sequences"),
        (("run.batch_warmup=-1",), r"run.batch_warmup=-1.0 is out of range: allowed is finite, 0 \(none\) or more"),
        (
            ("run.batch_warmup=0",),
            r"run.smallest_batch=4 has no effect without run.batch_from_noise=true or run.batch_w",
        ),
        (
            ("run.smallest_batch=5",),
            r"run.smallest_batch makes 5 sequences in phase 1, not .*; --micro_batch 1 divides",
        ),
        (("--global_batch", "17"), r"global batch 17 is not divisible by micro-batch x ranks = 2 x 1 = 2"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(arguments, message, text_folder, tmp_path):
    with pytest.raises(RecipeError, match=message):
        check_run(parse_command_line(recipe(text_folder, tmp_path / "run", *arguments, settings=WARMED_UP)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["vrsgd", "vrlamb", "vrlars", "vradam", "clars"])
def test_what_compares_micro_batches_has_two_from_the_first_update_on(name, text_folder, tmp_path, capsys):
    """With one, they are their base optimizers until the batch has grown."""
    one = ("--optimizer", name, "--micro_batch", "4")
    with pytest.raises(
        RecipeError, match=rf"{name} compares the gradients .* first updates of run.batch_warmup=0.5 have 1"
    ):
        check_run(parse_command_line(recipe(text_folder, tmp_path / "run", *one, settings=WARMED_UP)))
    check_run(parse_command_line(recipe(text_folder, tmp_path / "run", *one[:2], settings=WARMED_UP)))
    options = ["--optimizer", name, "--gpus", "1", "--most_gpus", "1", "--global_batch", "64", "run.batch_warmup=0.5"]
    assert plan([*options, "run.smallest_batch=16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["phases"][0]["micro"] == 8
    assert plan([*options, "run.smallest_batch=16", "--micro_batch", "16"]) == 1
    assert f"{name} compares the gradients of an update's micro-batches" in capsys.readouterr().out


@pytest.mark.parametrize(("unit", "duration"), [("updates", 3), ("sequences", 48), ("tokens", 48 * 16)])
def test_the_warmup_is_counted_in_the_schedules_unit(unit, duration):
    line = recipe("nowhere", Path("run"), f"schedule.unit={unit}", f"run.batch_warmup={duration}", settings=WARMED_UP)
    assert growths_of(parse_command_line(line).config)[0].warmup == 48


@pytest.mark.parametrize(("ranks", "micro"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_other_ranks_share_out_the_smallest_batch_too(ranks, micro):
    """A micro-batch by which they could share out the global one alone would end the run at its first update."""
    options = ("training.global_batch=64", "training.micro_batch=16", "run.smallest_batch=8", "run.batch_warmup=0.5")
    config = apply_overrides(get_preset("lamb-tiny"), options)
    shared = shared_anew(config, (), Path("checkpoint"), 16, ranks)
    assert shared.training.micro_batch == micro
    assert growths_of(shared)[0].plan(ranks).sequences == 8
    with pytest.raises(RecipeError, match=r"16 cannot share out its global batch of 64 .*that can: 1, 2, 4, 8"):
        shared_anew(config, (), Path("checkpoint"), 4, 16)


def test_the_plan_before_a_run_says_batches_and_updates():
    config = parse_command_line(recipe("nowhere", Path("run"), settings=WARMED_UP)).config
    lines = list(describe_growth(config, 2))
    assert lines[:3] == [
        "phase 1: batch warm-up: 4 to 16 sequences = 2 x 1 to 4 x 2",
        "  in steps of 4 over the first 48 of 96 sequences",
        "  9 updates (6 of 16, by which the learning rate is scheduled)",
    ]
    assert lines[3] == "phase 2: global = micro x accum x ranks = 1 x 4 x 2 = 8 sequences (256 tokens)"
    assert lines[4].startswith("  from phase 1 to 2: weights kept")


def test_the_planner_says_batches_updates_and_time(capsys):
    options = ["--preset", "lamb-64k-32k", "--gpus", "8", "run.batch_warmup=0.5", "run.smallest_batch=8192"]
    assert plan([*options, "--json", "--most_gpus", "8"]) == 0
    values = json.loads(capsys.readouterr().out)
    first, second = values["batch_warmup"]
    assert first["warmup"] == 7038 * 65536 // 2
    assert first["fewest_updates"] == first["most_updates"] == pytest.approx(3519 * 2 + 3519, rel=1e-2)
    assert (second["warmup"], second["most_updates"]) == (0, 1563)
    # As many sequences, and a little more for the updates that there are more of.
    phases = values["phases"]
    assert phases[0]["hours"] < first["most_hours"] < 1.01 * phases[0]["hours"]
    assert second["most_hours"] == pytest.approx(phases[1]["hours"])
    assert phases[0]["micro"] * 8 <= 8192
    assert plan([*options, "--most_gpus", "8"]) == 0
    printed = capsys.readouterr().out
    assert "  batch warm-up: 8,192 to 65,536 sequences\n    over the first 230,621,184 sequences; " in printed
    assert plan([*options, "--micro_batch", "2048", "--most_gpus", "1"]) == 1
    assert "run.smallest_batch makes 8192 sequences in phase 1, not divisible by" in capsys.readouterr().out


def test_a_comparison_knows_how_many_updates_there_are(tmp_path, monkeypatch):
    """All its runs have the same batches."""
    asked = []

    def stop(run, folder, line, last_step):
        asked.append(last_step)
        raise RecipeError("enough")

    monkeypatch.setattr("trustratio.recipes.comparison.compare.carry_out", stop)
    options = ["--optimizers", "lamb", "--lrs", "3", "--output", str(tmp_path / "comparison"), "--preset", "lamb-tiny"]
    assert compare([*options, "run.batch_warmup=0.5", "run.smallest_batch=64"]) == 2
    assert asked == [560 + 280]
