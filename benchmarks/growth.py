"""How the time of a dense step grows with the number of layers and of parameters."""

from __future__ import annotations

from typing import Any

from benchmarks.contenders import BASELINE, dense_contenders
from benchmarks.dense import TEMPORARIES, time_steps
from benchmarks.machine import available_memory
from benchmarks.shapes import equal_layers, make_parameters

__all__ = ["measure_growth_with_layers", "measure_growth_with_parameters"]

BYTES_PER_PARAMETER = 4 + 2 * 4 + 3 * 8 + TEMPORARIES  # weights, gradients and their copy, three states
LARGEST_LAYER = 1 << 22


def _measure(layers: int, elements: int, device: str, rounds: int) -> dict[str, Any]:
    names = (BASELINE, "torch AdamW foreach", "trustratio LAMB")
    chosen = [c for c in dense_contenders(device) if c.name.startswith(names) and "eager" not in c.name]
    return {"rows": time_steps(chosen, make_parameters(equal_layers(layers, elements), device), rounds)}


def measure_growth_with_layers(counts: list[int], elements: int, device: str, rounds: int) -> dict[str, Any]:
    """Time a step over the same number of elements in ever more layers."""
    return {str(count): _measure(count, elements, device, rounds) for count in counts}


def measure_growth_with_parameters(sizes: list[int], device: str, rounds: int) -> dict[str, Any]:
    """Time a step over ever more elements in layers of at most 4 million; sizes that memory does not hold say so."""
    results: dict[str, Any] = {}
    for size in sizes:
        needed = BYTES_PER_PARAMETER * size
        if needed > 0.9 * available_memory(device):
            results[str(size)] = {"missing": f"needs {needed / 1e9:.0f} GB of memory"}
            continue
        layers = max(8, size // LARGEST_LAYER)
        results[str(size)] = _measure(layers, size, device, rounds)
    return results
