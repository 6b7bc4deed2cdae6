from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from histill.models import STUDENTS, build_student, write_bundle
from histill.synthetic import KINDS, SCANNERS, STAINS, draw_tile, render, slide_effects

MEAN, STD = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
TEACHER = {"name": "somebody", "licence": "MIT", "derivatives": True, "source_url": "https://example.org/somebody"}


@pytest.fixture(scope="session")
def make_bundle():
    """Write a nano student with some provenance."""

    def make(folder, *, teacher=TEACHER, licence=None, seed=0, **more):
        write_bundle(
            folder,
            build_student("vit-nano", seed=seed).eval(),
            STUDENTS["vit-nano"],
            mean=MEAN,
            std=STD,
            input_px=56,
            licence=licence,
            provenance={"teacher": teacher, "data": {"tiles": 11, "fingerprint": "f00"}, **more},
        )
        return folder

    return make


@pytest.fixture(scope="session")
def bundle(tmp_path_factory, make_bundle):
    return make_bundle(tmp_path_factory.mktemp("export") / "nano")


@pytest.fixture(scope="session")
def tiles(tmp_path_factory):
    """A folder of 32 drawn tiles of 64 px, and one file that is no image inside."""
    folder = tmp_path_factory.mktemp("tiles")
    for number in range(32):
        kind = KINDS[number % len(KINDS)]
        drawn = draw_tile(kind, 64, number, slide_effects(number))
        Image.fromarray(np.asarray(render(drawn, STAINS["harris"], SCANNERS["aurora"], number))).save(
            folder / f"{kind}-{number}.png"
        )
    (folder / "broken.png").write_bytes(b"no image")
    return folder
