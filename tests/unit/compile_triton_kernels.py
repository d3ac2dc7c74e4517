"""Compiles the kernels for a GPU, which needs none: python compile_triton_kernels.py CAPABILITY [all].

Each kernel with one way to keep numbers, or with all of them. Prints a line for each: the registers of a thread,
the bytes that did not fit into them, and what was compiled. Run by test_waiting.py in a process of its own.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trustratio.optimizers.kernels import triton_kernels
from trustratio.optimizers.kernels.compiled_form import Kind

INT64 = {
    *("rows", "changing", "idle", "ends", "keys", "gammas"),
    *("weights", "gradients", "first", "second", "third", "mean_squares", "compensations"),
}
FP64 = {"partial", "total"}
INTEGERS = {"count", "blocks", "layers"}
NUMBERS = {*triton_kernels.SCALARS, "complement2", "complement3"}

KEPT = [
    triton_kernels.Types("bf16", "fp32", "fp32", "none"),
    triton_kernels.Types("fp32", "fp32", "bf16", "none"),
    triton_kernels.Types("bf16", "bf16", "bf16", "stochastic"),
    triton_kernels.Types("bf16", "bf16", "bf16", "kahan"),
    triton_kernels.Types("bf16", "bf16", "fp32", "stochastic"),
    triton_kernels.Types("bf16", "bf16", "fp32", "kahan"),
    triton_kernels.Types("fp32", "fp32", "fp32", "none"),
]


def type_of(name: str, constants: dict[str, Any]) -> str:
    kinds = {"constexpr": constants, "*i64": INT64, "*fp64": FP64, "i32": INTEGERS, "fp32": NUMBERS}
    return next((kind for kind, names in kinds.items() if name in names), "*fp32")


def compile_kernel(kernel: Any, constants: dict[str, Any], capability: int, warps: int) -> tuple[int, int]:
    """The registers of a thread, and the bytes of its stack: what was left over."""
    signature = {name: type_of(name, constants) for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK):(\d+)", usage.stdout + usage.stderr))
    return int(found["REG"]), int(found["STACK"])


def variants(*, with_all: bool) -> Iterator[tuple[Kind, int, triton_kernels.Types]]:
    modes = [(kind, mode) for kind in Kind for mode in (range(4) if kind.is_adam else (triton_kernels.APPLY,))]
    for index, (kind, mode) in enumerate(modes):
        for types in KEPT if with_all else [KEPT[index % len(KEPT)]]:
            yield kind, mode, types


def main(capability: int, *, with_all: bool) -> None:
    of_fold = compile_kernel(triton_kernels._fold, {"BLOCK": triton_kernels.FOLD}, capability, triton_kernels.WARPS)
    print(*of_fold, "fold")
    for kind, mode, types in variants(with_all=with_all):
        names = triton_kernels._TL_TYPES
        constants = {
            **{"KIND": kind.name, "MODE": mode, "MOMENTUM": True, "NESTEROV": kind is Kind.MOMENTUM},
            **{"CLIPS": not kind.is_belief, "DECAYS": kind is Kind.ADAM},
            **{"WEIGHT": names[types.weight], "GRADIENT": names[types.gradient]},
            **{"STATE": names[types.state], "MASTER": types.master, "BLOCK": triton_kernels.BLOCK},
        }
        kernel = triton_kernels._KERNELS[triton_kernels._family(kind)]
        print(*compile_kernel(kernel, constants, capability, types.warps(mode)), kind.name, mode, *types, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), with_all="all" in sys.argv[2:])
