"""Initial weights scaled to what each neuron keeps."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from anymask.errors import SettingError
from anymask.schedules import Schedule
from anymask.techniques.base import Attached, Context, Technique
from anymask.techniques.neurons import Neurons, reinitialise


@dataclass(frozen=True)
class FanInInit(Technique):
    r"""Kept weights whose variance fits the number of inputs that their neuron keeps, before the first step.

    With n the fan-in of a layer and n_i the kept weights of its output neuron i (neurons that keep none are left alone),

        w_ij <- sqrt(n / n_i) * w_ij            the weights that are there, or
        w_ij <- gain * N(0, 1) / sqrt(n_i)      where `redraw`

    so weights that were drawn with variance g^2 / n have g^2 / n_i. The first keeps signs and relative sizes within a neuron, which
    are what a found ticket is made of. The fan-in is counted for convolutions (also grouped and transposed; there without the stride),
    linear layers, attention projections, the `Conv1D` of transformers and recurrent layers; what else a mask covers stays as it is.

    Args:
        redraw: draw new weights, by the seed of `Recipe.attach`.
        gain: of the weights that are redrawn, > 0; sqrt(2) is Kaiming's for ReLU. Without `redraw` it means nothing.

    Raises:
        TechniqueError: on attach, without a mask, without a masked layer, or on a model cut by fully_shard.

    Example:
        >>> import torch
        >>> from anymask import Mask
        >>> from anymask.techniques import Context
        >>> model = torch.nn.Linear(4, 2)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> mask = Mask({"weight": torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]])})
        >>> FanInInit().attach(Context(model, None, torch.nn.functional.cross_entropy, mask=mask)).found
        '1 layers, kept weights times 1 to 2'
        >>> model.weight.tolist()
        [[2.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]

    Reference: Gradient Flow in Sparse Neural Networks and How Lottery Tickets Win (arXiv 2010.03533), which draws anew, N(0, 2 / n_i).
    To scale the weights that are there is ours; so is counting all kinds of layers.
    """

    name: ClassVar[str] = "fan_in_init"
    seam: ClassVar[str] = "init"
    about: ClassVar[str] = "initial weights scaled to the inputs that each neuron keeps"
    paper: ClassVar[str] = "arXiv 2010.03533"

    schedule: Schedule = field(default_factory=lambda: Schedule("step", full="0%", end="0%"))
    redraw: bool = False
    gain: float = math.sqrt(2)

    def __post_init__(self) -> None:
        if not 0 < self.gain < math.inf:
            raise SettingError(f"gain came as {self.gain}", allowed="a finite number > 0", fix="sqrt(2) is the default, 1 is for tanh")

    def attach(self, context: Context) -> Attached:
        generator = torch.Generator().manual_seed(context.seed)
        factors: list[float] = []  # least and greatest of each layer

        def change(layer: Neurons) -> Tensor:
            count = layer.kept.sum(1, keepdim=True)
            if self.redraw:
                drawn = torch.zeros(layer.kept.shape)
                drawn[layer.kept.cpu()] = torch.randn(int(count.sum()), generator=generator)
                return self.gain * drawn.to(count.device) / count.clamp(min=1).sqrt()
            scale = (layer.kept.shape[1] / count.double()).sqrt()
            factors.extend(scale[count > 0].unique()[[0, -1]].tolist() if count.any() else [])
            return layer.rows * scale.to(torch.promote_types(layer.rows.dtype, torch.float32))

        layers, attached = reinitialise(context, self, change), Attached()
        scaled = f"times {min(factors, default=1):.3g} to {max(factors, default=1):.3g}"
        attached.found = f"{layers} layers, kept weights {f'redrawn with gain {self.gain:.3g}' if self.redraw else scaled}"
        return attached
