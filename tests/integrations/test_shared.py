"""What the callbacks of all trainers share, without a trainer."""

import numpy as np
import pytest
import torch
from torch import nn

import anymask
from anymask.holding import held
from anymask.integrations.shared import Session, Wanted, undisturbed


def begun(mask: anymask.Mask | None, state=None) -> Session:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    return Session(Wanted(mask), network, optimizer, total_steps=10, steps_per_epoch=None, batches=[], state=state)


def test_a_resumed_mask_still_knows_where_it_comes_from():
    mask = anymask.prune(begun(None).network, "magnitude+2:4")
    session = begun(None, begun(mask).state_dict())
    assert held(session.optimizer).mask == mask
    assert held(session.optimizer).mask.info == mask.info


def test_info_that_is_no_json_ends_no_training_at_its_first_checkpoint():
    mask = anymask.Mask(dict(anymask.prune(begun(None).network, "magnitude", sparsity=0.5).items()), info={"score": np.float32(0.5)})
    assert held(begun(None, begun(mask).state_dict()).optimizer).mask.info == {"score": "0.5"}


def test_looking_at_data_asks_nothing_of_gpus_that_nobody_uses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # of which torch warns where it is to keep the numbers of all
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    state = torch.get_rng_state()
    with undisturbed([]):
        torch.rand(1)
    assert torch.equal(torch.get_rng_state(), state)
