"""What every row of DYNAMIC refuses, and how it says so."""

import pytest
import torch
from torch import nn

import anymask
from anymask.errors import MaskError, SettingError, TechniqueError, UnknownName
from anymask.pruning.dynamic import DYNAMIC
from tests.contracts.test_dynamic import Training, every_row, first_mask


@every_row
def test_a_second_rewiring_is_refused(method):
    training = Training(method)
    with pytest.raises(MaskError, match="rewired already"):
        anymask.rewire(training.hold, method, **training.how)
    training.rewiring.release()
    anymask.rewire(training.hold, method, **training.how)


@every_row
def test_a_released_hold_is_refused(method):
    training = Training(method)
    training.hold.release()
    with pytest.raises(MaskError, match="released"):
        anymask.rewire(training.hold, method, **training.how)


@every_row
def test_a_mask_with_a_pattern_is_refused(method):
    for pattern, allowed in (("2:4", False), ("channel", False), ("unstructured", True)):
        mask = anymask.Mask({"0.weight": torch.ones(8, 6), "2.weight": torch.eye(4, 8)}, info={"pattern": pattern})
        if allowed:
            Training(method, mask=mask, scope="global") if DYNAMIC[method].shrinks else Training(method, mask=mask)
        else:
            with pytest.raises(MaskError, match=f"pattern '{pattern}'"):
                Training(method, mask=mask)


@every_row
def test_a_mask_that_covers_a_tensor_twice_is_refused(method):
    twice = anymask.Mask({"a.weight": torch.ones(6, 6), "b.weight": torch.eye(6)})
    with pytest.raises(MaskError, match=r"a\.weight and b\.weight"):
        Training(method, "tied", mask=twice)


@every_row
def test_a_parameter_that_another_optimiser_trains_is_refused(method):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    hold = anymask.hold(first_mask(DYNAMIC[method], model, 0.5), model, optimizer)
    how = {"sparsity": 0.5} if DYNAMIC[method].shrinks else {}
    with pytest.raises(MaskError, match=r"does not train 1\.weight"):
        anymask.rewire(hold, method, total_steps=1000, **how)
    model[1].requires_grad_(False)
    anymask.rewire(hold, method, total_steps=1000, **how)


@every_row
@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"every": "100it"}, SettingError, "no update in steps 0 to 12"),
        ({"every": "0it"}, SettingError, "more than nothing"),
        ({"begin": "80%"}, SettingError, "no update"),
        ({"start": 10}, SettingError, "no update in steps 10 to 12"),
        ({"start": 12}, SettingError, "start < total_steps"),
        ({"total_steps": 0}, SettingError, "start < total_steps"),
        ({"every": "1ep"}, SettingError, "steps_per_epoch"),
        ({"evry": "1it"}, UnknownName, "every"),
        ({"fraction": 1.0}, SettingError, r"\(0, 1\)"),
        ({"scope": "erkk"}, UnknownName, "scope"),
        ({"grow": "momentum"}, UnknownName, "gradient"),
    ],
)
def test_settings_out_of_range_say_what_is_allowed(method, wrong, error, says):
    training = Training(method)
    training.rewiring.release()
    if "every" in wrong and DYNAMIC[method].shrinks and wrong["every"] == "100it":
        return  # there its last update comes at the end in any case
    with pytest.raises(error, match=says) as caught:
        anymask.rewire(training.hold, method, **{**training.how, **wrong})
    assert caught.value.allowed
    assert caught.value.fix


def test_unknown_methods_are_answered_with_the_nearest():
    training = Training("set")
    training.rewiring.release()
    with pytest.raises(UnknownName, match="rigl"):
        anymask.rewire(training.hold, "rgl", total_steps=9)


@every_row
def test_the_loop_that_forgets_backward_is_told_where_gradients_are_needed(method):
    training = Training(method)
    with torch.no_grad():
        for p in training.model.parameters():
            p.grad = torch.ones_like(p)
    training.optimizer.step()
    if DYNAMIC[method].grow == "gradient":
        with pytest.raises(TechniqueError, match="saw no gradient before optimiser step 2"):
            training.optimizer.step()
    else:
        training.optimizer.step()
        assert len(training.rewiring.history) == 1
