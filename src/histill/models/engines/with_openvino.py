"""The engines of OpenVINO on the processor: float32, bf16, int8."""

from __future__ import annotations

from typing import Any

import torch

from histill.errors import ConfigError
from histill.models.encoder import Tokens
from histill.models.engines.capture import INPUT, OUTPUTS, need
from histill.models.engines.engine import Prepare, Run

__all__ = ["has_bf16", "openvino_run", "precision_of"]


def precision_of(engine: str) -> str:
    """What an engine computes in, as OpenVINO calls it; of int8 that of all that is not int8.

    Asked for bf16 on a processor without it, OpenVINO does not take float32 but a slow product of its own: int8 was 3.4
    times slower so.
    """
    bf16 = engine == "openvino-bf16" or (engine == "openvino-int8" and has_bf16())
    return "bf16" if bf16 else "f32"


def has_bf16() -> bool:
    """Whether OpenVINO computes in bf16 on this processor."""
    core = need("openvino", "openvino").Core()
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def openvino_run(model: Any, engine: str, prepare: Prepare, *, batch: int) -> Run:
    """Compile a model for this processor, with as many threads as torch has at this moment.

    A batch is cut into parts that run side by side, each on threads of its own: threads that share one product wait
    for the slowest of them at its end, and parts do so only once a batch.

    Parameters
    ----------
    model
        An ``openvino.Model``, or the path of an ``.xml`` or ``.onnx`` file.
    engine
        ``openvino-fp32``, ``openvino-bf16`` or ``openvino-int8``.
    prepare
        Makes the graph's input of a batch.
    batch
        Most images at once; there are no more parts than that.

    Raises
    ------
    ConfigError
        bf16 on a processor that has none: OpenVINO would compute in float32 without a word.
    MissingExtraError
        Without openvino.
    """
    openvino = need("openvino", "openvino")
    if engine == "openvino-bf16" and not has_bf16():
        raise ConfigError(
            "this processor has no bf16 for OpenVINO", where="--engine", got=engine, remedy="use openvino-fp32"
        )
    threads = torch.get_num_threads()
    options = {
        "INFERENCE_PRECISION_HINT": precision_of(engine),
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": min(threads, batch),
    }
    compiled: Any = openvino.Core().compile_model(model, "CPU", options)
    requests = [compiled.create_infer_request() for _ in range(min(threads, batch))]

    def run(images_BCHW: torch.Tensor) -> Tokens:
        inputs = [prepare(part_BCHW) for part_BCHW in images_BCHW.tensor_split(min(len(requests), len(images_BCHW)))]
        running = list(zip(requests, inputs, strict=False))
        for request, images in running:
            request.start_async({INPUT: images}, share_inputs=True)
        for request, _ in running:
            request.wait()
        # the outputs lie in memory that the next run writes into: cat copies them, also when there is only one
        cls_BD, patches_BHWD = (
            torch.cat([torch.from_numpy(request.get_tensor(name).data) for request, _ in running]) for name in OUTPUTS
        )
        return Tokens(cls_BD, patches_BHWD)

    return run
