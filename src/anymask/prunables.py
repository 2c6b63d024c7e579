"""Which parameters a mask may cover."""

from collections.abc import Iterable

from torch import nn

from anymask.errors import MaskError, SettingError

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
KINDS: dict[str, tuple[type[nn.Module], ...]] = {"conv": _CONV, "linear": (nn.Linear,)}


def prunable(model: nn.Module, *, kinds: Iterable[str] = ("conv", "linear"), exclude: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """The parameters of `model` that a mask may cover, by name, in the model's own order.

    A tensor that several modules share (tied weights) is there once, under its first name.

    Args:
        model: any module.
        kinds: "conv" (1d, 2d, 3d, transposed) and "linear": whose `weight` counts.
        exclude: names of parameters or of modules to leave dense, such as "fc" or "layer4.1.conv2.weight".

    Raises:
        SettingError: for a kind or an excluded name that is not there.
        MaskError: when nothing is left to prune.

    Example:
        >>> from torch import nn
        >>> list(prunable(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2))))
        ['0.weight', '2.weight']
    """
    types = tuple(t for kind in kinds for t in _types(kind))
    owned = {id(m.weight) for m in model.modules() if isinstance(m, types)}
    named = {name: p for name, p in model.named_parameters() if id(p) in owned}
    kept = dict(named)
    for skip in exclude:
        hit = [name for name in named if name == skip or name.startswith(skip + ".")]
        if not hit:
            raise SettingError(f"exclude names {skip!r}", allowed=", ".join(named), fix="name a module or parameter of this model")
        for name in hit:
            kept.pop(name, None)
    if not kept:
        raise MaskError(
            f"{type(model).__name__} has no weight that a mask may cover",
            allowed=f"a model with one of: {', '.join(t.__name__ for t in types)}",
            fix="check `kinds` and `exclude`",
        )
    return kept


def transposed_groups(model: nn.Module) -> dict[str, int]:
    """The weights of transposed convolutions by name, with their groups: laid out `(in, out / groups, *kernel)`, unlike all others.

    Example:
        >>> from torch import nn
        >>> transposed_groups(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ConvTranspose2d(4, 2, 3, groups=2)))
        {'1.weight': 2}
    """
    types = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    groups = {id(m.weight): m.groups for m in model.modules() if isinstance(m, types)}
    return {name: groups[id(p)] for name, p in model.named_parameters() if id(p) in groups}


def _types(kind: str) -> tuple[type[nn.Module], ...]:
    if kind not in KINDS:
        raise SettingError(f"kinds holds {kind!r}", allowed=", ".join(KINDS), fix="choose among these")
    return KINDS[kind]
