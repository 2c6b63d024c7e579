"""CONTRIBUTING's toy method, put into a copy of the package as it says there: one file, one row."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import anymask

ROOT = Path(__file__).resolve().parent.parent
SECTION = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Add a mask method")[1].split("\n## ")[0]
FILE, ROW = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


def test_the_toy_method_takes_one_file_and_one_row_and_keeps_every_contract(tmp_path):
    package = tmp_path / "anymask"
    shutil.copytree(anymask.__path__[0], package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "pruning/centred.py").write_text(FILE)
    methods = package / "pruning/methods.py"
    table, rows = methods.read_text().split("METHODS: dict[str, Method] = {\n    row.name: row\n    for row in (\n")
    methods.write_text(
        f"from anymask.pruning.centred import centred\n{table}METHODS = {{\n    row.name: row\n    for row in (\n{ROW.strip()},\n{rows}"
    )
    contracts = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/contracts/test_methods.py", "-k", "centred"]
    where = os.environ | {"PYTHONPATH": str(tmp_path)}
    said = subprocess.run(contracts, cwd=ROOT, env=where, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    assert int(re.search(r"(\d+) passed", said.stdout)[1]) >= 20
    listed = subprocess.run([sys.executable, "-m", "anymask", "list", "masks"], env=where, capture_output=True, text=True, check=True)
    assert "weights that stand out from their layer" in listed.stdout
