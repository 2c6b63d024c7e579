"""The parts of docs/ about `best` and about single techniques, made of results/best and results/screen."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from statistics import fmean, median
from typing import Any

from ledgers import ROOT, Rows, contents, ledger, named
from long_tables import long_short, whole_short, with_interval
from tables import table as markdown

from anymask.report import grid, paired
from anymask.report.stats import Comparison, Overall, Pairs, overall
from anymask.report.table import interval, tables
from anymask.report.table import markdown as written
from anymask.runlog import Ledger
from anymask.techniques import TECHNIQUES

TUNED = "default@lr=0.4"  # where `default` is best on the tuning part (plans/rates.toml)
BASELINES = {"default", "default@lr=0.2", TUNED, "tost"}  # 0.2: a first look, which had not gone beyond it


# -- best ------------------------------------------------------------------------------------------------------------
def best() -> str:
    """All recipes against default, then against tost, then against default at two rates, the second of which it likes best."""
    rows = ledger("best")
    beside = [tables(_beside(rows, baseline), baseline=baseline) for baseline in ("tost", "default@lr=0.2", TUNED)]
    return written([*tables(rows), *chain(*beside)])


def _beside(rows: Rows, baseline: str) -> Rows:
    """What lies beside runs of `baseline`, but for `default` and the other baselines."""
    there = {_cell(row) for row in rows if row["settings"]["recipe"] == baseline}
    return [row for row in rows if _cell(row) in there and row["settings"]["recipe"] not in BASELINES - {baseline}]


def _cell(row: dict[str, Any]) -> tuple[Any, ...]:
    return *_place(row["settings"]), row["settings"]["mask"], row["settings"]["sparsity"]


def best_before(name: str) -> str:
    """The `differences` of what the presets were before, of results/`name`."""
    return differences([row for row in ledger("best") if row["settings"]["recipe"] == "default"] + ledger(name))


def best_short() -> str:
    """A line for each network, length and sparsity, beside its dense network: what recipes of two seeds are to default, over all masks."""
    rows, recipes = ledger("best"), ("tost", "best", "best-slow")
    named = (*(f"`{name}` - `default`" for name in recipes), "`best` - tuned `default`")
    head = ["images, network, epochs", "dense (seeds)", "sparsity", "`default`", *named, "seeds"]
    tuned = {(*_place(o.settings), o.settings["sparsity"]): o for o in _tuned(rows) if o.recipe == "best"}
    found: dict[tuple[Any, ...], dict[str, Overall]] = {}
    for o in overall(paired(rows)):
        if o.interval and o.recipe in recipes:
            where = (*_place(o.settings), o.settings["sparsity"])
            found.setdefault((*where, round(o.baseline_mean or 0, 9), o.n), {})[o.recipe] = o
    above, others, lines = [], [], []
    for (data, model, epochs, sparsity, default, seeds), group in found.items():
        of = _dense(rows, (data, model, epochs)).values()
        dense = f"{fmean(of):.2f} ({len(of)})" if of else ""
        beside = _beside_dense(rows, (data, model, epochs), sparsity)
        if beside.interval and beside.verdict == "won":
            above.append(f"{model} at {100 * sparsity:g}% ({interval(beside)} points, {beside.n} seeds)")
        elif beside.mean is not None:
            others.append(beside.mean)
        cells = [_won(group[name]) if name in group else "" for name in recipes]
        against = tuned.get((data, model, epochs, sparsity)) if "best" in group else None
        cells.append(f"{_won(against)} (n = {against.n})" if against else "")
        lines.append([f"{data}, {model}, {epochs}", dense, f"{100 * sparsity:g}%", f"{default:.2f}", *cells, f"{seeds}"])
    said = (
        f"The sparse network, trained with `best`, ends above the dense one, trained with `default` for as many epochs, for "
        f"{', '.join(above)}. In the other {len(others)} lines that have a dense network it does not ({min(others):+.1f} to "
        f"{max(others):+.1f} points). That is on average over the masks that are found without a training, so without tickets; the dense "
        f"network was trained at the protocol's rate alone, and never with the techniques of `best`.\n"
    )
    return f"{markdown(head, lines)}\n{said if above else ''}"


def _tuned(rows: Rows) -> list[Overall]:
    """Recipes against `default` at the rate it likes best, over the masks that it was trained on with it."""
    return [o for o in overall(paired(_beside(rows, TUNED), baseline=TUNED)) if o.interval]


def rate_shares() -> str:
    """What share of the gain of `best` the tuned rate alone gives `default`, over the masks and seeds that have all three."""
    rows = _beside(ledger("best"), TUNED)
    there = {(*_cell(row), row["settings"]["seed"]) for row in rows if row["settings"]["recipe"] == TUNED}
    wanted = [row for row in ledger("best") if (*_cell(row), row["settings"]["seed"]) in there]
    by: dict[tuple[str, float], dict[str, Overall]] = {}
    for o in overall(paired(wanted)):
        by.setdefault((o.settings["model"], o.settings["sparsity"]), {})[o.recipe] = o
    said = [
        f"{tuned.mean / best.mean:.0%} on {model} at {100 * sparsity:g}% (n = {tuned.n})"
        for (model, sparsity), found in by.items()
        if (tuned := found[TUNED]).mean is not None and (best := found["best"]).mean
    ]
    return f"Of what `best` gains there, the tuned rate alone gives `default` {', '.join(said)}.\n"


def _beside_dense(rows: Rows, place: tuple[Any, ...], sparsity: float) -> Pairs:
    """`best` beside the dense network of the same seed, over the masks that need no training to be found."""
    found: dict[int, list[float]] = {}
    for row in rows:
        s = row["settings"]
        if (s["recipe"], _place(s), s["sparsity"]) == ("best", place, sparsity) and not s["mask"].startswith("lottery"):
            found.setdefault(s["seed"], []).append(100 * row["accuracy"]["test"])
    pairs = {seed: (of, fmean(found[seed])) for seed, of in _dense(rows, place).items() if seed in found}
    return Pairs({"sparsity": sparsity}, "best", "dense", pairs)


def first_line() -> str:
    """README's first result: the wide network at 95%, over all masks."""
    rows = ledger("best")
    found = {o.recipe: o for o in overall(paired(rows)) if _wide(o.settings) and o.settings["sparsity"] == 0.95}
    best, tost = found["best"], found["tost"]
    tuned = next((o for o in _tuned(rows) if o.recipe == "best" and _wide(o.settings) and o.settings["sparsity"] == 0.95), None)
    without = [row for row in rows if not row["settings"]["mask"].startswith("lottery")]
    (untrained,) = (o for o in overall(paired(without)) if o.recipe == "best" and _wide(o.settings) and o.settings["sparsity"] == 0.95)
    over = f" (at four times the rate, its best of four, `best` is still {tuned.mean:+.1f} ahead, {tuned.n} seeds)" if tuned else ""
    low, high = best.interval or (0.0, 0.0)
    return (
        f"A first result: VGG-11 of half width (on which `best` was chosen), a fifth of CIFAR-100, 15 epochs, {best.cells} masks "
        f"that prune 95% of the weights, "
        f"{best.n} seeds. Trained as usual it ends at {best.baseline_mean:.1f}% test accuracy{over}, with `tost` at "
        f"{tost.recipe_mean:.1f}%, and **with `best` at {best.recipe_mean:.1f}%**: {best.mean:+.1f} points, 95% interval "
        f"[{low:+.1f}, {high:+.1f}]. The dense network, trained as usual, ends at "
        f"{fmean(_dense(rows, _place(best.settings)).values()):.1f}%; without lottery tickets, which take a dense training to find, "
        f"`best` is at {untrained.recipe_mean:.1f}%.\n"
    )


def _dense(rows: Rows, place: tuple[Any, ...]) -> dict[int, float]:
    """The test accuracy, in %, of the dense network of each seed there."""
    there = [row for row in rows if row["settings"]["mask"] == "dense" and _place(row["settings"]) == place]
    return {row["settings"]["seed"]: 100 * row["accuracy"]["test"] for row in there}


def _place(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(settings[name] for name in ("data", "model", "epochs"))


def _won(o: Overall) -> str:
    return f"{interval(o)}; {o.won}, {o.tied}, {o.lost}" if o.n > 2 else interval(o)  # two seeds decide nothing


def differences(rows: Rows) -> str:
    """A line for each network, recipe and sparsity of two seeds: its difference to default over all masks, and how many masks it wins."""
    head = ["images, network, epochs", "recipe", "sparsity", "default", "with it", "difference [95% CI]", "masks won, tied, lost", "seeds"]
    lines = [
        [
            ", ".join(map(str, _place(o.settings))),
            f"`{o.recipe}`",
            f"{100 * o.settings['sparsity']:g}%",
            f"{o.baseline_mean:.2f}",
            f"{o.recipe_mean:.2f}",
            interval(o),
            f"{o.won}, {o.tied}, {o.lost}",
            f"{o.n}",
        ]
        for o in overall(paired(rows))
        if o.interval
    ]
    return markdown(head, lines)


def best_costs() -> str:
    """What a training of each recipe takes, beside the default one of the same mask and seed: results/costs."""
    rows = ledger("costs")
    seconds = {(row["settings"]["recipe"], row["settings"]["seed"]): row["time"]["seconds"] for row in rows}
    ratios: dict[str, list[float]] = {}
    for (recipe, seed), took in seconds.items():
        if recipe != "default":
            ratios.setdefault(recipe, []).append(took / seconds["default", seed])
    said = ", ".join(f"`{recipe}` {median(found):.2f} times (n = {len(found)})" for recipe, found in ratios.items())
    taught = [row for row in rows if row["time"].get("teacher_seconds", 0) > 1]  # less: it was there and was read
    teachers = [row["time"]["teacher_seconds"] / seconds["default", row["settings"]["seed"]] for row in taught]
    where = f"{rows[0]['settings']['model']} with sparse layers on a CPU, random-erk at 98%, {rows[0]['machine']['threads']} threads"
    return (
        f"Time of a training as a multiple of the `default` one of the same seed ({where}, medians; of `tost` without what LRsI takes "
        f"before the first step): {said}. The teacher of `best-slow`, "
        f"trained once per seed for all masks and recipes, takes {median(teachers):.2f} times as long as a `default` training.\n"
    )


def costs_before(name: str) -> str:
    """The same of what the presets were before, of results/`name`, in one sentence."""
    rows = ledger(name)
    default = {row["settings"]["seed"]: row["time"]["seconds"] for row in rows if row["settings"]["recipe"] == "default"}
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row["techniques"]:
            ratios.setdefault(contents(row), []).append(row["time"]["seconds"] / default[row["settings"]["seed"]])
    return f"Times of a default training: {', '.join(f'{median(found):.2f} (`{recipe}`)' for recipe, found in ratios.items())}.\n"


def beside_ghosts() -> str:
    """One sentence: what `ghost_activation` adds to `density_lr` and `preconditioning`, on the tuning part."""
    with_it = "density_lr() + ghost_activation(cosine to 60%) + preconditioning()"
    found = paired(named(ledger("screen")), baseline="density_lr() + preconditioning()")
    by_seed: dict[int, list[float]] = {}
    for seed, value in chain.from_iterable(c.differences.items() for c in found if c.recipe == with_it):
        by_seed.setdefault(seed, []).append(value)
    apart = [*chain.from_iterable(by_seed.values())]
    of_seeds = ", ".join(f"{fmean(values):+.2f} over {len(values)} in seed {seed}" for seed, values in sorted(by_seed.items()))
    return f"{fmean(apart):+.2f} points over {len(apart)} pairs of masks and sparsities: {of_seeds}.\n"


def ghosts_reported() -> str:
    """The same on the report part, where they were looked at once."""
    here = {(_cell(row), row["settings"]["seed"]): row for row in ledger("best") if row["settings"]["recipe"] == "best"}
    apart = []
    for row in ledger("best-without-ghosts"):
        if row["settings"]["recipe"] == "best" and (with_them := here.get((_cell(row), row["settings"]["seed"]))):
            apart.append(100 * (with_them["accuracy"]["test"] - row["accuracy"]["test"]))
    return f"{fmean(apart):+.2f} points over {len(apart)} pairs of masks, sparsities and seeds.\n"


def ticket() -> str:
    """What the diagnostics say of `best` on a lottery ticket and on a random mask: results/ticket."""
    head = [
        "mask",
        "recipe",
        "test accuracy, %",
        "training loss",
        "signs flipped since the start, %",
        "distance from the start / size there",
    ]
    lines = []
    for row in named(ledger("ticket")):
        s, curves = row["settings"], row["curves"]
        seen = curves["diagnostics"]
        cells = [s["mask"], s["recipe"], f"{100 * row['accuracy']['test']:.2f}", f"{curves['train_loss'][-1]:.2f}"]
        cells += [f"{100 * seen['sign_flips_from_start'][-1]:.0f}", f"{seen['distance_overall'][-1]:.1f}"]
        lines.append(cells)
    return markdown(head, lines)


# -- the screen ----------------------------------------------------------------------------------------------------------
def screen_defaults() -> str:
    """One sentence: where `default` ends, to which the differences are."""
    found: dict[tuple[Any, ...], list[float]] = {}
    for row in ledger("screen"):
        s = row["settings"]
        if s["recipe"].split("@lr=")[0] == "default":
            rate = s["recipe"].partition("@lr=")[2] or f"{s['lr']:g}"
            how = f"{s['optimizer']}, lr {rate}, weight decay {s['weight_decay']:g}"
            found.setdefault((*_place(s), s["mask"], s["sparsity"], how), []).append(100 * row["accuracy"]["test"])
    said: dict[str, list[str]] = {}
    for (data, model, epochs, mask, sparsity, how), tests in found.items():
        here = f"{fmean(tests):.1f}% on {mask} at {100 * sparsity:g}% with {how} (n = {len(tests)})"
        said.setdefault(f"{data}, {model}, {epochs} epochs", []).append(here)
    return "`default` itself ends at:\n\n" + "".join(f"- {where}: {'; '.join(ends)}.\n" for where, ends in said.items())


def prototypes() -> str:
    """What was tried with code that is not here any more: results/screen/prototypes.jsonl."""
    rows = Ledger(ROOT / "results" / "screen" / "prototypes.jsonl").rows()
    by = [(row["settings"], f"{100 * row['accuracy']['test']:.2f}") for row in rows]
    lines = [[f"{s['mask']} at {100 * s['sparsity']:g}%", s["recipe"], str(s["seed"]), test] for s, test in by]
    return markdown(["mask", "recipe", "seed", "test accuracy, %"], lines)


# -- single techniques -------------------------------------------------------------------------------------------------
def alone(technique: str) -> str:
    """What a technique gave by itself, with the settings that were tried."""
    found = [c for c in paired(named(ledger("screen"))) if c.recipe.startswith(f"{technique}(") and " + " not in c.recipe]
    return "; ".join(map(_said, found)) + ".\n" if found else "nothing in a ledger yet; lab.md tells of one run.\n"


def _said(found: Comparison) -> str:
    inside = found.recipe.partition("(")[2].removesuffix(")")
    how = f"`{inside}` " if inside else ""
    where = f"{found.settings['mask']} at {100 * found.settings['sparsity']:g}%"
    spread = f" ± {found.half_width:.1f}" if found.half_width is not None else ""
    return f"{how}{found.mean:+.1f}{spread} points on {where} (n = {found.n})"


def which() -> str:
    """The page "which technique when": each sentence with its number."""
    screen, small = paired(named(ledger("screen"))), paired(ledger("evidence"))
    wins = [c.verdict for c in small if c.recipe == "tost"]
    return "\n".join([
        f"- **Begin with `best`** (`density_lr`, `preconditioning` and `ghost_activation`). {_all('best', 'default')}",
        f"- **In long trainings with strong weight decay** no gain is shown: {long_short()} (VGG-11 of a quarter of the width, tuning "
        f"part, 182 epochs, five times the paper's weight decay; [lab.md](lab.md)). "
        f"On full-width networks and all images `best` was trained to the end in 16 epochs only; "
        f"in 182, as it was before, it was far behind before the rate dropped, and three points behind when it was stopped. As it is now, "
        f"on a quarter of the width and all images, in 182: {whole_short()} (98%, random-erk).",
        f"- **ToST** (`tost`: gentler than the paper's, with settings that were chosen on a small network for Fashion-MNIST): "
        f"{_all('tost', 'default')} `best` against it: {_all('best', 'tost')} On others: {_others('tost')}",
        f"- **By mask**, `best` against `default` at 98% (± half the 95% interval): {_by_mask('best', 0.98)}.",
        f"- **At the highest sparsities, a trained dense network helps as a teacher** (`best-slow`), where it is clearly better than its "
        f"pupil. {_all('best-slow', 'default')} No other sparsity or network was trained with it from scratch. {_behind()} "
        f"**Without one**, more epochs give more for less: {longer()}",
        f"- **Tune the learning rate of the baseline first.** Of 0.1, 0.2, 0.4 and 0.8, `default` does best at 0.4 on the tuning images, "
        f"four times the protocol's rate (on a ResNet-18 0.8 is as good; VGG-11 at 98% and 99%, one seed; [lab.md](lab.md)). "
        f"That is a part of what recipes gain. "
        f"`default` at 0.4 against `default`: {_all(TUNED, 'default')} "
        f"`best` (at the protocol's rate) against `default` at 0.4: {_all('best', TUNED)} `tost` against it: {_all('tost', TUNED)} "
        f"`best-slow` against it: {_all('best-slow', TUNED)} On others, `best` against `default` at 0.4: {_others('best', TUNED)}",
        f"- **Other networks, images and lengths**, against `default`: {_others('best')}",
        f"- **On a small network that fits its images no gain was measurable**: on Fashion-MNIST-5k `tost` won {wins.count('won')}, "
        f"tied {wins.count('tied')} and lost {wins.count('lost')} of {len(wins)} masks and sparsities.",
        f"- **Do not use `fan_in_init` before batch norm without `density_lr`.** Alone, on random-erk at 98% of the tuning part: "
        f"{_one(screen, 'fan_in_init()')}; the two together: {_one(screen, 'density_lr() + fan_in_init()')}.",
        f"- **Single techniques**, on random-erk at 98% of the tuning part: `density_lr` {_one(screen, 'density_lr()')}; "
        f"`ghost_activation` {_one(screen, 'ghost_activation(cosine to 60%)')}; `distillation` {_one(screen, 'distillation()')}.",
        f"- **What it costs.** {best_costs()}",
    ])  # fmt: skip


def _all(recipe: str, baseline: str) -> str:
    """The difference over all masks on the wide network in 15 epochs, at each sparsity."""
    rows = [row for row in ledger("best") if row["settings"]["recipe"] in {recipe, baseline}]
    found = [_over(o) for o in overall(paired(rows, baseline=baseline)) if o.mean is not None and _wide(o.settings)]
    return "; ".join(found) + "." if found else "not measured yet."


def _behind() -> str:
    """One sentence: the masks and sparsities of the wide network on which `best-slow` ends below `best`."""
    found = [c for c in paired(ledger("best"), baseline="best") if c.recipe == "best-slow" and _wide(c.settings) and (c.mean or 0) < 0]
    where = [f"{c.settings['mask']} at {100 * c.settings['sparsity']:g}% ({with_interval(c)}, n = {c.n})" for c in found]
    return f"On average it ends below `best` on {', '.join(where)}." if where else "On no mask does it end below `best`."


def _others(recipe: str, baseline: str = "default") -> str:
    """The same on all other images, networks and lengths."""
    rows = [row for row in ledger("best") if row["settings"]["recipe"] in {recipe, baseline}]
    found = [o for o in overall(paired(rows, baseline=baseline)) if o.recipe == recipe and o.mean is not None and not _wide(o.settings)]
    said = [f"{o.settings['data']}, {o.settings['model']}, {o.settings['epochs']} epochs: {_over(o)}" for o in found]
    return "; ".join(said) + "." if said else "not measured yet."


def _wide(settings: Mapping[str, Any]) -> bool:
    return _place(settings) == ("cifar100", "vgg11-0.5x", 15)


def _over(o: Overall) -> str:
    interval = f"[{o.interval[0]:+.2f}, {o.interval[1]:+.2f}] " if o.interval else ""
    return f"{o.mean:+.2f} {interval}points at {100 * o.settings['sparsity']:g}% over {o.cells} mask{'s'[: o.cells > 1]}, n = {o.n}"


def _by_mask(recipe: str, sparsity: float) -> str:
    of = [c for c in paired(ledger("best")) if c.recipe == recipe and _wide(c.settings)]
    found = [c for c in of if c.settings["sparsity"] == sparsity and c.half_width is not None]
    return ", ".join(f"{c.settings['mask']} {c.mean:+.1f} ± {c.half_width:.1f}" for c in sorted(found, key=lambda c: -(c.mean or 0)))


def longer() -> str:
    """What three times the epochs are to a teacher: `default` in 45 beside `best-slow` in 15, and `best` in 45."""
    rows = [row for row in ledger("best") if row["settings"]["model"] == "vgg11-0.5x" and row["settings"]["sparsity"] == 0.98]
    at = {(s["recipe"], s["epochs"], s["mask"], s["seed"]): 100 * row["accuracy"]["test"] for row in rows if (s := row["settings"])}
    said = []
    for recipe in ("default", "best"):
        found: dict[int, list[tuple[float, float]]] = {}
        for name, epochs, mask, seed in at:
            if (name, epochs) == (recipe, 45) and ("best-slow", 15, mask, seed) in at:
                found.setdefault(seed, []).append((at["best-slow", 15, mask, seed], at[recipe, 45, mask, seed]))
        masks = {len(both) for both in found.values()}
        beside = Pairs({}, recipe, "best-slow", {seed: (fmean(a for a, _ in p), fmean(b for _, b in p)) for seed, p in found.items()})
        said.append(f"`{recipe}` {interval(beside)} points over {max(masks)} masks, n = {beside.n}")
    return f"in 45 epochs, beside `best-slow` in 15 (98%), {'; '.join(said)}."


def _one(found: Iterable[Comparison], recipe: str) -> str:
    """What a recipe of the screen gave on random-erk at 98%."""
    for c in found:
        if (c.recipe, c.settings["mask"], c.settings["sparsity"]) == (recipe, "random-erk", 0.98) and c.n:
            seeds = "seed" if c.n == 1 else "seeds"
            spread = f" ± {c.half_width:.1f}" if c.half_width is not None else ""
            return f"{c.mean:+.1f}{spread} points ({c.n} {seeds})"
    return "not measured"


PARTS: Mapping[str, Callable[[], str]] = {
    "which": which,
    "screen-grid": lambda: grid(named(ledger("screen"))),
    "screen-defaults": screen_defaults,
    "prototypes": prototypes,
    "best-table": best,
    "best-short": best_short,
    "first-line": first_line,
    "rate-shares": rate_shares,
    "best-before": partial(best_before, "best-before"),
    "best-without-ghosts": partial(best_before, "best-without-ghosts"),
    "best-costs": best_costs,
    "costs-before": partial(costs_before, "costs-before"),
    "costs-ghosts": partial(costs_before, "costs-ghosts"),
    "beside-ghosts": beside_ghosts,
    "ghosts-reported": ghosts_reported,
    "ticket": ticket,
    **{f"alone-{name.replace('_', '-')}": partial(alone, name) for name in TECHNIQUES},
}
