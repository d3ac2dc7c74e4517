"""What a step costs under FSDP2: collectives and time, beside timm's LAMB and LARS and torch's AdamW.

    python -m benchmarks.fsdp_collectives

shards a small transformer over two processes with `fully_shard`, and counts the collectives inside `optimizer.step()`
with torch's CommDebugMode. Step times are medians over the steps after the first. Needs timm, no GPU; writes
docs/results/fsdp_collectives.json and prints a table.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
import types
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.ranks import leave

RANKS = 2
STEPS = 15
LAYERS = 4
OUTPUT = Path(__file__).parent.parent / "docs" / "results"


def timm_optimizer(module: str, name: str) -> Any:
    """A class of timm.optim from its file alone; importing the package needs a torchvision that fits torch."""
    spec = importlib.util.find_spec("timm")
    assert spec is not None, "pip install --no-deps timm"
    folder = Path(next(iter(spec.submodule_search_locations or ())))
    for package, path in (("timm", folder), ("timm.optim", folder / "optim")):
        if package not in sys.modules:
            sys.modules[package] = bare = types.ModuleType(package)
            bare.__path__ = [str(path)]
            bare.__spec__ = spec
    return getattr(importlib.import_module(f"timm.optim.{module}"), name)


def optimizers() -> dict[str, Any]:
    """Name -> function from parameters to an optimizer."""
    from trustratio.optimizers import LAMB, LARS

    return {
        "torch AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
        "timm Lamb": lambda p: timm_optimizer("lamb", "Lamb")(p, lr=1e-3, max_grad_norm=None),
        "timm Lars": lambda p: timm_optimizer("lars", "Lars")(p, lr=1e-3, momentum=0.9, weight_decay=0.01),
        "trustratio LAMB": lambda p: LAMB(p, lr=1e-3),
        "trustratio LARS": lambda p: LARS(p, lr=1e-3, weight_decay=0.01),
    }


def measure(make: Any) -> dict[str, Any]:
    """Collectives of one step and the median time of a step, in milliseconds, on this rank."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode

    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
    for part in (*model.layers, model):
        fully_shard(part)
    optimizer = make(list(model.parameters()))
    times, collectives = [], {}
    for step in range(STEPS):
        model(torch.randn(2, 16, 256)).square().mean().backward()
        dist.barrier()
        if step == 1:
            with CommDebugMode() as communication:
                optimizer.step()
            collectives = {str(kind).split(".")[-1]: n for kind, n in communication.get_comm_counts().items()}
        else:
            begin = time.perf_counter()
            optimizer.step()
            times.append(1e3 * (time.perf_counter() - begin))
        optimizer.zero_grad()
    return {
        "tensors": len(list(model.parameters())),
        "elements": sum(p.numel() for p in model.parameters()),
        "collectives": sum(collectives.values()),
        "by_kind": collectives,
        "milliseconds": statistics.median(times[2:]),
    }


def run_rank(rank: int, port: int, answer: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {name: measure(make) for name, make in optimizers().items()}
    if rank == 0:
        Path(answer).write_text(json.dumps(found))
    leave()


def run() -> dict[str, Any]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        answer = str(Path(folder) / "found.json")
        torch.multiprocessing.spawn(run_rank, (port, answer), nprocs=RANKS)
        found = json.loads(Path(answer).read_text())
    return {
        "ranks": RANKS,
        "steps": STEPS,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, gloo, one thread per rank",
        "versions": {package: version(package) for package in ("torch", "timm")},
        "optimizers": found,
    }


def table(result: dict[str, Any]) -> str:
    """A markdown table."""
    lines = ["| optimizer | collectives in `step()` | ms per step |", "|---|---:|---:|"]
    for name, found in result["optimizers"].items():
        lines.append(f"| {name} | {found['collectives']} | {found['milliseconds']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    result = run()
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "fsdp_collectives.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
