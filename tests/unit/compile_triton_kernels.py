"""Compiles every kernel for an H100, which needs no GPU; prints how many. Run by test_waiting.py in its own process."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trustratio.optimizers.kernels import triton_kernels
from trustratio.optimizers.kernels.compiled_form import Kind

TARGET = GPUTarget("cuda", 90, 32)
INT64 = {"rows", "changing", "idle", "weights", "gradients", "first", "second", "third", "mean_squares", "ends"}
FP64 = {"partial", "total"}
INTEGERS = {"count", "blocks", "layers"}
NUMBERS = {*triton_kernels.SCALARS, "complement2", "complement3"}


def type_of(name: str, constants: dict[str, Any]) -> str:
    kinds = {"constexpr": constants, "*i64": INT64, "*fp64": FP64, "i32": INTEGERS, "fp32": NUMBERS}
    return next((kind for kind, names in kinds.items() if name in names), "*fp32")


def compile_kernel(kernel: Any, constants: dict[str, Any]) -> None:
    signature = {name: type_of(name, constants) for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    triton.compile(ASTSource(fn=kernel, signature=signature, constexprs=places), target=TARGET)


def variants() -> list[tuple[Any, dict[str, Any]]]:
    kernels: list[tuple[Any, dict[str, Any]]] = [(triton_kernels._fold, {"BLOCK": triton_kernels.FOLD})]
    for kind in Kind:
        for mode in range(4) if kind.is_adam else (triton_kernels.APPLY,):
            constants = {
                **{"KIND": kind.name, "MODE": mode, "MOMENTUM": True, "NESTEROV": kind is Kind.MOMENTUM},
                **{"WEIGHT": triton_kernels._TL_TYPES["bf16"], "GRADIENT": triton_kernels._TL_TYPES["fp32"]},
                "BLOCK": triton_kernels.BLOCK,
            }
            kernels.append((triton_kernels._KERNELS[triton_kernels._family(kind)], constants))
    return kernels


if __name__ == "__main__":
    for kernel, constants in variants():
        compile_kernel(kernel, constants)
    print(len(variants()))
