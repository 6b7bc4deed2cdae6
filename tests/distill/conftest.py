"""A small real run: a ViT teacher of random weights in timm's format, and drawn tiles with both kinds of tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from histill.models import STUDENTS, build_student, write_bundle
from histill.synthetic import write_tile_set


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "vit"
    model = build_student("vit-nano", seed=7)
    with torch.no_grad():
        for block in model.blocks:  # random layers that do something, so that the tokens of two images differ
            block.ls1.gamma.fill_(1.0)
            block.ls2.gamma.fill_(1.0)
    write_bundle(
        folder, model, STUDENTS["vit-nano"], mean=(0.7, 0.58, 0.7), std=(0.21, 0.23, 0.18), input_px=56, provenance={}
    )
    return folder


@pytest.fixture(scope="session")
def small_tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiles") / "set"
    write_tile_set(folder, tiles=48, slides=12, tile_px=64, fields=6, seed=1)
    return folder


@pytest.fixture(autouse=True)
def allocator_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that run inside of the tests' process do not change how it allocates for all tests after them."""
    monkeypatch.setattr("histill.distill.precision.keep_freed_memory", lambda device: False)
