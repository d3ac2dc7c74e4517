"""CowClip on one process: the worked example, both thresholds, how ids are counted, and errors."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from trustratio.optimizers import CowClip
from trustratio.optimizers.cowclip import CowClipSettings, clip_threshold, scale_cowclip

from ..reference import cowclip as reference

FLOOR = 0.01  # r√D·ζ of the worked example


def embedding(zeta: float = FLOOR / math.sqrt(2), **options: object) -> tuple[torch.nn.Parameter, CowClip]:
    rows = [[0.03, 0.04], [0.0, 0.0], [0.3, 0.4]]
    weight = torch.nn.Parameter(torch.tensor(rows, dtype=torch.float64))
    weight.grad = torch.tensor([[0.3, 0.4], [0.003, 0.004], [0.0, 0.0]], dtype=torch.float64)
    return weight, CowClip([{"params": [("items", weight)], "cowclip": True}], lr=0.1, zeta=zeta, **options)


def clipped(optimizer: CowClip, weight: torch.Tensor) -> torch.Tensor:
    """The gradient that entered Adam in its first step."""
    return optimizer.state[weight]["exp_avg"] / 0.1


def test_worked_example() -> None:
    weight, optimizer = embedding()
    optimizer.count_ids(weight, torch.tensor([0, 1, 0]))
    optimizer.step()
    expected = torch.tensor([[0.06, 0.08], [0.003, 0.004], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(clipped(optimizer, weight), expected, rtol=1e-12, atol=1e-15)


def test_worked_example_thresholds() -> None:
    norms = torch.tensor([0.05, 0.0, 0.5], dtype=torch.float64)
    counts = torch.tensor([2, 0, 1])
    found = clip_threshold(norms, counts, width=2, ratio=1.0, zeta=FLOOR / math.sqrt(2))
    torch.testing.assert_close(found, torch.tensor([0.1, 0.01, 0.5], dtype=torch.float64))


def test_thresholds_of_code_and_paper_differ_in_the_floor() -> None:
    norms = torch.tensor([0.0, 2.0], dtype=torch.float64)
    counts = torch.tensor([3, 3])
    code = clip_threshold(norms, counts, width=4, ratio=0.5, zeta=0.1)
    paper = clip_threshold(norms, counts, width=4, ratio=0.5, zeta=0.1, form="paper")
    torch.testing.assert_close(code, torch.tensor([0.5 * 3 * 0.5 * 2 * 0.1, 3.0], dtype=torch.float64))
    torch.testing.assert_close(paper, torch.tensor([3 * 0.1, 3.0], dtype=torch.float64))


@pytest.mark.parametrize("threshold", ["code", "paper"])
@pytest.mark.parametrize("chunk", [5, 1 << 16])
def test_steps_equal_the_reference_wherever_chunks_end(
    threshold: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trustratio.optimizers.formulas.chunks.CHUNK_ELEMENTS", {"cpu": chunk})
    torch.manual_seed(0)
    options = {"lr": 0.1, "weight_decay": 0.3, "ratio": 0.7, "zeta": 0.05, "threshold": threshold, "cowclip": True}
    first, second = torch.randn(9, 7, dtype=torch.float64), torch.randn(2, 12, dtype=torch.float64)
    weights = [torch.nn.Parameter(w.clone()) for w in (first, second)]
    optimizer = CowClip([("first", weights[0]), ("second", weights[1])], **options)
    expected, states = [first, second], [{}, {}]
    for _ in range(4):
        for i, weight in enumerate(weights):
            ids = torch.randint(0, len(weight), (6,))
            weight.grad = 5 * torch.randn_like(weight)
            optimizer.count_ids(("first", "second")[i], ids)
            counts = ids.bincount(minlength=len(weight)).tolist()
            expected[i], _ = reference(expected[i], weight.grad, states[i], **options, counts=counts)
        optimizer.step()
    for weight, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach(), wanted, rtol=1e-12, atol=1e-12)


def test_without_embeddings_it_is_adam() -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(4, 3, dtype=torch.float64)) for _ in range(2))
    optimizer = CowClip([ours], lr=0.1, weight_decay=0.2)
    adam = torch.optim.Adam([theirs], lr=0.1, weight_decay=0.2)
    for _ in range(5):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        adam.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert optimizer.trust_ratios() == {"0.0": 1.0}


def test_rows_that_do_not_occur_decay_with_l2_and_rest_without() -> None:
    for weight_decay, moves in ((0.0, False), (0.1, True)):
        weight, optimizer = embedding(weight_decay=weight_decay)
        before = weight.detach().clone()
        optimizer.count_ids("items", torch.tensor([0, 1]))
        optimizer.step()
        assert torch.equal(before[2], weight.detach()[2]) is not moves


def test_an_embedding_without_gradient_is_untouched_and_needs_no_counts() -> None:
    weight, optimizer = embedding(weight_decay=0.1)
    weight.grad.zero_()
    before = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight, before)
    assert optimizer.state[weight]["step"] == 0


def test_a_nan_stays_in_its_row() -> None:
    weight, optimizer = embedding()
    weight.grad[0, 0] = math.nan
    optimizer.count_ids("items", torch.tensor([0, 1]))
    optimizer.step()
    assert weight[0].isnan().any()
    assert weight[1:].isfinite().all()


# Counting -----------------------------------------------------------------------------------------------------------


class TwoTables(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.users = torch.nn.Embedding(6, 3)
        self.tags = torch.nn.EmbeddingBag(5, 2, mode="sum")

    def forward(self, users: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
        return self.users(input=users).sum() + self.tags(tags).sum()


def hooked() -> tuple[TwoTables, CowClip]:
    model = TwoTables()
    optimizer = CowClip(model.named_parameters(), lr=0.1, cowclip=True)
    optimizer.count_lookups(model)
    return model, optimizer


USERS, TAGS = torch.tensor([[0, 1], [1, 5]]), torch.tensor([[0, 0, 4], [4, 4, 2]])


def counts_of(model: TwoTables, optimizer: CowClip) -> tuple[list[int], list[int]]:
    """The counts that the next step would use."""
    for weight in (model.users.weight, model.tags.weight):
        weight.grad = torch.ones_like(weight)
    seen: dict[str, list[int]] = {}
    take = optimizer._counts.take

    def spy(layout, layers):  # type: ignore[no-untyped-def]
        counts, noted = take(layout, layers)
        seen.update({layer.name: n.tolist() for layer, n in zip(layers, counts, strict=True)})
        return counts, noted

    optimizer._counts.take = spy  # type: ignore[method-assign]
    optimizer.step()
    return seen["users.weight"], seen["tags.weight"]


def test_hooks_count_what_is_looked_up_over_accumulated_micro_batches() -> None:
    model, optimizer = hooked()
    for _ in range(2):
        optimizer_input = model(USERS, TAGS)
        optimizer_input.backward()
    assert counts_of(model, optimizer) == ([2, 4, 0, 0, 0, 2], [4, 0, 2, 0, 6])


def test_a_second_call_counts_once() -> None:
    """Before wrapping and after it, as a program may well do both."""
    model, optimizer = hooked()
    optimizer.count_lookups(torch.nn.Sequential(model))
    model(USERS, TAGS).backward()
    assert counts_of(model, optimizer) == ([1, 2, 0, 0, 0, 1], [2, 0, 1, 0, 3])


def test_only_lookups_with_a_backward_count() -> None:
    model, optimizer = hooked()
    model(USERS, TAGS)
    with torch.no_grad():
        model(USERS, TAGS)
    loss = model(USERS, TAGS)
    optimizer.zero_grad()  # between forward and backward, as many training loops have it
    loss.backward()
    assert counts_of(model, optimizer) == ([1, 2, 0, 0, 0, 1], [2, 0, 1, 0, 3])


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_not_counted(reentrant: bool) -> None:
    model, optimizer = hooked()
    start = torch.ones((), requires_grad=True)
    checkpoint(lambda x: x * model(USERS, TAGS), start, use_reentrant=reentrant).backward()
    assert counts_of(model, optimizer) == ([1, 2, 0, 0, 0, 1], [2, 0, 1, 0, 3])


def test_zero_grad_forgets_the_counts_of_a_dropped_step() -> None:
    model, optimizer = hooked()
    model(USERS, TAGS).backward()
    optimizer.zero_grad()
    model(USERS, TAGS).backward()
    assert counts_of(model, optimizer)[0] == [1, 2, 0, 0, 0, 1]


def test_removed_hooks_no_longer_count() -> None:
    model = TwoTables()
    optimizer = CowClip(model.named_parameters(), lr=0.1, cowclip=True)
    for handle in optimizer.count_lookups(model):
        handle.remove()
    model(USERS, TAGS).backward()
    with pytest.raises(RuntimeError, match=r"users\.weight, tags\.weight: call optimizer\.count_lookups\(model\)"):
        optimizer.step()


def test_counted_lookups_of_a_sparse_embedding_leave_the_refusal_to_the_step() -> None:
    module = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = CowClip(module.parameters(), lr=0.1, cowclip=True)
    optimizer.count_lookups(module)
    module(torch.tensor([0, 1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"dense.*sparse_coo.*sparse=False"):
        optimizer.step()


def test_a_missing_count_changes_nothing() -> None:
    weight, optimizer = embedding()
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match="no ids were counted for the step of items"):
        optimizer.step()
    assert torch.equal(weight, before)


def test_a_copy_counts_for_itself() -> None:
    weight, optimizer = embedding()
    optimizer.count_ids("items", torch.tensor([0, 0, 1]))
    twin = copy.deepcopy(optimizer)
    (other,) = twin.param_groups[0]["params"]
    twin.count_ids("items", torch.tensor([0, 1]))
    other.grad = weight.grad.clone()
    optimizer.step()
    twin.step()
    torch.testing.assert_close(clipped(optimizer, weight)[0], 2 * clipped(twin, other)[0])


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr must be in \[0, inf\), got -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1\), got 1.0"),
        ({"eps": -1.0}, "eps must be in"),
        ({"weight_decay": -1.0}, "weight_decay must be in"),
        ({"ratio": 0.0}, r"ratio must be in \(0, inf\), got 0.0"),
        ({"zeta": -1e-5}, r"zeta must be in \[0, inf\)"),
        ({"threshold": "print"}, "threshold must be one of 'code', 'paper'"),
        ({"cowclip": 1}, "cowclip must be True or False"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CowClip([torch.nn.Parameter(torch.ones(2, 2))], **{"lr": 0.1, **options})


def test_only_two_dimensional_parameters_have_rows() -> None:
    bias = torch.nn.Parameter(torch.ones(3))
    optimizer = CowClip([("bias", bias)], lr=0.1, cowclip=True)
    bias.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"two dimensions \(ids x columns\), got bias of shape \(3,\)"):
        optimizer.step()


def test_ids_of_what_is_not_clipped_are_refused() -> None:
    weight, optimizer = embedding()
    with pytest.raises(ValueError, match=r"cowclip=True \(items\), got 'user'"):
        optimizer.count_ids("user", torch.tensor([1]))
    with pytest.raises(ValueError, match=r"got a tensor of shape \(2,\)"):
        optimizer.count_ids(torch.ones(2), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"ids must be integers, got torch.float32"):
        optimizer.count_ids(weight, torch.tensor([1.0]))
    with pytest.raises(ValueError, match=r"has no nn\.Embedding"):
        optimizer.count_lookups(torch.nn.Linear(2, 2))


def test_scaling_rule() -> None:
    base = CowClipSettings(embedding_lr=1e-4, dense_lr=8e-4, weight_decay=2e-5)
    assert scale_cowclip(base, 1024, 1024) == base
    scaled = scale_cowclip(base, 1024, 131072)  # the authors' Criteo table: 90.50e-4 and 128 times the L2
    assert scaled.embedding_lr == 1e-4
    assert scaled.dense_lr == pytest.approx(90.5097e-4, rel=1e-5)
    assert scaled.weight_decay == pytest.approx(128 * 2e-5)
    with pytest.raises(ValueError, match="batch must be in"):
        scale_cowclip(base, 1024, 0)


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("drop", ["none", "zero", "optimizer"])
def test_lookups_of_a_dropped_batch_do_not_count(drop: str, by_hand: bool) -> None:
    model = TwoTables()
    optimizer = CowClip(model.named_parameters(), lr=0.1, cowclip=True)
    if not by_hand:
        optimizer.count_lookups(model)

    def batch(factor: float = 1.0) -> None:
        if by_hand:
            for users, tags in ((USERS[:1], TAGS[:1]), (USERS[1:], TAGS[1:])):
                optimizer.count_ids("users.weight", users)
                optimizer.count_ids("tags.weight", tags)
        (factor * model(USERS, TAGS)).backward()

    for factor in (float("nan"), 1.0):
        batch(factor)
        optimizer.zero_grad() if drop == "optimizer" else model.zero_grad(set_to_none=drop == "none")
    if not by_hand:
        torch.autograd.grad(model(USERS, TAGS), list(model.parameters()))
    batch()
    batch()
    assert counts_of(model, optimizer) == ([2, 4, 0, 0, 0, 2], [4, 0, 2, 0, 6])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_whose_lookups_are_counted_can_be_copied_and_pickled(
    copied: Callable[[torch.nn.Module], torch.nn.Module],
) -> None:
    model = TwoTables()
    optimizer = CowClip(model.named_parameters(), lr=0.1, cowclip=True)
    optimizer.count_lookups(model)
    model(USERS, TAGS).backward()
    other = copied(model)
    other(USERS, TAGS).backward()
    its_own = CowClip(other.named_parameters(), lr=0.1, cowclip=True)
    its_own.count_lookups(other)
    other(USERS, TAGS).backward()
    once = [1, 2, 0, 0, 0, 1], [2, 0, 1, 0, 3]
    assert counts_of(model, optimizer) == once
    assert counts_of(other, its_own) == once
