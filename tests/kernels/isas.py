"""What the tests of the native kernels go through."""

import os

from anymask.kernels import available, library

ISAS = [name for name in ("portable", "avx2", "avx512") if available() and library.library().am_use(name.encode()) is not None]
CASES = int(os.environ.get("ANYMASK_KERNEL_CASES", "60"))  # the sanitizer run asks for as many
