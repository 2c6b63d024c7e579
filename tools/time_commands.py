"""Run the README's two commands in a fresh clone of HEAD, time them, and keep the demo's ledger.

python tools/time_commands.py        on a quiet machine; writes results/times.json and results/demo/ledger.jsonl
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from anymask.runlog import atomic, processor

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("make demo", "make test")


def main() -> int:
    commands = sys.argv[1:] or list(COMMANDS)
    times = ROOT / "results" / "times.json"
    minutes = json.loads(times.read_text())["minutes"] if times.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "anymask"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        if (ROOT.parent / "shared").exists():  # the image packs that some tests use
            (Path(folder) / "shared").symlink_to(ROOT.parent / "shared")
        for command in commands:
            began = time.monotonic()
            if subprocess.run(command.split(), cwd=clone, check=False).returncode:
                print(f"{command} failed in a fresh clone", file=sys.stderr)
                return 1
            minutes[command] = round((time.monotonic() - began) / 60, 1)
        if "make demo" in commands:
            (ROOT / "results" / "demo").mkdir(parents=True, exist_ok=True)
            shutil.copy(clone / "runs" / "demo" / "ledger.jsonl", ROOT / "results" / "demo" / "ledger.jsonl")
    with atomic(times, "w") as file:
        file.write(json.dumps({"machine": f"{os.cpu_count()} cores of an {processor()}", "minutes": minutes}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
