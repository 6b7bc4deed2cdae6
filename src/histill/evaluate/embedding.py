"""Embeddings of many tiles: batched, cached by content, resumable.

An embedding is named by all that decides it: the encoder's weights, the pooling, the side that tiles are resized to,
the precision, and the data. The same name is computed once; a run that was killed goes on at the next block of tiles.

Shapes: N tiles, H and W pixels, D features, P and Q rows and columns of patches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from histill import files
from histill.errors import DataError
from histill.models.encoder import Embedding, Encoder, Tokens

__all__ = ["Embedder", "EncoderEmbedder", "FeatureCache", "ReadTiles"]

BLOCK_TILES = 512
"""Tiles between two commits of the cache."""

ReadTiles = Callable[[int, int], NDArray[np.uint8]]
"""(first, last) -> uint8 (last - first, H, W, 3), RGB."""


class Embedder(Protocol):
    """What a benchmark needs of an encoder. The seam: a fake needs a name, a key, a width and a function."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def key(self) -> str:
        """Hex digest of all that decides the features but the tiles: weights, pooling, size, precision."""
        ...

    @property
    def pooling(self) -> Embedding:
        """``cls`` or ``cls+mean``: always named with a result."""
        ...

    @property
    def dim(self) -> int:
        """Width D."""
        ...

    def embed(self, tiles_NHW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (N, D) of uint8 RGB tiles of any one size."""
        ...

    def patch_tokens(self, tiles_NHW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Patch tokens (N, P, Q, D') of uint8 RGB tiles, for segmentation."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncoderEmbedder:
    """An :class:`histill.models.encoder.Encoder` as an embedder."""

    encoder: Encoder
    name: str
    pooling: Embedding
    input_px: int
    """Side that tiles are resized to (bilinear, antialiased) before they enter; a multiple of the patch."""
    autocast: torch.autocast
    """Precision of the network."""
    batch: int = 64
    weights: str = ""
    """The encoder's ``content_hash()``."""
    sample: list[NDArray[np.uint8]] = field(default_factory=list)
    """The first tiles that it was shown, at most a batch: what its speed is measured on."""

    @classmethod
    def of(
        cls,
        encoder: Encoder,
        *,
        name: str,
        pooling: Embedding | None = None,
        input_px: int | None = None,
        precision: str = "auto",
        batch: int = 64,
    ) -> EncoderEmbedder:
        """Wrap a loaded encoder.

        Parameters
        ----------
        encoder
            Frozen, in eval mode, on its device.
        name
            What tables call it.
        pooling
            The encoder's own rule if None.
        input_px
            The encoder's own size if None.
        precision
            ``auto`` (bf16 where the processor has it), ``bf16`` or ``fp32``.
        batch
            Tiles per forward pass.
        """
        device = next(encoder.parameters()).device
        fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_has_bf16()
        enabled = precision == "bf16" or (precision == "auto" and fast)
        return cls(
            encoder=encoder,
            name=name,
            pooling=pooling or encoder.embedding,
            input_px=input_px or encoder.input_px,
            autocast=torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled),
            batch=batch,
            weights=encoder.content_hash(),
        )

    @property
    def dim(self) -> int:
        """Width of a feature."""
        return self.encoder.embed_dim * (2 if self.pooling == "cls+mean" else 1)

    @property
    def precision(self) -> str:
        """``bf16`` or ``fp32``."""
        return "bf16" if self.autocast._enabled else "fp32"

    @property
    def key(self) -> str:
        """Hex digest of weights, pooling, size and precision."""
        return hashlib.sha256(f"{self.weights} {self.pooling} {self.input_px} {self.precision}".encode()).hexdigest()

    def embed(self, tiles_NHW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Features (N, D)."""

        def pooled(tokens: Tokens) -> torch.Tensor:
            if self.pooling == "cls":
                return tokens.cls_BD
            return torch.cat([tokens.cls_BD, tokens.patches_BHWD.mean(dim=(1, 2))], dim=1)

        return self._run(tiles_NHW3, pooled)

    def patch_tokens(self, tiles_NHW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Patch tokens (N, P, Q, D')."""
        return self._run(tiles_NHW3, lambda tokens: tokens.patches_BHWD)

    @torch.no_grad()
    def _run(self, tiles_NHW3: NDArray[np.uint8], take: Callable[[Tokens], torch.Tensor]) -> NDArray[np.float32]:
        device, side, found = next(self.encoder.parameters()).device, self.input_px, []
        if not self.sample:
            self.sample.append(tiles_NHW3[: self.batch].copy())
        for start in range(0, len(tiles_NHW3), self.batch):
            part = np.ascontiguousarray(tiles_NHW3[start : start + self.batch])
            images_BCHW = torch.from_numpy(part).to(device).permute(0, 3, 1, 2).float() / 255
            if images_BCHW.shape[-2:] != (side, side):
                images_BCHW = F.interpolate(images_BCHW, size=(side, side), mode="bilinear", antialias=True)
            with self.autocast:
                tokens = self.encoder(images_BCHW)
            found.append(take(tokens).float().cpu().numpy())
        return np.concatenate(found)


def _cpu_has_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())


@dataclass(frozen=True, slots=True)
class FeatureCache:
    """Features by name, one ``.npy`` file each. Without a folder everything is computed anew."""

    folder: Path | None

    def features(
        self,
        embedder: Embedder,
        data_key: str,
        count: int,
        read: ReadTiles,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> NDArray[np.float32]:
        """Embed ``count`` tiles, or what is left of them.

        Parameters
        ----------
        embedder
            Who embeds.
        data_key
            Hex digest of the tiles: names and sizes or bytes; other tiles, another key.
        count
            Number of tiles N.
        read
            Gives a block of tiles.
        progress
            Told the number of further tiles.

        Returns
        -------
        ndarray
            (N, D) float32; read only when it comes from the cache.

        Raises
        ------
        DataError
            A feature that is not finite; nothing of that block is kept.
        """
        if self.folder is None:
            blocks = [
                _checked(embedder, read, start, min(start + BLOCK_TILES, count), progress)
                for start in range(0, count, BLOCK_TILES)
            ]
            return np.concatenate(blocks) if blocks else np.zeros((0, embedder.dim), np.float32)
        name = hashlib.sha256(f"{embedder.key} {data_key} {count}".encode()).hexdigest()[:32]
        target, partial, done_file = (self.folder / f"{name}{end}" for end in (".npy", ".part.npy", ".done.json"))
        if not target.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with files.lock(self.folder / f"{name}.lock", wait=True):
                if not target.exists():
                    self._fill(embedder, count, read, partial, done_file, progress)
                    partial.replace(target)
                    done_file.unlink(missing_ok=True)
                (self.folder / f"{name}.lock").unlink(missing_ok=True)
        found: NDArray[np.float32] = np.load(target, mmap_mode="r")
        return found

    def _fill(
        self,
        embedder: Embedder,
        count: int,
        read: ReadTiles,
        partial: Path,
        done_file: Path,
        progress: Callable[[int], None] | None,
    ) -> None:
        """Write block after block; ``done_file`` says how many rows are on the disk."""
        done = int(files.read_json(done_file)) if done_file.exists() and partial.exists() else 0
        shape = (count, embedder.dim)
        rows_ND = open_memmap(partial, mode="r+" if done else "w+", dtype=np.float32, shape=None if done else shape)
        if rows_ND.shape != shape:
            raise DataError("a cached embedding has another shape", where=partial, got=rows_ND.shape, allowed=shape)
        if progress is not None and done:
            progress(done)
        for start in range(done, count, BLOCK_TILES):
            stop = min(start + BLOCK_TILES, count)
            rows_ND[start:stop] = _checked(embedder, read, start, stop, progress)
            rows_ND.flush()
            files.write_json(done_file, stop)


def _checked(
    embedder: Embedder, read: ReadTiles, start: int, stop: int, progress: Callable[[int], None] | None
) -> NDArray[np.float32]:
    features_BD = embedder.embed(read(start, stop))
    broken_B = ~np.isfinite(features_BD).all(axis=1)
    if broken_B.any():
        raise DataError(
            "an embedding is not finite",
            where=f"{embedder.name}, tile {start + int(np.argmax(broken_B))}",
            remedy="look at the encoder's weights, or use --precision fp32",
        )
    if progress is not None:
        progress(stop - start)
    return features_BD.astype(np.float32, copy=False)
