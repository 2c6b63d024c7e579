"""Plan files: read as they are meant, and refused as a whole with the block named."""

from pathlib import Path

import pytest

from anymask.errors import FileFormatError, SettingError, UnknownName
from anymask.sweep import Plan, budget_seconds, read_plan, tasks
from anymask.train import Protocol
from tests.sweep.plans import CELLS, PLAN, write_plan


def read(folder: Path, text: str) -> Plan:
    (folder / "plan.toml").write_text(text)
    return read_plan(folder / "plan.toml")


def test_one_value_stands_for_a_list_of_one_and_what_is_left_out_is_as_compare_has_it(tmp_path: Path) -> None:
    plan = read(tmp_path, '[[block]]\nmasks = "snip"\nsparsity = 0\n')
    ((part,),) = plan.blocks
    assert (plan.retries, part.grid.masks, part.grid.sparsity, part.grid.recipes) == (1, ("snip",), (0.0,), ("default", "tost", "best"))
    assert (part.experiment.data, part.experiment.model, part.seeds) == ("fashion-mnist-5k", "demonet", (0, 1, 2))
    assert part.protocol == Protocol()
    assert read(tmp_path, '\ufeff[[block]]\nmasks = "snip"\nsparsity = 0\n') == plan  # as some editors begin a file


def test_a_block_has_its_own_protocol_over_the_shared_one_or_another_preset_instead_of_it(tmp_path: Path) -> None:
    text = '[protocol]\nepochs = 3\nlr = 1\n[[block]]\n[block.protocol]\nepochs = 4\n[[block]]\n[block.protocol]\npreset = "tost-182"\n'
    (first,), (second,) = read(tmp_path, text).blocks
    assert (first.protocol.epochs, first.protocol.lr, second.protocol.epochs) == (4, 1.0, 182)
    assert second.protocol.lr == 0.1


def test_seeds_are_how_many_or_which(tmp_path: Path) -> None:
    text = "[[block]]\nseeds = 2\nfirst_seed = 5\n[[block]]\nseeds = [3, 1]\n"
    assert [part.seeds for (part,) in read(tmp_path, text).blocks] == [(5, 6), (3, 1)]


def test_trainings_come_block_by_block_and_in_a_block_seed_by_seed_each_once(images: Path, tmp_path: Path) -> None:
    urgent = PLAN.split("[[block]]")[1].replace("seeds = 2", "seeds = [1]\ndense = false").replace('["random-erk", "snip"]', '"snip"')
    path = write_plan(tmp_path / "plan.toml", images, PLAN.replace("[[block]]", f"[[block]]{urgent}[[block]]", 1))
    planned = tasks(read_plan(path), tmp_path / "run")
    assert len(planned) == len({task.name for task in planned}) == CELLS  # the second block holds those of the first
    assert [(task.cell.mask, task.cell.seed) for task in planned[:2]] == [("snip", 1)] * 2
    assert [task.cell.seed for task in planned[2:]] == [0] * 5 + [1] * 3
    assert str(planned[0].cell) == "folder, resnet8-0.25x, snip 0.9, default, seed 1"
    assert not (tmp_path / "run").exists()


def test_several_networks_of_a_block_take_turns_within_a_seed_and_share_the_data_in_memory(images: Path, tmp_path: Path) -> None:
    path = write_plan(tmp_path / "plan.toml", images, PLAN.replace('"resnet8-0.25x"', '["resnet8-0.25x", "demonet"]'))
    planned = tasks(read_plan(path), tmp_path)
    assert [(task.cell.seed, task.cell.model) for task in planned[::5]] == [
        (0, "resnet8-0.25x"),
        (0, "demonet"),
        (1, "resnet8-0.25x"),
        (1, "demonet"),
    ]


def test_trainings_that_differ_in_their_protocols_alone_are_two(images: Path, tmp_path: Path) -> None:
    """Progress bars, and those who look after workers, know trainings by their cells."""
    path = write_plan(tmp_path / "plan.toml", images, f"{PLAN}[[block]]{PLAN.split('[[block]]')[1]}[block.protocol]\nlr = 0.2\n")
    planned = tasks(read_plan(path), tmp_path)
    assert len({task.cell for task in planned}) == len(planned) == 2 * len({str(task.cell) for task in planned})


WRONG = [
    ('[[block]]\nmask = "snip"', UnknownName, r"unknown setting in block 1 of .*plan\.toml: 'mask'.*did you mean 'masks'"),
    ('[[block]]\n[[block]]\nmasks = ["snpi"]', UnknownName, r"block 2 of .*: unknown mask method 'snpi'.*'snip'"),
    ('[[block]]\nrecipes = "tots"', UnknownName, r"block 1 of .*: unknown recipe 'tots'"),
    ('[[block]]\nmodel = "resnet21"', SettingError, r"block 1 of .*resnet21"),
    ('[[block]]\ndata = ["cifar11"]', UnknownName, r"block 1 of .*: unknown data set 'cifar11'.*cifar10"),
    ("[[block]]\nsparsity = 98", SettingError, r"block 1 of .*: sparsity came as 98"),
    ('[[block]]\nsparsity = ["0.9"]', SettingError, r"block 1 of .*: sparsity came as \['0\.9'\]. Allowed: a number, or a list"),
    ("[[block]]\nmodel = []", SettingError, r"block 1 of .*: model came as \[\]"),
    ("[[block]]\nseeds = 2.5", SettingError, r"block 1 of .*: seeds came as 2\.5"),
    ("[[block]]\nseeds = 0", SettingError, r"block 1 of .*: seeds came as 0"),
    ("[[block]]\nfirst_seed = -1", SettingError, r"block 1 of .*: first_seed came as -1"),
    ("[[block]]\nseeds = [1, 1]", SettingError, r"block 1 of .*: seeds came as \[1, 1\]"),
    ("[[block]]\nseeds = [1]\nfirst_seed = 2", SettingError, r"block 1 of .*: first_seed came as 2 with a list"),
    ('[[block]]\ndense = "yes"', SettingError, r"block 1 of .*: dense came as 'yes'. Allowed: true or false"),
    ('[[block]]\nmasks = ["dense"]', SettingError, r"block 1 of .*`dense` is a setting"),
    ("[[block]]\nmasks = []\ndense = false", SettingError, r"block 1 of .*something to train"),
    ("[[block]]\nvalidation = 1", SettingError, r"block 1 of .*: validation came as 1"),
    ("[protocol]\nepoch = 3\n[[block]]", UnknownName, r"block 1 of .*'epoch'.*'epochs'"),
    ("[[block]]\n[block.protocol]\nepochs = 2.5", SettingError, r"block 1 of .*: epochs came as 2\.5"),
    ("retry = 1\n[[block]]", UnknownName, r"'retry'.*'retries'"),
    ("retries = -1\n[[block]]", SettingError, r"retries came as -1"),
    ("block = 3", SettingError, r"block came as 3"),
    ("", SettingError, r"no block.*\[\[block\]\]"),
    ("[[block]\n", FileFormatError, r"cannot be read"),
]


@pytest.mark.parametrize(("text", "kind", "says"), WRONG, ids=[entry[0].replace("\n", " ") for entry in WRONG])
def test_a_mistake_is_refused_in_three_parts_that_name_the_block(text: str, kind: type[Exception], says: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=f"(?s){says}") as caught:
        read(tmp_path, text)
    assert "Allowed: " in str(caught.value)
    assert "To do: " in str(caught.value)


def test_data_that_are_not_there_are_told_with_the_block(tmp_path: Path) -> None:
    plan = read(tmp_path, f'[[block]]\n[[block]]\ndata = "cifar10"\ndata_dir = "{tmp_path}"')
    with pytest.raises(ValueError, match=r"block 2 of .*: no cifar10 in"):
        tasks(plan, tmp_path)


@pytest.mark.parametrize(("text", "seconds"), [("25m", 1500), ("2h", 7200), ("90s", 90), ("1h30m", 5400), ("0.5 m", 30)])
def test_a_budget_is_a_time_with_its_unit(text: str, seconds: float) -> None:
    assert budget_seconds(text) == seconds


@pytest.mark.parametrize("text", ["25", "m", "", "0s", "2 hours", "-3m", "1h and 3m"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match=r"budget came as .*25m"):
        budget_seconds(text)
