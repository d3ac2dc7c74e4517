"""Tensors that nothing explains are refused, never stepped with a wrong norm."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, LayoutError
from trustratio.optimizers.sharding.layout import Layer, Layout, Shard
from trustratio.optimizers.sharding.segments import in_segments


def layer() -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.randn(4, 3))
    p.grad = torch.randn(4, 3)
    return p


def test_a_flat_tensor_that_no_backend_explains_is_refused() -> None:
    optimizer = LAMB([layer()])
    flat = torch.nn.Parameter(torch.randn(12))
    flat.grad = torch.randn(12)
    before = flat.detach().clone()
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(LayoutError, match=r"Parameter of shape \(12,\) that the constructor was not given"):
        optimizer.step()
    assert torch.equal(flat, before)


def test_parameters_on_several_devices_are_refused() -> None:
    here, there = layer(), torch.nn.Parameter(torch.empty(3, device="meta"))
    there.grad = torch.empty(3, device="meta")
    before = here.detach().clone()
    optimizer = LAMB([("weight", here), ("bias", there)])
    with pytest.raises(LayoutError, match="on one device, got bias on meta and weight on cpu: move the model"):
        optimizer.step()
    assert torch.equal(here, before)
    assert not optimizer.state
    LAMB([("weight", here), ("empty", torch.nn.Parameter(torch.empty(0, device="meta")))]).step()


@pytest.mark.parametrize(
    ("attribute", "message"),
    [("_fsdp_flattened", "FSDP1 has flattened")],
)
def test_wrapped_parameters_are_refused(attribute: str, message: str) -> None:
    p = layer()
    setattr(p, attribute, True)
    with pytest.raises(LayoutError, match=message):
        LAMB([p]).step()


def test_a_tensor_subclass_is_refused() -> None:
    class Sharded(torch.Tensor):
        pass

    p = torch.nn.Parameter(torch.randn(4, 3).as_subclass(Sharded))
    p.grad = torch.randn(4, 3).as_subclass(Sharded)
    with pytest.raises(LayoutError, match="a tensor subclass"):
        LAMB([p]).step()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_of_a_wrapped_optimizer_does_not_take_flat_tensors_for_layers(copied: Any) -> None:
    optimizer = LAMB([layer()])
    flat = torch.nn.Parameter(torch.randn(12))
    optimizer.param_groups[0]["params"] = [flat]
    other = copied(optimizer)
    other.param_groups[0]["params"][0].grad = torch.randn(12)
    with pytest.raises(LayoutError, match="was not given"):
        other.step()


def test_shards_that_do_not_add_up_are_named() -> None:
    layout = Layout(
        backend="test",
        tensors=(torch.zeros(20),),
        groups=(0,),
        layers=(Layer("whole", (3, 2), 0), Layer("short", (4,), 0)),
        shards=(Shard(0, 0, 0, 6), Shard(1, 6, 0, 3)),
    )
    with pytest.raises(LayoutError, match=r"short \(4,\): 3 of 4 elements"):
        layout.prove()


def test_the_optimizers_import_torch_alone() -> None:
    program = (
        "import sys, trustratio.optimizers; "
        "wanted = {'deepspeed', 'transformers', 'accelerate', 'matplotlib', 'datasets', 'triton'}; "
        "sys.exit(str(wanted & set(sys.modules)) if wanted & set(sys.modules) else 0)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


def test_deepspeed_admits_the_classes_once_an_optimizer_is_made() -> None:
    import deepspeed  # noqa: F401
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    class Variant(LAMB):
        pass

    LAMB([layer()])
    Variant([layer()])
    assert LAMB in ZERO_SUPPORTED_OPTIMIZERS
    assert Variant in ZERO_SUPPORTED_OPTIMIZERS
    assert ZERO_SUPPORTED_OPTIMIZERS.count(LAMB) == 1


# Segments -----------------------------------------------------------------------------------------------------------


def layout_of(shape: tuple[int, ...], *shards: Shard, name: str = "layer") -> Layout:
    return Layout("test", (torch.zeros(1000),), (0,), (Layer(name, shape, 0),), shards)


def elements(shard: Shard, shape: tuple[int, ...], width: int) -> list[int]:
    """Positions in the layer of a block of `width` columns; of a run if width is 0."""
    if not width:
        return list(range(shard.offset, shard.offset + shard.length))
    columns = shape[1]
    first, column = divmod(shard.offset, columns)
    return [(first + i) * columns + column + j for i in range(shard.length // width) for j in range(width)]


@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize(
    ("width", "shard"), [(0, Shard(0, 5, 3, 14)), (0, Shard(0, 0, 0, 30)), (2, Shard(0, 7, 6, 8, 17))]
)
def test_segments_hold_the_same_elements_in_the_same_places(count: int, width: int, shard: Shard) -> None:
    shape = (6, 5)
    layout = in_segments(layout_of(shape, shard), [{"segments": count}])
    part = (6 // count, 5)
    assert [layer.shape for layer in layout.layers] == [part] * count
    found = [
        position + piece.layer * part[0] * part[1]
        for piece in layout.shards
        for position in elements(piece, part, width)
    ]
    assert found == elements(shard, shape, width)
    places = [place for piece in layout.shards for place in range(piece.start, piece.start + piece.length)]
    assert places == list(range(shard.start, shard.start + shard.length))
    assert sum(p.index_sum + p.length * p.layer * part[0] * part[1] for p in layout.shards) == sum(found)


def test_segments_by_name() -> None:
    groups = [{"segments": {"*.qkv.*": 3}}]
    assert len(in_segments(layout_of((6, 2), name="a.qkv.weight"), groups).layers) == 3
    assert [layer.name for layer in in_segments(layout_of((6, 2), name="b"), groups).layers] == ["b"]
    with pytest.raises(ValueError, match=r"layer a of shape \(6, 2\) does not divide into 4 segments"):
        in_segments(layout_of((6, 2), name="a"), [{"segments": 4}])


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (0, "segments must be a number of equal parts"),
        (1.5, "segments must be a number of equal parts"),
        ({"a": "3"}, "segments must be a number of equal parts"),
        ({"b": 3}, r"segments has the name 'b', which no parameter of the group has: \['a'\]"),
    ],
)
def test_bad_segments(segments: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAMB([{"params": [("a", torch.nn.Parameter(torch.ones(6, 2)))], "segments": segments}])


def test_shards_in_the_same_place_are_not_a_cover() -> None:
    """Both halves of one rank have the right length, and the same elements."""
    twice = replace(layout_of((4, 2), Shard(0, 0, 0, 4), Shard(0, 4, 0, 4)), placed=True)
    with pytest.raises(LayoutError, match=r"ranks hold overlapping parts of layer \(4, 2\)"):
        twice.prove()
    replace(twice, shards=(Shard(0, 0, 0, 4), Shard(0, 4, 4, 4))).prove()
