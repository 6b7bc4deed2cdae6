"""The model of an extraction: opened with an engine, checked against what is known of it, and asked batch by batch.

Shapes: B tiles, D features, H and W rows and columns (of pixels in ``tiles_BHW3``, of patches in tokens).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from histill.errors import ConfigError, ModelError
from histill.extract.config import ExtractConfig
from histill.models.encoder import Embedding, embedding_of
from histill.models.engines import Engine, open_engine
from histill.models.known import Known, check_colours
from histill.slides.slide import SlideError

__all__ = ["FeatureModel", "check_tile_mpp", "devices_of", "open_model", "settle_mpp"]

_SAME_MPP = 0.05


def settle_mpp(config: ExtractConfig, known: Known) -> tuple[float, ...]:
    """The scales that tiles may have: what was asked for, else what the model was made for; () when nobody knows.

    Raises
    ------
    ModelError
        The model was made for another scale than the one that is asked for.
    ConfigError
        No scale is asked for, and the model has none or several.
    """
    if config.mpp:
        if known.mpp and not config.any_mpp and not _near(config.mpp, known.mpp):
            raise ModelError(
                "this model was made for tiles of another scale",
                where=config.model,
                got=f"--mpp {config.mpp:g}",
                allowed=f"{_listed(known.mpp)} um/px, to {_SAME_MPP:.0%}",
                remedy="leave --mpp out, or take the other scale knowingly: --any-mpp",
            )
        return (config.mpp,)
    if config.coords is not None and (config.any_mpp or known.mpp):
        return () if config.any_mpp else known.mpp or ()
    if known.mpp is None or len(known.mpp) != 1:
        raise ConfigError(
            "it is not clear which scale the tiles shall have",
            where="--mpp",
            got=f"the model was made for {_listed(known.mpp)}" if known.mpp else "it does not say its own",
            remedy="state it: --mpp 0.5 is what 20x is"
            + (", or take the coordinates' own, whatever it is: --any-mpp" if config.coords is not None else ""),
        )
    return known.mpp


def check_tile_mpp(tile_mpp: float, allowed: tuple[float, ...], tile_px: int, where: object) -> None:
    """Refuse coordinates whose tiles come to another scale than allowed; () allows every one.

    Parameters
    ----------
    tile_mpp
        Microns per pixel that the tiles will have.
    allowed
        As of :func:`settle_mpp`; a difference of 5 % is none.
    tile_px
        Side of a tile in pixels, for the remedy.
    where
        The slide, for the error.

    Raises
    ------
    SlideError
        The tiles have none of these scales.
    """
    if allowed and not _near(tile_mpp, allowed):
        side = round(tile_px * tile_mpp / allowed[0])
        raise SlideError(
            "the tiles of these coordinates have another scale than the model was made for",
            where=where,
            got=f"{tile_mpp:.4g} um/px when a tile is {tile_px} px",
            allowed=f"{_listed(allowed)} um/px, to {_SAME_MPP:.0%}",
            remedy=f"let a tile be about {side} px (--tile-px), or take the other scale knowingly: --any-mpp",
        )


def _near(mpp: float, allowed: tuple[float, ...]) -> bool:
    return any(abs(mpp - each) <= _SAME_MPP * each for each in allowed)


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def devices_of(gpus: int) -> list[str]:
    """Names of the devices for ``--gpus``.

    Raises
    ------
    ConfigError
        More GPUs than there are.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus > there:
        raise ConfigError("so many GPUs cannot be reached", where="--gpus", got=gpus, allowed=f"0 to {there}")
    count = there if gpus < 0 else gpus
    return [f"cuda:{number}" for number in range(count)] or ["cpu"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FeatureModel:
    """An engine, and which of its tokens become a feature."""

    engine: Engine
    embedding: Embedding
    tokens: bool

    @property
    def width(self) -> int:
        """Width D of a feature."""
        return self.engine.embed_dim * (2 if self.embedding == "cls+mean" else 1)

    @property
    def tokens_shape(self) -> tuple[int, int, int] | None:
        """Shape of a tile's patch tokens, when they are wanted."""
        side = self.engine.input_px // self.engine.patch_px
        return (side, side, self.engine.embed_dim) if self.tokens else None

    @property
    def on_gpu(self) -> bool:
        """Whether results come later than the call."""
        return self.engine.device.startswith("cuda")

    @torch.inference_mode()
    def start(self, tiles_BHW3: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Begin a batch of uint8 tiles: features (B, D) float32, tokens (B, H, W, D) float16, both on the device."""
        tokens = self.engine(tiles_BHW3.permute(0, 3, 1, 2).to(self.engine.device, non_blocking=True))
        features_BD = embedding_of(tokens, self.embedding)
        return features_BD.float(), tokens.patches_BHWD.half() if self.tokens else None

    def finish(
        self, started: tuple[torch.Tensor, torch.Tensor | None]
    ) -> tuple[NDArray[np.float32], NDArray[np.float16] | None]:
        """Wait for a batch.

        Raises
        ------
        ModelError
            A feature is not finite, or a token not in the range of float16.
        """
        features_BD, tokens_BHWD = (each.cpu().numpy() if each is not None else None for each in started)
        assert features_BD is not None
        for name, values in (("feature", features_BD), ("patch token", tokens_BHWD)):
            if values is not None and not np.isfinite(values).all():
                raise ModelError(
                    f"a {name} is not finite" + (" in float16" if name != "feature" else ""),
                    where=f"{self.engine.name} ({self.engine.engine})",
                    remedy="look at the model's weights, or take --engine torch-fp32",
                )
        return features_BD, tokens_BHWD


def open_model(config: ExtractConfig, known: Known, engine: str, device: str) -> FeatureModel:
    """Open the model of a command.

    Parameters
    ----------
    config
        With a model.
    known
        As of :func:`histill.models.known.known_of`.
    engine, device
        As :func:`histill.models.engines.open_engine` takes them.

    Raises
    ------
    ModelError
        As ``open_engine``, and when its normalisation is not the one that it was made with.
    ConfigError
        As ``open_engine``, and when the tiles do not divide into its patches.
    MissingExtraError
        As ``open_engine``.
    """
    assert config.model is not None
    opened = open_engine(
        config.model, engine=engine, input_px=config.tile_px or None, batch=config.batch, device=device
    )
    check_colours(config.model, opened.mean, opened.std, known)
    if opened.input_px % opened.patch_px:
        raise ConfigError(
            "this tile does not divide into patches",
            where="--tile-px",
            got=opened.input_px,
            allowed=f"multiples of {opened.patch_px}",
        )
    embedding: Embedding = opened.embedding if config.embedding == "auto" else config.embedding
    return FeatureModel(engine=opened, embedding=embedding, tokens=config.tokens)
