"""Tensors that nothing explains are refused, never stepped with a wrong norm."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch

from trustratio.optimizers import LAMB, LayoutError
from trustratio.optimizers.layout import Layer, Layout, Shard


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
