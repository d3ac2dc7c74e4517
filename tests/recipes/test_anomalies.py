"""Anomaly scores against their definition in plain float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trustratio.recipes.rules.anomalies import anomaly_scores

from ..references.anomalies import lad, made_up

SQUARE = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [5.0, 0.5]])


@pytest.mark.parametrize("iterations", [1, 2])
def test_worked_example(iterations):
    """Round 1: mean (1.4, 0.5), variance (3.44, 0.2), threshold 0.2 + 2·0.2; round 2: (0.5, 0.5), (0.25, 0.25)."""
    scores, anomalous = anomaly_scores(SQUARE, iterations=iterations)
    assert scores.tolist() == pytest.approx([0, 0, 0, 0, 1], abs=1e-12)
    assert anomalous.tolist() == [False] * 4 + [True]


def test_statistics_of_the_worked_example():
    """With another sample, scores between show mean and variance of both rounds."""
    x = torch.cat([SQUARE, torch.tensor([[2.0, 0.5]])]).double()
    first = (
        0.5 * np.array([(x[:, 0] - 1.5) ** 2 / x[:, 0].var(correction=0), (x[:, 1] - 0.5) ** 2 / (1 / 6)]).max(0) / 6
    )
    scores, anomalous = anomaly_scores(x, iterations=1)
    np.testing.assert_allclose(scores, (first - first.min()) / (first.max() - first.min()), rtol=1e-12, atol=1e-15)
    assert anomalous.tolist() == [False] * 4 + [True, False]
    mean, variance = x[anomalous.logical_not(), 0].mean(), x[anomalous.logical_not(), 0].var(correction=0)
    second = 0.5 * np.array([(x[:, 0] - mean) ** 2 / variance, (x[:, 1] - 0.5) ** 2 / 0.2]).max(0) / 5
    scores, _ = anomaly_scores(x, iterations=2)
    np.testing.assert_allclose(scores, (second - second.min()) / (second.max() - second.min()), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("iterations", [1, 2, 4])
@pytest.mark.parametrize(("samples", "features", "classes"), [(211, 5, 3), (60, 70, 1), (400, 3, 4), (17, 3, 2)])
def test_equals_the_reference(samples, features, classes, iterations):
    x, labels = made_up(samples, features, classes)
    expected, expected_anomalous = lad(x, labels, iterations)
    scores, anomalous = anomaly_scores(x, labels, iterations)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert np.array_equal(anomalous.numpy(), expected_anomalous)
    assert scores.min() == 0
    assert scores.max() == 1


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(12, 80), st.integers(3, 6), st.integers(1, 3), st.integers(1, 3))
def test_equals_the_reference_on_any_table(seed, samples, features, classes, iterations):
    x, _ = made_up(samples, features, classes, seed)
    x[:, 1] += np.random.default_rng(seed).normal(size=samples)  # else deviations are equal at the border of a quarter
    labels = np.arange(samples) % classes  # in a class of two both deviate alike, but for rounding
    expected, expected_anomalous = lad(x, labels, iterations)
    scores, anomalous = anomaly_scores(x, labels, iterations)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-7, atol=1e-10)
    assert np.array_equal(anomalous.numpy(), expected_anomalous)


@pytest.mark.parametrize(
    ("samples", "classes", "seed", "iterations"),
    [
        (12, 1, 43, 1),  # the variance over N in place of N - 1 has one more at the threshold
        (20, 5, 0, 2),  # classes with one and two regular members in the second round
    ],
)
def test_equals_the_reference_where_few_samples_are_left(samples, classes, seed, iterations):
    x, _ = made_up(samples, 6, 1, seed)
    x, labels = x[:, 2:], np.arange(samples) % classes
    expected, expected_anomalous = lad(x, labels, iterations)
    scores, anomalous = anomaly_scores(x, labels, iterations)
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert np.array_equal(anomalous.numpy(), expected_anomalous)


def test_the_order_of_the_rows_does_not_show():
    """Also not in the last bit, which may carry a sample over the threshold."""
    x, labels = made_up(2000, 4, 3)
    expected = anomaly_scores(x, labels)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(x))
        scores, anomalous = anomaly_scores(x[order], labels[order])
        assert torch.equal(scores, expected.scores[order])
        assert torch.equal(anomalous, expected.anomalous[order])


def test_labels_are_names():
    x, labels = made_up()
    named = np.array([40, -7, 12])[labels]
    assert torch.equal(anomaly_scores(x, named).scores, anomaly_scores(x, labels).scores)
    assert torch.equal(anomaly_scores(x, labels.astype(np.float32)).scores, anomaly_scores(x, labels).scores)


def test_a_class_apart_is_not_anomalous_for_being_apart():
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(90, 2, generator=generator), 100 + torch.randn(10, 2, generator=generator)])
    alone, classes = anomaly_scores(x, iterations=1), anomaly_scores(x, [0] * 90 + [1] * 10, iterations=1)
    assert alone.scores[90:].min() > alone.scores[:90].max()
    assert classes.scores[90:].min() < classes.scores[:90].mean()


def test_classes_of_one_and_two_samples():
    """One sample has no variance, so it is near to nobody; two are described by both, anomalous or not."""
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0], [50.0], [60.0], [1000.0]])
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    scores, _ = anomaly_scores(x, labels, iterations=1)
    zero = (x[:, 0].double() - 1.5) ** 2 / 2 / 1.25 / 4
    one = (x[:, 0].double() - 55) ** 2 / 2 / 25 / 2
    nearest = zero.minimum(one)
    torch.testing.assert_close(scores, (nearest - nearest.min()) / (nearest.max() - nearest.min()))
    assert scores[-1] == 1


ALIKE = {
    "constant": torch.full((8, 3), 0.1),
    "one sample": torch.ones(1, 2),
    "two kinds": torch.tensor([[-1.0], [1.0]] * 4),
    "two kinds, but for rounding": torch.rand(
        2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).repeat(2, 1),
}


@pytest.mark.parametrize("case", ALIKE)
def test_where_all_deviate_alike_nothing_is_anomalous(case):
    x = ALIKE[case]
    scores, anomalous = anomaly_scores(x)
    assert scores.tolist() == [0.0] * len(x)
    assert not anomalous.any()


def test_the_highest_quarter():
    """Rounded down; of equal scores at its border none."""
    x = torch.arange(40.0).unsqueeze(1)
    scores, anomalous = anomaly_scores(x + 0.1 * x**2, iterations=1)
    assert int(anomalous.sum()) == 10
    assert scores[anomalous].min() > scores[~anomalous].max()
    _, anomalous = anomaly_scores(torch.cat([x[:36] / 36, torch.full((6, 1), 9.0)]).repeat(3, 1), iterations=1)
    assert int(anomalous.sum()) == 30  # a quarter is 31, of which 18 are far off, and then threes are alike
    equal = torch.tensor([[-1.0]] * 10 + [[1.0]] * 10 + [[0.0]])
    assert not anomaly_scores(equal, iterations=1).anomalous.any()


def test_large_numbers_beside_small_ones():
    """The second round sees the small ones with all their digits; squares beyond fp64 are no NaN."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    expected, _ = lad(small.numpy(), np.zeros(50, dtype=np.int64), 1)
    for large in (1e12, 1e300):
        x = torch.cat([small, torch.full((1, 2), large, dtype=torch.float64)])
        scores, anomalous = anomaly_scores(x, iterations=1)
        assert anomalous.nonzero().tolist() == [[50]]
        scores, _ = anomaly_scores(x, iterations=2)
        assert scores.isfinite().all()
        assert scores[:50].argmax() == expected.argmax() or large > 1e100


DTYPES = "float16 bfloat16 float32 int8 int64 uint8 uint16 uint32 uint64 float8_e4m3fn float8_e5m2"


@pytest.mark.parametrize("name", DTYPES.split())
def test_other_dtypes_are_computed_in_fp64(name):
    whole = (8 * torch.randn(100, 3, generator=torch.Generator().manual_seed(0))).round().abs()
    x = whole.to(getattr(torch, name))
    expected = anomaly_scores(x.double(), x[:, 0].long())
    assert torch.equal(anomaly_scores(x, x[:, 0]).scores, expected.scores)
    assert expected.scores.unique().numel() > 5


TIMES = 1.7e9 + np.random.default_rng(0).normal(size=(60, 2)) * 10  # fp32 has them in steps of 128
MEMBERS = np.arange(60) % 2


def read_only():
    x = TIMES.copy()
    x.flags.writeable = False
    return x


ARRAYS = {
    "lists": lambda: (TIMES.tolist(), [float(k) for k in MEMBERS]),
    "tuples": lambda: (tuple(map(tuple, TIMES)), tuple(MEMBERS)),
    "rows of tensors": lambda: (list(torch.tensor(TIMES)), list(torch.tensor(MEMBERS))),
    "rows of arrays": lambda: (list(TIMES), list(MEMBERS)),
    "objects": lambda: (TIMES.astype(object), MEMBERS.astype(object)),
    "backwards": lambda: (np.flip(np.flip(TIMES, 0).copy(), 0), MEMBERS[::-1].copy()[::-1]),
    "big-endian": lambda: (TIMES.astype(">f8"), MEMBERS.astype(">i4")),
    "long double": lambda: (TIMES.astype(np.longdouble), MEMBERS.astype(np.longdouble)),
    "read only": lambda: (read_only(), MEMBERS),
    "other strides": lambda: (np.repeat(TIMES, 3, axis=1)[:, ::3], np.repeat(MEMBERS, 2)[::2]),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_what_numpy_reads_is_read_in_fp64(case, recwarn):
    expected, _ = lad(TIMES, MEMBERS, 2)
    scores, _ = anomaly_scores(*ARRAYS[case](), iterations=np.int64(2))
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(scores, anomaly_scores(torch.tensor(TIMES), torch.tensor(MEMBERS), 2).scores)
    assert not recwarn


def test_labels_in_lists_of_floats_keep_their_digits():
    labels = [16777216.0, 16777217.0] * 30
    assert torch.equal(anomaly_scores(TIMES, labels).scores, anomaly_scores(TIMES, MEMBERS).scores)


def test_tables_of_pandas_are_read_by_position():
    pandas = pytest.importorskip("pandas")
    rows = np.random.default_rng(1).permutation(60)[:50]
    table = pandas.DataFrame({"time": TIMES[:, 0], "kind": MEMBERS, "late": TIMES[:, 1] > 1.7e9}).iloc[rows]
    series = pandas.Series(MEMBERS, dtype="Int64").iloc[rows]
    expected = anomaly_scores(np.stack([TIMES[:, 0], MEMBERS, TIMES[:, 1] > 1.7e9], axis=1)[rows], MEMBERS[rows])
    assert torch.equal(anomaly_scores(table, series).scores, expected.scores)


@pytest.mark.parametrize("classes", [1, 7, 40])
def test_rows_of_many_classes_and_chunks(classes):
    """More rows than are worked on together, and classes of other sizes than that."""
    random = np.random.default_rng(0)
    x, labels = random.standard_t(4, size=(40_000, 3)), random.integers(0, classes, 40_000)
    x[labels == 1, 0] = 3.0  # without variance in this class alone
    expected, expected_anomalous = lad(x, labels, 2)
    scores, anomalous = anomaly_scores(x, labels, 2)
    np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-12)
    assert np.array_equal(anomalous, expected_anomalous)


def test_nothing_is_kept_for_backward():
    x = torch.randn(20, 2, requires_grad=True)
    assert not anomaly_scores(x).scores.requires_grad


BAD = {
    "shape": ({"features": torch.ones(3)}, r"shape \(samples, features\), got torch.float32 \(3,\)"),
    "no columns": ({"features": torch.ones(3, 0)}, r"got torch.float32 \(3, 0\)"),
    "complex": ({"features": torch.ones(3, 1, dtype=torch.complex64)}, "must be real numbers"),
    "text": ({"features": "table.csv"}, "features must be a tensor or numbers in rows, got str"),
    "ragged": ({"features": [[1.0, 2.0], [3.0]]}, "features must be a tensor or numbers in rows, got list"),
    "labels complex": ({"labels": [0j] * 5}, "labels must be whole numbers, got torch.complex128"),
    "labels none": ({"labels": [None] * 5}, "labels must be a tensor or numbers in rows, got list"),
    "labels beyond int64": (
        {"labels": np.array([0, 0, 1, 1, 2**63 + 5], dtype=np.uint64)},
        "labels must be below 2.*, got 9223372036854775813 in row 4",
    ),
    "labels beyond floats": ({"labels": [0, 0, 1, 1, 2.0**60]}, "labels must be below 2.* in row 4"),
    "group": ({"group": True}, "group must be a process group that this rank is in"),
    "no rows": ({"features": torch.ones(0, 2)}, "features must have at least one row"),
    "nan": (
        {"features": torch.tensor([[1.0, 2.0], [3.0, float("nan")]])},
        "features must be finite, got nan in row 1, column 1",
    ),
    "inf": ({"features": torch.tensor([[-float("inf"), 2.0]])}, "got -inf in row 0, column 0"),
    "nan further on": (
        {"features": torch.cat([torch.ones(20_000, 1), torch.full((1, 1), float("nan"))])},
        "got nan in row 20000, column 0",
    ),
    "length": ({"labels": [0, 1]}, r"labels must have one number per sample, shape \(5,\), got \(2,\)"),
    "fractions": ({"labels": [0, 1, 0.5, 1, 0]}, "labels must be whole numbers, got 0.5 in row 2"),
    "nan label": ({"labels": [0, 1, 1, 1, float("nan")]}, "labels must be whole numbers, got nan in row 4"),
    "names": ({"labels": ["a", "b", "a", "b", "a"]}, "labels must be a tensor or numbers"),
    "empty class": ({"labels": [0, 0, 2, 2, 2], "classes": 3}, r"every class from 0 to 2 must have a sample, .* \[1\]"),
    "label too large": ({"labels": [0, 0, 1, 2, 1], "classes": 2}, "labels must be from 0 to 1, got 2 in row 3"),
    "classes": ({"classes": 0}, "classes must be a whole number of at least 1, got 0"),
    "iterations": ({"iterations": 0}, "iterations must be a whole number of at least 1, got 0"),
    "iterations of another kind": ({"iterations": 2.0}, "got 2.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    arguments, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        anomaly_scores(**{"features": SQUARE, **arguments})


UNREADABLE = {
    "sparse": lambda: torch.eye(5).to_sparse(),
    "sparse by rows": lambda: torch.eye(5).to_sparse_csr(),
    "meta": lambda: torch.ones(5, 2, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "quantized": lambda: torch.quantize_per_tensor(torch.rand(5, 2), 0.1, 0, torch.quint8),
    "packed": lambda: torch.ones(5, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", UNREADABLE)
def test_tensors_that_do_not_hold_numbers_are_named(kind):
    given, message = UNREADABLE[kind](), f"must be a dense tensor that holds its numbers, got a {kind.split()[0]} one"
    with pytest.raises(ValueError, match=f"features {message}"):
        anomaly_scores(given)
    with pytest.raises(ValueError, match=f"labels {message}"):
        anomaly_scores(SQUARE, given)
