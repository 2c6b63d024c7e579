"""Paired statistics: what a recipe changes when the mask, the seed and every other setting stay the same."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from anymask.report.cells import Cell, Row, but_the_mask, cells
from anymask.runlog import settings_id


@dataclass(frozen=True)
class Pairs:
    """Test accuracies in % of a recipe and its baseline, matched by seed.

    Args:
        settings: what all these runs share.
        recipe: the recipe that is judged.
        baseline: the recipe that it is judged against.
        pairs: for each seed the accuracy of the baseline and that of the recipe.
    """

    settings: Mapping[str, Any]
    recipe: str
    baseline: str
    pairs: Mapping[Any, tuple[float, float]]

    @property
    def n(self) -> int:
        """The number of seeds that have both runs."""
        return len(self.pairs)

    @property
    def differences(self) -> dict[Any, float]:
        """Recipe minus baseline in percentage points, by seed."""
        return {seed: recipe - baseline for seed, (baseline, recipe) in self.pairs.items()}

    @property
    def baseline_accuracies(self) -> list[float]:
        """Test accuracies of the baseline in %, in the order of the seeds."""
        return [baseline for baseline, _ in self.pairs.values()]

    @property
    def recipe_accuracies(self) -> list[float]:
        """Test accuracies of the recipe in %, in the order of the seeds."""
        return [recipe for _, recipe in self.pairs.values()]

    @property
    def baseline_mean(self) -> float | None:
        """Mean test accuracy of the baseline in %, over the paired seeds; None without a pair."""
        return fmean(self.baseline_accuracies) if self.pairs else None

    @property
    def recipe_mean(self) -> float | None:
        """Mean test accuracy of the recipe in %, over the paired seeds; None without a pair."""
        return fmean(self.recipe_accuracies) if self.pairs else None

    @property
    def mean(self) -> float | None:
        """Mean difference in percentage points; None without a pair."""
        return fmean(self.differences.values()) if self.pairs else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation of the differences; None with fewer than two pairs."""
        return stdev(self.differences.values()) if self.n > 1 else None

    @property
    def half_width(self) -> float | None:
        """Half the width of `interval`: `t(0.975, n - 1) * std / sqrt(n)`; None with fewer than two pairs."""
        std = self.std
        if std is None:
            return None
        from scipy.special import stdtrit  # the quantile of scipy.stats.t, without the second that scipy.stats takes to import

        return float(stdtrit(self.n - 1, 0.975)) * std / math.sqrt(self.n)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% confidence interval of the mean difference by Student's t; None with fewer than two pairs."""
        mean, half = self.mean, self.half_width
        return None if mean is None or half is None else (mean - half, mean + half)

    @property
    def verdict(self) -> str:
        """ "won" or "lost" when the whole interval lies above or below 0, else "tied"; "open" without an interval."""
        if self.interval is None:
            return "open"
        low, high = self.interval
        return "won" if low > 0 else "lost" if high < 0 else "tied"


@dataclass(frozen=True)
class Comparison(Pairs):
    """A recipe against the baseline in one cell, such as one mask at one sparsity.

    Args:
        unlike: the seeds whose runs are no partners because they began with other masks, or other weights.
    """

    unlike: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Overall(Pairs):
    """A recipe against the baseline over all cells that share some settings; each pair is the average of one seed over the cells.

    Args:
        cells: how many cells were averaged.
        won, tied, lost, open: how many of these cells have each `verdict`.
        left_out: the seeds that lack a pair in some cell, and so are in no average.
    """

    cells: int = 0
    won: int = 0
    tied: int = 0
    lost: int = 0
    open: int = 0
    left_out: tuple[Any, ...] = ()

    @property
    def score(self) -> str:
        """How many cells were won, tied and lost, and how many are open where some are."""
        return f"won {self.won}, tied {self.tied}, lost {self.lost}" + f", open {self.open}" * (self.open > 0)


def paired(rows: Iterable[Row], *, baseline: str = "default") -> list[Comparison]:
    """Each recipe against `baseline` in each cell that holds both.

    A cell is a set of runs with equal settings except recipe and seed; runs are matched by seed, since runs of one seed
    share initialisation and data order. Of two rows with the same id, the later one counts.

    Raises:
        FileFormatError: when a row lacks what the statistics need.

    Example:
        >>> def row(recipe, seed, test):
        ...     settings = {"data": "d", "model": "m", "mask": "snip", "sparsity": 0.9, "recipe": recipe, "seed": seed}
        ...     return {"id": f"{recipe}{seed}", "settings": settings, "accuracy": {"test": test}}
        >>> rows = [row("default", 0, 0.80), row("default", 1, 0.82), row("tost", 0, 0.83), row("tost", 1, 0.86)]
        >>> [comparison] = paired(rows)
        >>> round(comparison.mean, 6), comparison.n, comparison.verdict
        (3.5, 2, 'tied')
    """
    return compared(cells(rows), baseline=baseline)


def compared(members: Iterable[Cell], *, baseline: str) -> list[Comparison]:
    """Each recipe of each cell against `baseline`."""
    return [comparison for cell in members for comparison in compare(cell, baseline=baseline)]


def compare(cell: Cell, *, baseline: str) -> list[Comparison]:
    """Each recipe of one cell against `baseline`; none where the baseline was not run."""
    before = cell.accuracies(baseline)
    if not before:
        return []
    return [_comparison(cell, recipe, baseline, before, cell.accuracies(recipe)) for recipe in cell.recipes if recipe != baseline]


def _comparison(cell: Cell, recipe: str, baseline: str, before: Mapping[Any, float], after: Mapping[Any, float]) -> Comparison:
    both = [seed for seed in before if seed in after]
    unlike = tuple(seed for seed in both if not _begin_alike(cell.runs[baseline, seed], cell.runs[recipe, seed]))
    pairs = {seed: (before[seed], after[seed]) for seed in both if seed not in unlike}
    return Comparison(cell.settings, recipe, baseline, pairs, unlike=unlike)


def _begin_alike(one: Row, other: Row) -> bool:
    """Whether two runs began with the same mask and weights, and learned from the same teacher, where both say with which."""
    pairs = [(one.get(what), other.get(what)) for what in ("mask", "teacher")]
    same = one["settings"].get("weights_hash") == other["settings"].get("weights_hash")
    return same and all(None in pair or pair[0] == pair[1] for pair in pairs)


def missing(members: Iterable[Cell], *, baseline: str = "default") -> list[dict[str, Any]]:
    """The settings of each run that would complete a pair whose other half is there.

    A cell where only the baseline was run, such as a dense reference, lacks nothing.
    """
    return [
        {**cell.settings, "recipe": name, "seed": seed}
        for cell in members
        for name, seeds in _lacking(cell, baseline).items()
        for seed in sorted(seeds)
    ]


def _lacking(cell: Cell, baseline: str) -> dict[str, set[Any]]:
    before = set(cell.accuracies(baseline))
    after = {recipe: set(cell.accuracies(recipe)) for recipe in cell.recipes if recipe != baseline}
    return {baseline: set().union(*after.values()) - before, **{recipe: before - seeds for recipe, seeds in after.items()}}


def overall(comparisons: Iterable[Comparison], *, by: Sequence[str] | None = None) -> list[Overall]:
    """Each recipe against the baseline over all cells that share the settings `by`: all but the mask if left out.

    The cells (masks) of one seed share initialisation and data order, so they are not independent: the differences are
    first averaged over the cells within each seed, and the interval is over seeds. Only seeds with a pair in every
    cell count, so that each average is over the same cells; `Overall.left_out` names the others.
    """
    found: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        key = {"recipe": comparison.recipe, "baseline": comparison.baseline, **_shared(comparison, by)}
        found.setdefault(settings_id(key), []).append(comparison)
    return [_across(members, by) for members in found.values()]


def _shared(comparison: Comparison, by: Sequence[str] | None) -> dict[str, Any]:
    return but_the_mask(comparison.settings) if by is None else {name: comparison.settings.get(name) for name in by}


def _across(members: Sequence[Comparison], by: Sequence[str] | None) -> Overall:
    full = [member for member in members if member.n]
    seeds = sorted({seed for member in full for seed in member.pairs})
    whole = [seed for seed in seeds if all(seed in member.pairs for member in full)]
    pairs = {seed: (fmean(m.pairs[seed][0] for m in full), fmean(m.pairs[seed][1] for m in full)) for seed in whole}
    verdicts = [member.verdict for member in full]
    return Overall(
        _shared(members[0], by),
        members[0].recipe,
        members[0].baseline,
        pairs,
        cells=len(full),
        **{verdict: verdicts.count(verdict) for verdict in ("won", "tied", "lost", "open")},
        left_out=tuple(seed for seed in seeds if seed not in whole),
    )
