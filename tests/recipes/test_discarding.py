"""The masked tokens with the smallest losses left out: of the whole global batch, however it is cut."""

from __future__ import annotations

import copy
import dataclasses
import math
import threading

import pytest
import torch
import torch.nn.functional as F

from trustratio.recipes.common.errors import RecipeError
from trustratio.recipes.configuration.command_line import parse_command_line
from trustratio.recipes.configuration.config import ModelConfig
from trustratio.recipes.configuration.phases import phases_of
from trustratio.recipes.configuration.presets import get_preset
from trustratio.recipes.data.rows import MaskedRows
from trustratio.recipes.model.flops import ModelFlops
from trustratio.recipes.model.masked_language_model import build_model
from trustratio.recipes.planning.memory import model_size
from trustratio.recipes.planning.phase_plan import Machine, plan_phase
from trustratio.recipes.planning.plan import main as plan_main
from trustratio.recipes.planning.traffic import traffic
from trustratio.recipes.rules.global_batch import BatchPlan
from trustratio.recipes.rules.large_batch import large_loss_mask, smallest_kept_loss
from trustratio.recipes.runs.history import load_history
from trustratio.recipes.runs.report import page_data
from trustratio.recipes.training.checks import check_run
from trustratio.recipes.training.discarding import without_smallest_losses
from trustratio.recipes.training.loop import accumulate_step, seed_step
from trustratio.recipes.training.step_metrics import StepMetrics

from .recipe_runs import losses, recipe, records, train, trained_tensors
from .test_metrics import one_update
from .test_wrappers import NO_DROPOUT, REFERENCE, WRAPPERS, launch, runs  # noqa: F401 - fixtures

TINY = ModelConfig(layers=2, hidden=16, heads=2, intermediate=32, max_positions=32)
WHOLE = BatchPlan(16, 1, 1)
DISCARDED = "data.discard_smallest=0.3"


class Ranks:
    """Threads that stand for ranks and meet in their sums."""

    def __init__(self, count):
        self.count, self.barrier, self.values = count, threading.Barrier(count, timeout=60), [None] * count

    def sum(self, rank, values):
        self.values[rank] = values
        self.barrier.wait()
        total = sum(self.values[1:], self.values[0].clone())
        self.barrier.wait()
        return total

    def run(self, work):
        """Return what `work(rank)` does on each."""
        answers = [None] * self.count

        def one(rank):
            answers[rank] = work(rank)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers


class Engine:
    """One rank with a model of its own, whose gradient the test adds up."""

    device = torch.device("cpu")

    def __init__(self, model, ranks=None, rank=0):
        self.model, self.ranks, self.rank = copy.deepcopy(model), ranks or Ranks(1), rank

    def begin_micro_batch(self, last):
        pass

    def loss(self, batch):
        return self.model(batch.input_ids, batch.positions, batch.labels)

    def losses(self, batch):
        return self.model(batch.input_ids, batch.positions, batch.labels, reduction="none")[0]

    def backward(self, loss):
        loss.backward()

    def step(self):
        pass

    def sum_over_ranks(self, values):
        return self.ranks.sum(self.rank, values)


@pytest.fixture
def masked(rows, vocabulary):
    return MaskedRows(rows, vocabulary, 0.3, seed=7)


def double_model(**shape):
    torch.manual_seed(0)
    return build_model(dataclasses.replace(TINY, **shape), 104).double()


def reference(model, masked, discard):
    """The gradient of the mean over the kept predictions, in plain float64, and how many are kept."""
    (batch,) = masked.step_batches(0, WHOLE, 0)
    hidden = model.bert(batch.input_ids).last_hidden_state.reshape(-1, TINY.hidden)
    each = F.cross_entropy(model.cls(hidden[batch.positions]), batch.labels, reduction="none")
    kept = each.sort().values[int(discard * len(each)) :]
    names, parameters = zip(*model.named_parameters(), strict=True)
    return kept.mean().item(), dict(zip(names, torch.autograd.grad(kept.mean(), parameters), strict=True)), len(kept)


def trained(model, masked, plan, discard):
    """One update of the recipe's loop: loss, gradient and number of predictions kept, added up over the ranks."""
    ranks = Ranks(plan.ranks)

    def work(rank):
        engine = Engine(model, ranks, rank)
        batches, _ = without_smallest_losses(engine, masked.step_batches(0, plan, rank), discard)
        loss, totals = accumulate_step(engine, batches, False)
        return loss.double(), {name: p.grad for name, p in engine.model.named_parameters()}, totals[0]

    losses, gradients, kept = zip(*ranks.run(work), strict=True)
    assert len(set(map(float, kept))) == 1
    return float(sum(losses)), {name: sum(g[name] for g in gradients) for name in gradients[0]}, int(kept[0])


def distance(gradient, other):
    names = gradient.keys()
    scale = math.sqrt(sum(float(other[name].square().sum()) for name in names))
    return math.sqrt(sum(float((gradient[name] - other[name]).square().sum()) for name in names)) / scale


PLANS = [WHOLE, BatchPlan(4, 4, 1), BatchPlan(4, 2, 2), BatchPlan(4, 1, 4), BatchPlan(1, 2, 8)]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.ranks}x{plan.accumulation}x{plan.micro}")
@pytest.mark.parametrize("discard", [0.1, 0.5])
def test_the_gradient_is_that_of_the_mean_over_the_largest_losses(masked, plan, discard):
    model = double_model()
    loss, expected, count = reference(model, masked, discard)
    found_loss, found, kept = trained(model, masked, plan, discard)
    assert kept == count
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert distance(found, expected) <= 2e-6


def test_thresholds_of_parts_would_be_noticed(masked):
    """A threshold per rank or micro-batch keeps as many predictions in all, but others."""
    model, plan, discard = double_model(), BatchPlan(4, 2, 2), 0.5
    _, expected, _ = reference(model, masked, discard)
    parts = []
    for batch in [batch for rank in range(2) for batch in masked.step_batches(0, plan, rank)]:
        (part,), _ = without_smallest_losses(Engine(model), [batch], discard)
        parts.append(part)
    engine = Engine(model)
    accumulate_step(engine, parts, False)
    assert distance({n: p.grad for n, p in engine.model.named_parameters()}, expected) > 1e-2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_passes_see_the_same_dropout(masked, checkpointing):
    """And the second draws what it draws where nothing is discarded."""
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(TINY, dropout=0.3), 104).train()
    if checkpointing:
        model.checkpoint_activations()
    engine = Engine(model)
    seen = {"first": [], "second": [], "plain": []}
    batches = masked.step_batches(0, BatchPlan(4, 4, 1), 0)

    def watch(kind):
        def losses(batch):
            seen[kind].append(Engine.losses(engine, batch).detach())
            return seen[kind][-1]

        def loss(batch):
            each = Engine.losses(engine, batch)
            seen[kind].append(each.detach())
            return each.sum(), None

        engine.losses, engine.loss = losses, loss

    watch("plain")
    seed_step(1, 5, 0)
    accumulate_step(engine, batches, False)
    watch("first")
    seed_step(1, 5, 0)
    chosen, predicted = without_smallest_losses(engine, batches, 0.2)
    watch("second")
    accumulate_step(engine, chosen, False)
    assert predicted == sum(len(losses) for losses in seen["first"])
    first, second, plain = (torch.cat(seen[kind]) for kind in ("first", "second", "plain"))
    torch.testing.assert_close(first, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(second, first[large_loss_mask(first, 0.2)], rtol=1e-6, atol=0)
    assert (first.sort().values[1:] > first.sort().values[:-1]).all()


def test_it_chooses_what_the_rule_for_gathered_losses_chooses():
    generator = torch.Generator().manual_seed(3)
    for count in (1, 2, 7, 1000):
        shares = torch.randn(count, generator=generator).exp().tensor_split(3)  # of one, or of none
        everyone = torch.cat(shares)
        for discard in (0.0, 0.1, 1 / 3, 0.999):
            ranks = Ranks(3)
            thresholds = ranks.run(
                lambda rank, shares=shares, ranks=ranks, discard=discard, count=count: smallest_kept_loss(
                    shares[rank], discard, count, lambda values: ranks.sum(rank, values)
                )
            )
            assert len(set(map(float, thresholds))) == 1
            for share, threshold in zip(shares, thresholds, strict=True):
                assert torch.equal(~(share < threshold), large_loss_mask(share, discard, among=everyone))


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("values", "discard", "kept"),
    [
        ([0.1, 2.0, 0.5, 1.5], 0.25, [2.0, 0.5, 1.5]),
        ([1.0, 1.0, 1.0, 2.0], 0.5, [1.0, 1.0, 1.0, 2.0]),  # ties are kept
        ([1.0, 0.5, 1.0, 2.0], 0.5, [1.0, 1.0, 2.0]),
        ([0.0, -0.0, 1.0, 2.0], 0.25, [0.0, -0.0, 1.0, 2.0]),  # and these two are one
        ([-3.0, -1.0, 0.0, 2.0], 0.5, [0.0, 2.0]),
        ([INF, 1e-45, 3e38, 1.0], 0.5, [INF, 3e38]),
        ([-NAN, 1.0, NAN, 2.0], 0.25, [NAN, NAN, 2.0]),  # a loss that broke is not hidden
        ([-NAN, 1.0, NAN, 2.0], 0.5, [NAN, 1.0, NAN, 2.0]),
        ([5.0], 0.9, [5.0]),
        ([], 0.5, []),
    ],
)
def test_ties_zeros_and_what_is_no_number(values, discard, kept):
    values = torch.tensor(values)
    for chosen in (values[~(values < smallest_kept_loss(values, discard))], values[large_loss_mask(values, discard)]):
        torch.testing.assert_close(chosen, torch.tensor(kept), rtol=0, atol=0, equal_nan=True)


def test_an_example():
    """Kept are 2, 1.5 and .5, whose mean is 4/3; of all four it is 1.025."""
    each = torch.tensor([0.1, 2.0, 0.5, 1.5], requires_grad=True)
    mean = each[~(each < smallest_kept_loss(each, 0.25))].mean()
    mean.backward()
    assert mean.item() == pytest.approx(4 / 3)
    torch.testing.assert_close(each.grad, torch.tensor([0, 1, 1, 1]) / 3)


@pytest.mark.parametrize("discard", [-0.1, 1.0, NAN])
def test_shares_outside_of_0_to_1_are_refused(discard):
    with pytest.raises(ValueError, match=r"discard must be in \[0, 1\)"):
        smallest_kept_loss(torch.ones(3), discard)
    given = r"data\.discard_smallest(=.* is out of range: allowed is 0 \(none\) to below 1| takes a number)"
    with pytest.raises(RecipeError, match=given):
        check_run(parse_command_line([f"data.discard_smallest={discard}"]))


def test_a_compiled_model_with_dropout_is_refused():
    with pytest.raises(RecipeError, match=r"training\.compile=true cannot go together with model\.dropout=0\.1"):
        check_run(parse_command_line([DISCARDED, "training.compile=true", "model.dropout=0.1"]))
    check_run(parse_command_line([DISCARDED, "training.compile=true"]))


def test_an_update_without_masked_tokens_keeps_none(masked):
    empty = [batch.keep(torch.zeros(len(batch.labels), dtype=torch.bool)) for batch in masked.step_batches(0, WHOLE, 0)]
    engine = Engine(double_model())
    batches, predicted = without_smallest_losses(engine, empty, 0.5)
    loss, _ = accumulate_step(engine, batches, False)
    assert (predicted, float(loss)) == (0, 0.0)


# Whole runs


QUICK = ("accelerate-ddp", "accelerate-zero-3", "trainer-zero-2")


@pytest.mark.parametrize(
    "wrapper",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in WRAPPERS if name != REFERENCE],
)
def test_every_wrapper_leaves_out_the_same(runs, wrapper):  # noqa: F811
    expected = runs(REFERENCE, NO_DROPOUT, DISCARDED)
    found = runs(wrapper, NO_DROPOUT, DISCARDED)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)
    kept = [record["kept_fraction"] for record in records(found)]
    assert kept == [record["kept_fraction"] for record in records(expected)]
    assert all(0.69 < share < 0.75 for share in kept)  # at most one in some twenty is rounded


@pytest.mark.slow
def test_a_compiled_model_leaves_out_the_same(runs):  # noqa: F811
    compiled = runs(REFERENCE, NO_DROPOUT, DISCARDED, "training.compile=true")
    assert losses(compiled) == pytest.approx(losses(runs(REFERENCE, NO_DROPOUT, DISCARDED)), rel=1e-4)


def test_one_rank_leaves_out_the_same(runs, text_folder, pools, tmp_path):  # noqa: F811
    expected = runs(REFERENCE, NO_DROPOUT, DISCARDED)
    line = recipe(text_folder, tmp_path / "run", "--zero_stage", "1", NO_DROPOUT, DISCARDED)
    assert pools.get(1).run(train, str(expected.parent / "cache"), {}, "bert.py", line) == ["finished"]
    assert losses(tmp_path / "run") == pytest.approx(losses(expected), rel=1e-4)
    assert [r["kept_fraction"] for r in records(tmp_path / "run")] == [r["kept_fraction"] for r in records(expected)]


def test_discarding_trains_something_else(runs):  # noqa: F811
    plain, discarding = (losses(runs(REFERENCE, *options)) for options in ((NO_DROPOUT,), (NO_DROPOUT, DISCARDED)))
    assert all(large > small for large, small in zip(discarding, plain, strict=True))
    assert all("kept_fraction" not in record for record in records(runs(REFERENCE, NO_DROPOUT)))
    tiles = {
        tile["label"]: tile["value"]
        for tile in page_data(load_history(runs(REFERENCE, NO_DROPOUT, DISCARDED)))["tiles"]
    }
    assert 0.69 < tiles["kept in the loss"] < 0.75


@pytest.mark.parametrize("wrapper", [REFERENCE, "accelerate-ddp"])
def test_a_resumed_run_is_bit_exact(runs, launch, wrapper):  # noqa: F811
    straight = runs(wrapper, DISCARDED)
    checkpoint = straight / "checkpoints" / "step-00000005"
    resumed, endings = launch(f"{wrapper}-discarding-from-5", wrapper, DISCARDED, "--resume", str(checkpoint))
    assert endings == ["finished"] * 2
    assert losses(resumed) == losses(straight)[5:]
    one, other = (trained_tensors(folder / "checkpoints" / "step-00000010") for folder in (straight, resumed))
    assert len(one) > 20
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    _, endings = launch("discarding-otherwise", wrapper, "data.discard_smallest=0", "--resume", str(checkpoint))
    assert "discard_smallest: checkpoint 0.3, this run None" in endings[0]


# What it costs


def test_the_first_pass_is_measured():
    flops = ModelFlops(2, 16, 40, 104)
    update = dataclasses.replace(one_update(), predicted_tokens=8)
    assert update.record()["kept_fraction"] == update.masked_tokens / 8
    measured, plain = (
        StepMetrics(None, flops)._rates(each, 2.0)["model_flops_per_second"] for each in (update, one_update())
    )
    tokens = update.plan.sequences * 16
    assert plain == flops.update(tokens, update.masked_tokens, 16) / 2
    assert measured - plain == pytest.approx(flops.forward(tokens, 8, 16) / 2)
    assert flops.update(100, 10, 16) == 3 * flops.forward(100, 10, 16)


def test_the_first_pass_counts(capsys):
    config = get_preset("lamb-64k-32k")
    size, (phase, _) = model_size(config), phases_of(config)
    discarding = dataclasses.replace(config, data=dataclasses.replace(config.data, discard_smallest=0.1))
    plain, more = (plan_phase(size, each, phase, 8, Machine()) for each in (config, discarding))
    flops = ModelFlops.of(size.shape, size.vocabulary)
    predicted = 0.15 * 128
    expected = flops.forward(128, predicted, 128) + flops.update(128, 0.9 * predicted, 128)
    assert more.compute / plain.compute == pytest.approx(expected / flops.update(128, predicted, 128))
    assert 1.3 < more.compute / plain.compute < 1.34
    assert traffic(size, discarding, 4, 8).collectives["counts of losses"] == 5
    assert "counts of losses" not in traffic(size, config, 4, 8).collectives
    plan_main(["--preset", "lamb-64k-32k", "--gpus", "8", "data.discard_smallest=0.1"])
    assert "data.discard_smallest=0.1: one more forward pass in every update" in capsys.readouterr().out
