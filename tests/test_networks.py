"""A part of docs/networks.md anew: techniques on networks of timm, torchvision and transformers."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("timm", reason="timm is not installed", exc_type=(ImportError, RuntimeError))
pytest.importorskip("transformers", reason="transformers is not installed", exc_type=(ImportError, RuntimeError))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from network_list import CI, NETWORKS
from network_table import good
from networks import TECHNIQUES, rows, try_one


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("network", [n for n in NETWORKS if n.name in CI], ids=lambda n: n.name)
@pytest.mark.filterwarnings("ignore")  # of the other libraries, about their own insides
def test_a_technique_keeps_its_promises_on_a_network_of_others(network, technique):
    row = try_one(network, TECHNIQUES[technique])
    assert good(row), row
    listed = [r for r in rows() if (r["network"], r["technique"]) == (network.name, technique)]
    assert [{key: r[key] for key in row} for r in listed] == [row]  # the table says what is true today


def test_the_table_is_whole():
    assert {(r["network"], r["technique"]) for r in rows()} == {(n.name, t) for n in NETWORKS for t in TECHNIQUES}
    assert len(NETWORKS) >= 40
    assert len({n.family for n in NETWORKS}) >= 15
    assert not [r for r in rows() if not good(r)]
