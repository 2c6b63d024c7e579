"""`anymask convert`."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from anymask.cli.settings import RUN
from anymask.formats import convert as convert_file


def convert(
    source: Annotated[Path, Parameter(name="IN", group=RUN, help="A mask file of any library, or the folder of a checkpoint.")],
    out: Annotated[Path, Parameter(name="OUT", group=RUN, help="The file to write.")],
    /,
    *,
    to: Annotated[str, Parameter(group=RUN, help="anymask, weight-mask, torch-prune or zeros.")] = "anymask",
    weights: Annotated[Path | None, Parameter(group=RUN, help="A checkpoint, for torch-prune and zeros; may be IN.")] = None,
    force: Annotated[bool, Parameter(group=RUN, negative=(), help="Replace OUT if it is there.")] = False,
) -> int:
    """Read a mask, and write it in another format."""
    mask = convert_file(source, out, to=to, weights=weights, replace=force)
    origin = f", from {mask.info['source']}, of format {mask.info['format']}" if "format" in mask.info else ""
    print(f"{source}: {mask}{origin}")
    print(f"Mask: {out}", file=sys.stderr)
    left_out = mask.info.get("left_out")
    if isinstance(left_out, list):
        print(f"Note: not in the mask, because they hold no zero: {', '.join(map(str, left_out))}", file=sys.stderr)
    return 0
