"""The int8 recipe: weights and activations of the matrix products in 8 bits, calibrated on tiles.

Shape legend: N tiles, H and W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from histill.errors import ModelError
from histill.models.engines.capture import need

__all__ = ["RECIPE", "quantise"]

_SMOOTHING = 0.8
"""How much of the activations' outliers SmoothQuant moves into the weights, 0 to 1. Of 0.5, 0.65, 0.8 and NNCF's own
0.95, this one agreed best on a ViT-S with tiles like those of the calibration; on tiles of other scanners lower ones
agree better, and 0.95 much worse."""

RECIPE: dict[str, Any] = {
    "method": "NNCF post-training",
    "model_type": "transformer",
    "preset": "performance",
    "smoothing": _SMOOTHING,
}
"""What ``export.json`` says of the calibration."""


def quantise(model: Any, inputs: Sequence[NDArray[Any]]) -> Any:
    """Quantise an ``openvino.Model``.

    NNCF's transformer scheme: weights per output channel, activations per tensor with unsigned or signed ranges from
    the calibration, SmoothQuant (Xiao et al. 2023) on the matrix products, norms and softmax as they are.

    Parameters
    ----------
    model
        In float32; it is changed.
    inputs
        One input of the graph per calibration tile, each a batch of one.

    Returns
    -------
    openvino.Model
        Ready to save.

    Raises
    ------
    MissingExtraError
        Without nncf.
    ModelError
        If NNCF cannot quantise this model.
    """
    nncf = need("nncf", "openvino")
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return nncf.quantize(
            model,
            nncf.Dataset(list(inputs)),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.PERFORMANCE,
            subset_size=len(inputs),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=_SMOOTHING)
            ),
        )
    except (RuntimeError, ValueError) as error:
        raise ModelError("this model cannot be quantised", got=str(error).strip().partition("\n")[0][:300]) from error
    finally:
        logger.setLevel(level)
