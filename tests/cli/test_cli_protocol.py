"""`--protocol NAME`: below a file of settings, which is below the options; and the script that trains the paper's grid."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from anymask.cli.app import COMMANDS, make_app
from anymask.train import Protocol
from anymask.train.presets import PROTOCOLS, protocol_of
from tests.cli.test_cli_mistakes import check

ROOT = Path(__file__).parents[2]
SCRIPT, LENT = (ROOT / "benchmarks" / name for name in ("gpu.sh", "lent_gpu.sh"))


def taken(*words, command="compare"):
    """The protocol that a command line gives."""
    needed = ("--mask", "snip", "--out", "t") if command == "train" else ()
    _, bound, _ = make_app().parse_args([command, *needed, *map(str, words)], exit_on_error=False, print_error=False)
    return bound.arguments.get("protocol") or Protocol()


@pytest.mark.parametrize("command", ["compare", "train"])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_by_name_is_what_its_file_says(name, command):
    assert taken("--protocol", name, command=command) == protocol_of({"preset": name})


def test_options_override_a_file_and_a_file_overrides_the_protocol(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text("epochs = 150\nlr = 0.05\nnesterov = true\n")
    made = taken("--protocol", "tost-182", "--config", file, "--lr", "0.2")
    assert made == protocol_of({"preset": "tost-182", "epochs": 150, "nesterov": True, "lr": 0.2})
    file.write_text('protocol = "tost-182"\nbatch_size = 64\n')
    assert taken("--config", file) == protocol_of({"preset": "tost-182", "batch_size": 64})
    assert taken("--config", file, "--protocol", "grasp-160") == protocol_of({"preset": "grasp-160", "batch_size": 64})


def test_switches_of_a_protocol_can_be_turned_round():
    assert taken("--protocol", "tost-182", "--nesterov", "--no-augment") == protocol_of(
        {"preset": "tost-182", "nesterov": True, "augment": False}
    )


def test_drops_stand_one_after_the_other_or_between_commas_and_go_instead_of_those_of_the_protocol():
    for words in (("--drops", "50%", "75%"), ("--drops", "50%,75%"), ("--drops", "50%", "--drops", "75%")):
        assert taken("--protocol", "tost-182", "--epochs", 20, *words).drops == ("50%", "75%")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("compare --protocol tost-128 --dry-run", "did you mean 'tost-182'"),
        ("train --mask snip --out t --protocol short", "did you mean 'short-15'"),
        ("compare --protocol tost-182 --epochs 20 --dry-run", "give drops as shares"),
        ("compare --protocol --dry-run", "--protocol"),
        ("compare --momentum 1.5 --dry-run", "momentum came as 1.5"),
    ],
)
def test_mistakes_are_said(anymask, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    check(anymask(*words.split()), said)
    assert list(tmp_path.iterdir()) == []


def test_a_training_by_name_has_the_id_of_one_with_every_setting_written_out(anymask, tmp_path, small):
    ids, small = [], [word for pair in zip(small[::2], small[1::2], strict=True) if pair[0] != "--lr" for word in pair]
    for number, words in enumerate((["--protocol", "short-15", "--epochs", "1"], ["--epochs", "1", "--lr", "0.1"])):
        out = tmp_path / str(number)
        said = anymask("train", "--mask", "random", "--recipe", "default", "--out", out, *words, *small)
        assert said.code == 0, said.err
        ids.append(json.loads((out / "ledger.jsonl").read_text())["id"])
    assert ids[0] == ids[1]


def test_list_shows_the_protocols_and_where_they_come_from(anymask):
    said = anymask("list", "protocols")
    assert said.code == 0
    for words in ("tost-182", "x0.1 at 90 and 135", "VITA-Group/ToST", "grasp-160", "tiny-200", "short-15"):
        assert words in said.out


# -- benchmarks/gpu.sh -----------------------------------------------------------------------------------------------------
def run(folder, *words, **settings):
    environment = {**os.environ, "PYTHON": sys.executable, "PACKS": str(folder / "packs"), "DATA": str(folder / "data"), **settings}
    (folder / "packs").mkdir(exist_ok=True)
    (folder / "packs" / "unpack.py").write_text("import sys; sys.exit('not to be run')")
    return subprocess.run(["bash", str(SCRIPT), *words], env=environment, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("script", [SCRIPT, LENT], ids=lambda path: path.name)
def test_the_gpu_scripts_are_bash_that_parses(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


def test_the_gpu_script_says_which_data_are_missing_and_does_not_run_without_them(tmp_path):
    (tmp_path / "data" / "cifar-100-python").mkdir(parents=True)
    (tmp_path / "data" / "cifar-100-python" / "meta").touch()
    for words, code in ((["--data-only"], 0), ([], 2)):
        done = run(tmp_path, *words, RUN=str(tmp_path / "run"), LEDGER=str(tmp_path / "ledger.jsonl"))
        assert done.returncode == code, done.stderr
        assert "cifar10-10k is not there yet; missing: cifar10_10k2k_labels.npz cifar10_10k2k_train.wpk" in done.stderr
        assert "cifar100 is not" not in done.stderr
    assert "no run without all data of the plan" in done.stderr
    assert not (tmp_path / "run").exists()


def test_trainings_that_a_gpu_did_not_finish_are_taken_home_and_brought_back(tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text(
        '[protocol]\nepochs = 1\n[[block]]\ndata = ["fashion-mnist-5k"]\nmodel = ["demonet"]\nmasks = ["random-erk"]\n'
        'sparsity = [0.9]\nrecipes = ["default"]\nseeds = 1\ndense = false\n'
    )
    there, home, back = (tmp_path / name for name in ("there", "home", "back"))
    (there / "unfinished").mkdir(parents=True)
    for name in ("other", "both"):
        (there / "unfinished" / f"{name}.pt").write_bytes(b"half a training" * 1000)
    home.mkdir()
    settings = {"PLAN": str(plan), "LEDGER": str(tmp_path / "ledger.jsonl"), "DEVICE": "cpu", "COMPILE": "off", "STREAMS": "1"}
    done = run(tmp_path, **settings, RUN=str(there), OUT=str(home))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in home.iterdir()} == {"ledger.jsonl", "stopped.tar.gz.00"}
    (back / "unfinished").mkdir(parents=True)
    (back / "unfinished" / "both.pt").write_bytes(b"further")  # in an earlier call
    done = run(tmp_path, **settings, RUN=str(back), STOPPED=str(home / "stopped.tar.gz"))
    assert "1 of 1 trainings are finished" in done.stderr
    assert (back / "unfinished" / "other.pt").read_bytes() == b"half a training" * 1000
    assert (back / "unfinished" / "both.pt").read_bytes() == b"further"

    (home / "stopped.tar.gz.00").write_bytes((home / "stopped.tar.gz.00").read_bytes()[:100])
    done = run(tmp_path, **settings, RUN=str(tmp_path / "third"), STOPPED=str(home / "stopped.tar.gz"))
    assert "is not whole; its trainings begin again" in done.stderr
    assert "1 of 1 trainings are finished" in done.stderr
    assert [path.name for path in (tmp_path / "third").glob("**/*.pt")] == []


def test_what_a_lent_gpu_needs_is_cut_into_parts_and_comes_together_there(tmp_path):
    """The packs of the plan's data alone, in parts that no call carries twice; the commands are bash, and short enough for a call."""
    packs = tmp_path / "packs"
    packs.mkdir()
    for name in ("unpack.py", "cifar100_train_a.wpk", "cifar100_labels.npz", "cifar10_10k2k_train.wpk"):
        (packs / name).write_bytes(name.encode() * 2000)
    for part in ("00", "01"):
        (tmp_path / f"stopped.tar.gz.{part}").touch()
    environment = {**os.environ, "PACKS": str(packs), "PLAN": "plans/gpu.toml", "PART": "50000", "LENT": str(tmp_path / "lent")}
    environment["STOPPED"] = str(tmp_path / "stopped.tar.gz")
    done = subprocess.run([LENT, "packs", "calls"], env=environment, capture_output=True, text=True, check=True)
    parts = sorted((tmp_path / "lent").glob("part*"))
    with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as archive:
        assert sorted(archive.getnames()) == ["cifar100_labels.npz", "cifar100_train_a.wpk", "unpack.py"]
    carried = [json.loads(words) for words in re.findall(r"carry (\[.*\]):", done.stdout)]
    assert [name for names in carried for name in names if "/part" in name] == list(map(str, parts))
    assert [Path(name).name for name in carried[0]] == ["wheels", "stopped.tar.gz.00", "stopped.tar.gz.01"]
    assert len(parts) == len(carried) - 2 > 1
    for command in re.findall(r"carry .*:\n(.*)\n", done.stdout):
        subprocess.run(["bash", "-n", "-c", command], check=True)
        assert len(command) < 2000


def test_an_unknown_step_for_the_lent_gpu_is_told():
    done = subprocess.run([LENT, "mask"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.startswith("lent_gpu.sh: mask came; allowed: masks, wheels, packs, calls")) == (2, True)


@pytest.mark.skipif("sweep" not in COMMANDS, reason="there is no `anymask sweep` yet")
def test_the_gpu_script_goes_on_with_the_rows_of_elsewhere_and_takes_its_own_home(tmp_path):
    for name in ("cifar-100-python/meta", "cifar-10-10k/batches.meta", "tiny-imagenet-200/wnids.txt"):
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).touch()
    plan, ledger = tmp_path / "plan.toml", tmp_path / "results" / "ledger.jsonl"
    plan.write_text("[protocol]\nepochs = 1\n[[block]]\nmodel = 'resnet8-0.25x'\nmasks = 'random'\nrecipes = 'default'\nseeds = 1\n")
    settings = {"PLAN": str(plan), "LEDGER": str(ledger), "DEVICE": "cpu", "OUT": str(tmp_path / "out"), "OMP_NUM_THREADS": "1"}
    (tmp_path / "out").mkdir()
    done = run(tmp_path, **settings, RUN=str(tmp_path / "one"))
    assert done.returncode == 0, done.stderr
    first = ledger.read_bytes()
    assert len(first.splitlines()) == 2
    assert (tmp_path / "out" / "ledger.jsonl").read_bytes() == first
    plan.write_text(plan.read_text().replace("seeds = 1", "seeds = 2"))
    done = run(tmp_path, **settings, RUN=str(tmp_path / "two"))  # as on a machine that has the ledger only
    assert done.returncode == 0, done.stderr
    assert ledger.read_bytes().startswith(first)
    assert [json.loads(line)["settings"]["seed"] for line in ledger.read_text().splitlines()] == [0, 0, 1, 1]
    assert "4 trainings are in" in done.stderr
