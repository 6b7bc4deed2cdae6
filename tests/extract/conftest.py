"""A tiny model with a known teacher, and drawn slides with many small tiles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from histill.models import STUDENTS, build_student, write_bundle
from histill.synthetic.slides import write_slide

BIOPTIMUS = {"mean": (0.707223, 0.578729, 0.703617), "std": (0.211883, 0.230117, 0.177517)}


def bundle(folder: Path, *, seed: int = 0, input_px: int = 56, **options: object) -> Path:
    """A nano student of H-optimus-0 (0.5 um/px), with random weights."""
    facts = BIOPTIMUS | {"provenance": {"teacher": {"name": "h-optimus-0"}}} | options
    model = build_student("vit-nano", seed=seed).eval()
    write_bundle(folder, model, STUDENTS["vit-nano"], input_px=input_px, **facts)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(tmp_path_factory.mktemp("model") / "nano")


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    for number, name in enumerate("ab"):
        write_slide(folder / f"{name}.svs", width_px=700, height_px=600, mpp=0.5, seed=number, levels=(1, 4))
    return folder


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., Path]:
    return bundle
