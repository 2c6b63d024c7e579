"""The folder in which a search for a lottery ticket keeps its finished rounds."""

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from anymask.errors import FileFormatError, SettingError
from anymask.formats import load_mask
from anymask.mask import Mask
from anymask.ranks import by_rank_0, leads
from anymask.runlog import atomic


class LotteryFolder:
    """`settings.json`, `rewind.safetensors` (the weights at the rewinding step) and `round-01.mask`, `round-02.mask`, ...

    Each file is written whole or not at all, in this order, so what is there is finished. Without a folder nothing is kept.
    Of several ranks the first one reads and writes for all.

    Raises:
        SettingError: when the folder was made with other settings.
        FileFormatError: when its settings cannot be read.
    """

    def __init__(self, folder: str | PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.path = None if folder is None else Path(folder)
        if self.path is not None:
            by_rank_0(lambda: self._begin(settings))

    def _begin(self, settings: Mapping[str, Any]) -> None:
        file = (self.path or Path()) / "settings.json"
        if file.exists():
            self._compare(file, json.loads(json.dumps(settings)))
            return
        with atomic(file, "w") as out:
            json.dump(settings, out, indent=1)

    def _compare(self, file: Path, settings: Mapping[str, Any]) -> None:
        try:
            there = dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise FileFormatError(f"{file} cannot be read ({error})", allowed="a JSON object", fix="use another folder") from error
        other = [key for key in sorted({*there, *settings}) if there.get(key) != settings.get(key)]
        if other:
            raise SettingError(
                f"{file.parent} was made with "
                + ", ".join("another model" if key == "model" else f"{key}={there.get(key)!r}, not {settings.get(key)!r}" for key in other),
                allowed="a new folder, or the settings and the initial weights the folder was made with",
                fix="use another folder, or remove this one",
            )

    def weights(self) -> dict[str, Tensor] | None:
        """The weights at the rewinding step, if they are there."""
        return by_rank_0(lambda: self._read("rewind.safetensors"))

    def write_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Keep the weights at the rewinding step."""
        if self.path is not None and leads():
            self._write("rewind.safetensors", weights)

    def trained(self, number: int) -> dict[str, Tensor]:
        """The weights that round `number` left, where they are not rewound.

        Raises:
            FileFormatError: when they are not there.
        """
        file = f"round-{number:02d}.safetensors"
        if (weights := by_rank_0(lambda: self._read(file))) is None:
            raise FileFormatError(f"{self.path} has no {file}", allowed="the weights beside the mask of a round", fix="use another folder")
        return weights

    def last_round(self, plan: Sequence[int] | None) -> tuple[Mask, int] | None:
        """The mask and the number of the last finished round; `plan` holds how many weights each round keeps, where that is exact."""
        return by_rank_0(lambda: self._last_round(plan))

    def _last_round(self, plan: Sequence[int] | None) -> tuple[Mask, int] | None:
        done = max((int(file.stem[6:]) for file in self.path.glob("round-*.mask")), default=0) if self.path else 0
        if not done:
            return None
        mask = load_mask(self._round(done))
        if plan is not None and mask.kept != plan[done - 1]:
            raise FileFormatError(
                f"{self._round(done)} keeps {mask.kept} weights", allowed=f"{plan[done - 1]} after this round", fix="use another folder"
            )
        return mask, done

    def write_round(self, number: int, mask: Mask, *, trained: Mapping[str, Tensor] | None) -> None:
        """Keep the mask of a finished round, last, and the weights it trained, where the next one needs them."""
        if self.path is None or not leads():
            return
        if trained is not None:
            self._write(f"round-{number:02d}.safetensors", trained)
        mask.save(self._round(number))
        (self.path / f"round-{number - 1:02d}.safetensors").unlink(missing_ok=True)

    def _read(self, name: str) -> dict[str, Tensor] | None:
        if self.path is None or not (file := self.path / name).exists():
            return None
        try:
            return load_file(file)
        except SafetensorError as error:
            raise FileFormatError(f"{file} cannot be read ({error})", allowed="a safetensors file", fix="use another folder") from error

    def _write(self, name: str, weights: Mapping[str, Tensor]) -> None:
        with atomic((self.path or Path()) / name) as file:
            file.write(to_bytes(dict(weights)))

    def _round(self, number: int) -> Path:
        return (self.path or Path()) / f"round-{number:02d}.mask"
