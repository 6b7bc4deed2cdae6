"""Scripts of examples/ that make and compare teachers, on drawn tiles."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from histill.synthetic import write_tile_set

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "tiles"
    write_tile_set(folder, tiles=24, slides=6, tile_px=64, fields=2)
    return folder


def run(script: str, *words: object) -> str:
    command = [sys.executable, "-W", "error", str(EXAMPLES / script), *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_second_teacher_is_made_and_compared(tiles: Path, tmp_path: Path) -> None:
    made = [tmp_path / "one", tmp_path / "other"]
    for folder, seed in zip(made, (1, 2), strict=True):
        run(
            "make_second_teacher.py",
            "--tiles",
            tiles,
            "--out",
            folder,
            "--steps",
            2,
            "--batch-tiles",
            4,
            "--seed",
            seed,
        )
    model = timm.create_model(f"local-dir:{made[0]}", pretrained=True)
    assert model.forward_features(torch.zeros(1, 3, 112, 112)).shape == (1, 1 + 7 * 7, 256)
    names = [f"local-dir:{folder}" for folder in made]
    lines = run("agreement.py", "--models", *names, "--table", tiles / "labels.csv", "--split", "test").splitlines()
    test_rows = [line for line in (tiles / "labels.csv").read_text().splitlines() if line.endswith(",test")]
    assert lines[0].startswith(f"{len(test_rows)} tiles of labels.csv, split test")
    numbers = [[float(word) for word in line.split()[1:]] for line in lines[1:]]
    assert numbers[0][0] == numbers[1][1] == 1.0
    assert numbers[0][1] == numbers[1][0] < 1.0
