"""ONNX: a dense file with the zeros in it, and ONNX Runtime to check and to compare with. The one module that imports these."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anymask.errors import AnymaskError, SettingError
from anymask.shipping.plan import Array
from anymask.shipping.tracing import check_batches, exporting

_INSTALL = "pip install 'anymask[onnx]'"


def onnx_bytes(model: nn.Module, example: Tensor) -> bytes:
    """`model` as an ONNX file for batches of any size, its weights inside.

    Raises:
        SettingError: where onnx and onnxscript are not installed, or the exporter cannot follow the model.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SettingError(f"{error.name} is not installed", allowed=".anymask and .safetensors without it", fix=_INSTALL) from None
    several = example if len(example) > 1 else torch.cat([example, example])
    with exporting(model):
        dynamic = ({0: torch.export.Dim.DYNAMIC},)
        program: Any = torch.onnx.export(model, (several,), dynamo=True, dynamic_shapes=dynamic, verbose=False)
    check_batches(model, program.exported_program)
    with exporting(model):
        blob: bytes = program.model_proto.SerializeToString()
        return blob


class Session:
    """A network in ONNX Runtime, on the CPU.

    Args:
        blob: the bytes of an ONNX file, or the path of one.
        threads: how many threads it uses.
    """

    def __init__(self, blob: bytes | Path, *, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
        given = blob if isinstance(blob, bytes) else str(blob)
        self._session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    def __call__(self, batch: Array) -> Array:
        """(N, ...) for (N, ...), of the type that the network takes."""
        return np.asarray(self._session.run(None, {self._input: batch})[0])


def has_runtime() -> bool:
    """Whether ONNX Runtime is installed."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return False
    return True


def quantized(blob: bytes, sample: Array, folder: Path) -> Path:
    """The path in `folder` of the network `blob` with weights and activations of 8 bits, calibrated on `sample`.

    Raises:
        AnymaskError: when ONNX Runtime cannot.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    plain, prepared, small = (folder / name for name in ("plain.onnx", "prepared.onnx", "int8.onnx"))
    plain.write_bytes(blob)
    name = Session(blob, threads=1)._input

    class Once(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter([{name: sample}])

        def get_next(self) -> Any:
            return next(self.left, None)

    try:
        quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(small),
            Once(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    except Exception as error:  # of many kinds
        said = " ".join(str(error).split())[:200]
        raise AnymaskError(f"ONNX Runtime does not quantise it ({said})", allowed="what it can", fix="compare with float32") from error
    return small
