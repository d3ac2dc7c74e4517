"""The sampler of anomalous samples: what is in a sample, when it is made, and going on in the middle."""

import os
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from trustratio.recipes.rules.anomalies import anomaly_scores
from trustratio.recipes.rules.anomaly_sampler import LadSampler

from ..references.anomalies import made_up

X, LABELS = made_up(samples=200, features=4, classes=3)


def make(**options):
    return LadSampler(X, LABELS, **{"sample": 0.4, "anomalous": 0.1, "seed": 5, **options})


def most_anomalous(fraction=0.1):
    """By the definition: of each class the members with the highest scores, one at least."""
    scores = anomaly_scores(X, LABELS).scores.numpy()
    chosen = set()
    for k in range(3):
        members = np.flatnonzero(k == LABELS)
        count = max(1, int(fraction * len(members)))
        chosen |= set(members[np.argsort(-scores[members])][:count].tolist())
    return chosen


def test_a_sample_has_the_most_anomalous_of_each_class_and_others():
    sampler = make()
    sample = sampler.training_sample().tolist()
    assert len(sample) == len(set(sample)) == sampler.size == len(sampler) == 80
    assert most_anomalous() <= set(sample)
    order = list(sampler)
    assert sorted(order) == sample
    assert order != sample


@pytest.mark.parametrize("anomalous", [0.0, 0.001])
def test_there_is_at_least_one_of_each_class(anomalous):
    x = torch.arange(100.0).unsqueeze(1)
    labels = torch.tensor([0] * 98 + [1, 2])
    for epoch in range(5):
        sampler = LadSampler(x, labels, sample=0.05, anomalous=anomalous, seed=epoch)
        sample = sampler.training_sample()
        assert len(sample) == 5
        assert {0, 98, 99} <= set(sample.tolist())  # 0 is the farthest from the mean of its class


def test_the_others_are_drawn_uniformly():
    """600 draws of 80 - 19 out of 181: each is drawn about 202 times, with a deviation of 11.6."""
    sampler = make(every=1)
    counts = Counter()
    for epoch in range(600):
        sampler.set_epoch(epoch)
        counts.update(sampler.training_sample().tolist())
    always = most_anomalous()
    assert {index for index, count in counts.items() if count == 600} == always
    others = [counts[index] for index in range(200) if index not in always]
    expected = 600 * (80 - len(always)) / len(others)
    deviation = (expected * (1 - expected / 600)) ** 0.5
    assert max(abs(count - expected) for count in others) < 5 * deviation
    assert np.std(others) == pytest.approx(deviation, rel=0.3)


def test_a_whole_sample_is_a_shuffle():
    assert sorted(make(sample=1.0)) == list(range(200))


def test_the_sample_is_kept_for_some_epochs_and_the_order_is_not():
    sampler = make(every=2)
    samples, orders = [], []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        samples.append(set(orders[-1]))
    assert samples[0] == samples[1] != samples[2] == samples[3]
    assert orders[0] != orders[1]
    sampler.set_epoch(0)
    assert list(sampler) == orders[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_only_set_epoch_goes_to_another_epoch(workers):
    """However far a pass went, and whatever workers asked for ahead; a second pass without it warns."""
    told, untold = make(), make()
    loader = DataLoader(range(200), batch_size=8, sampler=untold, num_workers=workers)
    first = torch.cat([batch for batch, _ in zip(loader, range(8), strict=False)]).tolist()
    with pytest.warns(UserWarning, match="another pass over the same indices of epoch 0: call set_epoch"):
        assert torch.cat(list(loader)).tolist() == list(told)
    assert first == list(make())[:64]
    untold.set_epoch(1)
    told.set_epoch(1)
    assert list(untold) == list(told)


def test_no_pass_warns_where_epochs_are_set(recwarn):
    sampler = make()
    list(sampler)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        list(sampler)
    sampler.load_state_dict(sampler.state_dict(taken=3))
    list(sampler)
    assert not recwarn


def test_seeds_differ_and_processes_do_not():
    assert list(make()) == list(make())
    assert list(make()) != list(make(seed=6))
    table = "[[float(n * n % 17)] for n in range(40)]"
    program = f"from trustratio.recipes.rules.anomaly_sampler import LadSampler\nprint(list(LadSampler({table})))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert shown.stdout.strip() == str(list(LadSampler([[float(n * n % 17)] for n in range(40)])))


def test_a_function_is_asked_whenever_the_sample_is_made():
    calls = []

    def features():
        calls.append(len(calls))
        return X if len(calls) < 3 else X[:, ::-1].copy() * np.linspace(1, 2, 200)[:, None]

    sampler = LadSampler(features, LABELS, sample=0.2, anomalous=0.1, every=2, seed=5)
    assert calls == []
    samples = []
    for epoch in range(6):
        sampler.set_epoch(epoch)
        samples.append(set(sampler))
    assert calls == [0, 1, 2]
    assert most_anomalous() <= samples[0] & samples[3]
    assert not most_anomalous() <= samples[4]


@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_take_turns(drop_last):
    whole = list(make())
    parts = [list(make(num_replicas=3, rank=rank, drop_last=drop_last)) for rank in range(3)]
    length = 26 if drop_last else 27
    assert [len(part) for part in parts] == [length] * 3
    assert len(make(num_replicas=3, rank=1, drop_last=drop_last)) == length
    for rank, part in enumerate(parts):
        assert part == (whole + whole)[rank : 3 * length : 3]


def test_more_ranks_than_samples():
    parts = [list(LadSampler(X[:3], num_replicas=5, rank=rank, sample=0.5)) for rank in range(5)]
    assert [len(part) for part in parts] == [1] * 5


# Going on -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("taken", [0, 7, 79, 80])
@pytest.mark.parametrize("replicas", [1, 3])
def test_going_on_in_the_middle(taken, replicas, told):
    straight = make(num_replicas=replicas, rank=0, every=2)
    orders = []
    for epoch in range(5):
        straight.set_epoch(epoch)
        orders.append(list(straight))
    taken = min(taken, len(straight))

    first = make(num_replicas=replicas, rank=0, every=2)
    first.set_epoch(3)
    steps = iter(first)
    done = [next(steps) for _ in range(taken)]
    second = make(num_replicas=replicas, rank=0, every=2)
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["taken"] == taken
    if told:
        second.set_epoch(3)
    nothing_left = pytest.warns(UserWarning, match="nothing is left of epoch 3: call set_epoch")
    with nothing_left if taken == len(straight) and not told else nullcontext():
        assert done + list(second) == orders[3]
    second.set_epoch(4)
    assert list(second) == orders[4]


def test_another_epoch_begins_at_its_start():
    first = make()
    steps = iter(first)
    next(steps)
    second = make()
    second.load_state_dict(first.state_dict())
    second.set_epoch(2)
    first.set_epoch(2)
    assert list(second) == list(first)


@pytest.mark.filterwarnings("ignore:another pass")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_look_at_the_first_batch_does_not_lose_the_place(workers):
    second = make()
    second.load_state_dict(make().state_dict(taken=24))
    loader = DataLoader(range(200), batch_size=8, sampler=second, num_workers=workers)
    left = list(make())[24:]
    assert next(iter(loader)).tolist() == left[:8]
    assert torch.cat(list(loader)).tolist() == left
    second.set_epoch(0)
    assert second.state_dict()["taken"] == 24
    assert torch.cat(list(loader)).tolist() == left


@pytest.mark.filterwarnings("ignore:another pass")
def test_passes_do_not_disturb_each_other():
    sampler = make()
    whole, steps = list(make()), iter(sampler)
    done = [next(steps) for _ in range(30)]
    assert list(sampler) == whole  # e.g. an evaluation
    done += [next(steps) for _ in range(10)]
    state = sampler.state_dict()
    assert (state["epoch"], state["taken"]) == (0, 40)
    sampler.set_epoch(1)
    assert done + list(steps) == whole
    state = sampler.state_dict()
    assert (state["epoch"], state["taken"]) == (1, 0)


def test_the_last_batch_may_be_incomplete():
    sampler = make()
    for done, _ in enumerate(DataLoader(range(200), batch_size=64, sampler=sampler), start=1):
        taken = sampler.state_dict(taken=64 * done)["taken"]
    assert taken == 80


def test_numbers_of_numpy_and_torch():
    plain = make(every=2, iterations=2, seed=7, classes=3, num_replicas=2, rank=1)
    numbers = {"every": 2, "iterations": 2, "seed": 7, "classes": 3, "num_replicas": 2, "rank": 1}
    other = make(anomalous=np.float64(0.1), **{name: np.int64(number) for name, number in numbers.items()})
    plain.set_epoch(3)
    other.set_epoch(torch.tensor(3))
    assert list(other) == list(plain)
    assert {type(number) for number in other.state_dict()["settings"].values()} == {int, float, bool}


@pytest.mark.parametrize(("fraction", "count"), [(0.29, 29), (0.57, 57), (0.299, 29), (1 / 3, 33), (1.0, 100)])
def test_fractions_are_not_below_what_was_written(fraction, count):
    """In floats 0.29 x 100 is 28.999999999999996."""
    x = torch.arange(100.0).unsqueeze(1)
    by_score = anomaly_scores(x).scores.argsort(descending=True, stable=True)
    for seed in range(3):
        sample = set(LadSampler(x, sample=1.0 if count == 100 else count / 100, anomalous=fraction, seed=seed))
        assert sample == set(by_score[:count].tolist())


def test_a_state_of_other_data_is_refused():
    state = make().state_dict(taken=8)
    options = {"sample": 0.4, "anomalous": 0.1, "seed": 5}
    x = X.copy()
    x[117, 2] += 1e-9
    for other, what in (
        (LadSampler(X, 2 - LABELS, **options), "labels"),
        (LadSampler(x, LABELS, **options), "features"),
    ):
        with pytest.raises(ValueError, match=f"the state is of a sampler of other {what}"):
            other.load_state_dict(state)
        assert other.state_dict()["taken"] == 0
    for same in (X.tolist(), torch.tensor(X), X[::-1][::-1], lambda: X):
        sampler = LadSampler(same, LABELS.tolist(), **options)
        sampler.load_state_dict(state)
        assert list(sampler) == list(make())[8:]


def test_a_sample_of_a_model_that_has_changed_since_is_kept():
    """A function is not asked again for a sample that the state has."""
    first = LadSampler(lambda: X, LABELS, every=3)
    first.set_epoch(1)
    order = list(first)
    second = LadSampler(lambda: pytest.fail("asked"), LABELS, every=3)
    second.load_state_dict(first.state_dict(taken=0))
    assert list(second) == order


def test_a_loader_with_workers_is_ahead():
    """So the training says what it is done with."""
    first = make()
    batches = iter(DataLoader(range(200), batch_size=5, sampler=first, num_workers=2))
    done = torch.cat([next(batches) for _ in range(3)]).tolist()
    assert first.state_dict()["taken"] > 15
    second = make()
    second.load_state_dict(first.state_dict(taken=15))
    loader = DataLoader(range(200), batch_size=5, sampler=second, num_workers=2)
    assert done + torch.cat(list(loader)).tolist() == list(make())
    assert len(loader) == 16


def test_a_state_is_saved_as_a_file(tmp_path):
    sampler = make()
    next(iter(sampler))
    torch.save(sampler.state_dict(), tmp_path / "sampler.pt")
    other = make()
    other.load_state_dict(torch.load(tmp_path / "sampler.pt", weights_only=True))
    assert list(other) == list(make())[1:]


# What is refused ----------------------------------------------------------------------------------------------------

BAD = {
    "sample zero": ({"sample": 0.0}, r"sample must be a fraction in \(0, 1\], got 0.0"),
    "sample": ({"sample": 1.5}, r"sample must be a fraction in \(0, 1\], got 1.5"),
    "sample nan": ({"sample": float("nan")}, "got nan"),
    "anomalous": ({"anomalous": -0.1}, r"anomalous must be a fraction in \[0, 1\], got -0.1"),
    "anomalous text": ({"anomalous": "0.1"}, "got '0.1'"),
    "every": ({"every": 0}, "every must be a whole number of at least 1, got 0"),
    "every half": ({"every": 0.5}, "every must be a whole number of at least 1, got 0.5"),
    "iterations": ({"iterations": 0}, "iterations must be a whole number of at least 1, got 0"),
    "seed": ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    "more anomalous than fit": (
        {"sample": 0.1, "anomalous": 0.5},
        r"99 anomalous samples \(anomalous=0.5, .*\) do not fit into a sample of 20",
    ),
    "rank alone": ({"rank": 1}, "rank needs num_replicas, got rank=1 alone"),
    "rank": ({"num_replicas": 2, "rank": 2}, "rank must be a whole number from 0 to num_replicas - 1 = 1, got 2"),
    "no rank": ({"num_replicas": 2}, "got None"),
    "replicas": ({"num_replicas": 0, "rank": 0}, "num_replicas must be a whole number of at least 1, got 0"),
    "dropped": ({"num_replicas": 100, "rank": 0, "drop_last": True}, "a sample of 80 leaves nothing for 100 ranks"),
    "classes": ({"classes": 2}, "labels must be from 0 to 1, got 2"),
    "empty class": ({"classes": 4}, r"every class from 0 to 3 must have a sample, got none of \[3\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_named(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_bad_tables_are_named():
    with pytest.raises(ValueError, match="labels must have one number per sample"):
        LadSampler(X, LABELS[:10])
    with pytest.raises(ValueError, match="got nan in row 1, column 0"):
        LadSampler([[1.0], [float("nan")]])
    with pytest.raises(ValueError, match="must have at least one sample"):
        LadSampler(torch.ones(0, 3))
    with pytest.raises(ValueError, match="labels must be given with a function"):
        LadSampler(lambda: X)
    with pytest.raises(ValueError, match=r"labels must have one number per sample, shape \(samples,\), got \(\)"):
        LadSampler(lambda: X, 5)
    with pytest.raises(ValueError, match="a row for each of the 200 labels, got 100"):
        list(LadSampler(lambda: X[:100], LABELS))
    with pytest.raises(ValueError, match="group must be a process group that this rank is in"):
        LadSampler(X, LABELS, group=True)
    with pytest.raises(ValueError, match="got inf in row 0"):
        list(LadSampler(lambda: torch.full((200, 1), torch.inf), LABELS))


def test_bad_places_are_named():
    sampler = make()
    with pytest.raises(ValueError, match="epoch must be a whole number of at least 0, got -1"):
        sampler.set_epoch(-1)
    with pytest.raises(ValueError, match=r"taken must be a whole number of at least 0, got 0\.5"):
        sampler.state_dict(taken=0.5)
    with pytest.raises(ValueError, match="no state of a LadSampler: it lacks taken, period"):
        sampler.load_state_dict({"epoch": 1, "indices": None, "settings": {}})
    with pytest.raises(ValueError, match="the state is of a sampler with seed=6, this one has 5"):
        sampler.load_state_dict(make(seed=6).state_dict())
    assert sampler.epoch == 0


# With the Trainer ---------------------------------------------------------------------------------------------------


def test_with_the_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    sampler = make(sample=0.2, num_replicas=1, rank=0)
    seen = []

    class Model(torch.nn.Linear):
        def forward(self, x, index):
            seen.extend(index.tolist())
            return {"loss": super().forward(x).square().mean()}

    class WithSampler(Trainer):
        def _get_train_sampler(self, *arguments):
            return sampler

    rows = [{"x": torch.tensor(X[index]).float(), "index": index} for index in range(200)]
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=2, per_device_train_batch_size=8, report_to=[], save_strategy="no", use_cpu=True
    )
    WithSampler(Model(4, 1), arguments, train_dataset=rows).train()
    expected = make(sample=0.2)
    orders = []
    for epoch in range(2):
        expected.set_epoch(epoch)
        orders += list(expected)
    assert seen == orders
