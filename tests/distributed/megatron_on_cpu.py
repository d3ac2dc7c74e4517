"""Megatron-core's DistributedDataParallel and DistributedOptimizer on CPU: what must be replaced, and what is not.

Megatron-core 0.16.1 insists on CUDA in a few places. While `without_cuda()` is entered

    torch.cuda.current_device()             returns the CPU
    device="cuda" in any torch function     means the CPU
    tensor.type()                           says "torch.cuda.FloatTensor" and so on

and nothing else is replaced: buffers, buckets, range maps, reduce-scatter, clipping, loss scale, main parameters and
all-gather are Megatron's own code, over gloo.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode


class _CPUForCUDA(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "cuda" in str(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        result = function(*args, **kwargs)
        if function is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.")
        return result


@contextmanager
def without_cuda() -> Iterator[None]:
    with mock.patch("torch.cuda.current_device", return_value=torch.device("cpu")), _CPUForCUDA():
        yield
