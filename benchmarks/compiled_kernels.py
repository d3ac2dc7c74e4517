"""Compiles the Triton kernels for GPUs, which needs none, and writes docs/results/compiled_kernels.json.

python -m benchmarks.compiled_kernels                        # all, for three capabilities: an hour on two cores
python -m benchmarks.compiled_kernels --some --capability 90 # each with one way to keep numbers; prints them
python -m benchmarks.compiled_kernels --page                 # the table in docs/kernels.md, from the file

What has been compiled is written as it comes, and not compiled again by the same version of Triton.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trustratio.optimizers.kernels import triton_kernels
from trustratio.optimizers.kernels.compiled_form import Kind
from trustratio.optimizers.kernels.triton_blocks import BLOCK
from trustratio.optimizers.kernels.triton_kernels import APPLY, APPLY_KEPT, MEASURE, MEASURE_AND_KEEP, Types

__all__ = ["Usage", "Variant", "compiled", "products", "some_variants", "variants", "write", "write_page"]

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "results" / "compiled_kernels.json"
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- compiled kernels: by benchmarks/compiled_kernels.py -->", "<!-- end of compiled kernels -->"
CAPABILITIES = (80, 90, 100)

INT64 = {
    *("rows", "changing", "idle", "ends", "keys", "gammas"),
    *("weights", "gradients", "first", "second", "third", "mean_squares", "compensations"),
}
FP64 = {"partial", "total"}
INTEGERS = {"count", "blocks", "layers"}
NUMBERS = {*triton_kernels.SCALARS, "complement2", "complement3"}

KEPT = [
    Types("fp32", "fp32", "fp32", "none"),
    Types("fp32", "bf16", "fp32", "none"),
    Types("fp32", "fp32", "bf16", "none"),
    Types("bf16", "bf16", "bf16", "stochastic"),
    Types("bf16", "bf16", "bf16", "kahan"),
    Types("bf16", "bf16", "fp32", "none"),
    Types("fp16", "fp16", "fp32", "none"),
    Types("bf16", "bf16", "fp32", "stochastic"),
    Types("bf16", "bf16", "fp32", "kahan"),
    Types("bf16", "fp32", "fp32", "none"),
]
"""Ways to keep numbers, the usual ones first."""


class Variant(NamedTuple):
    """One kernel, with all that is fixed when it is compiled.

    Attributes:
        kind: The formula; "FOLD" for the kernel that adds up the sums of blocks.
        mode: Of the sweep.
        aligned: Whether its blocks lie at multiples of 16 bytes.
        wide: Whether squares are added in fp64 throughout.
    """

    kind: str
    mode: int
    weight: str
    gradient: str
    state: str
    master: str
    aligned: bool
    wide: bool

    @property
    def types(self) -> Types:
        return Types(self.weight, self.gradient, self.state, self.master)


class Usage(NamedTuple):
    """What a compiled kernel takes.

    Attributes:
        warps: Of a program.
        registers: Of a thread.
        stack: Bytes of a thread that did not fit into registers.
        shared: Bytes of shared memory of a program.
        vectors: Loads and stores of 16 bytes in its PTX.
        singles: Those of less, of elements.
    """

    warps: int
    registers: int
    stack: int
    shared: int
    vectors: int
    singles: int


def variants(types: Types, capability: int) -> Iterator[Variant]:
    """Every kernel with one way to keep numbers, as GPUs of this capability use them."""
    wide = divmod(capability, 10) in triton_kernels.FAST_IN_FP64
    if types == KEPT[0]:
        yield Variant("FOLD", MEASURE, *types, aligned=True, wide=wide)
    for (kind, mode), aligned in itertools.product(_sweeps(), (True, False)):
        yield Variant(kind.name, mode, *types, aligned=aligned, wide=wide)


def some_variants() -> Iterator[Variant]:
    """Every kernel once, with ways to keep numbers, places and sums in turn."""
    yield Variant("FOLD", MEASURE, *KEPT[0], aligned=True, wide=True)
    for index, (kind, mode) in enumerate(_sweeps()):
        yield Variant(kind.name, mode, *KEPT[index % len(KEPT)], aligned=index % 3 > 0, wide=index % 4 > 0)


def _sweeps() -> list[tuple[Kind, int]]:
    updates = [kind for kind in Kind if kind.is_adam]
    momentum = [Kind.MOMENTUM, Kind.MOMENTUM_GSNR]
    sums = [(kind, MEASURE) for kind in Kind if kind not in (*updates, *momentum)]
    return [*sums, *((kind, APPLY) for kind in momentum), *itertools.product(updates, range(4))]


def compiled(variant: Variant, capability: int) -> tuple[Usage, str]:
    """What the kernel takes on GPUs of this capability, 90 for 9.0, and its PTX."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants, warps = _kernel(variant)
    signature = {name: _type_of(name, constants) for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    options = triton_kernels.compiler_options(warps)
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    taken = _resources(found.asm["cubin"], triton.knobs.nvidia.cuobjdump.path)
    vectors, singles = _accesses(ptx := found.asm["ptx"])
    return Usage(warps, taken["REG"], taken["STACK"], found.metadata.shared, vectors, singles), ptx


def _kernel(variant: Variant) -> tuple[Any, dict[str, Any], int]:
    """The function, its constants, and the number of warps."""
    if variant.kind == "FOLD":
        return triton_kernels._fold, {"BLOCK": triton_kernels.FOLD}, triton_kernels.WARPS
    kind, names = Kind[variant.kind], triton_kernels._TL_TYPES
    constants = {
        **{"KIND": kind.name, "MODE": variant.mode, "MOMENTUM": True, "NESTEROV": kind is Kind.MOMENTUM},
        **{"CLIPS": not kind.is_belief, "DECAYS": kind is Kind.ADAM},
        **{"WEIGHT": names[variant.weight], "GRADIENT": names[variant.gradient]},
        **{"STATE": names[variant.state], "MASTER": variant.master, "BLOCK": BLOCK},
        **{"ALIGNED": variant.aligned, "WIDE": variant.wide},
    }
    warps = variant.types.warps(variant.mode, variant.aligned)
    return triton_kernels._KERNELS[triton_kernels._family(kind)], constants, warps


def _type_of(name: str, constants: dict[str, Any]) -> str:
    kinds = {"constexpr": constants, "*i64": INT64, "*fp64": FP64, "i32": INTEGERS, "fp32": NUMBERS}
    return next((kind for kind, names in kinds.items() if name in names), "*fp32")


def _resources(cubin: bytes, program: str) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(count) for name, count in re.findall(r"(REG|STACK):(\d+)", usage.stdout + usage.stderr)}


def _accesses(ptx: str) -> tuple[int, int]:
    """Loads and stores of elements: of 16 bytes, and of fewer. Tables and sums are of single numbers of 8 bytes.

    Numbers of layers are single fp32 numbers, as elements may be: but they are loaded without a predicate.
    """
    of_vectors = re.findall(r"(?:ld|st)\.global(?:\.\w+)*?\.(?:v4\.b32|v2\.b64|b128)", ptx)
    of_elements = re.findall(r"@%p\d+ (?:ld|st)\.global(?:\.\w+)*?\.b(?:16|32)\b", ptx)
    singles = [one for one in of_elements if ".v" not in one]
    narrow = re.findall(r"(?:ld|st)\.global(?:\.\w+)*?\.v2\.b(?:16|32)", ptx)
    return len(of_vectors), len(singles) + len(narrow)


def products(ptx: str) -> int:
    """Multiplications in fp64, of which a thread does some for each of its elements, or two for each sum."""
    return len(re.findall(r"\b(?:mul|fma)(?:\.\w+)*\.f64\b", ptx))


def _job(job: tuple[Variant, int]) -> tuple[Variant, int, Usage]:
    variant, capability = job
    return variant, capability, compiled(variant, capability)[0]


def write(jobs: list[tuple[Variant, int]], processes: int, path: Path) -> list[list[Any]]:
    """Compile what the file does not have yet; returns all its rows of this version of Triton."""
    import triton

    content = json.loads(path.read_text()) if path.exists() else {}
    rows = content.setdefault(triton.__version__, [])
    columns = ["capability", *Variant._fields, *Usage._fields]
    content["columns"] = columns
    known = {tuple(row[: 1 + len(Variant._fields)]) for row in rows}
    missing = [(variant, capability) for variant, capability in jobs if (capability, *variant) not in known]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for count, (variant, capability, usage) in enumerate(pool.imap_unordered(_job, missing), 1):
            rows.append([capability, *variant, *usage])
            if count % 20 == 0 or count == len(missing):
                path.write_text(_text(content))
                print(f"{count} of {len(missing)}", file=sys.stderr, flush=True)
    return list(rows)


def _text(content: dict[str, Any]) -> str:
    """JSON with a line for each kernel."""
    parts = [f'"columns": {json.dumps(content["columns"])}']
    for version in sorted(set(content) - {"columns"}):
        lines = ",\n".join(json.dumps(row) for row in sorted(content[version]))
        parts.append(f'"{version}": [\n{lines}\n]')
    return "{\n" + ",\n".join(parts) + "\n}\n"


# The sweeps and ways to keep numbers that the page shows.
SHOWN = {
    "LARS, apply": (Kind.MOMENTUM, APPLY),
    "LAMB, measure and keep": (Kind.ADAM, MEASURE_AND_KEEP),
    "LAMB, apply": (Kind.ADAM, APPLY_KEPT),
    "VRLAMB, measure and keep": (Kind.ADAM_GSNR, MEASURE_AND_KEEP),
    "VRLAMB, apply": (Kind.ADAM_GSNR, APPLY_KEPT),
}
COLUMNS = {
    "fp32": KEPT[0],
    "bf16 state of fp32 weights": KEPT[2],
    "bf16 state and weights, by chance": KEPT[3],
    "bf16 state, weights with a rest": KEPT[4],
}


def write_page(path: Path = FILE, page: Path = PAGE) -> None:
    """Put what the file says between the marks in the page."""
    text = page.read_text()
    before, rest = text.split(BEGIN)
    _, behind = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n\n{_table(json.loads(path.read_text()))}\n{END}{behind}")


def _table(content: dict[str, Any]) -> str:
    """Registers of the usual kernels for 9.0 by the newest Triton in the file, and what all have in common."""
    version = max((name for name in content if name != "columns"), key=_numbers)
    rows = [dict(zip(content["columns"], row, strict=True)) for row in content[version]]
    taken = {
        (row["kind"], row["mode"], *(row[name] for name in Types._fields)): row["registers"]
        for row in rows
        if row["capability"] == 90 and row["aligned"]
    }
    counts = Counter(row["capability"] for row in rows)
    of_each = ", ".join(f"{count} kernels for {capability / 10}" for capability, count in sorted(counts.items()))
    stack = max(row["stack"] for row in rows)
    lines = [f"| sweep | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, (kind, mode) in SHOWN.items():
        numbers = [str(taken.get((kind.name, mode, *types), "")) for types in COLUMNS.values()]
        lines.append(f"| {name} | {' | '.join(numbers)} |")
    return (
        f"Compiled by Triton {version}: {of_each}. "
        f"{f'Up to {stack} bytes of a thread do not' if stack else 'All numbers of all of them'} fit into registers. "
        "Registers of a thread, for 9.0 and aligned blocks:\n\n" + "\n".join(lines) + "\n"
    )


def _numbers(version: str) -> list[int]:
    """Of a version such as 3.6.0 or 3.6.0+git1234, to compare."""
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def _capability(text: str) -> int:
    """90 of "9.0" and of "90"."""
    digits = text.replace(".", "") if re.fullmatch(r"\d{2,3}|\d{1,2}\.\d", text) else "0"
    if int(digits) < 70:
        raise argparse.ArgumentTypeError(f"{text!r} is no capability such as 9.0, or 90, that Triton compiles for")
    return int(digits)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled_kernels", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--capability", type=_capability, nargs="+", default=CAPABILITIES, help="9.0 or 90 (default: 8.0, 9.0 and 10.0)"
    )
    parser.add_argument(
        "--some",
        type=_positive,
        nargs="?",
        const=1,
        help="each kernel once, or one in SOME; prints them, with their loads of 16 bytes (vectors), of less (singles) "
        "and multiplications in fp64 (products), and writes nothing",
    )
    parser.add_argument("--page", action="store_true", help="compile nothing, write the table in the page")
    parser.add_argument(
        "--ways",
        type=_positive,
        default=len(KEPT),
        help=f"how many combinations of dtypes of weights and state, usual ones first (default: {len(KEPT)})",
    )
    parser.add_argument("--processes", type=_positive, default=2)
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    if options.page:
        write_page(options.out)
        return
    if options.some:
        chosen = itertools.islice(some_variants(), 0, None, options.some)
        for variant, capability in itertools.product(chosen, options.capability):
            usage, ptx = compiled(variant, capability)
            numbers = {"capability": capability, **variant._asdict(), **usage._asdict(), "products": products(ptx)}
            print(json.dumps(numbers), flush=True)
        return
    pairs = itertools.product(KEPT[: options.ways], options.capability)
    jobs = [(variant, capability) for types, capability in pairs for variant in variants(types, capability)]
    write(jobs, options.processes, options.out)


if __name__ == "__main__":
    main()
