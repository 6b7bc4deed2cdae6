"""The engine of onnxruntime, in float32 on the processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from histill.models.encoder import Tokens
from histill.models.engines.capture import INPUT, OUTPUTS, need
from histill.models.engines.engine import Prepare, Run

__all__ = ["onnxruntime_run"]


def onnxruntime_run(path: Path, prepare: Prepare) -> Run:
    """Open an ONNX file; the file may go away afterwards.

    As many threads as torch has at this moment.

    Parameters
    ----------
    path
        As :func:`histill.models.engines.capture.write_onnx` makes it.
    prepare
        Makes the graph's input of a batch.

    Raises
    ------
    MissingExtraError
        Without onnxruntime.
    """
    onnxruntime = need("onnxruntime", "onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images_BCHW: torch.Tensor) -> Tokens:
        cls_BD, patches_BHWD = session.run(list(OUTPUTS), {INPUT: prepare(images_BCHW)})
        return Tokens(torch.from_numpy(cls_BD), torch.from_numpy(patches_BHWD))

    return run
