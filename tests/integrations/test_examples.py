"""The examples run, and differ from the scripts without them in the lines that are marked."""

import re
from pathlib import Path

import pytest
import torch

from anymask.prunables import prunable

ROOT = Path(__file__).resolve().parents[2]
MNIST = (ROOT / "examples" / "mnist.py").read_text(encoding="utf-8")
MARKED = re.compile(r"# anymask (\d)/4$")
README = (ROOT / "README.md").read_text(encoding="utf-8")
# "py" and not "python": test_docs.py runs those, and lets no warning pass; these two packages give some of their own.
EXAMPLES = dict(zip(("lightning", "transformers"), re.findall(r"```py\n(.*?)```", README, re.DOTALL), strict=True))
ADDED = re.compile(r"  # \+( .*)?$")
NUMBERS = {3: "three", 4: "four"}


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


def test_the_readme_names_the_mnist_script_and_its_marks() -> None:
    assert "[examples/mnist.py](examples/mnist.py) is PyTorch's MNIST script on the embedded images; the four lines" in README
    assert "`# anymask 1/4`" in README


def train(script: str, name: str) -> list[tuple[int, int]]:
    """Run an example of the README: for each weight that a mask may cover, how many zeros it begins with and how many of them stay."""
    torch.manual_seed(0)
    names: dict = {"__name__": "example"}
    before, after = re.split(r"^(?=trainer = )", script, flags=re.MULTILINE)
    exec(compile(before, f"README.md-{name}", "exec"), names)
    pruned = {key: p == 0 for key, p in prunable(names["model"]).items()}
    exec(compile(after, f"README.md-{name}", "exec"), names)
    weights = prunable(names["model"])
    return [(int(zero.sum()), int((weights[key].cpu() == 0)[zero.cpu()].sum())) for key, zero in pruned.items()]


@pytest.mark.filterwarnings("ignore")  # advice of Lightning and transformers to the people who run this
@pytest.mark.parametrize(("package", "lines"), [("lightning", 4), ("transformers", 4)])
def test_the_examples_of_the_readme_keep_every_zero_by_the_lines_that_are_marked(
    package: str, lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    whole = EXAMPLES[package].splitlines()
    plain = [line for line in whole if not ADDED.search(line)]
    assert len(whole) - len(plain) == lines
    assert f"`pip install anymask[{package}]`), {NUMBERS[lines]} lines" in README
    assert not [line for line in plain if "AnyMask" in line or re.search(r"\bsparse\b", line)]  # nothing of it is left unmarked
    kept = train("\n".join(whole), package)
    assert all(zeros == stay for zeros, stay in kept)
    assert sum(zeros for zeros, _ in kept) > 100
    lost = train("\n".join(plain), package)  # it runs without them, and the zeros go
    assert [zeros for zeros, _ in lost] == [zeros for zeros, _ in kept]
    assert sum(stay for _, stay in lost) < sum(zeros for zeros, _ in lost) / 2
