"""The encoder: images in, class token and patch tokens out, whatever model stands behind it.

Shape legend: B images, C = 3 colours, N tokens, D width of a token, H and W rows and columns (of pixels in
``images_BCHW``, of patches in ``patches_BHWD``).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from histill.errors import DataError, ModelError
from histill.models.sources import build, record_of, resolve
from histill.models.teachers import TeacherSpec

__all__ = ["Embedding", "Encoder", "Tokens", "embedding_of", "load_encoder", "tokens_of", "wrap"]

Embedding = Literal["cls", "cls+mean"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a vision transformer says of a batch of images, after its last norm."""

    cls_BD: torch.Tensor
    """The class token, (B, D)."""
    patches_BHWD: torch.Tensor
    """The patch tokens in their grid, (B, H, W, D); registers are left out."""


def tokens_of(model: Any, images_BCHW: torch.Tensor) -> Tokens:
    """Run a timm vision transformer and sort its tokens.

    Parameters
    ----------
    model
        Anything with timm's ``forward_features``, ``num_prefix_tokens`` and ``patch_embed.patch_size``.
    images_BCHW
        Float images, already normalised with the model's mean and std.

    Raises
    ------
    ModelError
        If the image size is no multiple of the patch size.
    """
    rows, columns = images_BCHW.shape[-2:]
    patch_px = int(model.patch_embed.patch_size[0])
    if rows % patch_px or columns % patch_px or not rows or not columns:
        raise ModelError(
            "this image size does not divide into patches",
            got=f"{rows} x {columns} px",
            allowed=f"multiples of {patch_px} px, such as {_sizes_near(rows, columns, patch_px)}",
            remedy="crop or resize the images",
        )
    tokens_BND = model.forward_features(images_BCHW)
    patches_BND = tokens_BND[:, model.num_prefix_tokens :]
    grid = (rows // patch_px, columns // patch_px)
    return Tokens(tokens_BND[:, 0], patches_BND.reshape(patches_BND.shape[0], *grid, patches_BND.shape[-1]))


def _sizes_near(rows: int, columns: int, patch_px: int) -> str:
    below = [max(side // patch_px, 1) * patch_px for side in (rows, columns)]
    above = [-(-max(side, 1) // patch_px) * patch_px for side in (rows, columns)]
    return f"{below[0]} x {below[1]} or {above[0]} x {above[1]}"


def embedding_of(tokens: Tokens, embedding: Embedding) -> torch.Tensor:
    """The class token (B, D), or for ``cls+mean`` the class token and the mean of the patch tokens (B, 2D)."""
    if embedding == "cls":
        return tokens.cls_BD
    return torch.cat([tokens.cls_BD, tokens.patches_BHWD.mean(dim=(1, 2))], dim=1)


class Encoder(nn.Module):
    """A vision transformer that knows its own normalisation, token layout, embedding rule and licence.

    Made by :func:`histill.models.load_encoder` (frozen, for use) or :func:`wrap` (as it is, for training).

    Parameters
    ----------
    model
        A timm vision transformer with a class token; kept, not copied.
    name
        For messages and records.
    mean, std
        Of the RGB channels, images in 0..1.
    input_px
        Side of the images that it is used with, pixels: a multiple of its patches.
    embedding
        What :meth:`embed` gives: the class token, or also the mean patch token.
    licence
        Identifier of the weights' licence; None when unknown.
    spec
        The teacher's row of the table; None for other models.

    Raises
    ------
    ModelError
        An unknown embedding, no class token, or a size that does not divide into patches.
    """

    _mean_C11: torch.Tensor
    _std_C11: torch.Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        input_px: int,
        embedding: Embedding = "cls",
        licence: str | None = None,
        spec: TeacherSpec | None = None,
    ) -> None:
        super().__init__()
        layout: Any = model
        self.training = model.training
        self.model = model
        self.name = name
        self.mean = mean
        self.std = std
        self.input_px = input_px
        self.embedding: Embedding = embedding
        self.licence = licence
        self.spec = spec
        self.embed_dim = int(layout.num_features)
        self.patch_px = int(layout.patch_embed.patch_size[0])
        self.prefix_tokens = int(layout.num_prefix_tokens)
        if embedding not in ("cls", "cls+mean"):
            raise ModelError("there is no such embedding", where=name, got=repr(embedding), allowed="cls, cls+mean")
        if self.prefix_tokens < 1:
            raise ModelError("this model has no class token", where=name, allowed="a transformer with a class token")
        if input_px <= 0 or input_px % self.patch_px:
            raise ModelError(
                "this input size does not divide into patches",
                where=name,
                got=f"{input_px} px",
                allowed=f"multiples of {self.patch_px} px",
            )
        # not persistent: the state dict of an encoder is that of its model
        self.register_buffer("_mean_C11", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("_std_C11", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def embedding_dim(self) -> int:
        """Width of what :meth:`embed` returns."""
        return self.embed_dim * (2 if self.embedding == "cls+mean" else 1)

    def normalise(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Bring uint8 images in 0..255 or float images in 0..1 to the scale that the model was trained on.

        Parameters
        ----------
        images_BCHW
            Shape (B, 3, H, W), RGB; uint8, or any float type.

        Returns
        -------
        Tensor
            float32 (B, 3, H, W): (image in 0..1 - mean) / std of each colour.

        Raises
        ------
        DataError
            Another shape, or a type that has no agreed scale.
        """
        if images_BCHW.ndim != 4 or images_BCHW.shape[1] != 3:
            raise DataError(
                "an encoder takes a batch of RGB images",
                where=self.name,
                got=f"shape {tuple(images_BCHW.shape)}",
                allowed="(B, 3, H, W)",
            )
        if images_BCHW.dtype == torch.uint8:
            images_BCHW = images_BCHW.float() / 255
        elif not images_BCHW.is_floating_point():
            raise DataError(
                "images of a type that has no agreed scale",
                where=self.name,
                got=images_BCHW.dtype,
                allowed="uint8 in 0..255 or float in 0..1",
            )
        return (images_BCHW.float() - self._mean_C11) / self._std_C11

    def forward(self, images_BCHW: torch.Tensor) -> Tokens:
        """Encode images.

        Parameters
        ----------
        images_BCHW
            uint8 in 0..255, or float in 0..1; normalisation happens here. H and W are multiples of ``patch_px``.

        Returns
        -------
        Tokens
            In float32, or in the type of the surrounding ``torch.autocast``.
        """
        return tokens_of(self.model, self.normalise(images_BCHW))

    def embed(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Encode images into one vector each by the embedding rule: (B, D) for ``cls``, (B, 2D) for ``cls+mean``."""
        return embedding_of(self(images_BCHW), self.embedding)

    def content_hash(self) -> str:
        """Hex SHA-256 of all that decides the tokens: mean, std, and each weight's name, type, shape and bytes."""
        digest = hashlib.sha256(repr((tuple(self.mean), tuple(self.std))).encode())
        for name, tensor in self.model.state_dict().items():
            digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def load_encoder(
    name: str,
    *,
    input_px: int | None = None,
    device: str | torch.device = "cpu",
    embedding: Embedding | None = None,
    trust_remote_code: bool = False,
) -> Encoder:
    """Load a pretrained encoder: frozen, in eval mode, in float32.

    Parameters
    ----------
    name
        A name of ``histill models``, ``timm:NAME``, ``hf-hub:ORG/NAME``, ``local-dir:FOLDER``, or the path of an
        existing model folder.
    input_px
        Side of the tiles that it will be used with; the model's own size if None. Any multiple of the patch size
        works: position embeddings are resampled to the images at hand.
    device
        Where the weights go.
    embedding
        ``cls`` or ``cls+mean``; the model's own rule if None.
    trust_remote_code
        Allow a teacher whose hub repository brings its own Python code to run it. Read that code first.

    Raises
    ------
    ModelError
        Unknown or ambiguous name; missing, damaged or unfitting files; a hub that refuses.
    MissingExtraError
        If the teacher needs ``transformers``.
    """
    source = resolve(name)
    spec = source.spec
    model = build(source, trust_remote_code=trust_remote_code).requires_grad_(False).eval().float()
    record = record_of(source)
    cfg: Any = getattr(model, "pretrained_cfg", {})
    return Encoder(
        model,
        name=name,
        mean=spec.mean if spec else _triple(cfg["mean"]),
        std=spec.std if spec else _triple(cfg["std"]),
        input_px=input_px or (spec.input_px if spec else int(cfg["input_size"][-1])),
        embedding=embedding or (spec.embedding if spec else record.get("embedding", "cls")),
        licence=spec.licence if spec else (record.get("licence") or cfg.get("license")),
        spec=spec,
    ).to(device)


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def wrap(
    model: nn.Module,
    *,
    name: str,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    input_px: int = 224,
    embedding: Embedding = "cls",
    licence: str | None = None,
) -> Encoder:
    """Give a timm vision transformer in training the interface of an encoder; mode and gradients stay as they are.

    Parameters
    ----------
    model
        A timm vision transformer with a class token; kept, not copied.
    name, mean, std, input_px, embedding, licence
        As in :class:`Encoder`; ``input_px`` in pixels.

    Returns
    -------
    Encoder
        Around ``model``, in its mode; what trains the one trains the other.

    Raises
    ------
    ModelError
        As :class:`Encoder`.
    """
    return Encoder(model, name=name, mean=mean, std=std, input_px=input_px, embedding=embedding, licence=licence)
