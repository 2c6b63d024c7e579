"""The native kernels: plain C without headers of Python or PyTorch. Without a compiler the installation goes on, and says so."""

import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = "src/anymask/kernels"
NAMES = ("core", "portable", "avx2", "avx512")
PARTS = ("blocks", "gather", "norm", "normpool", "pool", "soft")


class Build(build_ext):
    """With OpenMP where the compiler has it; optional as a whole."""

    def build_extension(self, ext):
        for flags in (["-fopenmp"], []):  # without it: one thread
            ext.extra_compile_args = ["-O3", "-std=gnu11", *flags]
            ext.extra_link_args = ["-lm", *flags]
            try:
                return super().build_extension(ext)
            except Exception as error:
                print(f"anymask: no native kernels with {flags or 'one thread'}: {error}", file=sys.stderr)
        print("anymask: to_sparse, and the speed of anymask.load, need a C compiler (gcc or clang); all else works", file=sys.stderr)

    def get_export_symbols(self, ext):
        return []  # it is no Python module,

    def get_ext_filename(self, fullname):
        return super().get_ext_filename(fullname).partition(".")[0] + ".clib"  # nor named like one


setup(
    cmdclass={"build_ext": Build},
    ext_modules=[
        Extension(
            "anymask.kernels._native",
            [f"{KERNELS}/{name}.c" for name in NAMES],
            depends=[f"{KERNELS}/core.h", *(f"{KERNELS}/{part}.inc" for part in PARTS)],
            optional=True,
        )
    ],
)
