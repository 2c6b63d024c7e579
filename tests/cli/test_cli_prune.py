"""`anymask prune`: what it takes, and which files it writes, and over which it does not."""

from safetensors.torch import load_file

from anymask import load_mask
from anymask.pruning.lottery_folder import LotteryFolder
from tests.cli.test_cli_mistakes import check


def test_prune_takes_a_scope_a_pattern_a_floor_and_layers_to_leave_out(anymask, small, tmp_path):
    how = ["--scope", "erk", "--pattern", "channel", "--floor", "2", "--exclude", "stem", "fc", "--sparsity", "0.5"]
    said = anymask("prune", "magnitude", *how, "--out", tmp_path / "m.mask", *small)
    assert said.code == 0, said.err
    mask = load_mask(tmp_path / "m.mask")
    assert {key: mask.info[key] for key in ("scope", "pattern", "floor", "exclude")} == {
        "scope": "erk",
        "pattern": "channel",
        "floor": 2,
        "exclude": ["stem", "fc"],
    }
    assert not any(name.startswith(("stem", "fc")) for name in mask)
    assert all(set(mask[name].flatten(1).float().mean(1).tolist()) <= {0.0, 1.0} for name in mask)
    said = anymask("prune", "magnitude+erk+channel", *how[4:], "--out", tmp_path / "same.mask", *small)
    assert said.code == 0, said.err
    assert load_mask(tmp_path / "same.mask") == mask


def test_a_pattern_that_decides_the_sparsity_needs_none_and_takes_no_other(anymask, small, tmp_path):
    left_out = ["--exclude", "stem"]
    said = anymask("prune", "snip+1:2", *left_out, "--out", tmp_path / "m.mask", *small)
    assert said.code == 0, said.err
    assert load_mask(tmp_path / "m.mask").sparsity == 0.5
    said = anymask("prune", "snip+1:2", "--sparsity", "0.9", *left_out, "--out", tmp_path / "n.mask", *small)
    assert said.code == 2
    assert "sparsity came as 0.9 with pattern 1:2" in said.err
    assert not (tmp_path / "n.mask").exists()


def test_a_ticket_that_starts_from_other_weights_leaves_them_beside_its_mask(anymask, small, tmp_path):
    said = anymask("prune", "lottery-lr", "--sparsity", "0.3", "--epochs", "1", "--out", tmp_path / "l.mask", *small)
    assert said.code == 0, said.err
    assert {path.name for path in tmp_path.iterdir()} == {"l.mask", "l.safetensors"}
    assert load_file(tmp_path / "l.safetensors").keys() >= set(load_mask(tmp_path / "l.mask"))


def test_a_ticket_writes_over_a_file_beside_it_only_when_told_so_and_never_over_the_weights_it_begins_with(anymask, small, tmp_path):
    there, command = tmp_path / "l.safetensors", ["prune", "lottery-lr", "--sparsity", "0.3", "--epochs", "1", *small]
    there.write_text("mine")
    check(anymask(*command, "--out", tmp_path / "l.mask"), "l.safetensors is there already", "--force")
    for out in ("l.mask", "l.safetensors"):
        said = anymask(*command, "--out", tmp_path / out, "--weights", there, "--force")
        check(said, f"{out}, which would replace {there}, the weights that this begins with")
    assert there.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["l.safetensors"]
    assert anymask(*command, "--out", tmp_path / "l.mask", "--force").code == 0
    assert load_file(there).keys() >= set(load_mask(tmp_path / "l.mask"))


def test_rounds_of_a_ticket_are_gone_on_with_by_the_same_training_alone_and_removed_by_no_other_method(
    anymask, small, tmp_path, monkeypatch
):
    whole, parts = tmp_path / "whole.mask", tmp_path / "parts.mask"
    command = ["prune", "lottery", "--sparsity", "0.5", *small, "--epochs"]
    assert anymask(*command, "1", "--out", whole).code == 0
    with monkeypatch.context() as patch:

        def stopped(folder, number, mask, *, trained):
            mask.save(folder.path / f"round-0{number}.mask")
            raise KeyboardInterrupt

        patch.setattr(LotteryFolder, "write_round", stopped)
        assert anymask(*command, "1", "--out", parts).code == 130
    rounds = tmp_path / "parts.rounds"
    said = anymask(*command, "2", "--out", parts)
    check(said, f"{rounds} was made with training epochs=1, not 2", "remove this one")
    assert anymask("prune", "random", "--sparsity", "0.5", "--out", parts, *small).code == 0
    assert (rounds / "round-01.mask").exists()
    assert anymask(*command, "1", "--out", parts, "--force").code == 0
    assert load_mask(parts) == load_mask(whole)
    assert not rounds.exists()


def test_tickets_whose_names_have_a_point_share_no_weights(anymask, small, tmp_path):
    for name in ("l-0.3", "l-0.4"):
        said = anymask("prune", "lottery-lr", "--sparsity", name[2:], "--epochs", "1", "--out", tmp_path / name, *small)
        assert said.code == 0, said.err
    assert {path.name for path in tmp_path.iterdir()} == {"l-0.3", "l-0.3.safetensors", "l-0.4", "l-0.4.safetensors"}


def test_a_number_of_rounds_that_there_cannot_be_is_not_taken_for_none(anymask, small, tmp_path):
    check(anymask("prune", "random", "--sparsity", "0.9", "--rounds", "0", "--out", tmp_path / "m.mask", *small), "rounds came as 0")
