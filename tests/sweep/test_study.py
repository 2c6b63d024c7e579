"""A study: real searches with tiny trainings. The halves are apart, and whatever stops it, it ends with the same winner."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from anymask.data import load
from anymask.data.apart import digests
from anymask.errors import AnymaskError, FileFormatError, SettingError, TechniqueError, UnknownName
from anymask.recipe import Recipe
from anymask.runlog import Ledger
from anymask.sweep import Cell, Studied, Watcher, read_study, study
from anymask.sweep.claims import claimed
from anymask.sweep.halves import confirmation_cut, tuning_cut
from anymask.sweep.space import read_space
from anymask.sweep.variants import variant
from tests.sweep.plans import DENSELY, write_images

ROOT = Path(__file__).parents[2]
TRIALS, TUNE, CONFIRM = 12, 2 * 2, 3  # settings, and trainings of one recipe in each half
STUDY = """
[protocol]
epochs = 2
batch_size = 8
[recipe]
base = "tost:ghost_activation,label_smoothing"
[tune]
data = "folder"
data_dir = "{images}"
share = 0.5
validation = 0.4
model = "resnet8-0.25x"
masks = ["random", "magnitude"]
sparsity = 0.8
seeds = 2
first_seed = 100
trials = 12
[confirm]
data = "folder"
data_dir = "{images}"
validation = 0.2
model = "resnet8-0.25x"
masks = "random"
sparsity = 0.8
seeds = 3
[space]
lr = [0.001, 0.05]
ghost_activation = [true, false]
"ghost_activation.beta" = {low = 0.5, high = 4.0, log = true}
"label_smoothing.eps" = [0.0, 0.3]
"""
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["anymask.sweep.run", "anymask.sweep.study", "optuna"])


@pytest.fixture(scope="module")
def file(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "study.toml"
    path.write_text(STUDY.replace("{images}", str(images)))
    return path


@pytest.fixture(scope="module")
def whole(file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Studied]:
    """The folder of an undisturbed study, and what it gave."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, study(read_study(file), folder, computing=DENSELY)


def changed(file: Path, folder: Path, *pairs: tuple[str, str]) -> Path:
    """The study with other lines."""
    text = file.read_text()
    for before, after in pairs:
        assert before in text
        text = text.replace(before, after)
    (folder / "changed.toml").write_text(text)
    return folder / "changed.toml"


def rows(folder: Path, half: str) -> list[dict[str, Any]]:
    return Ledger(folder / half / "ledger.jsonl").rows()


def keys(found: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    return [(row["id"], row["accuracy"]) for row in found]


def test_tuning_sees_its_own_seeds_and_images_and_no_test_image(whole: Any) -> None:
    folder, _ = whole
    tune, confirm = rows(folder, "tune"), rows(folder, "confirm")
    assert {row["settings"]["seed"] for row in tune} == {100, 101}
    assert {row["settings"]["seed"] for row in confirm} == {0, 1, 2}
    assert all(row["accuracy"]["test"] is None and row["accuracy"]["last_test"] is None for row in tune)
    assert all(row["accuracy"]["test"] is not None for row in confirm)
    assert not {row["settings"]["data_hash"] for row in tune} & {row["settings"]["data_hash"] for row in confirm}


def test_the_baseline_is_tuned_among_the_same_learning_rates_as_the_recipe(whole: Any) -> None:
    folder, done = whole
    found: dict[str, list[float]] = {}
    for row in rows(folder, "tune"):
        found.setdefault(row["settings"]["recipe"], []).append(row["accuracy"]["validation"])
    baselines = {name: values for name, values in found.items() if name.startswith("default")}
    assert {name: len(values) for name, values in baselines.items()} == {"default@lr=0.001": TUNE, "default@lr=0.05": TUNE}
    assert done.winner.baseline == max(baselines, key=lambda name: fmean(baselines[name]))
    assert {variant(name).lr for name in found} == {0.001, 0.05}


def test_a_recipe_is_trained_with_the_learning_rate_that_its_name_asks_for(whole: Any) -> None:
    here = {row["settings"]["recipe"]: row["curves"]["lr"] for row in rows(whole[0], "tune")}
    low, high = here["default@lr=0.001"], here["default@lr=0.05"]
    assert high == pytest.approx([50 * lr for lr in low])
    assert max(high) <= 0.05


def test_the_winner_is_the_best_mean_of_paired_differences_and_is_tried_to_the_end(whole: Any) -> None:
    folder, done = whole
    by_recipe: dict[str, dict[tuple[str, int], float]] = {}
    for row in rows(folder, "tune"):
        settings = row["settings"]
        by_recipe.setdefault(settings["recipe"], {})[settings["mask"], settings["seed"]] = row["accuracy"]["validation"]
    base = by_recipe[done.winner.baseline]
    points = {
        name: fmean(100 * (accuracy - base[key]) for key, accuracy in found.items())
        for name, found in by_recipe.items()
        if len(found) == TUNE and not name.startswith("default")
    }
    assert done.winner.points == pytest.approx(max(points.values()), abs=1e-3)
    assert points[done.winner.recipe] == max(points.values())
    assert done.winner.trainings == TUNE


def test_worse_settings_are_dropped_after_the_first_seed_and_what_is_switched_off_has_no_settings(whole: Any) -> None:
    tried: dict[str, list[int]] = {}
    for row in rows(whole[0], "tune"):
        tried.setdefault(row["settings"]["recipe"], []).append(row["settings"]["seed"])
    pruned = [seeds for seeds in tried.values() if len(seeds) < TUNE]
    assert pruned
    assert all(seeds[:2] == [100, 100] for seeds in pruned)
    off = [name for name in tried if "ghost_activation=false" in name]
    assert off
    assert not any("beta" in name for name in off)


def test_the_recipe_as_it_is_with_the_baselines_learning_rate_is_tried_first(whole: Any) -> None:
    folder, done = whole
    tried = [row for row in rows(folder, "tune") if not row["settings"]["recipe"].startswith("default")]
    assert tried[0]["techniques"] == Recipe.preset("tost:ghost_activation,label_smoothing").settings()
    assert variant(tried[0]["settings"]["recipe"]).lr == variant(done.winner.baseline).lr


def test_the_confirmation_trains_baseline_and_winner_once_and_a_second_call_nothing(file: Path, whole: Any) -> None:
    folder, done = whole
    before = rows(folder, "confirm")
    assert sorted(row["settings"]["recipe"] for row in before) == sorted([done.winner.baseline, done.winner.recipe] * CONFIRM)
    frozen = (folder / "winner.toml").read_bytes()
    assert study(read_study(file), folder, computing=DENSELY) == done
    assert (rows(folder, "confirm"), (folder / "winner.toml").read_bytes()) == (before, frozen)


def test_the_winner_is_a_recipe_file_of_the_settings_that_were_trained(whole: Any) -> None:
    folder, done = whole
    recipe = Recipe.preset(str(folder / "winner.toml"))
    trained = next(row for row in rows(folder, "confirm") if row["settings"]["recipe"] == done.winner.recipe)
    assert recipe.settings() == trained["techniques"]
    assert f"--lr {variant(done.winner.recipe).lr}" in (folder / "winner.toml").read_text()


def test_the_report_says_which_numbers_chose_and_which_confirm(whole: Any) -> None:
    folder, done = whole
    text = (folder / "study.md").read_text()
    tuning, confirmation = text.split("## Confirmation: folder; resnet8-0.25x; seeds 0, 1, 2")
    assert "## Tuning: folder; resnet8-0.25x; seeds 100, 101" in tuning
    assert f"{TRIALS} settings were tried" in tuning
    assert done.winner.recipe in tuning
    assert f"{done.winner.recipe} against {done.winner.baseline}: of 1 cell" in confirmation


def _study(file: Path, folder: Path) -> None:
    study(read_study(file), folder, computing=DENSELY)


def test_killed_at_random_moments_it_ends_with_the_trainings_and_the_winner_of_an_undisturbed_study(
    file: Path, whole: Any, tmp_path: Path
) -> None:
    folder, lots, kills = tmp_path / "run", random.Random(seed := int(time.time())), 0
    process = CONTEXT.Process(target=_study, args=(file, folder))
    process.start()
    while True:
        process.join(lots.uniform(0.4, 1.6) if kills < 4 else 60)
        if process.exitcode is not None:
            break
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        kills += 1
        process = CONTEXT.Process(target=_study, args=(file, folder))
        process.start()
    assert process.exitcode == 0
    assert kills >= 2, f"lots of seed {seed}"
    assert (folder / "winner.toml").read_bytes() == (whole[0] / "winner.toml").read_bytes(), f"lots of seed {seed}"
    for half in ("tune", "confirm"):
        assert keys(rows(folder, half)) == keys(rows(whole[0], half)), f"lots of seed {seed}"


def test_a_budget_stops_it_cleanly_and_the_same_call_goes_on(file: Path, whole: Any, tmp_path: Path) -> None:
    stopped = study(read_study(file), tmp_path / "run", computing=DENSELY, budget=0.3)
    assert stopped.winner is None
    assert stopped.trials < TRIALS
    assert not (tmp_path / "run" / "winner.toml").exists()
    with (tmp_path / "run" / "tune" / "journal.log").open("ab") as journal:
        journal.write(b'{"op_code": 4')  # as a power cut leaves it
    assert study(read_study(file), tmp_path / "run", computing=DENSELY).winner == whole[1].winner


class Once(Watcher):
    """A Ctrl-C in the first training of the confirmation."""

    def __init__(self) -> None:
        self.begun = 0

    def begin(self, *, total: int, done: int) -> None:
        self.begun += 1

    def epoch(self, cell: Cell, epoch: int, figures: dict[str, Any]) -> None:
        if self.begun == 2:
            raise KeyboardInterrupt


def test_a_confirmation_that_was_stopped_goes_on_without_the_search(file: Path, whole: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        study(read_study(file), tmp_path / "run", computing=DENSELY, watcher=Once())
    (tmp_path / "run" / "tune" / "journal.log").unlink()
    assert study(read_study(file), tmp_path / "run", computing=DENSELY).winner == whole[1].winner
    assert keys(rows(tmp_path / "run", "confirm")) == keys(rows(whole[0], "confirm"))


WRONG = [
    (("first_seed = 100", "first_seed = 2"), SettingError, r"\[tune\] and \[confirm\] both have seed 2"),
    (("seeds = 3", "seeds = [7, 101, 100]"), SettingError, "both have seeds 100, 101"),
    (("trials = 12", "trials = 0"), SettingError, "trials came as 0"),
    (("share = 0.5", "share = 1"), SettingError, "share came as 1"),
    (("trials = 12", "trails = 6"), UnknownName, r"\[tune\].*'trails'.*'trials'"),
    (("[confirm]", "[confirm]\nrecipes = 'tost'"), UnknownName, r"\[confirm\].*'recipes'"),
    (("lr = [0.001, 0.05]", ""), SettingError, r"\[space\].*lr came as None.*baseline"),
    (("lr = [0.001, 0.05]", "lr = [0.0, 0.05]"), SettingError, r"\[space\].*lr: lr came as 0\.0"),
    (("lr = [0.001, 0.05]", "lr = {low = 0.1, high = 1.0}"), SettingError, "lr came as"),
    (('"label_smoothing.eps" = [0.0, 0.3]', '"label_smoothing.esp" = [0.0, 0.3]'), UnknownName, "label_smoothing.esp: .*'esp'.*'eps'"),
    (('"label_smoothing.eps" = [0.0, 0.3]', '"label_smoothing.eps" = [0.0, 3.0]'), SettingError, "label_smoothing.eps: eps came as"),
    (('"label_smoothing.eps" = [0.0, 0.3]', '"label_smoothing.eps" = []'), SettingError, "label_smoothing.eps: it came as"),
    (('"label_smoothing.eps" = [0.0, 0.3]', '"lrsi.lr" = [0.0, 0.3]'), SettingError, "recipe has no lrsi.*lrsi=true"),
    (("log = true", "log = 3"), SettingError, "ghost_activation.beta: it came as"),
    (("low = 0.5", "low = 5"), SettingError, "low came as 5.0"),
    (("[space]", "[spaces]"), UnknownName, "'spaces'.*'space'"),
    (('base = "tost:', 'base = "tots:'), UnknownName, r"\[recipe\].*'tots'"),
]


@pytest.mark.parametrize(("pair", "kind", "says"), WRONG, ids=[says for *_, says in WRONG])
def test_a_mistake_is_refused_in_three_parts(file: Path, tmp_path: Path, pair: Any, kind: type[AnymaskError], says: str) -> None:
    with pytest.raises(kind, match=f"(?s){says}") as caught:
        read_study(changed(file, tmp_path, pair))
    assert "Allowed: " in str(caught.value)
    assert "To do: " in str(caught.value)


def test_the_same_images_in_both_halves_are_refused_and_nothing_is_written(file: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"\[tune\] has 0 images of folder that the other half does not have.*share = 0\.5"):
        study(read_study(changed(file, tmp_path, ("share = 0.5", ""))), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_of_the_confirmation_are_taken_away_from_tuning_whatever_their_data_are_called(file: Path, tmp_path: Path) -> None:
    other = write_images(tmp_path / "other", seed=1)
    known = next((tmp_path / "other" / "train" / "class0").iterdir())
    mine = Path(next(part for part in read_study(file).tune).experiment.data_dir or "")
    known.write_bytes((mine / "test" / "class0" / "0.png").read_bytes())  # a test image of the confirmation
    lines = ("share = 0.5\n", ""), (f'[tune]\ndata = "folder"\ndata_dir = "{mine}"', f'[tune]\ndata = "folder"\ndata_dir = "{other}"')
    cut = tuning_cut(read_study(changed(file, tmp_path, *lines)))
    images = load("folder", dir=other)
    assert (len(images.train), len(cut(images).train)) == (40, 39)
    assert not set(digests(cut(images).train)) & set(digests(load("folder", dir=mine).test))
    given = replace(images, validation=images.test)  # would be in both halves
    assert [half(given).validation for half in (cut, confirmation_cut(read_study(file)))] == [None, None]


def test_a_folder_belongs_to_one_study(file: Path, whole: Any, tmp_path: Path) -> None:
    folder, done = whole
    assert study(read_study(changed(file, tmp_path, ("[protocol]", 'about = "said otherwise"\n[protocol]'))), folder).winner == done.winner
    for pair in (("seeds = 3", "seeds = 4"), ("trials = 12", "trials = 13")):
        with pytest.raises(SettingError, match=r"holds a study with another .*whose winner is chosen.*choose another --out"):
            study(read_study(changed(file, tmp_path, pair)), folder)


def test_a_study_with_plugins_goes_on_and_a_damaged_note_of_it_is_named(file: Path, whole: Any, tmp_path: Path) -> None:
    shutil.copytree(whole[0], tmp_path / "run")
    note, table = tmp_path / "run" / "study.json", json.loads((whole[0] / "study.json").read_text())
    note.write_text(json.dumps({**table, "plugins": ["json"]}))
    assert (
        study(read_study(changed(file, tmp_path, ("[protocol]", 'plugins = ["json"]\n[protocol]'))), tmp_path / "run").winner
        == whole[1].winner
    )
    for damage in ("", "{", "[3]", "3"):
        note.write_text(damage)
        with pytest.raises(FileFormatError, match=r"study\.json cannot be read"):
            study(read_study(file), tmp_path / "run")


def test_a_winner_that_was_changed_by_hand_is_not_confirmed(file: Path, whole: Any, tmp_path: Path) -> None:
    shutil.copytree(whole[0], tmp_path / "run")
    winner = tmp_path / "run" / "winner.toml"
    winner.write_text(re.sub(r"\neps = .*", "\neps = 0.9", winner.read_text()))
    with pytest.raises(SettingError, match=r"winner\.toml are not those that the study chose"):
        study(read_study(file), tmp_path / "run")


def test_a_second_process_is_refused(file: Path, tmp_path: Path) -> None:
    with claimed(tmp_path / "run" / "study.lock"), pytest.raises(SettingError, match="another process works on"):
        study(read_study(file), tmp_path / "run")


def test_what_cannot_be_trained_counts_as_bad_and_where_nothing_can_it_says_why(file: Path, tmp_path: Path) -> None:
    short = changed(file, tmp_path, ("trials = 12", "trials = 2"), ("lr = [0.001, 0.05]", "lr = [1e30, 0.05]"))
    done = study(read_study(short), tmp_path / "some", computing=DENSELY)
    assert done.winner is not None
    assert done.winner.baseline == "default@lr=0.05"
    assert "| 1e+30 | failed | 0 |" in (tmp_path / "some" / "study.md").read_text()
    with pytest.raises(TechniqueError, match=r"default failed with each learning rate \(TechniqueError: the training loss became"):
        study(read_study(changed(short, tmp_path, ("lr = [1e30, 0.05]", "lr = [1e30]"))), tmp_path / "none", computing=DENSELY)


def test_the_study_in_plans_is_whole() -> None:
    wanted = read_study(ROOT / "plans" / "study-two-cores.toml")
    assert wanted.trials * sum(len(part.seeds) * len(part.grid.masks) for part in wanted.tune) == 160
    assert [part.experiment.model for part in wanted.confirm] == ["resnet20", "vgg11-0.25x"]


def test_the_study_in_the_docs_is_whole(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "study.md").read_text()
    (tmp_path / "study.toml").write_text(text.split("```toml\n")[1].split("```")[0])
    assert read_study(tmp_path / "study.toml").space["ghost_skip.scale"].log


def test_two_numbers_with_a_point_are_a_range_and_other_lists_are_choices() -> None:
    table = {"lr": [0.1, 0.2], "label_smoothing.eps": [0.1, 0.2], "ghost_skip.scale": {"choices": [0.1, 0.2]}, "lrsi": [True, False]}
    found = read_space(table, "tost", where="[space]")
    assert [(choice.values, choice.low, choice.high) for choice in found.values()] == [
        ((0.1, 0.2), 0.0, 0.0),
        ((), 0.1, 0.2),
        ((0.1, 0.2), 0.0, 0.0),
        ((True, False), 0.0, 0.0),
    ]
    assert list(found) == ["ghost_skip.scale", "label_smoothing.eps", "lr", "lrsi"]


def test_a_1_among_numbers_switches_nothing_on() -> None:
    assert read_space({"lr": [1.0, 0.5], "label_smoothing.eps": [0.05, 0.2]}, "tost", where="[space]")["lr"].values == (1.0, 0.5)
    assert read_space({"lr": [0.1], "preconditioning.every": [1, 100]}, "best", where="[space]")["preconditioning.every"].values == (1, 100)
