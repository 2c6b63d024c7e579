"""The reference trainer with masks that move."""

from dataclasses import replace

import pytest
from torch import Tensor

from anymask import fit, prunable
from anymask.data import Batches, Split
from anymask.errors import SettingError, TechniqueError, UnknownName
from anymask.pruning.dynamic import DYNAMIC
from anymask.train import Protocol, accuracy
from tests.train.trainings import EVERY, MOVING, PROTOCOL, Net, batches, images, mask_of, train_once


def misled() -> Batches:
    """Validation images under wrong labels: learning makes it worse, so that an early checkpoint is chosen."""
    right = images(40, seed=2)
    return Batches(Split(right.images, (right.labels + 1) % 4), batch_size=20)


@pytest.mark.parametrize("moving", MOVING)
@pytest.mark.parametrize("preset", ["default", "tost"])
def test_the_model_ends_under_the_mask_of_the_result(moving: str, preset: str) -> None:
    model = Net()
    result = train_once(model, recipe=preset, moving=moving)
    assert result.mask is not None
    result.mask.check(model)
    zeros = {name: int((p == 0).sum()) for name, p in prunable(model).items()}
    assert zeros == {name: int((~result.mask[name]).sum()) for name in result.mask}
    assert result.mask.kept == mask_of(Net()).kept
    assert (result.mask == mask_of(Net())) == (moving == "static")
    assert accuracy(model, batches()[2]) == result.test


@pytest.mark.parametrize("moving", ["set", "rigl"])
def test_the_mask_of_the_chosen_checkpoint_comes_with_its_weights(moving: str) -> None:
    train, _, _ = batches()
    masks = []
    model = Net()
    result = fit(model, train, mask=mask_of(Net()), rewire=MOVING[moving], recipe="default", protocol=PROTOCOL, validation=misled())
    assert result.best_epoch < 4
    for epochs in (result.best_epoch, 5):  # as it was by the end of that epoch, and by the end of training
        whole = fit(Net(), train, mask=mask_of(Net()), rewire=MOVING[moving], recipe="default", protocol=PROTOCOL, last_step=4 * epochs)
        masks.append(whole.mask)
    assert result.mask == masks[0] != masks[1]
    assert all(not model.get_parameter(name)[~result.mask[name]].any() for name in result.mask)
    assert accuracy(model, misled()) == result.validation


def test_gradual_pruning_chooses_only_where_the_sparsity_is_reached() -> None:
    train, _, _ = batches()
    model = Net()
    result = fit(model, train, rewire=MOVING["gmp"], sparsity=0.6, recipe="default", protocol=PROTOCOL, validation=misled())
    assert result.best_epoch >= 4  # 75% of 20 steps, 4 an epoch
    assert result.mask is not None
    assert result.mask.kept == round(0.4 * result.mask.total)
    assert result.curves["density"] == sorted(result.curves["density"], reverse=True)
    assert result.curves["density"][-1] == result.mask.density
    assert sum(result.curves["moved"]) == result.mask.total - result.mask.kept


def test_curves_say_what_moved_in_each_epoch() -> None:
    result = train_once(Net(), recipe="default", moving="rigl")
    assert [moved > 0 for moved in result.curves["moved"]] == [True, True, True, True, False]
    assert result.curves["density"] == [mask_of(Net()).density] * 5
    assert "moved" not in train_once(Net(), recipe="default").curves


def test_a_dense_training_has_no_mask() -> None:
    train, _, test = batches()
    result = fit(Net(), train, recipe="default", protocol=Protocol(epochs=1), test=test)
    assert result.mask is None


def test_without_checkpoints_of_the_final_sparsity_the_last_weights_stay() -> None:
    train, validation, _ = batches()
    model = Net()
    result = fit(model, train, rewire=MOVING["gmp"], sparsity=0.6, recipe="default", protocol=PROTOCOL, validation=validation, last_step=8)
    assert (result.best_epoch, result.validation) == (0, None)
    assert result.mask is not None
    assert 0.4 < result.mask.density < 1
    assert accuracy(model, validation) == result.last_validation


class Loud(Net):
    """Its gradients overflow in float16 until GradScaler has come down, which skips steps."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 100


@pytest.mark.parametrize("end", ["25%", "100%"])
def test_gradual_pruning_that_gets_no_step_for_its_last_move_is_an_error(end: str) -> None:
    train, _, _ = batches()
    protocol = replace(PROTOCOL, precision="float16", clip=0.0, lr=1e-4)
    how = {"rewire": replace(DYNAMIC["gmp"], every="2it", end=end), "sparsity": 0.6, "recipe": "default", "protocol": protocol}
    if end == "100%":
        with pytest.raises(TechniqueError, match="before its last update"):
            fit(Loud(), train, **how)
    else:
        result = fit(Loud(), train, **how)
        assert result.mask is not None
        assert result.mask.kept == round(0.4 * result.mask.total)


def test_a_rewound_training_moves_at_the_same_steps() -> None:
    train, validation, _ = batches()
    result = fit(
        Net(), train, mask=mask_of(Net()), rewire=MOVING["set"], recipe="default", protocol=PROTOCOL, validation=validation, first_step=8
    )
    assert [moved > 0 for moved in result.curves["moved"]] == [True, True, False]


def test_what_does_not_go_together_is_refused() -> None:
    train, _, _ = batches()
    for how, error, says in (
        ({"rewire": "rigl"}, SettingError, "without mask.*random-erk"),
        ({"rewire": "gmp"}, SettingError, "without sparsity"),
        ({"sparsity": 0.9}, SettingError, "without rewire"),
        ({"rewire": "rgl", "mask": mask_of(Net())}, UnknownName, "rigl"),
        ({"rewire": MOVING["set"], "sparsity": 0.9, "mask": mask_of(Net())}, SettingError, "keeps as many"),
    ):
        with pytest.raises(error, match=says):
            fit(Net(), train, recipe="default", protocol=PROTOCOL, **how)  # type: ignore[arg-type]


def test_whoever_watches_gets_the_density() -> None:
    seen = []
    train, _, _ = batches()
    fit(
        Net(),
        train,
        mask=mask_of(Net()),
        rewire=replace(DYNAMIC["set"], **EVERY),
        recipe="default",
        protocol=Protocol(epochs=1, batch_size=16),
        on_epoch=lambda epoch, figures: seen.append(figures["density"]),
    )
    assert seen == [mask_of(Net()).density]
