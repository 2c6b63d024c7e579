"""Recipes: where they come from, how they are cut, and what they refuse."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import anymask
from anymask import Recipe
from anymask.errors import AnymaskError, FileFormatError, SettingError, TechniqueError, UnknownName
from anymask.recipe import presets
from anymask.runlog import settings_id
from anymask.schedules import Schedule
from anymask.techniques import HAM, Averaging, GhostActivation, GhostSkip, LabelSmoothing, RescaleSettings


def net() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)])
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def loader(count: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(8, 1, 8, 8), torch.arange(8) % 3) for _ in range(count)]


def test_the_example_of_the_design_runs_as_written() -> None:
    model, optimizer = net()
    loader_ = loader()
    x, _ = loader_[0]
    n = len(loader_)

    mask = anymask.prune(model, "synflow", sparsity=0.5, data=loader_)
    hold = anymask.hold(mask, model, optimizer)
    recipe = anymask.Recipe.preset("tost").attach(model, optimizer, total_steps=n, example=x)
    for x, y in loader_:
        recipe.loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        recipe.step()
    model = recipe.finish()

    assert sum(int((p == 0).sum()) for n, p in model.named_parameters() if n in mask) == mask.total - mask.kept
    assert set(recipe.found) == {"lrsi", "ghost_activation", "ghost_skip", "label_smoothing"}
    hold.release()


def test_lrsi_uses_the_mask_that_is_held() -> None:
    model, optimizer = net()
    mask = anymask.prune(model, "random", sparsity=0.5)
    anymask.hold(mask, model, optimizer)
    running = Recipe.preset("tost:lrsi").attach(model, optimizer, total_steps=9, data=loader())
    assert running._context.mask is mask


def test_lrsi_without_labels_says_so_and_leaves_batch_norm_alone() -> None:
    model, optimizer = net()
    running = Recipe.preset("tost:lrsi").attach(model, optimizer, total_steps=40, example=loader()[0][0])
    assert "labels drawn" in running.found["lrsi"]
    assert int(model[1].num_batches_tracked) == 0
    assert torch.equal(model[1].running_mean, torch.zeros(4))


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_and_says_what_it_is(name: str) -> None:
    recipe = Recipe.preset(name)
    assert recipe.name == name
    assert Recipe.from_settings(recipe.settings()).techniques == recipe.techniques


def test_tost_is_the_four_techniques_of_the_paper() -> None:
    assert {t.name for t in Recipe.preset("tost").techniques} == {"lrsi", "ghost_activation", "ghost_skip", "label_smoothing"}


def test_a_recipe_is_cut_by_name() -> None:
    whole = Recipe.preset("tost")
    assert [t.name for t in Recipe.preset("tost:lrsi,ghost_skip").techniques] == ["lrsi", "ghost_skip"]
    assert Recipe.preset("tost:-lrsi").techniques == whole.without("lrsi").techniques
    assert Recipe.preset("tost:-lrsi").name == whole.without("lrsi").name == "tost:-lrsi"
    assert Recipe.preset("tost:lrsi").name == whole.only("lrsi").name == "tost:lrsi"


@pytest.mark.parametrize(("name", "near"), [("tots", "tost"), ("tost:lrsl", "lrsi"), ("tost:-ghost_skp", "ghost_skip")])
def test_unknown_names_are_answered_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UnknownName, match=near):
        Recipe.preset(name)


class Magnitude(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs()


def test_techniques_that_work_on_weights_refuse_complex_ones_and_the_others_do_not() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64), Magnitude(), nn.ReLU(), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = [(torch.randn(5, 4, dtype=torch.complex64), torch.arange(5) % 3)]
    holding = anymask.hold(anymask.Mask({"0.weight": torch.eye(4)}), model, optimizer)
    with pytest.raises(TechniqueError, match=r"density_lr on Sequential.* are complex: 0\.weight .*use Recipe\.preset\('best:-density_lr,"):
        Recipe.preset("best").attach(model, optimizer, total_steps=9, data=data)
    with pytest.raises(TechniqueError, match=r"lrsi on Sequential.* are complex: 0\.weight, 0\.bias\. .*leave lrsi out"):
        Recipe.preset("tost:lrsi").attach(model, optimizer, total_steps=9, data=data)
    Recipe.preset("tost:ghost_activation,label_smoothing").attach(model, optimizer, total_steps=9, data=data).finish(early=True)
    holding.release()
    anymask.hold(anymask.Mask({"3.weight": torch.ones(3, 4)}), model, optimizer)  # of real weights
    Recipe.preset("best").attach(model, optimizer, total_steps=9, data=data).finish(early=True)


@pytest.mark.parametrize("name", ["tost:-lrsi,ghost_skip", "tost:ghost_skip,-lrsi"])
def test_a_minus_before_some_techniques_alone_is_refused(name: str) -> None:
    with pytest.raises(SettingError, match="all with a minus, or none"):
        Recipe.preset(name)


def test_a_name_that_is_no_text_is_refused() -> None:
    for name in (None, Path("r.toml")):
        with pytest.raises(SettingError, match=r"the name of a recipe came as .*`anymask list`.*Recipe\.load"):
            Recipe.preset(name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[[technique]]\nname = "ghost_skp"', "ghost_skip"),
        ('[[technique]]\nname = "ghost_skip"\nscal = 1.0', "scale"),
        ('[[technique]]\nname = "ghost_skip"\nscale = "big"', r"a number such as 1\.0"),
        ('[[technique]]\nname = "lrsi"\nsettings = { etta = 0.1 }', "eta"),
        ('[[technique]]\nname = "label_smoothing"\nschedule = { shape = "cosin" }', "cosine"),
        ('[[technique]]\nname = "label_smoothing"\n[[technique]]\nname = "label_smoothing"', "once"),
        ('[[technique]]\nname = "label_smoothing"\neps = 1.5', "share"),
        ("technique = 3", "list"),
        ("", r"came as None.*technique = \[\] for none"),
        ('[[techniqe]]\nname = "label_smoothing"', "unknown key in .*'techniqe'.*did you mean 'technique'"),
        ("technique = [3]", "list"),
        ("[[technique", "TOML"),
    ],
)
def test_a_file_with_a_mistake_says_which(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(AnymaskError, match=says):
        Recipe.preset(str(tmp_path / "r.toml"))


def test_a_file_that_is_not_there_or_no_text_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no recipe file"):
        Recipe.load(tmp_path / "r.toml")
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileFormatError):
        Recipe.load(tmp_path / "r.toml")


def test_finish_before_the_ghosts_have_faded_is_refused_unless_asked_for() -> None:
    model, optimizer = net()
    running = Recipe((GhostActivation(),)).attach(model, optimizer, total_steps=9)
    with pytest.raises(TechniqueError, match="ghost_activation still act"):
        running.finish()
    assert running.finish(early=True) is model


def test_more_steps_than_said_are_refused() -> None:
    model, optimizer = net()
    running = Recipe((GhostActivation(),)).attach(model, optimizer, total_steps=2)
    running.step()
    running.step()
    with pytest.raises(TechniqueError, match="more than total_steps = 2"):
        running.step()


def test_finish_finds_what_somebody_left_in_the_model_and_weights_that_came_back() -> None:
    model, optimizer = net()
    running = Recipe((LabelSmoothing(),)).attach(model, optimizer, total_steps=9)
    handle = model[2].register_forward_hook(lambda *_: None)
    with pytest.raises(TechniqueError, match=r"module 2 is changed.*the recipe has left"):
        running.finish()
    handle.remove()
    running = Recipe((LabelSmoothing(),)).attach(model, optimizer, total_steps=9, mask=anymask.prune(model, "random", sparsity=0.5))
    with pytest.raises(TechniqueError, match="pruned weights are not 0"):
        running.finish()


def test_finish_lets_a_loop_compile_freeze_and_keep_what_it_likes() -> None:
    """It looks for what a recipe may leave behind; these are no reason to fail after a whole training."""
    model, optimizer = net()
    running = Recipe((LabelSmoothing(),)).attach(model, optimizer, total_steps=9)
    model.compile(backend="eager")
    torch.compile(model, backend="eager")
    model.last = torch.zeros(1)
    next(model.parameters()).requires_grad_(False)
    assert running.finish() is model


def test_an_average_of_the_weights_computes_the_plain_network() -> None:
    model, optimizer = net()
    running = Recipe((GhostActivation(),)).attach(model, optimizer, total_steps=9)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    running.finish(early=True)
    x, _ = loader()[0]
    assert torch.equal(average.eval()(x), model.eval()(x))


def test_a_technique_that_cannot_join_leaves_no_other_behind() -> None:
    model, optimizer = net()
    before = anymask.surgery.fingerprint(model)
    with pytest.raises(TechniqueError, match="example"):
        Recipe((GhostActivation(), GhostSkip())).attach(model, optimizer, total_steps=9)
    assert anymask.surgery.fingerprint(model) == before


def test_without_an_optimiser_only_what_works_on_its_steps_is_refused() -> None:
    model, _ = net()
    running = Recipe((GhostActivation(), LabelSmoothing())).attach(model, None, total_steps=2)
    for x, y in loader(2):
        running.loss(model(x), y).backward()
        running.step()
    running.finish()
    with pytest.raises(TechniqueError, match="averaging got no optimiser"):
        Recipe((Averaging(),)).attach(model, None, total_steps=2)


@pytest.mark.parametrize("wrong", [{"total_steps": 0}, {"total_steps": 5, "start": 5}, {"total_steps": 5, "start": -1}])
def test_steps_out_of_range_are_refused(wrong: dict) -> None:
    model, optimizer = net()
    with pytest.raises(SettingError, match="start"):
        Recipe().attach(model, optimizer, **wrong)


def test_epochs_in_a_schedule_need_the_length_of_an_epoch() -> None:
    model, optimizer = net()
    recipe = Recipe((GhostActivation(Schedule(end="2ep")),))
    with pytest.raises(SettingError, match="steps_per_epoch"):
        recipe.attach(model, optimizer, total_steps=30)
    running = recipe.attach(model, optimizer, total_steps=30, steps_per_epoch=10)
    for _ in range(20):
        running.step()
    assert running.strengths == {"ghost_activation": 0.0}
    running.finish()


def test_label_smoothing_is_the_papers_formula_and_torchs_with_another_eps() -> None:
    torch.manual_seed(0)
    model, optimizer = net()
    output, target, eps, classes = torch.randn(7, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4, -100, 0]), 0.1, 5
    running = Recipe((LabelSmoothing(eps=eps),)).attach(model, optimizer, total_steps=1)
    by_hand = 0.0
    for row, y in zip(output, target.tolist(), strict=True):
        if y >= 0:
            logs = row - row.exp().sum().log()
            by_hand -= sum((1 - eps if c == y else eps / (classes - 1)) * float(logs[c]) for c in range(classes)) / 6
    ours = running.loss(output, target)
    assert float(ours) == pytest.approx(by_hand, rel=1e-6)
    assert float(F.cross_entropy(output, target, label_smoothing=eps * classes / (classes - 1))) == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3)])
def test_label_smoothing_takes_probabilities_of_classes(shape: tuple[int, ...]) -> None:
    """Of mixup, say: of certain ones the loss is that of their classes, and of all others the mean over these."""
    model, optimizer = net()
    running = Recipe((LabelSmoothing(eps=0.1),)).attach(model, optimizer, total_steps=1)
    output, target = torch.randn(shape, dtype=torch.float64), torch.randint(5, (shape[0], *shape[2:]))
    certain = F.one_hot(target, 5).movedim(-1, 1).to(output.dtype)
    torch.testing.assert_close(running.loss(output, certain), running.loss(output, target))
    mixed = running.loss(output, 0.7 * certain + 0.3 * certain.flip(1))
    torch.testing.assert_close(mixed, 0.7 * running.loss(output, target) + 0.3 * running.loss(output, 4 - target))


def test_label_smoothing_refuses_another_loss() -> None:
    model, optimizer = net()
    with pytest.raises(TechniqueError, match="cross_entropy"):
        Recipe((LabelSmoothing(),)).attach(model, optimizer, total_steps=1, loss=F.mse_loss)


def test_learned_ghosts_join_the_group_of_their_convolution_and_leave_with_their_slots() -> None:
    model, _ = net()
    optimizer = torch.optim.SGD([{"params": model[3].parameters(), "lr": 0.5}, {"params": model[8].parameters()}], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    running = Recipe((GhostSkip(Schedule("linear", end="100%"), kind="learned"),)).attach(
        model, optimizer, total_steps=2, example=torch.zeros(2, 1, 8, 8)
    )
    assert [len(group["params"]) for group in optimizer.param_groups] == [2 + 3, 2]
    assert running.added.parameters == 4 * 4 + 2 * 4
    assert running.added.flops == 2 * 4 * 4 * 4 * 4  # 1x1, 4 channels in and out, 4 x 4 places
    for x, y in loader(2):
        running.loss(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        running.step()
    running.finish()
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
    assert len(optimizer.state) == 4


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"soft": "swisch"}, {"fade": "blnd"}])
def test_ghost_activation_settings_are_checked(wrong: dict) -> None:
    with pytest.raises(SettingError):
        GhostActivation(**wrong)


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"kind": "fre"}, {"where": "al"}])
def test_ghost_skip_settings_are_checked(wrong: dict) -> None:
    with pytest.raises(SettingError):
        GhostSkip(**wrong)


def test_nested_settings_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('[[technique]]\nname = "lrsi"\nbatches = 2\nsettings = { gamma = 3, iterations = 7 }')
    (lrsi,) = Recipe.load(tmp_path / "r.toml").techniques
    assert lrsi.settings == RescaleSettings(gamma=3, iterations=7)  # type: ignore[attr-defined]


def test_equal_recipes_have_equal_ids_however_their_numbers_are_written() -> None:
    whole, broken = (
        Recipe.from_settings([{"name": "ham", "alpha": value}, {"name": "lrsi", "settings": {"gamma": value}}]) for value in (200, 200.0)
    )
    assert whole == broken
    assert settings_id({"recipe": whole.settings()}) == settings_id({"recipe": broken.settings()})
    assert whole.settings()[0]["alpha"] == HAM(alpha=200.0).alpha
