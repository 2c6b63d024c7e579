"""CONTRIBUTING's toy method, put into a copy of the package as it says there: one file, one row; and its module beside the package."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import anymask

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTION = PAGE.split("## Add a mask method")[1].split("\n## ")[0]
FILE, ROW = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
MODULE, PLAN = re.findall(r"```(?:python|toml)\n(.*?)```", PAGE.split("## Without changing anymask")[1].split("\n## ")[0], re.DOTALL)


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


def test_the_module_of_ones_own_is_trained_with_in_worker_processes_without_changing_the_package(tmp_path):
    """As a console script has it: without the current folder among the places where Python looks."""
    for name, text in (("mine.py", MODULE), ("smoother.toml", '[[technique]]\nname = "smoother"'), ("plan.toml", PLAN)):
        (tmp_path / name).write_text(text)
    (tmp_path / "plan.toml").write_text(PLAN + "sparsity = 0.5\nseeds = 1\ndense = false\nprotocol = { epochs = 1, batch_size = 1000 }\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/anymask").write_text("from anymask.cli import main\nif __name__ == '__main__':\n    raise SystemExit(main())\n")
    command = [sys.executable, "bin/anymask", "sweep", "plan.toml", "--out", "run", "--workers", "2"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/ledger.jsonl").read_text().splitlines()]
    trained = {(row["settings"]["model"], row["settings"]["mask"], *(t["name"] for t in row["techniques"])) for row in rows}
    assert trained == {("mine:net", mask, *more) for mask in ("centred", "centred+erk") for more in ((), ("smoother",))}
