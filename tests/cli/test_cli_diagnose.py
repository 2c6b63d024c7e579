"""`--diagnose`: in the row and on the page, and no part of what a training is."""

import json

import pytest

HOW = ["--epochs", "2", "--recipe", "default"]


def rows(folder):
    return [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]


def test_train_records_diagnostics_and_is_the_same_training(anymask, small, tmp_path):
    for mode in ("off", "on", "sharpness"):
        said = anymask("train", "--mask", "random", *HOW, "--diagnose", mode, "--out", tmp_path / mode, *small)
        assert said.code == 0, said.err
    (off,), (on,), (sharp,) = (rows(tmp_path / mode) for mode in ("off", "on", "sharpness"))
    assert off["id"] == on["id"] == sharp["id"]
    weights = {(tmp_path / mode / "model.safetensors").read_bytes() for mode in ("off", "on", "sharpness")}
    assert len(weights) == 1
    assert "diagnostics" not in off["curves"]
    found = on["curves"]["diagnostics"]
    assert set(found["gradient_norm"]) == set(on["density"]["layers"])
    assert len(found["effective_rank"]) == 2
    assert "sharpness" not in found
    assert sharp["curves"]["diagnostics"].items() >= found.items()
    assert len(sharp["curves"]["diagnostics"]["sharpness"]) == 2


def test_compare_draws_them_on_its_page(anymask, small, tmp_path):
    grid = ["--masks", "random", "--recipes", "default", "tost", "--seeds", "1", "--epochs", "1"]
    said = anymask("compare", *grid, "--diagnose", "on", "--out", tmp_path, *small)
    assert said.code == 0, said.err
    assert all("diagnostics" in row["curves"] for row in rows(tmp_path))
    assert ">Diagnostics</h2>" in (tmp_path / "report.html").read_text()


def test_sweep_records_them_in_each_process(anymask, small, tmp_path):
    settings = dict(zip(small[::2], small[1::2], strict=True))
    lines = ["[protocol]", "epochs = 1", f"batch_size = {settings['--batch-size']}", f"lr = {settings['--lr']}"]
    block = {"data": "folder", "data_dir": settings["--data-dir"], "model": settings["--model"], "masks": "random", "recipes": "default"}
    lines += ["[[block]]", *(f'{key} = "{value}"' for key, value in block.items()), "seeds = 2", "dense = false"]
    (tmp_path / "plan.toml").write_text("\n".join(lines))
    words = ["sweep", tmp_path / "plan.toml", "--out", tmp_path / "run", "--diagnose", "on", "--workers", 2, "--device", "cpu"]
    said = anymask(*words)
    assert said.code == 0, said.err
    found = rows(tmp_path / "run")
    assert len(found) == 2
    assert all(len(row["curves"]["diagnostics"]["dead_relus"]) == 1 for row in found)


@pytest.mark.parametrize("command", ["train --mask random", "compare --dry-run", "sweep {plan}"])
def test_another_value_is_a_mistake_that_names_those_there_are(anymask, small, tmp_path, command):
    (tmp_path / "plan.toml").write_text('[[block]]\nmasks = "random"\n')
    words = command.format(plan=tmp_path / "plan.toml").split()
    said = anymask(*words, "--diagnose", "sharpnes", "--out", tmp_path / "run")
    assert said.code == 2
    assert "unknown value of diagnose: 'sharpnes'" in said.err
    assert "sharpness" in said.err
    assert not (tmp_path / "run").exists()
