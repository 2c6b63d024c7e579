"""Names of parameters: what trainers put before them, and which name in a model is meant."""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from difflib import SequenceMatcher

from torch import nn

from anymask import prunables

Shapes = Mapping[str, tuple[int, ...]]

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # torch.compile, FSDP, checkpointing: at any place
PREFIXES = ("module.", "model.", "params.")  # (Distributed)DataParallel, Lightning and Hugging Face, flax: before all names
_WORDS = re.compile(r"[a-z]+|\d+")
_AUTOMATIC = re.compile(r"(^|\.)[A-Z]\w*_\d+(\.|$)")  # Conv_0: flax counts by class from 0, which says nothing of torch's names
_ALIKE = 0.6


def bare(names: Iterable[str], *, prefixes: bool = True) -> dict[str, str]:
    """For each name the one without what torch.compile, FSDP and, if all names have it, a wrapping module put into it.

    Example:
        >>> bare(["module._orig_mod.fc.weight", "module._orig_mod.fc.bias"])
        {'module._orig_mod.fc.weight': 'fc.weight', 'module._orig_mod.fc.bias': 'fc.bias'}
    """
    found = {name: _unwrapped(name) for name in names}
    for prefix in PREFIXES * 2 if prefixes else ():  # each may be inside each
        if all(name.startswith(prefix) for name in found.values()):
            found = {old: name.removeprefix(prefix) for old, name in found.items()}
    return found if len(set(found.values())) == len(found) else {name: name for name in found}


def matched(shapes: Shapes, model: nn.Module, *, loose: bool = False) -> dict[str, str]:
    """The name in `model` that each name of a file stands for; a name for which there is none is left out.

    Args:
        shapes: the names of a file, with the shapes of their tensors.
        model: whose parameters are meant.
        loose: also match names that only resemble each other, by shape and then by the words and numbers in them, where
            this leaves no choice.

    Example:
        >>> matched({"module.fc.weight": (2, 3)}, nn.Sequential(nn.Linear(3, 2)), loose=True)
        {'module.fc.weight': '0.weight'}
    """
    wanted = {name: tuple(p.shape) for name, p in prunables.bare(model).named_parameters(remove_duplicate=False)}
    found = {name: name for name in shapes if name in wanted and (not loose or shapes[name] == wanted[name])}
    by_core = _by_core(wanted)
    for name in shapes:
        core = _core(name)
        target = by_core.get(core) or by_core.get(core + ".weight") or by_core.get(core + "_orig")  # of a model that is pruned by torch
        if name not in found and target is not None and target not in found.values() and (not loose or shapes[name] == wanted[target]):
            found[name] = target
    return {**found, **_resembling(shapes, wanted, found)} if loose else found


def aligned(names: Iterable[str], others: Collection[str]) -> dict[str, str]:
    """For each name the same among `others`, or the only one that differs by prefixes alone; left out where there is none.

    Example:
        >>> aligned(["fc.weight", "head.weight"], ["model.fc.weight", "model.fc.bias"])
        {'fc.weight': 'model.fc.weight'}
    """
    by_core = _by_core(others)
    found = {name: name if name in others else by_core.get(_core(name)) for name in names}
    return {name: other for name, other in found.items() if other is not None}


def _by_core(names: Collection[str]) -> dict[str, str]:
    """The names by what they are without prefixes, where this tells them apart."""
    cores = Counter(_core(name) for name in names)
    return {_core(name): name for name in names if cores[_core(name)] == 1}


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _core(name: str) -> str:
    name = _unwrapped(name)
    while (shorter := name.removeprefix("module.").removeprefix("model.").removeprefix("params.")) != name:
        name = shorter
    return name


def _resembling(shapes: Shapes, wanted: Shapes, found: Mapping[str, str]) -> dict[str, str]:
    """Matches among what is left, one shape at a time: the only pair, or names of which each is the other's nearest."""
    groups: dict[tuple[int, ...], tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for side, names in enumerate((shapes, wanted)):
        for name, shape in names.items():
            if name not in (found if side == 0 else found.values()):
                groups[shape][side].append(name)
    matches: dict[str, str] = {}
    for ours, theirs in groups.values():
        matches |= {ours[0]: theirs[0]} if len(ours) == len(theirs) == 1 else _nearest_pairs(ours, theirs)
    return matches


def _nearest_pairs(ours: list[str], theirs: list[str]) -> dict[str, str]:
    """Each of `ours` with its nearest of `theirs`; nothing at all when one of them has no nearest, or shares it."""
    if len(ours) > len(theirs):
        return {}
    pairs = {name: _only_nearest(name, theirs) for name in ours}
    targets = [target for target in pairs.values() if target is not None]
    if len(set(targets)) != len(ours) or any(_AUTOMATIC.search(name) for name in ours):
        return {}
    return {name: target for name, target in pairs.items() if target is not None}


def _only_nearest(name: str, others: list[str]) -> str | None:
    """The one of `others` with the same numbers and the likest words; None when two are as like, or none is like."""
    words = _words(name)
    scores = sorted((_likeness(words, _words(other)), other) for other in others)
    if not scores or scores[-1][0] < _ALIKE or (len(scores) > 1 and scores[-1][0] == scores[-2][0]):
        return None
    return scores[-1][1]


def _words(name: str) -> list[str]:
    return _WORDS.findall(name.lower())


def _likeness(ours: list[str], theirs: list[str]) -> float:
    """In [0, 1]; 0 when the numbers differ: layer 1 is not layer 2."""
    if [word for word in ours if word.isdigit()] != [word for word in theirs if word.isdigit()]:
        return 0.0
    return SequenceMatcher(a=" ".join(ours), b=" ".join(theirs), autojunk=False).ratio()
