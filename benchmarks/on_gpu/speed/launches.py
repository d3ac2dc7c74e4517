"""What a step would send to a GPU, counted on a CPU: launches of Triton's interpreter and tensor operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["count_on_cpu"]


class _Operations(TorchDispatchMode):
    """Counts tensor operations that are none of the interpreter's own."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.kernels: Counter[str] = Counter()
        self._inside_a_kernel = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not self._inside_a_kernel
        return function(*args, **(kwargs or {}))

    @contextmanager
    def kernel(self, name: str) -> Iterator[None]:
        """Around a launch."""
        self.kernels[name] += 1
        self._inside_a_kernel = True
        try:
            yield
        finally:
            self._inside_a_kernel = False


def count_on_cpu(work: Callable[[], object]) -> dict[str, Any]:
    """Launches of Triton kernels and tensor operations of `work`."""
    operations = _Operations()
    with _seen_by(operations), operations:
        work()
    return {
        "kernels": operations.kernels.total(),
        "tensor_operations": operations.count,
        "by_name": dict(operations.kernels.most_common(12)),
    }


@contextmanager
def _seen_by(operations: _Operations) -> Iterator[None]:
    """Show the interpreter's launches, where there is Triton, to `operations`."""
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        yield
        return
    launch = GridExecutor.__call__

    def counted(executor: Any, *args: Any, **kwargs: Any) -> Any:
        with operations.kernel(getattr(executor.fn, "__name__", "kernel")):
            return launch(executor, *args, **kwargs)

    GridExecutor.__call__ = counted
    try:
        yield
    finally:
        GridExecutor.__call__ = launch
