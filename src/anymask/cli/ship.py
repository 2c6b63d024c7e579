"""`anymask ship`."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from anymask.cli.settings import RUN
from anymask.errors import MissingFile, SettingError
from anymask.shipping.making import ship as ship_model
from anymask.shipping.runs import of_checkpoint, of_folder


def ship(
    source: Annotated[Path, Parameter(name="RUN", group=RUN, help="The folder of `anymask train`, or a checkpoint.")],
    /,
    *,
    to: Annotated[Path, Parameter(group=RUN, help="The file to write: x.anymask, x.onnx or x.safetensors.")],
    values: Annotated[
        str | None, Parameter(group=RUN, help="Of .anymask: float16 (if left out), bfloat16, float32, or int8 of each output channel.")
    ] = None,
    model: Annotated[
        str | None, Parameter(group=RUN, help="The network of a checkpoint, as in `anymask list models`, or one of yours.")
    ] = None,
    shape: Annotated[
        tuple[int, int, int] | None, Parameter(name="--input", group=RUN, help="Its input: channels, height and width, such as 3 32 32.")
    ] = None,
    mask: Annotated[Path | None, Parameter(group=RUN, help="The mask of a checkpoint; its own zeros if left out.")] = None,
    force: Annotated[bool, Parameter(group=RUN, negative=(), help="Replace the file if it is there.")] = False,
) -> int:
    """Write a trained network to a file of the size of what is kept."""
    if to.exists() and not force:
        raise SettingError(f"{to} is there already", allowed="a new file", fix="choose another --to, or add --force to replace it")
    if source.is_dir():
        if mask is not None:
            raise SettingError(
                f"--mask came with the folder {source}", allowed="it for a checkpoint", fix="leave it out: the folder has one"
            )
        found = of_folder(source, shape=shape, model=model)
    elif (model is None or shape is None) and not source.exists():
        raise MissingFile(f"nothing is at {source}", allowed="a run folder, or a checkpoint", fix="check the path")
    elif model is None or shape is None:
        raise SettingError(f"{source} came without its network", allowed="a folder, or a checkpoint", fix="give --model NAME --input C H W")
    else:
        found = of_checkpoint(source, model=model, shape=shape, mask=mask)
    done = ship_model(found.model, found.mask, example=found.example, to=to, values=values, info=dict(found.info))
    off = "" if done.difference is None else f"; outputs differ by at most {done.difference:.2g}"
    times = f"{done.dense_bytes / done.bytes:.1f}"
    smaller = f", {times} times smaller" if float(times) > 1 else ""  # .onnx and .safetensors hold the zeros
    print(f"{done.kept:,} of {done.total:,} weights, {done.bytes / 1e6:.3f} MB of {done.dense_bytes / 1e6:.3f} MB dense{smaller}{off}")
    print(f"File: {to}", file=sys.stderr)
    return 0
