"""Two small steps of each kernel, for a tool that looks at every access to memory.

python -m benchmarks.on_gpu.sharded.one_step DEVICE
"""

from __future__ import annotations

import sys

import torch

from benchmarks.on_gpu.speed.contenders import IN_MICRO_BATCHES, OURS
from benchmarks.on_gpu.speed.subject import Subject
from trustratio.optimizers import create_optimizer

from .sanitizer import BEGUN, STEPPED

__all__ = ["main"]

SHAPES = [(67, 31), (2049,), (3, 5, 7), (1,), ()]
"""Of sizes that no block and no vector of a load divides."""
BF16 = {"state_dtype": "bfloat16"}


def main(device: str) -> None:
    """Step LAMB, LARS, LANS and VRLAMB in fp32, and LAMB with state in bf16; say when that begins and ends."""
    torch.ones(1, device=device).item()
    print(BEGUN, flush=True)
    for name, optimizer, options in [*((name, kind, {}) for name, kind in OURS.items()), ("bf16", "lamb", BF16)]:
        subject = Subject(SHAPES, device)
        stepped = create_optimizer(optimizer, subject.groups(), lr=1e-3, implementation="triton", **options)
        for _ in range(2):
            subject.prepare(name)
            stepped.step()
        assert all(torch.isfinite(p).all() for p in subject.parameters), f"{name} made numbers that are not finite"
    print(f"{STEPPED} {len(OURS) + 1} optimizers, {len(IN_MICRO_BATCHES)} of them with statistics of micro-batches")


if __name__ == "__main__":
    main(sys.argv[1])
