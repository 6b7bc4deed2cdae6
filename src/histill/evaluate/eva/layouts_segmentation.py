"""Sets of images with a mask per pixel, as distributed: CoNSeP and MoNuSAC.

Shapes: N tiles, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import loadmat

from histill.errors import DataError
from histill.evaluate.eva.layouts import central_box, central_square, data_key, file_digest, required
from histill.evaluate.eva.segmentation import IGNORE
from histill.evaluate.features import Array
from histill.slides.masks import fill_polygon

__all__ = ["SegmentationSet", "read_consep", "read_monusac"]

_CONSEP_PX = 250
"""Side of the tiles that the original cuts CoNSeP's images into."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SegmentationSet:
    """Tiles with masks, of all splits."""

    classes: tuple[str, ...]
    """Background first."""
    images_NHW3: NDArray[np.uint8]
    masks_NHW: NDArray[np.uint8]
    """Positions in ``classes``, or 255 (ignored)."""
    split_N: Array
    """train or val."""
    group_N: Array
    """Image (CoNSeP) or patient (MoNuSAC)."""
    group: str
    key: str
    """Hex digest of names, sizes and rows."""
    sources: dict[str, int]
    """Split -> images that its tiles are cut from."""

    def __len__(self) -> int:
        return len(self.images_NHW3)

    def read(self, first: int, last: int) -> NDArray[np.uint8]:
        """Tiles ``first`` to ``last``."""
        return self.images_NHW3[first:last]

    def take(self, rows: Array) -> SegmentationSet:
        """Some of the tiles, in that order."""
        return SegmentationSet(
            classes=self.classes,
            images_NHW3=self.images_NHW3[rows],
            masks_NHW=self.masks_NHW[rows],
            split_N=self.split_N[rows],
            group_N=self.group_N[rows],
            group=self.group,
            key=file_digest(self.key, np.asarray(rows).tolist()),
            sources=self.sources,
        )


def _nearest(mask_HW: Array, tile_px: int, box: tuple[float, float, float, float] | None = None) -> NDArray[np.uint8]:
    mask = Image.fromarray(mask_HW.astype(np.uint8))
    return np.asarray(mask.resize((tile_px, tile_px), Image.Resampling.NEAREST, box=box))


# ------------------------------------------------------------------ CoNSeP

_CONSEP_CLASSES = ("background", "other", "inflammatory", "epithelial", "spindle-shaped")
_CONSEP_MERGED = np.array([0, 1, 2, 3, 3, 4, 4, 4], np.uint8)
"""Of the seven types: healthy and malignant epithelium are one class; fibroblast, muscle and endothelium another."""


def read_consep(root: Path, tile_px: int) -> SegmentationSet:
    """CoNSeP: ``{Train,Test}/Images/<name>.png`` and ``{Train,Test}/Labels/<name>.mat`` (``type_map``).

    Train is train (27 images), Test is val (14): the original has no other. Images of 1,000 px are cut into 250 px
    tiles without overlap, each resized to ``tile_px``.
    """
    images, masks, splits, groups, paths = [], [], [], [], []
    sources = {}
    for folder, split in (("Train", "train"), ("Test", "val")):
        found = sorted(required(root / folder / "Images", "CoNSeP").glob("*.png"))
        sources[split] = len(found)
        for path in found:
            labels = required(root / folder / "Labels" / f"{path.stem}.mat", "CoNSeP", folder=False)
            with Image.open(path) as opened:
                image = opened.convert("RGB")
            type_HW = _type_map(labels, (image.height, image.width))
            for top in range(0, image.height - _CONSEP_PX + 1, _CONSEP_PX):
                for left in range(0, image.width - _CONSEP_PX + 1, _CONSEP_PX):
                    box = (left, top, left + _CONSEP_PX, top + _CONSEP_PX)
                    images.append(np.asarray(image.crop(box).resize((tile_px, tile_px), Image.Resampling.BILINEAR)))
                    masks.append(_nearest(type_HW[top : box[3], left : box[2]], tile_px))
                    splits.append(split)
                    groups.append(path.stem)
            paths += [path, labels]
    return _assembled(
        images, masks, splits, groups, "image", _CONSEP_CLASSES, data_key(paths, root, tile_px), sources, root, "CoNSeP"
    )


def _type_map(path: Path, shape: tuple[int, int]) -> NDArray[np.uint8]:
    try:
        content = loadmat(path)
    except (OSError, ValueError) as error:
        raise DataError("a label file of CoNSeP cannot be read", where=path, got=error) from None
    if "type_map" not in content:
        names = ", ".join(name for name in content if not name.startswith("__"))
        raise DataError("a label file of CoNSeP has no type_map", where=path, got=names)
    types_HW = content["type_map"]
    if types_HW.shape != shape or not np.isin(types_HW, range(len(_CONSEP_MERGED))).all():
        raise DataError(
            "a type_map of CoNSeP is not as published",
            where=path,
            got=f"shape {types_HW.shape}, values {types_HW.min()} to {types_HW.max()}",
            allowed=f"shape {shape} as its image, whole values 0 to 7",
        )
    merged_HW: NDArray[np.uint8] = _CONSEP_MERGED[types_HW.astype(np.int64)]
    return merged_HW


# ------------------------------------------------------------------ MoNuSAC

_MONUSAC_CLASSES = ("background", "epithelial", "lymphocyte", "neutrophil", "macrophage")


def read_monusac(root: Path, tile_px: int) -> SegmentationSet:
    """MoNuSAC: ``<folder>/<patient>/<image>.tif`` with ``<image>.xml``, polygons of nuclei in pixels.

    ``MoNuSAC_images_and_annotations`` is train (209 images), ``MoNuSAC Testing Data and Annotations`` is val (85): the
    original has no other. The central square of an image is resized to ``tile_px``, as the original's offline
    protocol does. Nuclei of another name (``Ambiguous``) are ignored in training and scores.
    """
    images, masks, splits, groups, paths = [], [], [], [], []
    sources = {}
    folders = (("MoNuSAC_images_and_annotations", "train"), ("MoNuSAC Testing Data and Annotations", "val"))
    for folder, split in folders:
        found = sorted(required(root / folder, "MoNuSAC").glob("*/*.tif"))
        sources[split] = len(found)
        for path in found:
            labels = required(path.with_suffix(".xml"), "MoNuSAC", folder=False)
            images.append(central_square(path, tile_px))
            with Image.open(path) as opened:
                width, height = opened.size
            masks.append(_nearest(_nuclei(labels, width, height), tile_px, central_box(width, height, tile_px)))
            splits.append(split)
            groups.append(path.parent.name)
            paths += [path, labels]
    key = data_key(paths, root, tile_px)
    return _assembled(images, masks, splits, groups, "patient", _MONUSAC_CLASSES, key, sources, root, "MoNuSAC")


def _nuclei(path: Path, width: int, height: int) -> NDArray[np.uint8]:
    """Mask (H, W) from Annotation elements: the class is the Name of its Attribute, a nucleus a Region of Vertices."""
    try:
        tree = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise DataError("an annotation file of MoNuSAC cannot be read", where=path, got=error) from None
    mask_HW = np.zeros((height, width), np.uint8)
    for annotation in tree.iter("Annotation"):
        name = next((attribute.get("Name", "") for attribute in annotation.iter("Attribute")), "")
        regions = list(annotation.iter("Region"))
        if regions and not name:
            raise DataError(
                "an annotation of MoNuSAC has no class", where=path, allowed=", ".join(_MONUSAC_CLASSES[1:])
            )
        value = _MONUSAC_CLASSES.index(name.lower()) if name.lower() in _MONUSAC_CLASSES[1:] else IGNORE
        for region in regions:
            ring = np.array([(float(v.get("X", "nan")), float(v.get("Y", "nan"))) for v in region.iter("Vertex")])
            if len(ring) >= 3 and np.isfinite(ring).all():
                inside_HW = np.zeros((height, width), bool)
                fill_polygon(inside_HW, [ring])
                mask_HW[inside_HW] = value
    return mask_HW


def _assembled(
    images: list[Array],
    masks: list[Array],
    splits: list[str],
    groups: list[str],
    group: str,
    classes: tuple[str, ...],
    key: str,
    sources: dict[str, int],
    root: Path,
    name: str,
) -> SegmentationSet:
    if not images:
        raise DataError(f"there are no images of {name} here", where=root, remedy="check that the archive is unpacked")
    return SegmentationSet(
        classes=classes,
        images_NHW3=np.stack(images),
        masks_NHW=np.stack(masks),
        split_N=np.array(splits),
        group_N=np.array(groups),
        group=group,
        key=key,
        sources=sources,
    )
