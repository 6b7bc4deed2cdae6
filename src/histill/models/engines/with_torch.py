"""The engines of torch: eager in float32 or bf16, and compiled in bf16."""

from __future__ import annotations

import copy
from typing import Any

import torch

from histill.models.encoder import Encoder, Tokens
from histill.models.engines.engine import Run

__all__ = ["torch_run"]


def torch_run(encoder: Encoder, engine: str) -> Run:
    """Make the function that runs one batch with torch, on the encoder's device.

    In bf16 the weights are stored as such, and images are normalised in float32 before they are rounded.

    Parameters
    ----------
    encoder
        In float32; it is left as it is.
    engine
        ``torch-fp32``, ``torch-bf16`` or ``torch-compile-bf16``.
    """
    device = next(encoder.parameters()).device
    dtype = torch.float32 if engine == "torch-fp32" else torch.bfloat16
    model: Any = encoder.model if dtype == torch.float32 else copy.deepcopy(encoder.model).to(dtype)
    features = torch.compile(model.forward_features) if "compile" in engine else model.forward_features
    skipped, patch_px = encoder.prefix_tokens, encoder.patch_px

    @torch.inference_mode()
    def run(images_BCHW: torch.Tensor) -> Tokens:
        normal_BCHW = encoder.normalise(images_BCHW.to(device, non_blocking=True))
        tokens_BND = features(normal_BCHW.to(dtype)).float()
        grid = tuple(side // patch_px for side in images_BCHW.shape[-2:])
        return Tokens(tokens_BND[:, 0], tokens_BND[:, skipped:].unflatten(1, grid))

    return run
