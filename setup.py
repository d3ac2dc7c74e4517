"""Builds the compiled sweeps over CPU memory, if there is a compiler. All else is in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        # Plain C, loaded with ctypes; without it steps are computed by tensor operations.
        Extension(
            "trustratio.optimizers.kernels._cpu_kernels",
            sources=["optimizers/kernels/cpu_kernels.c"],
            depends=["optimizers/kernels/cpu_sweeps.h", "optimizers/kernels/cpu_rounding.h"],
            extra_compile_args=["-O3", "-fno-math-errno", "-ffp-contract=fast", "-pthread", "-Wno-psabi"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
