"""Lengths of training written as people say them: "60%", "90ep", "500it"."""

import re
from dataclasses import dataclass

from anymask.errors import SettingError

_FORM = re.compile(r"(\d+(?:\.\d+)?)\s*(%|ep|it)")


@dataclass(frozen=True)
class Duration:
    """A length of training: a share of it, a number of epochs, or a number of iterations (optimiser steps).

    Example:
        >>> Duration.parse("60%").steps(total=1000)
        600
        >>> Duration.parse("2ep").steps(total=1000, per_epoch=100)
        200
    """

    amount: float
    unit: str  # "%", "ep" or "it"

    @classmethod
    def parse(cls, text: str) -> "Duration":
        """Read "60%" (of the whole training), "90ep" (epochs) or "500it" (optimiser steps).

        Raises:
            SettingError: for any other text, and for more than 100%.
        """
        match = _FORM.fullmatch(str(text).strip())
        if match is None or (match[2] == "%" and float(match[1]) > 100):
            raise SettingError(
                f"duration came as {text!r}",
                allowed='a share "0%" to "100%", epochs "90ep" or steps "500it"',
                fix='write the unit, as in "60%"',
            )
        return cls(float(match[1]), match[2])

    def steps(self, *, total: int, per_epoch: int | None = None) -> int:
        """This length in optimiser steps, at most `total`.

        Args:
            total: steps of the whole training, >= 1.
            per_epoch: steps of one epoch; needed by "ep" only.

        Raises:
            SettingError: when epochs are asked for and `per_epoch` is not known.
        """
        if self.unit == "ep" and per_epoch is None:
            raise SettingError(
                f"duration {self} counts epochs, and the length of an epoch is not known here",
                allowed='epochs where steps_per_epoch is given, else a share "60%" or steps "500it"',
                fix="pass steps_per_epoch=len(loader)",
            )
        each = {"%": total / 100, "ep": float(per_epoch or 0), "it": 1.0}[self.unit]
        return min(total, round(self.amount * each))

    def __str__(self) -> str:
        return f"{self.amount:.15g}{self.unit}"
