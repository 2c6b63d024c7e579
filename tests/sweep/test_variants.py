"""Recipes with settings of their own, by name."""

import pytest

from anymask.errors import SettingError, UnknownName
from anymask.recipe import Recipe
from anymask.sweep import Grid
from anymask.sweep.variants import variant, variant_name


def test_a_name_without_changes_is_the_recipe_itself() -> None:
    for name in ("default", "tost", "tost:lrsi", "tost:-lrsi"):
        assert (variant(name).recipe, variant(name).lr) == (Recipe.preset(name), None)


def test_changes_go_over_a_recipe_and_leave_the_rest_of_it() -> None:
    changed = variant("tost@ghost_activation.schedule.end=30%,ghost_activation.soft=mish,label_smoothing.eps=0.1,lrsi=false").recipe
    tables = {settings["name"]: settings for settings in Recipe.preset("tost:-lrsi").settings()}
    tables["ghost_activation"] |= {"soft": "mish", "schedule": tables["ghost_activation"]["schedule"] | {"end": "30%"}}
    tables["label_smoothing"]["eps"] = 0.1
    assert changed.settings() == list(tables.values())


def test_a_technique_that_is_not_in_the_recipe_can_be_added() -> None:
    changed = variant("default@label_smoothing=true,label_smoothing.eps=0.2,lr=1").recipe
    assert changed.settings() == Recipe.from_settings([{"name": "label_smoothing", "eps": 0.2}]).settings()


def test_names_of_equal_changes_are_equal_and_are_read_back() -> None:
    changes = {"lr": 1e-05, "ghost_skip": True, "ghost_activation.soft": "mish"}
    name = variant_name("tost", changes)
    assert name == variant_name("tost", dict(reversed(changes.items())))
    assert variant(name).lr == 1e-05
    assert variant(variant_name(name, {"lr": 0.2})).lr == 0.2


def test_a_recipe_file_may_have_an_at_in_its_path(tmp_path) -> None:
    (tmp_path / "my@home.toml").write_text('[[technique]]\nname = "label_smoothing"\n')
    assert [t.eps for t in variant(f"{tmp_path}/my@home.toml@label_smoothing.eps=0.3").recipe.techniques] == [0.3]
    assert len(variant(f"{tmp_path}/my@home.toml").recipe.techniques) == 1


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("tost@lr=0", SettingError, "lr came as 0"),
        ("tost@lr=true", SettingError, "lr came as True"),
        ("tost@lr=fast", SettingError, "lr came as 'fast'"),
        ("tost@lr=inf", SettingError, "lr came as inf"),
        ("tost@lr=[0.1]", SettingError, r"lr came as \[0.1\]"),
        ("tost@lr=0.1,label_smoothing.eps=0.2,lr=0.2", SettingError, "changes a setting twice"),
        ("tost@lsri=false", UnknownName, "unknown technique 'lsri'.*'lrsi'"),
        ("tost@label_smoothing.esp=1", UnknownName, "'esp'.*'eps'"),
        ("tost@label_smoothing.eps=much", SettingError, "label_smoothing.eps came as 'much'"),
        ("default@label_smoothing.eps=0.1", SettingError, "has no label_smoothing.*label_smoothing=true"),
        ("tost@ghost_skip=3", SettingError, "ghost_skip came as 3"),
        ("tost@lr=0.1,", SettingError, "'' came as a change"),
        ("tots@lr=0.1", UnknownName, "unknown recipe 'tots'"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(name: str, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=f"(?s){says}") as caught:
        Grid(recipes=("default", name))
    assert "Allowed: " in str(caught.value)
    assert "To do: " in str(caught.value)
