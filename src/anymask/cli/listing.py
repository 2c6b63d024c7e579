"""`anymask list`."""

from collections.abc import Callable, Iterable
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from anymask import toml
from anymask.cli.settings import RUN
from anymask.data import DATASETS
from anymask.models import FORMS, MODELS
from anymask.pruning import DYNAMIC, METHODS
from anymask.recipe import presets
from anymask.registry import lookup
from anymask.techniques import TECHNIQUES
from anymask.train.presets import PROTOCOLS, preset_about

Row = tuple[str, str, str]  # name, one line about it, paper or where else it comes from


KINDS: dict[str, tuple[Callable[[], Iterable[Row]], str]] = {
    "masks": (
        lambda: [
            *((name, row.about, f"arXiv {row.paper}") for name, row in METHODS.items()),
            *((name, f"moves while it trains: {row.about}", f"arXiv {row.paper}") for name, row in DYNAMIC.items()),
        ],
        "compare --masks, train --mask, prune; snip+erk+2:4 for another scope and pattern; or a file of your own",
    ),
    "recipes": (
        lambda: [(name, str(toml.read(path).get("about", "")), "") for name, path in presets().items()],
        "compare --recipes, train --recipe; or a TOML file of your own; tost:lrsi is a part of one",
    ),
    "techniques": (lambda: [(name, kind.about, kind.paper) for name, kind in TECHNIQUES.items()], "what recipes are made of"),
    "models": (lambda: [*((name, model.about, "") for name, model in MODELS.items()), ("and", FORMS, "")], "--model"),
    "data": (lambda: [(name, source.about, "") for name, source in DATASETS.items()], "--data"),
    "protocols": (
        lambda: [(name, *preset_about(name)) for name in PROTOCOLS],
        "compare --protocol, train --protocol; other options override what is in one",
    ),
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
