"""Small data sets in the original layouts, and an encoder that sees colours and where they are; conftest loads it."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from scipy.io import savemat

MHIST_HEADER = [
    "Image Name",
    "Majority Vote Label",
    "Number of Annotators who Selected SSA (Out of 7)",
    "Partition",
]


@dataclass
class ColourEmbedder:
    """A real encoder of 4 x 4 mean colours: what it gives can be worked out by hand."""

    name: str = "colours"
    key: str = hashlib.sha256(b"colours").hexdigest()
    pooling: str = "cls"
    dim: int = 48
    grid: int = 4
    tiles: list[int] = field(default_factory=list)
    """Number of tiles of each call."""

    def patch_tokens(self, tiles_NHW3: np.ndarray) -> np.ndarray:
        self.tiles.append(len(tiles_NHW3))
        count, height, width, _ = tiles_NHW3.shape
        rows, columns = height // self.grid * self.grid, width // self.grid * self.grid
        parts = tiles_NHW3[:, :rows, :columns].reshape(
            count, self.grid, rows // self.grid, self.grid, columns // self.grid, 3
        )
        return (parts.mean(axis=(2, 4)) / 64 - 2).astype(np.float32)

    def embed(self, tiles_NHW3: np.ndarray) -> np.ndarray:
        return self.patch_tokens(tiles_NHW3).reshape(len(tiles_NHW3), -1)


def picture(label: int, seed: int, width: int = 40, height: int = 40) -> Image.Image:
    """Noise whose colour tells the class, not quite surely."""
    rng = np.random.default_rng([seed, label])
    base = np.random.default_rng(label).uniform(60, 200, 3) + rng.normal(0, 25, 3)
    pixels = base + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def save(path: Path, image: Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def write_table(path: Path, header: list[str] | None, rows: Iterable[list[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        if header is not None:
            writer.writerow(header)
        writer.writerows(rows)
    return path


def write_bach(root: Path, numbers: Iterable[int] = range(1, 101)) -> Path:
    photos = root / "ICIAR2018_BACH_Challenge" / "Photos"
    for label, (name, letters) in enumerate({"Benign": "b", "InSitu": "is", "Invasive": "iv", "Normal": "n"}.items()):
        for number in numbers:
            save(photos / name / f"{letters}{number:03d}.tif", picture(label, number, 48, 36))
    (photos / "microscopy_ground_truth.csv").write_text("b001.tif,Benign\n")
    return root


def write_crc(root: Path, train: int = 12, val: int = 5) -> Path:
    classes = ["ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"]
    for folder, count in (("NCT-CRC-HE-100K", train), ("CRC-VAL-HE-7K", val)):
        for label, name in enumerate(classes):
            for number in range(count):
                image = picture(label, number + (1000 if folder[0] == "C" else 0), 16, 16)
                save(root / folder / name / f"{name}-{folder[0]}{number:05d}.tif", image)
    return root


def write_mhist(root: Path, train: int = 40, test: int = 16) -> Path:
    rows = []
    for number in range(train + test):
        label = number % 2
        save(root / "images" / f"MHIST_{number:03d}.png", picture(label, number))
        partition = "train" if number < train else "test"
        rows.append([f"MHIST_{number:03d}.png", ("HP", "SSA")[label], 7 * label, partition])
    write_table(root / "annotations.csv", MHIST_HEADER, rows)
    return root


def write_pcam(root: Path, sizes: tuple[int, int, int] = (60, 20, 24), *, slides: bool = False) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for split, count in zip(("train", "valid", "test"), sizes, strict=True):
        stem = root / f"camelyonpatch_level_2_split_{split}"
        label = np.arange(count) % 2
        images = np.stack([np.asarray(picture(k, 100 * count + n, 96, 96)) for n, k in enumerate(label)])
        with h5py.File(f"{stem}_x.h5", "w") as file:
            file["x"] = images
        with h5py.File(f"{stem}_y.h5", "w") as file:
            file["y"] = label.astype(np.uint8).reshape(-1, 1, 1, 1)
        if slides:
            rows = [[n, 0, 0, k, k, f"camelyon16_{split}_normal_{n // 6:03d}"] for n, k in enumerate(label)]
            header = ["", "coord_y", "coord_x", "tumor_patch", "center_tumor_patch", "wsi"]
            write_table(Path(f"{stem}_meta.csv"), header, rows)
    return root


BREAKHIS = {
    "TA": ("benign", "B", "tubular_adenoma", ["14015", "15275", "19854C", "13413", "14134"]),
    "MC": ("malignant", "M", "mucinous_carcinoma", ["10147", "16875", "19979", "11520", "12773"]),
    "F": ("benign", "B", "fibroadenoma", ["14134E", "21998CD", "25197", "23060AB", "9133"]),
    "DC": ("malignant", "M", "ductal_carcinoma", ["2523", "2773", "9461", "4364", "6241"]),
}


def write_breakhis(root: Path, images: int = 4) -> Path:
    breast = root / "BreaKHis_v1" / "histology_slides" / "breast"
    for label, (name, (kind, letter, folder, patients)) in enumerate(BREAKHIS.items()):
        for patient in patients:
            for zoom in ("40", "100"):
                for number in range(1, images + 1):
                    stem = f"SOB_{letter}_{name}-14-{patient}"
                    path = breast / kind / "SOB" / folder / stem / f"{zoom}X" / f"{stem}-{zoom}-{number:03d}.png"
                    save(path, picture(label, number + len(patient), 70, 46))
    save(breast / "benign/SOB/adenosis/SOB_B_A-14-22549AB/40X/SOB_B_A-14-22549AB-40-001.png", picture(9, 1))
    return root


def write_gleason(root: Path, cores: int = 4, patches: int = 4) -> Path:
    for array in ("ZT76", "ZT111", "ZT199", "ZT204", "ZT80"):
        for core in range(cores):
            name = f"{array}_39_A_{core}_1"
            for patch in range(patches):
                label = (core + patch) % 4
                file = f"{name}_patch_{patch}_class_{label}.jpg"
                image = picture(label, core * 10 + patch + int(array[2:]) * 100)
                if array == "ZT80":
                    save(root / "test_patches_750" / "patho_1" / name / file, image)
                    save(root / "test_patches_750" / "patho_2" / name / file, image)
                else:
                    save(root / "train_validation_patches_750" / name / file, image)
    return root


def write_consep(root: Path, train: int = 3, test: int = 2, side: int = 500) -> Path:
    """Discs on a pale ground; ``type_map`` is float, as in the original, next to ``inst_map``."""
    for folder, count in (("Train", train), ("Test", test)):
        for number in range(1, count + 1):
            rng = np.random.default_rng([number, len(folder)])
            pixels, types = np.full((side, side, 3), 230.0), np.zeros((side, side))
            rows, columns = np.mgrid[:side, :side]
            for nucleus in range(40):
                kind = nucleus % 7 + 1
                y, x = rng.uniform(0, side, 2)
                disc = (rows - y) ** 2 + (columns - x) ** 2 < 24**2
                types[disc], pixels[disc] = kind, np.array([30 * kind, 200 - 25 * kind, 90 + 15 * (kind % 3)])
            stem = f"{folder.lower()}_{number}"
            save(root / folder / "Images" / f"{stem}.png", Image.fromarray(pixels.astype(np.uint8)))
            save(root / folder / "Overlay" / f"{stem}.png", Image.fromarray(pixels.astype(np.uint8)))
            (root / folder / "Labels").mkdir(exist_ok=True)
            savemat(
                root / folder / "Labels" / f"{stem}.mat",
                {"type_map": types, "inst_map": (types > 0).astype(np.int32), "inst_type": np.ones((1, 1))},
            )
    return root


MONUSAC_REGION = (
    '<Region Id="{n}" Type="0" Zoom="1" Area="1" NegativeROA="0"><Attributes/><Vertices>{v}</Vertices></Region>'
)


def monusac_xml(nuclei: dict[str, list[list[tuple[float, float]]]]) -> str:
    """ImageScope's annotations: one per class, its name in the first attribute."""
    found = []
    for number, (name, regions) in enumerate(nuclei.items(), start=1):
        parts = []
        for n, region in enumerate(regions, start=1):
            vertices = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in region)
            parts.append(MONUSAC_REGION.format(n=n, v=vertices))
        found.append(
            f'<Annotation Id="{number}" Name="" ReadOnly="0" LineColor="65280">'
            f'<Attributes><Attribute Name="{name}" Id="0" Value=""/></Attributes>'
            f'<Regions><RegionAttributeHeaders><AttributeHeader Id="9999" Name="Region"/></RegionAttributeHeaders>'
            f"{''.join(parts)}</Regions><Plots/></Annotation>"
        )
    return f'<?xml version="1.0"?><Annotations MicronsPerPixel="0.25">{"".join(found)}</Annotations>'


def write_monusac(root: Path, train: int = 4, test: int = 2) -> Path:
    colours = {"Epithelial": (200, 40, 40), "Lymphocyte": (40, 200, 40), "Neutrophil": (40, 40, 200)}
    folders = (("MoNuSAC_images_and_annotations", train), ("MoNuSAC Testing Data and Annotations", test))
    for folder, count in folders:
        for number in range(count):
            rng = np.random.default_rng([number, len(folder)])
            patient = f"TCGA-{len(folder)}-{number:04d}-01Z-00-DX1"
            pixels = np.full((64, 96, 3), 230, np.uint8)
            nuclei: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in colours}
            for slot in range(12):
                name = list(colours)[rng.integers(3)]
                left, top = 18 + 16 * (slot % 4), 2 + 21 * (slot // 4)
                pixels[top : top + 12, left : left + 10] = colours[name]
                nuclei[name].append([(left, top), (left + 10, top), (left + 10, top + 12), (left, top + 12)])
            path = save(root / folder / patient / f"{patient}_1.tif", Image.fromarray(pixels))
            path.with_suffix(".svs").write_bytes(b"the same image, not read")
            path.with_suffix(".xml").write_text(monusac_xml(nuclei))
    return root


def write_camelyon16(root: Path, numbers: Iterable[int] = range(1, 33), tests: int = 10) -> Path:
    """Slides are small TIFF images: embedding is passed in, and here it reads them as they are."""
    for label, name in enumerate(("normal", "tumor")):
        for number in numbers:
            save(root / "training" / name / f"{name}_{number:03d}.tif", picture(label, number))
    rows = []
    for number in range(1, tests + 1):
        label = number % 2
        save(root / "testing" / "images" / f"test_{number:03d}.tif", picture(label, 500 + number))
        rows.append([f"test_{number:03d}", ("Normal", "Tumor")[label], "None" if label == 0 else "IDC", "None"])
    write_table(root / "testing" / "reference.csv", None, rows)
    return root


def write_panda(root: Path, slides: int = 180, *, noisy: bool = False) -> Path:
    rows = []
    for number in range(slides):
        name, label = hashlib.md5(str(number).encode()).hexdigest(), number % 6
        save(root / "train_images" / f"{name}.tiff", picture(label, number, 20, 20))
        rows.append([name, "radboud", label, "3+3"])
    write_table(root / "train.csv", ["image_id", "data_provider", "isup_grade", "gleason_score"], rows)
    if noisy:
        header = ["image_id", "data_provider", "isup_grade", "gleason_score", "noise_ratio_10"]
        write_table(
            root / "train_with_noisy_labels.csv", header, [[*row, int(n % 10 == 0)] for n, row in enumerate(rows)]
        )
    return root


def embed_slide(path: Path, *, mpp: float, tile_px: int, max_tiles: int) -> np.ndarray:
    """Four tiles of the small pictures that stand for slides."""
    with Image.open(path) as image:
        pixels = np.asarray(image.resize((tile_px * 2, tile_px * 2)))
    tiles = [pixels[y : y + tile_px, x : x + tile_px] for y in (0, tile_px) for x in (0, tile_px)]
    return ColourEmbedder().embed(np.stack(tiles))
