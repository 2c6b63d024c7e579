"""Lottery tickets: the rounds by hand, rewinding, and going on where an earlier call was cut off."""

import json
from itertools import pairwise

import pytest
import torch
from torch import nn

from anymask.errors import FileFormatError, MaskError, SettingError
from anymask.formats import load_mask
from anymask.pruning import lottery_ticket, prune


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 2))  # 80 + 20 weights


class Training:
    """Adds random numbers to every weight, counts a batch-norm step, holds the mask, notes its calls; fails in call `dies`."""

    def __init__(self, *, dies=None):
        self.calls, self.started_from, self.dies = [], [], dies

    def __call__(self, model, mask, first, last):
        if len(self.calls) + 1 == self.dies:
            raise KeyboardInterrupt
        self.calls.append((None if mask is None else mask.kept, first, last))
        self.started_from.append({name: p.detach().clone() for name, p in model.named_parameters()})
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * (0.1 if last is None else 0.3))
            model[1].running_mean.add_(1)
        if mask is not None:
            mask.apply(model)


def test_every_round_prunes_a_fifth_of_what_is_left_and_the_last_hits_the_sparsity():
    train = Training()
    ticket = lottery_ticket(make(), sparsity=0.57, train=train)
    # 100 -> 80 -> 64 -> 51 (51.2) -> 43, where the plan would be 41 (40.96); the first training is dense
    assert [kept for kept, _, _ in train.calls] == [None, 80, 64, 51]
    assert ticket.mask.kept == 43
    assert ticket.mask.info["rounds"] == 4


@pytest.mark.parametrize("rewind_step", [0, 7])
def test_every_round_starts_from_the_masked_weights_of_step_k(rewind_step):
    model, train = make(), Training()
    ticket = lottery_ticket(model, sparsity=0.5, train=train, rewind_step=rewind_step)
    rounds = [(None, rewind_step, None), (80, rewind_step, None), (64, rewind_step, None), (51, rewind_step, None)]
    assert train.calls == [(None, 0, 7)] * (rewind_step > 0) + rounds
    assert all(torch.equal(ticket.weights[n], t) == (rewind_step == 0) for n, t in model.state_dict().items() if n.endswith("weight"))
    assert int(ticket.weights["1.running_mean"].sum()) == (10 if rewind_step else 0)  # buffers are rewound too
    for (kept, _, _), start in list(zip(train.calls, train.started_from, strict=True))[-3:]:
        held = {name: start[name] != 0 for name in ticket.mask}
        assert sum(int(h.sum()) for h in held.values()) == kept
        assert all(torch.equal(start[name], ticket.weights[name] * held.get(name, True)) for name in start)


def test_the_smallest_weights_after_training_go_by_hand():
    model = nn.Linear(3, 2, bias=False)
    model.weight.data.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))

    def train(model, mask, first, last):  # 1 becomes 10, -6 the smallest but in size
        with torch.no_grad():
            model.weight[model.weight == 1] = 10
            model.weight[model.weight == 6] = -6
            model.weight[model.weight == 4] = 0.5

    # rounds of 50%: of 10 2 3 0.5 5 -6 stay 10 5 -6, then (1 - 0.5)^2 * 6 = 2: 10 and -6
    ticket = lottery_ticket(model, sparsity=2 / 3, train=train, rate=0.5)
    assert ticket.mask["weight"].tolist() == [[True, False, False], [False, False, True]]


@pytest.mark.parametrize("rewind_step", [0, 3])
def test_a_call_cut_off_in_round_3_goes_on_there_with_the_same_result_bit_for_bit(tmp_path, rewind_step):
    whole = lottery_ticket(make(), sparsity=0.6, train=Training(), rewind_step=rewind_step)
    first = Training(dies=3 + (rewind_step > 0))
    with pytest.raises(KeyboardInterrupt):
        lottery_ticket(make(), sparsity=0.6, train=first, rewind_step=rewind_step, folder=tmp_path)
    second = Training()
    torch.manual_seed(123)
    model = make()
    torch.manual_seed(456)
    again = lottery_ticket(model, sparsity=0.6, train=second, rewind_step=rewind_step, folder=tmp_path)
    assert [kept for kept, _, _ in first.calls[-2:] + second.calls] == [None, 80, 64, 51, 41]
    assert again.mask == whole.mask
    assert again.mask.info == whole.mask.info
    assert again.weights.keys() == whole.weights.keys()
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in whole.weights.items())

    third = Training(dies=1)  # everything is there: nothing is trained
    assert lottery_ticket(make(), sparsity=0.6, train=third, rewind_step=rewind_step, folder=tmp_path).mask == whole.mask


def test_a_kept_weight_that_trains_to_0_is_no_pruned_weight_and_no_pruned_one_comes_back(tmp_path):
    def to_zero(model, mask, first, last):
        if mask is not None:  # from the second round on
            nn.init.zeros_(model[0].weight)
            nn.init.zeros_(model[3].weight)

    lottery_ticket(make(), sparsity=0.6, train=to_zero, folder=tmp_path)
    masks = [load_mask(tmp_path / f"round-0{n}.mask") for n in range(1, 6)]
    assert [mask.kept for mask in masks] == [80, 64, 51, 41, 40]
    assert all(bool((before[n] | ~after[n]).all()) for before, after in pairwise(masks) for n in after)


def test_sparsity_0_trains_nothing_and_keeps_everything():
    assert lottery_ticket(make(), sparsity=0.0, train=Training(dies=1)).mask.sparsity == 0


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"sparsity": 0.8}, r"sparsity=0\.6, not 0\.8"),
        ({"rate": 0.5}, r"rate=0\.2, not 0\.5"),
        ({"rewind_step": 4}, "rewind_step=0, not 4"),
        ({"seed": 9}, "seed=0, not 9"),
        ({"exclude": ["3"]}, "exclude="),
        ({"training": {"epochs": 3, "lr": 0.2}}, r"made with training lr=0\.1, not 0\.2"),
    ],
)
def test_a_folder_of_other_settings_is_refused(tmp_path, other, says):
    how = {"sparsity": 0.6, "training": {"epochs": 3, "lr": 0.1}, "folder": tmp_path}
    lottery_ticket(make(), train=Training(), **how)
    with pytest.raises(SettingError, match=says):
        lottery_ticket(make(), **{**how, "train": Training(dies=1), **other})


def test_a_folder_of_another_initialisation_is_refused(tmp_path):
    lottery_ticket(make(), sparsity=0.6, train=Training(), folder=tmp_path)
    other = make()
    other[0].weight.data[0, 0] += 1e-6
    with pytest.raises(SettingError, match="made with another model"):
        lottery_ticket(other, sparsity=0.6, train=Training(), folder=tmp_path)


@pytest.mark.parametrize("name", ["settings.json", "rewind.safetensors", "round-05.mask"])
def test_a_damaged_file_is_refused_and_not_trained_over(tmp_path, name):
    lottery_ticket(make(), sparsity=0.6, train=Training(), folder=tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:20])
    with pytest.raises(FileFormatError, match=name):
        lottery_ticket(make(), sparsity=0.6, train=Training(dies=1), folder=tmp_path)


def test_a_mask_of_another_search_in_the_folder_is_refused(tmp_path):
    lottery_ticket(make(), sparsity=0.6, train=Training(), folder=tmp_path)
    (tmp_path / "round-04.mask").replace(tmp_path / "round-05.mask")
    with pytest.raises(FileFormatError, match=r"round-05\.mask keeps 41 weights.*40"):
        lottery_ticket(make(), sparsity=0.6, train=Training(), folder=tmp_path)


def test_a_training_that_does_not_hold_its_mask_is_refused():
    def careless(model, mask, first, last):
        with torch.no_grad():
            model[0].weight.add_(1)

    with pytest.raises(MaskError, match=r"pruned weights that are not 0 in 0\.weight.*anymask\.hold"):
        lottery_ticket(make(), sparsity=0.6, train=careless)


def test_a_training_that_diverges_is_refused():
    def diverging(model, mask, first, last):
        nn.init.constant_(model[3].weight, torch.nan)

    with pytest.raises(MaskError, match=r"NaN or infinite scores for 3\.weight"):
        lottery_ticket(make(), sparsity=0.6, train=diverging)


@pytest.mark.parametrize(
    ("how", "says"), [({"rate": 0.0}, "rate came as"), ({"rate": 1}, "rate came"), ({"rewind_step": -1}, "rewind_step")]
)
def test_settings_out_of_range_are_refused_before_anything_is_trained(how, says):
    with pytest.raises(SettingError, match=says):
        lottery_ticket(make(), sparsity=0.6, train=Training(dies=1), **how)


def test_prune_returns_the_mask_of_the_ticket():
    ticket = lottery_ticket(make(), sparsity=0.6, train=Training(), exclude=["3"])
    assert prune(make(), "lottery", sparsity=0.6, train=Training(), exclude=["3"]) == ticket.mask


def test_the_folder_holds_plain_settings_and_one_mask_a_round(tmp_path):
    ticket = lottery_ticket(make(), sparsity=0.6, train=Training(), folder=tmp_path / "new" / "folder")
    names = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    rounds = [f"round-0{n}.mask" for n in range(1, 6)]
    assert names == ["rewind.safetensors", *rounds, "settings.json"]
    settings = json.loads((tmp_path / "new" / "folder" / "settings.json").read_text())
    shared = ticket.mask.info.keys() - {"collapsed", "model", "versions"}  # another version may go on with the search
    assert {key: settings[key] for key in shared} == {key: ticket.mask.info[key] for key in shared}


def test_learning_rate_rewinding_goes_on_from_what_was_trained():
    train = Training()
    ticket = lottery_ticket(make(), sparsity=0.5, train=train, rewinds=False)
    assert train.calls == [(None, 0, None), (80, 0, None), (64, 0, None), (51, 0, None)]
    first, second = train.started_from[:2]
    assert not torch.equal(first["0.bias"], second["0.bias"])  # not pruned, and trained in the first round
    assert int(ticket.weights["1.running_mean"].sum()) == 40  # four trainings, one after the other
    assert ticket.mask.info["method"] == "lottery-lr"


def test_learning_rate_rewinding_cut_off_in_round_3_goes_on_with_the_same_result(tmp_path):
    how = {"sparsity": 0.6, "rewinds": False, "rewind_step": 2}
    whole = lottery_ticket(make(), train=Training(), **how)
    with pytest.raises(KeyboardInterrupt):
        lottery_ticket(make(), train=Training(dies=4), folder=tmp_path, **how)
    again = lottery_ticket(make(), train=Training(), folder=tmp_path, **how)
    assert again.mask == whole.mask
    assert all(torch.equal(again.weights[name], tensor) for name, tensor in whole.weights.items())
    assert [file.name for file in sorted(tmp_path.glob("round-*.safetensors"))] == ["round-05.safetensors"]
    (tmp_path / "round-05.safetensors").unlink()
    with pytest.raises(FileFormatError, match=r"has no round-05\.safetensors"):
        lottery_ticket(make(), train=Training(dies=1), folder=tmp_path, **how)


@pytest.mark.parametrize(("rounds", "kept"), [(1, []), (2, [63]), (3, [74, 54])])  # 100 * 0.4^(r/n)
def test_a_number_of_rounds_prunes_equal_shares(rounds, kept):
    train = Training()
    ticket = lottery_ticket(make(), sparsity=0.6, train=train, rounds=rounds)
    assert [kept for kept, _, _ in train.calls] == [None, *kept]
    assert (ticket.mask.kept, ticket.mask.info["rounds"]) == (40, rounds)
    assert ticket.mask.info["rate"] == pytest.approx(1 - 0.4 ** (1 / rounds))


@pytest.mark.parametrize(
    ("method", "row"), [("lottery", {}), ("lottery-oneshot", {}), ("lottery-rewind", {"rewind_step": 3}), ("lottery-lr", {})]
)
def test_prune_runs_each_row_of_the_table_and_says_which(method, row):
    assert prune(make(), method, sparsity=0.6, train=Training(), **row).info["method"] == method


def test_a_ticket_has_the_scope_and_pattern_asked_for(tmp_path):
    mask = lottery_ticket(make(), sparsity=0.6, train=Training(), scope="uniform", folder=tmp_path / "uniform").mask
    assert {name: int(mask[name].sum()) for name in mask} == {"0.weight": 32, "3.weight": 8}
    how = {"sparsity": 0.6, "train": Training(), "pattern": "channel", "folder": tmp_path / "channel"}
    mask = lottery_ticket(make(), **how).mask
    assert set(mask["0.weight"].sum(1).tolist()) <= {0, 8}
    assert 30 < mask.kept <= 40
    assert lottery_ticket(make(), **{**how, "train": Training(dies=1)}).mask == mask
