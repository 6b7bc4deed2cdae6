"""The seam: images in, tokens out, whatever library runs the model.

Shape legend: B images, C = 3 colours, N patch tokens, D width of a token, H and W rows and columns (of pixels in
``images_BCHW``, of patches in ``patches_BHWD``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from histill.errors import DataError
from histill.models.encoder import Embedding, Tokens, embedding_of

__all__ = ["ENGINES", "Engine", "LoadedEngine", "Prepare", "Run"]

ENGINES = (
    "torch-fp32",
    "torch-bf16",
    "torch-compile-bf16",
    "onnxruntime",
    "openvino-fp32",
    "openvino-bf16",
    "openvino-int8",
)
"""Every engine; ``torch`` is short for ``torch-fp32``, and ``auto`` measures those that are installed."""

Run = Callable[[torch.Tensor], Tokens]
"""uint8 (B, 3, input_px, input_px) on the CPU, B at most ``batch``, to tokens in float32."""

Prepare = Callable[[torch.Tensor], Any]
"""uint8 (B, 3, H, W) to the array that a graph takes."""


class Engine(Protocol):
    """A model ready to run: it knows its own normalisation, token layout, embedding rule and licence."""

    @property
    def name(self) -> str:
        """The model, as it was asked for."""

    @property
    def engine(self) -> str:
        """What runs it: one of :data:`ENGINES`."""

    @property
    def embed_dim(self) -> int:
        """Width of a token."""

    @property
    def patch_px(self) -> int:
        """Side of a patch token, in pixels."""

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches in the model: the class token and the registers."""

    @property
    def input_px(self) -> int:
        """Side of the images that it takes, in pixels."""

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of the RGB channels, images in 0..1; the engine normalises by itself."""

    @property
    def std(self) -> tuple[float, float, float]:
        """Standard deviation of the RGB channels, images in 0..1."""

    @property
    def embedding(self) -> Embedding:
        """The model's own embedding rule: ``cls`` or ``cls+mean``."""

    @property
    def embedding_dim(self) -> int:
        """Width of an embedding made by that rule."""

    @property
    def licence(self) -> str | None:
        """Licence of the weights; None if unknown."""

    @property
    def device(self) -> str:
        """Where it runs, and where the tokens lie."""

    def __call__(self, images_BCHW: torch.Tensor) -> Tokens:
        """Encode uint8 RGB images of ``input_px`` (B, 3, H, W), any B; tokens in float32, on ``device``."""

    def embed(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Encode images into one vector each by the embedding rule: float32 (B, D) for ``cls``, (B, 2D) else."""

    def content_hash(self) -> str:
        """Hex SHA-256 of the weights, and of the engine where it changes the numbers (bf16, int8)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedEngine:
    """The one implementation of :class:`Engine`: the facts, and a function that runs one batch."""

    name: str
    """The model, as it was asked for."""
    engine: str
    """One of :data:`ENGINES`."""
    embed_dim: int
    """Width of a token."""
    patch_px: int
    """Side of a patch token, in pixels."""
    prefix_tokens: int
    """The class token and the registers."""
    input_px: int
    """Side of the images, in pixels."""
    mean: tuple[float, float, float]
    """Mean of the RGB channels, images in 0..1."""
    std: tuple[float, float, float]
    """Standard deviation of the RGB channels, images in 0..1."""
    embedding: Embedding
    """The embedding rule."""
    licence: str | None
    """Licence of the weights; None if unknown."""
    device: str
    """Where it runs, and where the tokens lie."""
    batch: int
    """Most images that run at once; more are cut up."""
    fixed_batch: bool
    """Whether the engine was built for exactly ``batch`` images; fewer are then filled up with black."""
    run: Run
    """Runs one batch."""
    digest: Callable[[], str]
    """Computes the content hash."""

    @property
    def embedding_dim(self) -> int:
        """Width of an embedding made by the embedding rule."""
        return self.embed_dim * (2 if self.embedding == "cls+mean" else 1)

    def content_hash(self) -> str:
        """Hex SHA-256 of the weights, and of the engine where it changes the numbers."""
        return self.digest()

    def __call__(self, images_BCHW: torch.Tensor) -> Tokens:
        """Encode uint8 RGB images.

        Raises
        ------
        DataError
            For another type or size of images, or none at all.
        """
        allowed = (3, self.input_px, self.input_px)
        if images_BCHW.dtype != torch.uint8 or tuple(images_BCHW.shape[1:]) != allowed or not len(images_BCHW):
            raise DataError(
                "an engine takes a batch of uint8 RGB images of the size that it was opened for",
                where=f"{self.name} ({self.engine})",
                got=f"{images_BCHW.dtype} {tuple(images_BCHW.shape)}",
                allowed=f"uint8 (B, 3, {self.input_px}, {self.input_px})",
                remedy="open the engine with input_px, or resize the images",
            )
        parts = [self._run_part(part_BCHW) for part_BCHW in images_BCHW.split(self.batch)]
        if len(parts) == 1:
            return parts[0]
        return Tokens(torch.cat([part.cls_BD for part in parts]), torch.cat([part.patches_BHWD for part in parts]))

    def embed(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Encode uint8 RGB images by the embedding rule, as :meth:`histill.models.encoder.Encoder.embed` does."""
        return embedding_of(self(images_BCHW), self.embedding)

    def _run_part(self, images_BCHW: torch.Tensor) -> Tokens:
        missing = self.batch - len(images_BCHW)
        if not self.fixed_batch or not missing:
            return self.run(images_BCHW)
        filled_BCHW = torch.cat([images_BCHW, images_BCHW.new_zeros(missing, *images_BCHW.shape[1:])])
        tokens = self.run(filled_BCHW)
        return Tokens(tokens.cls_BD[:-missing], tokens.patches_BHWD[:-missing])
