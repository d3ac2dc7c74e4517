"""Runs a function on several local processes that are joined by gloo (NCCL on GPUs)."""

from __future__ import annotations

import os
import pickle
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

__all__ = ["leave", "run_on_ranks"]


def run_on_ranks(function: Callable[..., Any], ranks: int, *arguments: Any, deepspeed: bool = False) -> Any:
    """Call a module-level function in `ranks` new processes, one thread each, and return what rank 0 returned.

    Args:
        function: What to call, with `arguments`.
        ranks: Number of processes.
        arguments: Anything that pickles.
        deepspeed: Initialise DeepSpeed's communication too.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer"
        torch.multiprocessing.spawn(_serve, (ranks, port, answer, function, arguments, deepspeed), nprocs=ranks)
        # DeepSpeed leaves 66 MB of shared memory per rank behind.
        for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_127.0.0.1_{port}_*"):
            buffer.unlink(missing_ok=True)
        return pickle.loads(answer.read_bytes())


def _serve(
    rank: int, ranks: int, port: int, answer: Path, function: Callable[..., Any], arguments: Any, deepspeed: bool
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if deepspeed:
        _join_with_deepspeed(backend)
    else:
        dist.init_process_group(backend)
    result = function(*arguments)
    if rank == 0:
        answer.write_bytes(pickle.dumps(result))
    leave()


def leave() -> None:
    """End this rank's process, whose answer is written.

    Not by returning: wrappers keep process groups in circles, and gloo's threads now and then abort a process that ends
    with such groups.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _join_with_deepspeed(backend: str) -> None:
    import deepspeed
    from deepspeed.utils import logger

    from trustratio.integrations.deepspeed.building import leave_out_shared_memory

    logger.setLevel("ERROR")
    leave_out_shared_memory()  # nobody here sends through it, and a build that is interrupted hangs the next
    deepspeed.init_distributed(backend, verbose=False)
