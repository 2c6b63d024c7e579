"""The same cases but for equal bits, with the native core built for AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import anymask.kernels

SOURCE = Path(anymask.kernels.__file__).parent
CASES = [str(Path(__file__).parent / f"test_{name}.py") for name in ("gather", "norms")]


def _runtime(name: str) -> str | None:
    """Where gcc has the sanitizer's library."""
    if shutil.which("gcc") is None:
        return None
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=False).stdout.strip()
    return found if os.path.isabs(found) else None


@pytest.mark.skipif(_runtime("libasan.so") is None, reason="no gcc with AddressSanitizer here")
def test_the_native_core_is_clean_under_both_sanitizers(tmp_path):
    built = tmp_path / "sanitized.clib"
    flags = ["-O1", "-g1", "-std=gnu11", "-fPIC", "-shared", "-fopenmp", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [str(SOURCE / f"{name}.c") for name in ("core", "portable", "avx2", "avx512")]
    subprocess.run(["gcc", *flags, "-o", str(built), *sources, "-lm"], check=True)
    env = {
        **os.environ,
        "ANYMASK_NATIVE": str(built),
        "ANYMASK_KERNEL_CASES": "25",
        "LD_PRELOAD": f"{_runtime('libasan.so')} {_runtime('libstdc++.so')}",  # PyTorch throws, which ASan wants to see
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",  # the leaks of Python and PyTorch are their own
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *CASES, "-k", "not unknown and not busy"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "skipped" not in done.stdout
    assert "[100%]" in done.stdout
