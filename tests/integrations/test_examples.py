"""The examples run, and differ from the scripts without them in the lines that are marked."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
MNIST = (ROOT / "examples" / "mnist.py").read_text(encoding="utf-8")
MARKED = re.compile(r"# anymask (\d)/4$")
TEXT = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
PAGE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def run(script: str) -> torch.nn.Module:
    names: dict = {"__name__": "example"}
    exec(compile(script, "mnist.py", "exec"), names)
    return names["main"](["--dry-run", "--epochs", "4", "--batch-size", "8"])


def zeros(model: torch.nn.Module) -> float:
    weights = [p for p in model.parameters() if p.dim() > 1]
    return sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)


def test_the_mnist_script_needs_four_lines_more(capsys: pytest.CaptureFixture[str]) -> None:
    lines = MNIST.splitlines()
    assert sorted(m.group(1) for line in lines if (m := MARKED.search(line))) == ["1", "2", "3", "4"]
    plain = [line for line in lines if not MARKED.search(line)]
    assert len(lines) - len(plain) == 4
    assert zeros(run("\n".join(plain))) == 0
    assert zeros(run(MNIST)) == pytest.approx(0.9, abs=0.001)
    assert capsys.readouterr().out.count("Accuracy") == 8


@pytest.mark.filterwarnings("ignore")  # advice of Lightning and transformers to the people who run this
@pytest.mark.parametrize(("place", "package", "lines"), [(0, "lightning", 4), (1, "transformers", 3)])
def test_the_examples_of_the_page_run_and_take_as_many_lines_as_it_says(
    place: int, package: str, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    exec(compile(PAGE[place], f"docs/integrations.md-{package}", "exec"), {})
    ours = [line for line in PAGE[place].splitlines() if "AnyMask" in line or re.search(r"\bsparse\b", line)]
    assert len(ours) == lines, ours  # added, or changed to name the callback
    assert f"{({3: 'Three', 4: 'Four'})[lines]} lines are added or changed" in TEXT
