"""`anymask list`."""

from collections.abc import Callable, Iterable
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anymask.cli.settings import RUN, load_table
from anymask.data import DATASETS
from anymask.models import FORMS, MODELS
from anymask.pruning import DYNAMIC, METHODS
from anymask.recipe import presets
from anymask.registry import lookup
from anymask.techniques import TECHNIQUES
from anymask.train.presets import PROTOCOLS, preset_about

Row = tuple[str, str, str]  # name, one line about it, paper or where else it comes from


def _masks() -> list[Row]:
    static = [(name, row.about, f"arXiv {row.paper}") for name, row in METHODS.items()]
    return static + [(name, f"moves while it trains: {row.about}", f"arXiv {row.paper}") for name, row in DYNAMIC.items()]


def _recipes() -> list[Row]:
    return [(name, str(load_table(path).get("about", "")), "") for name, path in presets().items()]


def _techniques() -> list[Row]:
    return [(name, kind.about, kind.paper) for name, kind in TECHNIQUES.items()]


def _models() -> list[Row]:
    return [*((name, model.about, "") for name, model in MODELS.items()), ("and", FORMS, "")]


def _data() -> list[Row]:
    return [(name, source.about, "") for name, source in DATASETS.items()]


def _protocols() -> list[Row]:
    return [(name, *preset_about(name)) for name in PROTOCOLS]


KINDS: dict[str, tuple[Callable[[], Iterable[Row]], str]] = {
    "masks": (_masks, "compare --masks, train --mask, prune; snip+erk+2:4 for another scope and pattern; or a file of your own"),
    "recipes": (_recipes, "compare --recipes, train --recipe; or a TOML file of your own; tost:lrsi is a part of one"),
    "techniques": (_techniques, "what recipes are made of"),
    "models": (_models, "--model"),
    "data": (_data, "--data"),
    "protocols": (_protocols, "compare --protocol, train --protocol; other options override what is in one"),
}


def show(
    kind: Annotated[
        str | None, Parameter(group=RUN, help="masks, recipes, techniques, models, data or protocols; all of them if left out.")
    ] = None,
    /,
) -> int:
    """Show the names that other commands take."""
    console = Console(highlight=False)
    for name in KINDS if kind is None else [kind]:
        rows, use = lookup(KINDS, name, what="list")
        _print(console, name, list(rows()), use)
    return 0


def _print(console: Console, name: str, rows: list[Row], use: str) -> None:
    shown = Table(title=Text(f"{name}: {use}"), title_justify="left", show_header=False)
    papers = any(paper for _, _, paper in rows)
    for label, about, paper in rows:
        cells = [Text(label, "bold"), Text(about)]
        shown.add_row(*cells, *([Text(paper)] if papers else []))
    console.print(shown)
