"""A model as a graph: followed by ``torch.export`` and written as ONNX or turned into OpenVINO.

The batch is dynamic, the side of the images fixed. Shape legend as in :mod:`histill.models.engines.engine`, and N
tokens with prefix.
"""

from __future__ import annotations

import copy
import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from timm.layers.format import Format
from torch import nn

from histill.errors import MissingExtraError, ModelError
from histill.models.encoder import Encoder
from histill.models.engines.simplify import simplify

__all__ = ["INPUT", "OUTPUTS", "TokenGraph", "need", "to_openvino", "write_onnx"]

INPUT = "images"
OUTPUTS = ("cls", "patches")

_MOST_IMAGES = 2**16
_PROTOBUF_BYTES = 1_900_000_000  # a protobuf file ends at 2 GiB; larger weights go into a file beside it


def need(module: str, extra: str) -> Any:
    """Import an optional library, or say what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is not None and error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # it is there, but something that it needs is not: that must be seen
        raise MissingExtraError(f"{module} is not installed", remedy=f"pip install 'histill[{extra}]'") from None


class TokenGraph(nn.Module):
    """What is exported: images to ``cls`` (B, D) and ``patches`` (B, H, W, D), in float32.

    Parameters
    ----------
    encoder
        The model; copied.
    pixels
        Take uint8 (B, rows, columns, 3), RGB, and normalise inside; otherwise float32 (B, 3, rows, columns), already
        normalised.
    """

    mean_C11: torch.Tensor
    std_C11: torch.Tensor

    def __init__(self, encoder: Encoder, *, pixels: bool) -> None:
        super().__init__()
        self.model: Any = _of_one_size(encoder)
        self.pixels = pixels
        self.skipped = encoder.prefix_tokens
        self.grid = (encoder.input_px // encoder.patch_px,) * 2
        self.register_buffer("mean_C11", torch.tensor(encoder.mean).view(3, 1, 1))
        self.register_buffer("std_C11", torch.tensor(encoder.std).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode one batch."""
        if self.pixels:
            images = (images.permute(0, 3, 1, 2).float() / 255 - self.mean_C11) / self.std_C11
        tokens_BND = self.model.forward_features(images)
        return tokens_BND[:, 0], tokens_BND[:, self.skipped :].unflatten(1, self.grid)


class _FixedRope(nn.Module):
    """Rotary embeddings of one grid, in place of a module that makes them anew in every run."""

    embed: torch.Tensor

    def __init__(self, embed: torch.Tensor, grid: tuple[int, int]) -> None:
        super().__init__()
        self.feat_shape = grid
        self.register_buffer("embed", embed.detach().clone())

    def get_embed(self) -> torch.Tensor:
        """What timm's Eva asks for."""
        return self.embed


def _of_one_size(encoder: Encoder) -> nn.Module:
    """Copy the model, simplify it and make its position embeddings once, for one size of images."""
    model: Any = copy.deepcopy(encoder.model).cpu().float().eval()
    simplify(model)
    if not getattr(model, "dynamic_img_size", False):
        return cast(nn.Module, model)
    model.set_input_size(img_size=(encoder.input_px, encoder.input_px))
    model.dynamic_img_size = False
    model.patch_embed.flatten = True
    model.patch_embed.output_fmt = Format.NCHW
    if getattr(model, "rope", None) is not None:
        grid = tuple(model.patch_embed.grid_size)
        model.rope = _FixedRope(model.rope.get_embed(shape=grid), grid)
    return cast(nn.Module, model)


def write_onnx(encoder: Encoder, path: Path, *, pixels: bool) -> None:
    """Write a model as ONNX, the batch dynamic: input ``images``, outputs ``cls`` and ``patches``.

    Weights beyond 1.9 GB lie beside it in ``<name>.data``.

    Parameters
    ----------
    encoder, pixels
        As in :class:`TokenGraph`.
    path
        The new file.

    Raises
    ------
    ModelError
        If torch cannot follow the model's code.
    MissingExtraError
        Without onnx and onnxscript.
    """
    for module in ("onnx", "onnxscript"):
        need(module, "onnx")
    with _exporting(encoder):
        written: Any = torch.onnx.export(
            TokenGraph(encoder, pixels=pixels),
            (_example(encoder, pixels=pixels),),
            dynamo=True,
            dynamic_shapes=_dynamic(),
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            verbose=False,
        )
    size = sum(tensor.numel() * tensor.element_size() for tensor in encoder.model.state_dict().values())
    written.save(str(path), external_data=size > _PROTOBUF_BYTES)


def to_openvino(encoder: Encoder, *, pixels: bool) -> Any:
    """Turn a model into an ``openvino.Model`` in float32 with the names of the ONNX file, the batch dynamic.

    Parameters
    ----------
    encoder, pixels
        As in :class:`TokenGraph`.

    Raises
    ------
    ModelError
        If torch or OpenVINO cannot follow the model's code.
    MissingExtraError
        Without openvino.
    """
    openvino = need("openvino", "openvino")
    example = _example(encoder, pixels=pixels)
    with torch.no_grad(), _exporting(encoder):
        program = torch.export.export(TokenGraph(encoder, pixels=pixels), (example,), dynamic_shapes=_dynamic())
        model = openvino.convert_model(program)
    model.reshape([-1, *example.shape[1:]])
    model.input(0).tensor.set_names({INPUT})
    for output, name in zip(model.outputs, OUTPUTS, strict=True):
        output.tensor.set_names({name})
    return model


def _example(encoder: Encoder, *, pixels: bool) -> torch.Tensor:
    side = encoder.input_px
    return torch.zeros(2, side, side, 3, dtype=torch.uint8) if pixels else torch.zeros(2, 3, side, side)


def _dynamic() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch", min=1, max=_MOST_IMAGES)},)


@contextmanager
def _exporting(encoder: Encoder) -> Iterator[None]:
    """Keep the exporters' running commentary from the user, and name the model that they cannot follow."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # torch and OpenVINO raise whatever the model's code leads them to
        raise ModelError(
            "this model cannot be turned into a graph",
            where=encoder.name,
            got=str(error).strip().partition("\n")[0][:300],
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
