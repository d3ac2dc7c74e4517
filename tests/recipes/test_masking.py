import numpy as np
import pytest
import torch

from trustratio.recipes.data.masking import VALIDATION_EPOCH, hashed_uniform, mask_sequences
from trustratio.recipes.data.rows import MaskedRows, RowOrder
from trustratio.recipes.rules.global_batch import BatchPlan


def big_batch(vocabulary, epoch=0, seed=1):
    tokens = np.random.default_rng(1).integers(5, 100, size=(4000, 64))
    tokens[:, 0], tokens[:, -1] = 2, 3
    return tokens, mask_sequences(tokens, np.arange(4000), epoch, seed, vocabulary, 0.15)


def test_shares_are_15_percent_and_80_10_10(vocabulary):
    tokens, batch = big_batch(vocabulary)
    original = tokens.reshape(-1)[batch.positions.numpy()]
    changed = batch.input_ids.reshape(-1)[batch.positions].numpy()
    chosen = len(original)
    assert chosen / (4000 * 62) == pytest.approx(0.15, abs=0.003)
    assert np.mean(changed == vocabulary.mask_id) == pytest.approx(0.8, abs=0.01)
    # A random replacement equals the original once in 95 times.
    assert np.mean(changed == original) == pytest.approx(0.1 + 0.1 / 95, abs=0.01)
    replaced = changed[(changed != original) & (changed != vocabulary.mask_id)]
    assert np.isin(replaced, vocabulary.ordinary).all()
    assert len(np.unique(replaced)) == 95


def test_special_tokens_are_never_chosen_and_other_positions_stay(vocabulary):
    tokens, batch = big_batch(vocabulary)
    assert not np.isin(batch.labels.numpy(), vocabulary.special).any()
    untouched = np.ones(tokens.size, dtype=bool)
    untouched[batch.positions.numpy()] = False
    assert (batch.input_ids.reshape(-1).numpy()[untouched] == tokens.reshape(-1)[untouched]).all()


def test_masks_differ_between_epochs_seeds_and_validation(vocabulary):
    tokens, batch = big_batch(vocabulary)
    for epoch, seed in ((1, 1), (0, 2), (VALIDATION_EPOCH, 1)):
        other = mask_sequences(tokens, np.arange(4000), epoch, seed, vocabulary, 0.15)
        assert not torch.equal(batch.input_ids, other.input_ids)
    again = mask_sequences(tokens, np.arange(4000), 0, 1, vocabulary, 0.15)
    assert torch.equal(batch.input_ids, again.input_ids)


def test_hash_is_uniform_and_uncorrelated_between_neighbours():
    draws = hashed_uniform(3, 0, np.arange(2000), 64, 0)
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    expected = draws.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 50  # chi-square, 19 degrees of freedom
    assert abs(np.corrcoef(draws[:, :-1].ravel(), draws[:, 1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(draws.ravel(), hashed_uniform(3, 0, np.arange(2000), 64, 1).ravel())[0, 1]) < 0.01


def step_sequences(rows, vocabulary, step, plan):
    """Return (input row, label count) of every sequence of a step over all ranks, sorted: an order-free description."""
    found = []
    for rank in range(plan.ranks):
        for batch in MaskedRows(rows, vocabulary, 0.3, 7).step_batches(step, plan, rank):
            length = rows.shape[1]
            for i, ids in enumerate(batch.input_ids.tolist()):
                inside = (batch.positions >= i * length) & (batch.positions < (i + 1) * length)
                found.append((ids, (batch.positions[inside] - i * length).tolist(), batch.labels[inside].tolist()))
    return sorted(found)


@pytest.mark.parametrize("step", [0, 2, 3])  # 200 rows: step 3 of 64 crosses into the second epoch
def test_a_step_is_the_same_at_every_rank_count_and_micro_batch(rows, vocabulary, step):
    plans = [BatchPlan(64, 1, 1), BatchPlan(8, 8, 1), BatchPlan(1, 64, 1), BatchPlan(8, 4, 2), BatchPlan(4, 2, 8)]
    first, *others = (step_sequences(rows, vocabulary, step, plan) for plan in plans)
    assert len(first) == 64
    assert all(other == first for other in others)


def test_an_epoch_visits_every_row_once_in_a_new_order():
    order = RowOrder(50, seed=3)
    epochs = [np.concatenate([ids for _, ids in order.epoch_rows(50 * e, 50)]) for e in range(3)]
    for visited in epochs:
        assert sorted(visited.tolist()) == list(range(50))
    assert not np.array_equal(epochs[0], epochs[1])
    pieces = list(RowOrder(50, seed=3).epoch_rows(45, 10))  # asked for in the middle, across the border
    assert [epoch for epoch, _ in pieces] == [0, 1]
    assert pieces[0][1].tolist() == epochs[0][45:].tolist()
    assert pieces[1][1].tolist() == epochs[1][:5].tolist()


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_validation_covers_the_first_rows_once_with_equally_many_batches_per_rank(rows, vocabulary, ranks):
    masked = MaskedRows(rows, vocabulary, 0.15, 7)
    shares = [masked.validation_batches(4, rank, ranks, limit=21) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    labels = sorted(label for share in shares for batch in share for label in batch.labels.tolist())
    (whole,) = masked.validation_batches(21, 0, 1, limit=21)
    assert labels == sorted(whole.labels.tolist())
