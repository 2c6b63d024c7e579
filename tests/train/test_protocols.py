"""Protocols: what they may hold, what they are called, and the ids of runs that were made before there were names."""

import json
import sys
import tempfile
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD

from anymask.config import Bench, Experiment
from anymask.errors import SettingError, UnknownName
from anymask.runlog import settings_id
from anymask.sweep import Cell, Runner
from anymask.sweep.plan import read_plan
from anymask.train import Protocol
from anymask.train.presets import PROTOCOLS, preset_about, preset_settings, protocol_of
from anymask.train.settings import with_momentum

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
LEDGERS = sorted(ROOT.glob("results/*/ledger.jsonl"))
PLANS = sorted(path for path in (ROOT / "plans").glob("*.toml") if not path.stem.startswith("study"))  # those: tests/sweep/test_study.py
NAMES = {f.name for f in fields(Protocol)}


def rows(ledger):
    return [json.loads(line) for line in ledger.read_text().splitlines()]


@pytest.mark.parametrize("ledger", [ROOT / "results" / "demo" / "ledger.jsonl"])
def test_what_is_trained_now_has_the_id_that_it_had_before_drops_and_momentum_were_settings(ledger):
    bench = Bench(Experiment(), Protocol(epochs=7, batch_size=64, augment=False))
    cell = Cell("dense", 0.0, "default", 0)
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(bench, folder)
        assert runner.name(cell) == "80361bd406a9607b"
        plain = [row for row in rows(ledger) if row["settings"]["recipe"] == "default"]
        cells = [Cell(**{name: row["settings"][name] for name in ("mask", "sparsity", "recipe", "seed")}) for row in plain]
        assert [runner.name(cell) for cell in cells] == [row["id"] for row in plain]


@pytest.mark.parametrize("ledger", LEDGERS, ids=lambda path: path.parent.name)
def test_the_settings_in_committed_ledgers_are_those_of_a_protocol_of_now(ledger):
    for row in rows(ledger):
        there = {name: value for name, value in row["settings"].items() if name in NAMES}
        now = Protocol(**{name: tuple(value) if isinstance(value, list) else value for name, value in there.items()}).plain()
        assert now == there
        assert settings_id({**row["settings"], **now, "techniques": row["techniques"]}) == row["id"]


def test_new_settings_are_in_the_plain_values_where_they_differ_and_decide_something():
    new = {"drops": ("30%",), "momentum": 0.8, "nesterov": False}
    assert not set(new) & set(Protocol(schedule="step").plain())
    assert not set(new) & set(Protocol(optimizer="adamw", **new).plain())  # which has neither drops here nor momentum
    plain = Protocol(schedule="step", **new).plain()
    assert {name: plain[name] for name in new} == {"drops": ["30%"], "momentum": 0.8, "nesterov": False}
    assert json.loads(json.dumps(plain)) == plain


# -- the step schedule ------------------------------------------------------------------------------------------------
def rates(protocol, *, per_epoch):
    total = protocol.epochs * per_epoch
    return [protocol.lr_at(step, total=total, per_epoch=per_epoch) for step in range(total)]


def test_drops_in_epochs_come_with_the_first_step_of_that_epoch():
    found = rates(protocol_of({"preset": "tost-182"}), per_epoch=3)
    assert found == pytest.approx([0.1] * 270 + [0.01] * 135 + [0.001] * 141)


def test_drops_in_epochs_count_from_the_start_and_shares_from_the_end_of_the_warmup():
    for drops, when in ((("6ep",), 12), (("12it",), 12), (("50%",), 15)):
        found = rates(Protocol(epochs=10, schedule="step", drops=drops, warmup="5ep"), per_epoch=2)
        assert [i for i, (a, b) in enumerate(pairwise(found), 1) if b < a] == [when]


@given(st.integers(1, 60), st.integers(1, 7), st.integers(0, 50))
def test_the_default_drops_give_the_very_rates_that_they_gave_before_they_were_a_setting(epochs, per_epoch, percent):
    protocol, total = Protocol(epochs=epochs, schedule="step", warmup=f"{percent}%"), epochs * per_epoch
    warmup = round(percent * (total / 100))
    for step in range(warmup, total):
        done = (step - warmup) / max(1, total - warmup)
        assert protocol.lr_at(step, total=total, per_epoch=per_epoch) == 0.1 * (0.1 ** ((done >= 0.5) + (done >= 0.75)))


def test_without_drops_the_rate_stays():
    assert set(rates(Protocol(epochs=4, schedule="step", drops=()), per_epoch=2)) == {0.1}


@pytest.mark.parametrize("drops", [("20ep",), ("5ep", "30ep"), ("100%",)])
def test_a_drop_that_would_never_come_is_refused_and_the_way_to_shorten_said(drops):
    with pytest.raises(SettingError, match=r"drops came with .* and epochs as 20\. Allowed: .*shares"):
        Protocol(epochs=20, schedule="step", drops=drops)
    assert Protocol(epochs=20, drops=drops).schedule == "cosine"  # where they decide nothing they may be anything


# -- the optimiser -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.9, False), (0.5, True), (0.0, True)])
def test_the_optimiser_has_the_momentum_of_the_protocol(momentum, nesterov):
    torch.manual_seed(0)
    one, two = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    two.load_state_dict(one.state_dict())
    ours = Protocol(lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=0.01).make_optimizer(one)
    theirs = SGD(two.parameters(), lr=0.1, momentum=momentum, nesterov=nesterov and momentum > 0, weight_decay=0.01)
    for _ in range(3):
        for net, optimizer in ((one, ours), (two, theirs)):
            optimizer.zero_grad()
            net(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
    assert torch.equal(one.weight, two.weight)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"lr": 0.0},
        {"optimizer": "sdg"},
        {"schedule": "cosin"},
        {"warmup": "3"},
        {"precision": "fp32"},
        {"weight_decay": -1.0},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"momentum": float("nan")},
        {"drops": ("90",)},
        {"drops": "50%"},
    ],
)
def test_settings_out_of_range_say_what_is_allowed(wrong):
    with pytest.raises(SettingError, match=r"Allowed: .*\. To do: "):
        Protocol(**wrong)


# -- named ones ----------------------------------------------------------------------------------------------------------
PUBLISHED = {
    "tost-182": {"epochs": 182, "batch_size": 128, "lr": 0.1, "weight_decay": 2e-4, "drops": ("90ep", "135ep")},
    "grasp-160": {"epochs": 160, "batch_size": 128, "lr": 0.1, "weight_decay": 1e-4, "drops": ("80ep", "120ep")},
    "tiny-200": {"epochs": 200, "batch_size": 256, "lr": 0.2, "weight_decay": 5e-4, "drops": ("100ep", "150ep")},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_protocols_are_as_published(name):
    like = {"optimizer": "sgd", "momentum": 0.9, "nesterov": False, "schedule": "step", "warmup": "0%", "augment": True}
    assert protocol_of({"preset": name}) == Protocol(**PUBLISHED[name], **like)


def test_the_short_protocol_is_15_epochs_of_cosine():
    assert protocol_of({"preset": "short-15"}) == Protocol(epochs=15)


def test_the_table_of_protocols_holds_every_file_and_each_says_what_it_is_and_where_it_comes_from():
    folder = ROOT / "src" / "anymask" / "protocols"
    assert set(PROTOCOLS.values()) == {path.name for path in folder.iterdir()}
    for name, file in PROTOCOLS.items():
        assert file == f"{name}.toml"
        about, source = preset_about(name)
        assert about
        assert source
        assert set(preset_settings(name)) <= NAMES


def test_what_is_said_besides_goes_over_the_preset_and_the_rest_is_as_in_the_preset_or_the_default():
    made = protocol_of({"preset": "grasp-160", "weight-decay": 5e-4, "clip": 1, "drops": ["50%"]})
    assert (made.weight_decay, made.clip, made.drops, made.epochs, made.precision) == (5e-4, 1.0, ("50%",), 160, "float32")
    assert isinstance(made.clip, float)  # 1 and 1.0 are one training
    assert protocol_of({}) == Protocol()
    assert protocol_of({"schedule": "step", "drops": "30%"}).drops == ("30%",)


@pytest.mark.parametrize(
    ("table", "error", "said"),
    [
        ({"preset": "tost-128"}, UnknownName, "did you mean 'tost-182'"),
        ({"preset": 182}, SettingError, "preset came as 182"),
        ({"preset": "tost-182", "epoch": 3}, UnknownName, "did you mean 'epochs'"),
        ({"presett": "tost-182"}, UnknownName, "did you mean 'preset'"),
        ({"about": "mine"}, UnknownName, "unknown setting"),
        ({"epochs": 2.5}, SettingError, "a whole number"),
        ({"epochs": True}, SettingError, "a whole number"),
        ({"lr": "0.1"}, SettingError, "a number"),
        ({"nesterov": 1}, SettingError, "true or false"),
        ({"schedule": ["step"]}, SettingError, "a text"),
        ({"drops": [90]}, SettingError, "a list"),
        ({"drops": 90}, SettingError, "a list"),
        ({"preset": "tost-182", "epochs": 20}, SettingError, "give drops as shares"),
        ({"optimizer": "sdg"}, UnknownName, "did you mean 'sgd'"),
    ],
)
def test_what_no_protocol_has_is_refused_in_three_parts(table, error, said):
    with pytest.raises(error, match=r"Allowed: .*\. To do: ") as caught:
        protocol_of(table)
    assert said in str(caught.value)


# -- plans ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_plans_name_what_there_is(path):
    plan = read_plan(path)  # refuses what is unknown
    assert plan.about
    assert {part.protocol.epochs for block in plan.blocks for part in block} <= {5, 15, 16, 45, 182}


def cells(plan):
    """(data, model, mask, sparsity) of a plan in its order; the number of its dense references."""
    found = [
        (data, model, mask, sparsity)
        for block in plan["block"]
        for data in block["data"]
        for model in block["model"]
        for mask in block["masks"]
        for sparsity in block["sparsity"]
    ]
    return found, [(data, model) for block in plan["block"] if block["dense"] for data in block["data"] for model in block["model"]]


def test_the_papers_plan_is_the_whole_grid_each_cell_once_the_most_urgent_first():
    plan = tomllib.loads((ROOT / "plans" / "paper.toml").read_text())
    found, dense = cells(plan)
    assert len(found) == len(set(found)) == 5 * 5 * 3 * 3
    assert len(dense) == len(set(dense)) == 5 * 3
    assert {mask for _, _, mask, _ in found} == {"random-erk", "snip", "grasp", "synflow", "lottery"}
    first = [cell for cell in found if cell[0] == "cifar100" and cell[1] in ("resnet32", "resnet18")]
    assert found[: len(first)] == first
    assert [data for data, *_ in found if data == "tiny-imagenet"] == [data for data, *_ in found][-75:]
    assert all((block["recipes"], block["seeds"]) == (["default", "tost"], 3) for block in plan["block"])


def test_momentum_of_0_gives_the_same_steps_and_lets_a_fused_sgd_meet_a_late_gradient():
    x, found = torch.ones(2, 4), []
    for fused in (None, True):
        torch.manual_seed(0)
        early, late = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)
        optimizer = torch.optim.SGD([*early.parameters(), *late.parameters()], lr=0.1, momentum=0.9, nesterov=True, fused=fused)
        optimizer = with_momentum(optimizer) if fused else optimizer
        for step in range(3):
            (late(early(x)) if step else early(x)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([*early.parameters(), *late.parameters()])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


def test_adamw_at_a_rate_of_sgd_is_said_aloud() -> None:
    with pytest.warns(UserWarning, match=r"AdamW came with lr=0.1, which suits SGD: 0.001 to 0.01"):
        Protocol(optimizer="adamw").make_optimizer(nn.Linear(2, 2))
    Protocol(optimizer="adamw", lr=0.03).make_optimizer(nn.Linear(2, 2))
    Protocol().make_optimizer(nn.Linear(2, 2))
