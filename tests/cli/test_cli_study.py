"""`anymask study`: exit codes, what is said, what is written."""

from pathlib import Path

import pytest

from tests.sweep.test_study import STUDY


@pytest.fixture
def file(small, tmp_path):
    """A study of a moment."""
    path = tmp_path / "study.toml"
    path.write_text(STUDY.replace("{images}", small[3]).replace("trials = 12", "trials = 2").replace("seeds = 3", "seeds = 1"))
    return path


def test_a_study_shows_its_report_and_where_the_winner_is(anymask, file, tmp_path):
    out = tmp_path / "run"
    first = anymask("study", file, "--out", out, "--sparse", "off", "--device", "cpu", "--budget", "0.001s")
    assert (first.code, first.out) == (0, "")
    assert first.err.splitlines()[-2:] == ["Tuning: 0 of 2 settings were tried.", "The same command goes on from there."]
    said = anymask("study", file, "--out", out, "--sparse", "off", "--device", "cpu")
    assert said.code == 0, said.err
    assert said.out == (out / "study.md").read_text()
    lines = said.err.splitlines()
    assert lines[-4:-2] == [
        "Tuning: 2 of 2 settings were tried.",
        "Confirmation: 2 of 2 trainings are finished, 0 failed, 0 are left.",
    ]
    assert lines[-2].startswith(f"Winner: {out / 'winner.toml'}, tost:ghost_activation,label_smoothing@")
    assert lines[-1] == f"Report: {out / 'study.md'}"
    report = anymask("report", out / "confirm", "--baseline", _baseline(out))
    assert report.code == 0, report.err
    for command in ("report", "inspect"):
        assert f"name {out / 'confirm'}, or read {out / 'study.md'}" in anymask(command, out).err
    assert "confirmation's" in anymask("report", out / "tune", "--baseline", _baseline(out)).err
    trained = anymask(
        "train", "--mask", "random", "--recipe", out / "winner.toml", "--epochs", "1", "--out", tmp_path / "best", *small_of(file)
    )
    assert trained.code == 0, trained.err


def _baseline(out: Path) -> str:
    return next(line for line in (out / "winner.toml").read_text().splitlines() if line.startswith("baseline")).split('"')[1]


def small_of(file: Path) -> list[str]:
    """The options of a training on the study's images."""
    folder = next(line for line in file.read_text().splitlines() if line.startswith("data_dir")).split('"')[1]
    return ["--data", "folder", "--data-dir", folder, "--model", "resnet8-0.25x", "--batch-size", "27"]


def test_a_dry_run_says_how_many_trainings_there_would_be(anymask, file, tmp_path):
    said = anymask("study", file, "--out", tmp_path / "run", "--dry-run")
    assert (said.code, said.err) == (0, "")
    assert "default with 2 learning rates, 4 trainings each" in said.out
    assert "2 settings of tost:ghost_activation,label_smoothing, at most 4 trainings each" in said.out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_a_mask_file_once_and_what_is_named_twice_once(anymask, file, small, tmp_path):
    assert anymask("prune", "random", "--sparsity", "0.9", "--out", tmp_path / "m.mask", *small).code == 0
    file.write_text(file.read_text().replace('"magnitude"]\nsparsity = 0.8', f'"{tmp_path}/m.mask"]\nsparsity = [0.8, 0.9, 0.90]'))
    said = anymask("study", file, "--out", tmp_path / "run", "--dry-run")
    assert "default with 2 learning rates, 6 trainings each" in said.out, said.err


@pytest.mark.parametrize(
    ("change", "words", "says"),
    [
        (("first_seed = 100", "first_seed = 0"), [], "both have seed 0"),
        (("share = 0.5", ""), [], "has 0 images of folder that the other half does not have"),
        (("trials = 2", "trials = 2"), ["--budget", "soon"], "budget came as 'soon'"),
        (("trials = 2", "trials = 2"), ["--device", "cuba"], "device 'cuba'"),
    ],
)
def test_mistakes_are_told_in_three_parts_before_anything_is_written(anymask, file, change, words, says):
    tmp_path = file.parent
    file.write_text(file.read_text().replace(*change))
    said = anymask("study", file, "--out", tmp_path / "run", *words)
    assert said.code == 2
    assert says in said.err
    assert [line.split(":")[0] for line in said.err.splitlines()] == ["Error", "Allowed", "To do"]
    assert not (tmp_path / "run").exists()
