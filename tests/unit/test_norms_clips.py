"""What is remembered of clips and layers, where gradients share memory and layers are left out at random."""

from __future__ import annotations

import gc

import torch

from trustratio.integrations.layer_norms import LayerNorms, clip_grad_norm_
from trustratio.integrations.norms.shard_sums import MOST_KEPT, ShardSums


def test_a_clip_leaves_what_is_known_of_other_views_of_a_bucket() -> None:
    """As DDP's gradient_as_bucket_view makes them: written together, they have one version."""
    bucket = torch.zeros(8)
    first, second = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in (first, second)]
    norms = [LayerNorms(optimizer) for optimizer in optimizers]
    first.grad, second.grad = bucket[:4], bucket[4:]
    said = []
    for limit in (0.01, None, 1e9):
        bucket.fill_(1.0)
        for optimizer in optimizers:
            if limit is not None:
                clip_grad_norm_(optimizer, limit)
        for optimizer in optimizers:
            optimizer.step()
        said.append([one.latest().clipped for one in norms])
    assert said == [[True, True], [None, None], [False, False]]


def test_memory_is_bounded_where_other_layers_are_left_out_in_every_step() -> None:
    layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(10))
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    LayerNorms(optimizer, layers, every=1)
    for step in range(2 * MOST_KEPT + 10):
        for number, layer in enumerate(layers):
            for p in layer.parameters():
                p.grad = torch.ones_like(p) if (step + 1) >> number & 1 else None
        clip_grad_norm_(optimizer, 1.0)
        optimizer.step()
    kept = [len(sums) for sums in _orders()]
    assert kept
    assert max(kept) <= MOST_KEPT


def _orders() -> list[dict]:
    """What shard sums keep by sets of layers, wherever they are."""
    return [found._orders for found in gc.get_objects() if isinstance(found, ShardSums) and found._orders]
