"""What a run was made on: the processor or GPU and the versions of the packages, stored with every result."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "trustratio")


def describe_machine(device: str | None = None, packages: Sequence[str] = PACKAGES) -> dict[str, object]:
    """Name the device, the number of cores, Python's version and those of the packages that are installed.

    Args:
        device: "cpu" or "cuda"; None: a GPU if torch finds one.
        packages: names of distributions.
    """
    on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: installed for name in packages if (installed := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
        flags = next((line for line in lines if line.startswith("flags")), "")
        widest = next((name for name in ("avx512f", "avx2") if f" {name} " in f"{flags} "), "")
        return ", ".join([*sorted(names), *([widest] if widest else [])])
    return platform.processor() or platform.machine()
