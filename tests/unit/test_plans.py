"""What a plan depends on is noticed when it changes, and what the last step reports is of the last step alone."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from trustratio.optimizers import CLARS, LAMB, LAMBC, LANS, LARS, CowClip, LayerwiseOptimizer, LayoutError, NovoGrad
from trustratio.optimizers.sharding import backends
from trustratio.optimizers.sharding.backends import Backend
from trustratio.optimizers.sharding.layout import Layout
from trustratio.optimizers.sharding.refusals import refuse_rows, refuse_statistics
from trustratio.optimizers.sharding.unsharded import whole_parameters

Parameters = dict[str, torch.nn.Parameter]


class ClippingWrapper(Backend):
    """Steps whole parameters, clips by itself, and sees neither single gradients nor rows."""

    def explain(self, optimizer: Any, tensors: Any) -> Layout:
        refuse_statistics(optimizer, "the wrapper adds them up", "another wrapper")
        refuse_rows(optimizer, "which the wrapper does not know")
        return whole_parameters(optimizer, tensors, backend="wrapper", clips_with="its own clipping")


@contextmanager
def clipping_wrapper() -> Iterator[None]:
    wrapper = ClippingWrapper()
    backends.register_backend(wrapper)
    try:
        yield
    finally:
        backends._known.registered.remove(wrapper)


def parameters(*names: str, shape: tuple[int, ...] = (4, 3)) -> Parameters:
    generator = torch.Generator().manual_seed(len(names))
    return {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name in names}


def step(optimizer: torch.optim.Optimizer, *groups: int) -> None:
    """Take one step, in one call, or in one for each of the groups."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    if not groups:
        optimizer.step()
        return
    every_group = optimizer.param_groups
    for group in groups:
        optimizer.param_groups = [every_group[group]]
        optimizer.step()
    optimizer.param_groups = every_group


# Options against the layout -----------------------------------------------------------------------------------------


def assign(optimizer: LAMB) -> None:
    for group in optimizer.param_groups:
        group["max_grad_norm"] = 0.5


def assign_in_one_group(optimizer: LAMB) -> None:
    optimizer.param_groups[-1]["max_grad_norm"] = 0.5


def load(optimizer: LAMB) -> None:
    saved = LAMB([{"params": [p]} for p in parameters("a", "b").values()], max_grad_norm=0.5)
    optimizer.load_state_dict(saved.state_dict())


def set_state(optimizer: LAMB) -> None:
    state = optimizer.__getstate__()
    groups = [{**group, "max_grad_norm": 0.5} for group in state["param_groups"]]
    optimizer.__setstate__({"state": state["state"], "param_groups": groups})


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("change", [assign, assign_in_one_group, load, set_state])
@pytest.mark.parametrize("optimizer_class", [LAMB, LAMBC])
def test_a_limit_that_the_wrapper_makes_impossible_is_refused_however_it_comes(
    optimizer_class: Any, change: Callable[[Any], None], steps_before: int
) -> None:
    with clipping_wrapper():
        ps = parameters("a", "b")
        optimizer = optimizer_class([{"params": [p]} for p in ps.values()])
        for _ in range(steps_before):
            step(optimizer)
        change(optimizer)
        before = [p.detach().clone() for p in ps.values()]
        with pytest.raises(ValueError, match=r"max_grad_norm"):
            step(optimizer)
        assert all(torch.equal(p, w) for p, w in zip(ps.values(), before, strict=True))
        for group in optimizer.param_groups:
            group["max_grad_norm"] = None
        step(optimizer)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_limit_that_a_copy_brings_is_refused(copied: Any) -> None:
    other = copied(LAMB(parameters("a").values(), max_grad_norm=0.5))
    with clipping_wrapper(), pytest.raises(ValueError, match=r"max_grad_norm=0\.5 cannot be used under wrapper"):
        step(other)


def test_one_limit_for_all_groups() -> None:
    optimizer = LAMB([{"params": [p]} for p in parameters("a", "b").values()])
    step(optimizer)
    optimizer.param_groups[1]["max_grad_norm"] = 1.0
    with pytest.raises(ValueError, match=r"every group must have the same, got None in one and 1\.0 in another"):
        step(optimizer)


@pytest.mark.parametrize(
    ("option", "value"),
    [("segments", -1), ("segments", {"nobody": 2}), ("adapt", "yes"), ("betas", (0.9, 1.5)), ("eps", -1.0)],
)
def test_options_out_of_range_are_refused_when_a_plan_is_made(option: str, value: Any) -> None:
    ps = parameters("a")
    optimizer = LAMB(list(ps.items()))
    optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError, match=option):
        step(optimizer)


def test_statistics_and_rows_that_come_later_are_refused_as_before_the_first_step() -> None:
    with clipping_wrapper():
        lars, clip = LARS(parameters("a").values(), lr=0.1), CowClip(parameters("b").values(), lr=0.1)
        step(lars)
        step(clip)
        lars.collect_group_norms()
        clip.param_groups[0]["cowclip"] = True
        with pytest.raises(LayoutError, match="the wrapper adds them up"):
            step(lars)
        with pytest.raises(LayoutError, match="clips rows of embeddings"):
            step(clip)


# Options that make another plan -------------------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [2, {"a": 2}])
def test_segments_set_after_the_first_step(segments: Any) -> None:
    ps = parameters("a", "b")
    optimizer = LAMB(list(ps.items()))
    step(optimizer)
    optimizer.param_groups[0]["segments"] = segments
    step(optimizer)
    several = ["a[0]", "a[1]", "b[0]", "b[1]"] if segments == 2 else ["a[0]", "a[1]", "b"]
    assert list(optimizer.trust_ratios()) == several
    optimizer.param_groups[0]["segments"] = 3
    with pytest.raises(ValueError, match="does not divide into 3 segments"):
        step(optimizer)


def test_segments_changed_in_place() -> None:
    segments = {"a": 2}
    optimizer = LAMB([{"params": list(parameters("a", "b").items()), "segments": segments}])
    step(optimizer)
    segments["b"] = 2
    step(optimizer)
    assert list(optimizer.trust_ratios()) == ["a[0]", "a[1]", "b[0]", "b[1]"]


@pytest.mark.parametrize(
    ("optimizer_class", "before", "after"), [(LAMB, 2, 4), (LAMB, 2, None), (NovoGrad, None, 2), (NovoGrad, 4, 2)]
)
def test_numbers_of_other_segments_are_refused(optimizer_class: Any, before: int | None, after: int | None) -> None:
    """A sum over a layer says nothing about the layer's parts."""
    ps = parameters("a")
    optimizer = optimizer_class([{"params": list(ps.items()), "segments": before}], lr=0.1)
    step(optimizer)
    kept = ps["a"].detach().clone()
    optimizer.param_groups[0]["segments"] = after
    with pytest.raises(LayoutError, match="set segments before the first step"):
        step(optimizer)
    assert torch.equal(ps["a"], kept)


def test_segments_of_an_optimizer_with_statistics_set_after_the_first_step() -> None:
    ps = parameters("a")
    optimizer = CLARS(list(ps.items()), lr=0.1)
    ps["a"].sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["segments"] = 2
    ps["a"].sum().backward()
    with pytest.raises(LayoutError, match="leave out the option segments"):
        optimizer.step()


def test_cowclip_set_after_the_first_step() -> None:
    embedding, ids = torch.nn.Embedding(5, 3), torch.tensor([0, 1, 1])
    optimizer = CowClip(embedding.parameters(), lr=0.1, ratio=1e-3)
    embedding(ids).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["cowclip"] = True
    optimizer.zero_grad()
    embedding(ids).sum().backward()
    with pytest.raises(RuntimeError, match="no ids were counted"):
        optimizer.step()
    optimizer.count_lookups(embedding)
    expected = CowClip([torch.nn.Parameter(embedding.weight.detach().clone())], lr=0.1, ratio=1e-3, cowclip=True)
    expected.load_state_dict({**optimizer.state_dict(), "param_groups": expected.state_dict()["param_groups"]})
    optimizer.zero_grad()
    embedding(ids).sum().backward()
    (weight,) = expected.param_groups[0]["params"]
    weight.grad = embedding.weight.grad.clone()
    expected.count_ids(weight, ids)
    expected.step()
    optimizer.step()
    assert torch.equal(weight, embedding.weight)
    optimizer.param_groups[0]["cowclip"] = False
    with pytest.raises(ValueError, match=r"no nn\.Embedding"):
        optimizer.count_lookups(embedding)
    step(optimizer)


def test_cowclip_and_segments() -> None:
    optimizer = CowClip(parameters("a").values(), lr=0.1, cowclip=True)
    optimizer.param_groups[0]["segments"] = 2
    with pytest.raises(ValueError, match="leave out segments"):
        step(optimizer)


def test_adapt_set_after_the_first_step() -> None:
    optimizer = LAMB(list(parameters("a", "b", shape=(5,)).items()))
    step(optimizer)
    assert optimizer.adapted_layers() == set()
    optimizer.param_groups[0]["adapt"] = True
    assert optimizer.adapted_layers() == set()  # of the last step
    step(optimizer)
    assert optimizer.adapted_layers() == {"a", "b"}
    assert set(optimizer.trust_ratios().values()) != {1.0}


# What the last step reports -----------------------------------------------------------------------------------------


def optimizer_of_two_groups(optimizer_class: type[LayerwiseOptimizer] = LAMB) -> tuple[Any, Parameters]:
    ps = parameters("a", "b", "c")
    groups: list[dict[str, Any]] = [
        {"params": [("a", ps["a"]), ("b", ps["b"])], "adapt": True},
        {"params": [("c", ps["c"])], "adapt": False},
    ]
    return optimizer_class(groups, lr=0.1), ps  # type: ignore[call-arg]


@pytest.mark.parametrize("optimizer_class", [LAMB, LARS, LANS])
@pytest.mark.parametrize("calls", [(), (0, 1), (1, 0)])
def test_calls_for_single_groups_are_one_step(optimizer_class: Any, calls: tuple[int, ...]) -> None:
    optimizer, _ = optimizer_of_two_groups(optimizer_class)
    expected, _ = optimizer_of_two_groups(optimizer_class)
    for _ in range(3):
        step(expected)
        step(optimizer, *calls)
        assert optimizer.trust_ratios() == expected.trust_ratios()
        assert optimizer.adapted_layers() == {"a", "b"}


def test_a_group_is_added() -> None:
    optimizer, _ = optimizer_of_two_groups()
    step(optimizer)
    optimizer.add_param_group({"params": list(parameters("d").items())})
    assert list(optimizer.trust_ratios()) == ["a", "b", "c"]  # of the last step
    for _ in range(2):
        step(optimizer)
        names, ratios = optimizer.trust_ratio_vector()
        assert (names, ratios.shape) == (["a", "b", "c", "d"], (4,))
        assert optimizer.adapted_layers() == {"a", "b", "d"}


@pytest.mark.parametrize("calls", [(), (0, 1)])
@pytest.mark.parametrize("removed", ["group", "parameter", "group, for another one"])
def test_what_is_removed_is_given_up(removed: str, calls: tuple[int, ...]) -> None:
    optimizer, ps = optimizer_of_two_groups()
    step(optimizer, *calls)
    if removed == "parameter":
        optimizer.param_groups[0]["params"].remove(ps["a"])
        names = ["b", "c"]
    else:
        del optimizer.param_groups[0]
        names = ["c"]
        calls = calls[:1]
    gone = ps.pop("a")
    if removed == "group, for another one":
        del optimizer.param_groups[0]  # so that nothing is left of what was stepped
        optimizer.add_param_group({"params": list(parameters("d").items())})
        names = ["d"]
    optimizer.state.pop(gone)
    reference = weakref.ref(gone)
    del gone
    for _ in range(2):
        step(optimizer, *calls)
        assert list(optimizer.trust_ratios()) == names
        assert optimizer.adapted_layers() == {name for name in names if name != "c"}
    gc.collect()
    assert reference() is None


def test_groups_change_places() -> None:
    optimizer, _ = optimizer_of_two_groups()
    step(optimizer, 0, 1)
    optimizer.param_groups.reverse()
    step(optimizer)
    assert list(optimizer.trust_ratios()) == ["c", "a", "b"]
    assert optimizer.adapted_layers() == {"a", "b"}
    step(optimizer, 1, 0)
    assert list(optimizer.trust_ratios()) == ["a", "b", "c"]


def test_parameters_are_converted_after_the_first_step() -> None:
    """What a plan knows of a tensor's dtype would be wrong."""
    optimizer, ps = optimizer_of_two_groups()
    step(optimizer)
    for p in ps.values():
        p.grad = None
        p.data = p.data.double()
        optimizer.state[p] = {name: value.double() for name, value in optimizer.state[p].items()}
    step(optimizer)
    assert all(p.dtype == torch.float64 for p in ps.values())


def test_nothing_is_known_before_the_first_step() -> None:
    optimizer, _ = optimizer_of_two_groups()
    assert optimizer.trust_ratios() == {}
    assert optimizer.adapted_layers() == set()
