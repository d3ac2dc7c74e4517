"""Builds the compiled sweeps over CPU memory, if there is a compiler. All else is in pyproject.toml.

The library is plain C without Python's headers, so that one wheel serves every Python: its tag says for which processor
and from which glibc on. With TRUSTRATIO_TARGET=x86_64 or aarch64 it is compiled by Zig, for glibc 2.17 on that
processor, on whichever machine this is.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

TARGETS = ("x86_64", "aarch64")
OLDEST_GLIBC = (2, 17)  # the first that has aarch64

target = os.environ.get("TRUSTRATIO_TARGET", "")
if target and target not in TARGETS:
    raise SystemExit(f"TRUSTRATIO_TARGET must be {' or '.join(TARGETS)}, or not set; got {target!r}")


def oldest_glibc(library: bytes) -> "tuple[int, int] | None":
    """The oldest glibc that has all symbols which an ELF library asks for; None if it asks for none of glibc's."""
    found = re.findall(rb"\0GLIBC_(\d+)\.(\d+)", library)
    return max((int(major), int(minor)) for major, minor in found) if found else None


class BuildLibrary(build_ext):
    """Builds a library that is loaded with ctypes."""

    def finalize_options(self) -> None:
        """Compile anew, since the last library may be another target's."""
        super().finalize_options()
        self.force = True

    def get_ext_filename(self, fullname: str) -> str:
        """Without the name of a Python, which does not matter to it."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        if not target:
            return super().build_extension(ext)
        path = Path(self.get_ext_fullpath(ext.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        where = ["-target", f"{target}-linux-gnu.{'.'.join(map(str, OLDEST_GLIBC))}", "-shared", "-fPIC", "-s"]
        options = [*where, *ext.extra_compile_args, *ext.extra_link_args]
        subprocess.run([sys.executable, "-m", "ziglang", "cc", *options, "-o", path, *ext.sources], check=True)


class TaggedWheel(bdist_wheel):
    """Tags a wheel by what its library needs: no certain Python, and on Linux the glibc that it asks for."""

    def get_tag(self) -> "tuple[str, str, str]":
        platform = super().get_tag()[2]
        builder = self.get_finalized_command("build_ext")
        library = Path(builder.get_ext_fullpath(builder.extensions[0].name))
        if not library.exists():  # there was no compiler
            return "py3", "none", "any"
        glibc = oldest_glibc(library.read_bytes())
        if glibc and (target or platform.startswith("linux_")):
            major, minor = max(glibc, OLDEST_GLIBC)
            platform = f"manylinux_{major}_{minor}_{target or platform.removeprefix('linux_')}"
        return "py3", "none", platform


if __name__ == "__main__":
    setup(
        cmdclass={"build_ext": BuildLibrary, "bdist_wheel": TaggedWheel},
        setup_requires=["ziglang>=0.13"] if target else [],
        ext_modules=[
            # Plain C, loaded with ctypes; without it steps are computed by tensor operations.
            Extension(
                "trustratio.optimizers.kernels._cpu_kernels",
                sources=["optimizers/kernels/cpu_kernels.c"],
                depends=["optimizers/kernels/cpu_sweeps.h", "optimizers/kernels/cpu_rounding.h"],
                extra_compile_args=["-O3", "-g0", "-fno-math-errno", "-ffp-contract=fast", "-pthread", "-Wno-psabi"],
                extra_link_args=["-pthread"],
                optional=not target,
            )
        ],
    )
