"""Run the README's two commands in a fresh clone of HEAD, time them, and keep the demo's ledger.

python tools/time_commands.py        on a quiet machine; writes results/times.json and results/demo/ledger.jsonl
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from anymask.runlog import atomic

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("make demo", "make test")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "anymask"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        if (ROOT.parent / "shared").exists():  # the image packs that some tests use
            (Path(folder) / "shared").symlink_to(ROOT.parent / "shared")
        minutes = {}
        for command in COMMANDS:
            began = time.monotonic()
            done = subprocess.run(command.split(), cwd=clone, check=False)
            minutes[command] = (time.monotonic() - began) / 60
            if done.returncode:
                print(f"{command} failed in a fresh clone", file=sys.stderr)
                return 1
            if command == "make demo":
                (ROOT / "results" / "demo").mkdir(parents=True, exist_ok=True)
                shutil.copy(clone / "runs" / "demo" / "ledger.jsonl", ROOT / "results" / "demo" / "ledger.jsonl")
    measured = {
        "machine": f"{os.cpu_count()} cores of an {processor()}",
        "commands": {command: {"minutes": round(value, 2)} for command, value in minutes.items()},
    }
    with atomic(ROOT / "results" / "times.json", "w") as file:
        file.write(json.dumps(measured, indent=1) + "\n")
    return 0


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
