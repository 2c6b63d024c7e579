"""Downloads from a server on this machine."""

import hashlib
import io
import socket
import tarfile
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest

from anymask.data import DATASETS, load
from anymask.data.download import DOWNLOADS, Remote, fetch
from anymask.errors import DataError, FileFormatError
from tests.data.conftest import write_cifar10, write_fashion


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        self.server.asked.append(self.path)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves the folder `server.root`; `server.asked` counts the requests."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    root = tmp_path / "served"
    root.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=root)) as running:
        running.root, running.asked, running.url = root, [], f"http://127.0.0.1:{running.server_port}"
        thread = Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def put(server, name: str, blob: bytes, **settings: str) -> Remote:
    (server.root / name).write_bytes(blob)
    return Remote(f"{server.url}/{name}", hashlib.md5(blob).hexdigest(), **settings)


def tar_of(folder) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        archive.add(folder, folder.name)
    return file.getvalue()


def test_a_data_set_that_is_not_there_is_fetched_once_and_read(server, target, tmp_path, monkeypatch):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    remote = put(server, "cifar-10-python.tar.gz", tar_of(tmp_path / "cifar-10-batches-py"))
    monkeypatch.setitem(DOWNLOADS, "cifar10", (remote,))
    with pytest.raises(DataError, match="no cifar10 in"):
        load("cifar10", dir=target)
    assert server.asked == []
    assert len(load("cifar10", dir=target, download=True).train) == 6
    assert [path.name for path in target.iterdir()] == ["cifar-10-batches-py"]
    assert len(load("cifar10", dir=target, download=True).train) == 6
    assert len(server.asked) == 1


def test_without_a_folder_downloads_go_to_the_cache_and_are_found_there_again(server, target, tmp_path, monkeypatch):
    write_fashion(tmp_path / "files", train=np.zeros((2, 3, 4)), test=np.zeros((1, 3, 4)), zipped=True)
    remotes = [put(server, path.name, path.read_bytes(), into="fashion-mnist") for path in (tmp_path / "files").iterdir()]
    monkeypatch.setitem(DOWNLOADS, "fashion-mnist", tuple(remotes))
    monkeypatch.setitem(DATASETS, "fashion-mnist", _nowhere_known(DATASETS["fashion-mnist"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(target))
    load("fashion-mnist", download=True)
    assert len(list((target / "anymask" / "fashion-mnist").iterdir())) == 4
    assert len(load("fashion-mnist").train) == 2


def _nowhere_known(source):
    return type(source)(source.about, source.read, source.files, source.inside)


def test_a_zip_is_unpacked(server, target):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.mkdir("tiny") if hasattr(archive, "mkdir") else archive.writestr("tiny/", "")
        archive.writestr("tiny/wnids.txt", "n01")
    fetch([put(server, "tiny.zip", file.getvalue())], target)
    assert (target / "tiny" / "wnids.txt").read_text() == "n01"


def test_a_wrong_checksum_leaves_nothing_behind_not_even_the_files_before_it(server, target):
    good = put(server, "one.gz", b"right", into="set")
    bad = Remote(put(server, "two.gz", b"tampered with", into="set").url, "0" * 32, "set")
    with pytest.raises(DataError, match=r"two\.gz could not be fetched .*md5 0{32}.* To do: check the network"):
        fetch([good, bad], target)
    assert list(target.iterdir()) == []


def test_a_file_that_the_server_does_not_have_is_an_error_in_three_parts(server, target):
    with pytest.raises(DataError, match=r"404.*Allowed: .*To do: "):
        fetch([Remote(f"{server.url}/none.gz", "0" * 32)], target)
    assert list(target.iterdir()) == []


def test_a_network_that_does_not_answer_is_an_error_in_three_parts(target, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(DataError, match=r"could not be fetched .*Allowed: .*To do: check the network"):
            fetch([Remote(f"http://127.0.0.1:{taken.getsockname()[1]}/x.gz", "0" * 32)], target)
    assert list(target.iterdir()) == []


def member(name: str, *, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, 4 if kind == tarfile.REGTYPE else 0
    return info


HOSTILE = [
    [member("../evil")],
    [member("good"), member("set/../../evil")],
    [member("{outside}/evil")],
    [member("link", kind=tarfile.SYMTYPE, link="{outside}"), member("link/evil")],
    [member("link", kind=tarfile.LNKTYPE, link="../evil")],
    [member("pipe", kind=tarfile.FIFOTYPE)],
]


@pytest.mark.parametrize("members", HOSTILE)
def test_a_tar_that_leaves_its_folder_or_holds_links_is_refused(server, target, tmp_path, members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for info in members:
            copy = member(info.name.format(outside=tmp_path), kind=info.type, link=info.linkname.format(outside=tmp_path))
            archive.addfile(copy, io.BytesIO(b"evil"))
    with pytest.raises(FileFormatError, match="was refused at"):
        fetch([put(server, "set.tar.gz", file.getvalue())], target)
    assert list(target.iterdir()) == []
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "{outside}/evil"])
def test_a_zip_that_leaves_its_folder_is_refused(server, target, tmp_path, name):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name.format(outside=tmp_path), "evil")
    with pytest.raises(FileFormatError, match="was refused at"):
        fetch([put(server, "set.zip", file.getvalue())], target)
    assert list(target.iterdir()) == []
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("name", ["set.tar.gz", "set.zip"])
def test_a_file_that_is_no_archive_is_refused(server, target, name):
    with pytest.raises(FileFormatError, match="was refused at"):
        fetch([put(server, name, b"no archive")], target)
    assert list(target.iterdir()) == []


def test_a_folder_of_the_same_name_that_is_not_whole_is_kept_and_named(server, target, tmp_path):
    write_cifar10(tmp_path / "set")
    (target / "set").mkdir()
    (target / "set" / "mine").write_text("mine")
    with pytest.raises(DataError, match=r"could not be written .*To do: move what is in the way"):
        fetch([put(server, "set.tar.gz", tar_of(tmp_path / "set"))], target)
    assert [path.name for path in target.rglob("*")] == ["set", "mine"]


def test_every_download_is_a_data_set_with_md5s_and_the_names_that_it_is_looked_for_by():
    for name, remotes in DOWNLOADS.items():
        assert name in DATASETS
        for remote in remotes:
            assert int(remote.md5, 16) > 0
            assert len(remote.md5) == 32
            assert not remote.into or remote.into in DATASETS[name].inside
    assert {remote.url.rsplit("/", 1)[1] for remote in DOWNLOADS["fashion-mnist"]} == {
        f"{stem}.gz" for stem in DATASETS["fashion-mnist"].files
    }
