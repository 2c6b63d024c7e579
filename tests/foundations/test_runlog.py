"""Files that survive: whole or not at all; the ledger loses no finished run."""

import fcntl
import json
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from anymask import Mask
from anymask.errors import FileFormatError, SettingError
from anymask.runlog import Ledger, atomic, processor, settings_id

ROWS = [{"id": "a", "test": 0.5}, {"id": "ü", "curve": [1, 2]}, {"id": "c"}]


def ledger_of(path, rows=ROWS):
    ledger = Ledger(path / "deep" / "ledger.jsonl")
    for row in rows:
        ledger.append(row)
    return ledger


# -- atomic ------------------------------------------------------------------------------------------------------------


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    target = tmp_path / "f"
    target.write_bytes(b"old")

    def write_half():
        with atomic(target) as file:
            file.write(b"half")
            file.flush()
            assert target.read_bytes() == b"old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_file_is_written_whole_into_new_folders_and_may_be_read_by_others(tmp_path):
    target = tmp_path / "a" / "b" / "ü.txt"
    before = os.umask(0o022)
    try:
        with atomic(target, "w") as file:
            file.write("wörd")
    finally:
        os.umask(before)
    assert target.read_text("utf-8") == "wörd"
    assert target.stat().st_mode & 0o777 == 0o644
    assert os.listdir(target.parent) == ["ü.txt"]


@pytest.mark.parametrize("write", [lambda path: atomic(path).__enter__(), Mask({"weight": torch.eye(2)}).save])
def test_a_folder_is_no_file_to_write_and_is_named_as_it_was_given(tmp_path, write):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write(tmp_path / "folder")
    assert str(caught.value) == f"{tmp_path}/folder is a folder. Allowed: the name of a file to write. To do: name a file in it."
    assert os.listdir(tmp_path) == ["folder"]


# -- the ledger --------------------------------------------------------------------------------------------------------


def test_rows_come_back_in_order_and_a_missing_file_has_none(tmp_path):
    assert Ledger(tmp_path / "none").rows() == []
    ledger = ledger_of(tmp_path)
    assert ledger.rows() == ROWS
    assert ledger.ids() == {"a", "ü", "c"}


def test_processes_that_append_at_once_lose_nothing(tmp_path):
    row = "{'id': sys.argv[2] + str(n), 'long': 'y' * 9999}"
    code = f"import sys; from anymask.runlog import Ledger\nfor n in range(40): Ledger(sys.argv[1]).append({row})"
    path = tmp_path / "ledger.jsonl"
    workers = [subprocess.Popen([sys.executable, "-c", code, path, f"{worker}-"]) for worker in range(4)]
    assert [worker.wait(60) for worker in workers] == [0] * 4
    assert Ledger(path).ids() == {f"{worker}-{n}" for worker in range(4) for n in range(40)}


def test_an_append_waits_for_the_lock(tmp_path):
    ledger = ledger_of(tmp_path)
    with open(ledger.path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        late = threading.Thread(target=ledger.append, args=[{"id": "late"}])
        late.start()
        late.join(0.2)
        assert "late" not in ledger.ids()
    late.join(10)  # closing the file gave the lock back
    assert "late" in ledger.ids()


def test_a_file_cut_anywhere_keeps_its_whole_rows_and_heals(tmp_path):
    ledger = ledger_of(tmp_path)
    whole = ledger.path.read_bytes()
    for cut in range(len(whole)):
        ledger.path.write_bytes(whole[:cut])
        left = ROWS[: whole[: cut + 1].count(b"\n")]  # of a row that lacks its newline alone nothing is lost
        assert ledger.rows() == left
        ledger.append({"id": "next"})
        assert ledger.rows() == [*left, {"id": "next"}]


def test_a_last_row_whose_newline_an_editor_took_stays_and_gets_it_back(tmp_path):
    ledger = ledger_of(tmp_path)
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole[:-1])
    assert ledger.rows() == ROWS
    ledger.append({"id": "next"})
    assert ledger.path.read_bytes() == whole + b'{"id": "next"}\n'


@pytest.mark.parametrize("damaged", [b'{"id": "b"', b"3", b"[1]", b"\xff\xfe", b"null"])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, damaged):
    ledger = ledger_of(tmp_path)
    lines = ledger.path.read_bytes().splitlines()
    ledger.path.write_bytes(b"\n".join([lines[0], damaged, lines[2], b""]))
    with pytest.raises(FileFormatError, match=r"line 2 of .*ledger\.jsonl"):
        ledger.rows()


def test_a_row_that_json_cannot_hold_leaves_the_file_alone(tmp_path):
    ledger = ledger_of(tmp_path)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            ledger.append({"id": "nan", "test": value})
    with pytest.raises(TypeError):
        ledger.append({"id": {1}})
    assert ledger.rows() == ROWS


# -- settings_id -------------------------------------------------------------------------------------------------------


def test_the_id_of_settings_is_the_same_in_any_order_and_on_any_machine():
    settings = {"model": "resnet20", "lr": 0.1, "recipe": {"name": "tost", "ghosts": ["ü", None, True]}}
    shuffled = {"recipe": {"ghosts": ["ü", None, True], "name": "tost"}, "lr": 0.1, "model": "resnet20"}
    assert settings_id(settings) == settings_id(shuffled) == settings_id(json.loads(json.dumps(settings))) == "14fd029f8f8d31b8"


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_settings_that_no_ledger_can_hold_are_refused_before_the_work(value):
    with pytest.raises(SettingError, match=rf"^recipe\.0\.gamma came as {value}\. Allowed"):
        settings_id({"recipe": [{"gamma": value}]})


def test_rows_without_an_id_are_nobodys(tmp_path):
    ledger = ledger_of(tmp_path)
    ledger.append({"id": "a", "test": 0.5})
    ledger.append({"test": 0.9})
    assert ledger.by_id()["a"]["test"] == 0.5
    assert ledger.ids() == {row["id"] for row in ledger.rows() if "id" in row}


def test_other_settings_have_another_id():
    assert len({settings_id(s) for s in ({}, {"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, {"a": [1]})}) == 6


# -- processor ---------------------------------------------------------------------------------------------------------


def test_the_processor_has_the_name_that_the_system_says(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda _: "processor\t: 0\nmodel name\t: Made 3000 @ 2.0 GHz\nprocessor\t: 1\n")
    assert processor() == "Made 3000 @ 2.0 GHz"


def test_where_no_name_is_said_the_processor_is_its_kind(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda _: "processor\t: 0\n")
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert processor() == platform.machine()
