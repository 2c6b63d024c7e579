"""The benchmarks of speed run, at sizes of a test, and write what docs/speed.md is made from."""

import importlib
import json
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from anymask.kernels import available, why_not

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("training", "inference", "layers", "trainer", "overhead")

pytestmark = pytest.mark.skipif(not available(), reason=why_not())


def script(name: str) -> ModuleType:
    """A module of benchmarks/ or tools/, which import each other by their plain names."""
    for folder in ("benchmarks", "tools"):
        if str(ROOT / folder) not in sys.path:
            sys.path.append(str(ROOT / folder))
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of all of them."""
    folder = tmp_path_factory.mktemp("sparse")
    for name in NAMES:
        script(name).main(["--tiny", "--threads", "1", "--out", str(folder / f"{name}.json")])
    return folder


def read(results: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((results / f"{name}.json").read_text())
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_run_writes_all_its_cases_and_where_they_were_measured(results: Path, name: str) -> None:
    found = read(results, name)
    assert found["finished"]
    assert found["machine"]["threads"] == 1
    assert {"processor", "cores", "isa", "torch", "when"} <= set(found["machine"])
    assert len({row["name"] for row in found["results"]}) == len(found["results"]) >= 1


def test_every_part_of_the_page_is_made_from_what_they_write(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = script("speed_tables")
    monkeypatch.setattr(tables, "RESULTS", results)
    for name in ("demo-dense.jsonl", "training-2026-11-24.json"):  # a ledger, which is of no script, and what another host gave
        shutil.copy(ROOT / "results" / "sparse" / name, results)
    page = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/speed.md"))
    for name, make in tables.PARTS.items():
        assert f"<!-- made by {name} -->" in page
        text = make()
        assert text.strip()
        assert text != tables.NOTHING, name
        rows = [line.count("|") for line in text.splitlines() if line.startswith("|")]
        assert len(set(rows)) <= 1, name  # no cell too many
    monkeypatch.setattr(tables, "RESULTS", results / "nowhere")
    assert {make() for make in tables.PARTS.values()} == {tables.NOTHING}


def test_the_figures_are_svg_with_a_line_for_each_network_and_mask(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = script("speed_tables")
    monkeypatch.setattr(tables, "RESULTS", results)
    lines = {}
    for path, draw in tables.FIGURES.items():
        drawn = ET.fromstring(draw())
        lines[Path(path).stem] = len(drawn.findall(".//{*}polyline"))
        assert draw() == draw()
    assert lines["training"] == 1
    assert lines["inference"] == 2  # batch sizes
    assert lines["layers"] >= 4  # two layers, each with and without the change of layout
    monkeypatch.setattr(tables, "RESULTS", results / "nowhere")
    assert {draw() for draw in tables.FIGURES.values()} == {None}


def test_the_count_of_operations_is_that_of_the_kept_weights() -> None:
    """2 x kept x positions x batch for each of forward, input gradient (not of the images) and weight gradient, sparse or dense."""
    import torch

    from anymask import Mask, to_sparse

    counting, training = script("counting"), script("training")
    counts = []
    for convert in (False, True):
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.Conv2d(4, 2, 1, bias=False), torch.nn.Flatten())
        kept = torch.zeros(4, 3, 3, 3)
        kept[:, 0, 0] = 1  # 12 of 108
        mask = Mask({"0.weight": kept, "1.weight": torch.ones(2, 4, 1, 1)})
        mask.apply(model)
        x = torch.randn(5, 3, 6, 6)
        if convert:
            to_sparse(model, mask, x, measure=False)
        with counting.Count(model, mask) as count:
            training.Training(model, x).step()
        counts.append(sum(operations for operations, _ in count.rows))
    assert counts == [2 * 16 * 5 * (12 * 2 + 8 * 3)] * 2


def test_who_is_stopped_goes_on_and_who_is_finished_begins_anew(tmp_path: Path) -> None:
    turns = script("turns")
    path = tmp_path / "some.json"
    first = turns.Record(path, only=None, cases=["a", "b"])
    first.put({"name": "a", "value": 1})
    again = turns.Record(path, only=None, cases=["a", "b"])
    assert again.missing() == ["b"]
    again.put({"name": "b", "value": 2})
    again.finish()
    one = turns.Record(path, only="b", cases=["a", "b"])
    assert one.missing() == ["b"]
    one.put({"name": "b", "value": 3})
    one.finish()
    assert [row["value"] for row in json.loads(path.read_text())["results"]] == [1, 3]
    assert turns.Record(path, only=None, cases=["a", "b"]).missing() == ["a", "b"]
    changed = json.loads(path.read_text())
    changed["machine"]["torch"] = "another"
    path.write_text(json.dumps({**changed, "finished": False}))
    assert turns.Record(path, only=None, cases=["a", "b"]).missing() == ["a", "b"]
    with pytest.raises(SystemExit, match="another machine"):
        turns.Record(path, only="b", cases=["a", "b"])


def test_cases_that_are_measured_one_by_one_finish_with_the_last(tmp_path: Path) -> None:
    turns, path, finished = script("turns"), tmp_path / "some.json", []
    for case in ("b", "a"):
        record = turns.Record(path, only=case, cases=iter(["a", "b"]))
        record.put({"name": case})
        record.finish()
        finished.append(json.loads(path.read_text())["finished"])
    assert finished == [False, True]


def test_whoever_is_much_slower_leaves_after_two_rounds() -> None:
    turns = script("turns")
    seconds = {"quick": 0.051, "slow": 0.12, "ours": 0.12}
    calls = {name: lambda s=s: turns.time.sleep(s) for name, s in seconds.items()}
    took = turns.in_turns(calls, rounds=3, may_drop=("quick", "slow"))
    assert {name: len(values) for name, values in took.items()} == {"quick": 3, "slow": 2, "ours": 3}
