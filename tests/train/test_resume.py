"""A training that is killed and started again ends bit-equal to one that was never disturbed."""

import multiprocessing
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anymask import Mask
from anymask.errors import FileFormatError, SettingError
from anymask.surgery import fingerprint
from anymask.train import checkpoint
from anymask.train.sparsity import slots_loaded, slots_stored
from tests.train.trainings import MOVING, PROTOCOL, RECIPE, Net, mask_of, train_and_save, train_once

KILLS = 10


@pytest.mark.parametrize("moving", ["static", "rigl"])
def test_killed_at_ten_random_moments_is_bit_equal_to_undisturbed(tmp_path: Path, moving: str) -> None:
    context = multiprocessing.get_context("forkserver")  # imports torch once, and forks from a process of one thread
    context.set_forkserver_preload(["torch._dynamo", "anymask.train", "anymask.pruning"])
    reference = _run(context, tmp_path / "undisturbed", moving, kill_after=None)
    assert reference is not None

    chance, kills, resumed, runs = random.Random(0), 0, 0, 0
    while kills < KILLS or runs == 0:
        folder = tmp_path / f"run{runs}"
        resumed += (folder / "checkpoint.pt").exists()
        kill_after = chance.uniform(0, 0.3) if kills < KILLS else None
        done = _run(context, folder, moving, kill_after=kill_after, awaited=("started", "checkpoint.pt")[kills % 2])
        kills += done is None
        if done is not None:
            _same(done, reference)
            runs += 1
    assert resumed > 0


def _run(context: Any, folder: Path, moving: str, *, kill_after: float | None, awaited: str = "started") -> dict[str, Any] | None:
    """What a training in a process of its own leaves behind; None when it was killed, `kill_after` seconds from `awaited`."""
    folder.mkdir(exist_ok=True)
    process = context.Process(target=train_and_save, args=(folder, moving))
    process.start()
    while kill_after is not None and process.is_alive() and not (folder / awaited).exists():
        time.sleep(0.01)
    process.join(kill_after)
    process.kill()  # SIGKILL
    process.join()
    (folder / "started").unlink(missing_ok=True)
    return torch.load(folder / "done.pt", weights_only=True) if (folder / "done.pt").exists() else None


def _same(ours: dict, theirs: dict) -> None:
    assert ours["curves"] == theirs["curves"]
    assert ours["accuracy"] == theirs["accuracy"]
    for part in ("model", "mask"):
        for key, value in theirs[part].items():
            assert torch.equal(ours[part][key], value), key


@pytest.mark.parametrize("how", [*({"moving": name} for name in MOVING), {"diagnose": "on"}], ids=lambda how: next(iter(how.values())))
@pytest.mark.parametrize("steps", [1, 3, 4, 7, 11, 17])
def test_stopped_after_any_step_is_bit_equal_in_every_phase(
    tmp_path: Path, steps: int, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Net()
    expected = train_once(whole, **how)
    kept = checkpoint.save
    saves = 0

    def stop_after(path: Path, state: dict) -> None:
        nonlocal saves
        kept(path, state)
        saves += 1
        if saves == steps:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", stop_after)
        with pytest.raises(KeyboardInterrupt):
            train_once(Net(), file=tmp_path / "c.pt", every=1, **how)
    model = Net(seed=99)  # its weights must come from the checkpoint
    result = train_once(model, file=tmp_path / "c.pt", every=1, **how)
    assert result.curves == expected.curves
    assert result.mask == expected.mask
    for key, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    """A loop over masks or seeds that forgot to name the file by them would get the first training's weights for each."""
    train_once(Net(), file=tmp_path / "c.pt")
    before = (tmp_path / "c.pt").read_bytes()
    other = Mask({name: ~kept for name, kept in mask_of(Net()).items()})
    for how, named in (({"mask": other}, "mask"), ({"protocol": replace(PROTOCOL, lr=0.04)}, "protocol"), ({"seed": 1}, "seed")):
        with pytest.raises(SettingError, match=f"of a training with another {named}\\. Allowed"):
            train_once(Net(), file=tmp_path / "c.pt", **how)
    assert (tmp_path / "c.pt").read_bytes() == before


class Stopping(nn.Module):
    """A ReLU in whose call number `left` Ctrl-C comes."""

    def __init__(self) -> None:
        super().__init__()
        self.left = 0

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        y = F.relu(x)
        if self.left == 0:
            raise KeyboardInterrupt
        return y


@pytest.mark.parametrize("moving", ["static", "rigl"])
def test_ctrl_c_in_any_forward_pass_leaves_the_model_as_it_came(moving: str) -> None:
    model, depth = Net(), torch._C._len_torch_function_stack()
    relu = model.body[2] = Stopping()
    before, fresh = fingerprint(model), {name: value.clone() for name, value in model.state_dict().items()}
    for relu.left in (1, 2, 5, 10, 20, 40):  # while the recipe looks at the model, in LRsI, in a step, in an evaluation ...
        with pytest.raises(KeyboardInterrupt):
            train_once(model, moving=moving, sparse="off")
        assert torch._C._len_torch_function_stack() == depth
        assert fingerprint(model) == before
        assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    model.load_state_dict(fresh)
    assert train_once(model, moving=moving, sparse="off").curves == train_once(Net(), moving=moving, sparse="off").curves


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_how_steps_are_made_is_of_the_machine_that_goes_on(kind: type[torch.optim.Optimizer]) -> None:
    """A CPU's checkpoint, on a GPU, would give its fused optimizer up, and a recorded step cannot read a rate for another."""
    (there, here), made = (Net(), Net()), []
    for model, fused in ((there, None), (here, True)):
        made.append(kind(model.parameters(), lr=0.1, weight_decay=0.1, fused=fused))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        made[-1].step()
    saved = slots_stored(there, made[0])
    saved["param_groups"][0]["lr"] = 0.01
    slots_loaded(here, made[1], saved)
    assert (made[1].param_groups[0]["lr"], made[1].param_groups[0]["fused"], saved["param_groups"][0]["fused"]) == (0.01, True, None)
    made[1].step()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_damaged_checkpoint_is_a_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.pt").write_bytes(content)
    with pytest.raises(FileFormatError, match="remove it"):
        train_once(Net(), file=tmp_path / "c.pt")


def test_a_checkpoint_that_would_run_code_runs_nothing(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    torch.save(_Hostile(touched), tmp_path / "c.pt")
    with pytest.raises(FileFormatError):
        train_once(Net(), file=tmp_path / "c.pt")
    assert not touched.exists()


class _Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    train_once(Net(), file=tmp_path / "c.pt")
    with pytest.raises(SettingError, match="other techniques"):
        train_once(Net(), recipe=RECIPE.without("label_smoothing"), file=tmp_path / "c.pt")


def test_a_checkpoint_of_a_mask_that_moves_otherwise_is_refused(tmp_path: Path) -> None:
    train_once(Net(), file=tmp_path / "c.pt", moving="rigl")
    with pytest.raises(SettingError, match="other about and grow and name"):
        train_once(Net(), file=tmp_path / "c.pt", moving="set")
    with pytest.raises(SettingError, match="with rewire"):
        train_once(Net(), file=tmp_path / "c.pt")
