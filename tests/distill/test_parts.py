from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from histill.distill.average import average_of, update_average
from histill.distill.checking import held_out_paths
from histill.distill.config import DistillConfig
from histill.distill.parts import build, resolve_views
from histill.distill.views.config import ViewConfig
from histill.errors import ConfigError
from histill.models import build_student, wrap
from histill.tiles.images import ImageFolder


@pytest.mark.parametrize(
    ("tile_px", "teacher_px", "expected"),
    [(128, 518, (112, 56)), (224, 224, (224, 98)), (512, 224, (224, 98)), (256, 518, (224, 98)), (20, 224, (28, 14))],
)
def test_sizes_of_views_follow_tiles_and_teacher(
    tmp_path: Path, tile_px: int, teacher_px: int, expected: tuple[int, int]
) -> None:
    Image.fromarray(np.zeros((tile_px, tile_px + 30, 3), np.uint8)).save(tmp_path / "t.png")
    views = resolve_views(DistillConfig(), ImageFolder.scan(tmp_path), teacher_px, 14).views
    assert (views.global_px, views.local_px) == expected


def test_a_crop_must_divide_into_patches(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "t.png")
    config = DistillConfig(views=ViewConfig(global_px=100))
    with pytest.raises(ConfigError, match="multiple of 14"):
        resolve_views(config, ImageFolder.scan(tmp_path), 224, 14)


@pytest.mark.parametrize("written", ["relative", "absolute", "through a link"])
def test_held_out_tiles_are_found_however_a_table_names_them(tmp_path: Path, written: str) -> None:
    tiles, tables = tmp_path / "tiles" / "a", tmp_path / "tables"
    for folder in (tiles, tables):
        folder.mkdir(parents=True)
    for name in ("1.png", "2.png"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tiles / name)
    (tmp_path / "link").symlink_to(tmp_path / "tiles")
    prefix = {"relative": "../tiles/a", "absolute": str(tiles), "through a link": "../tiles/a"}[written]
    root = tmp_path / ("link" if written == "through a link" else "tiles")
    (tables / "t.csv").write_text(f"path,label,slide,split\n{prefix}/1.png,x,s,test\n{prefix}/2.png,y,t,train\n")
    held_out = held_out_paths(root, (tables / "t.csv",))
    assert ImageFolder.scan(root, hold_out=held_out).paths == ("a/2.png",)
    assert ImageFolder.scan(root, table=tables / "t.csv").paths == ("a/1.png", "a/2.png")


def test_weight_decay_spares_biases_norms_and_layer_scales(
    small_teacher: Path, small_tiles: Path, tmp_path: Path
) -> None:
    config = DistillConfig(
        teacher=(f"local-dir:{small_teacher}",), student=("vit-nano",), tiles=small_tiles, out=tmp_path, batch_tiles=8
    )
    learner = build(config, tmp_path).learners[0]
    decaying = {
        id(parameter) for group in learner.optimiser.param_groups if group["decays"] for parameter in group["params"]
    }
    for name, parameter in learner.student.named_parameters():
        spared = name.endswith(("bias", "gamma", "norm.weight", "norm1.weight", "norm2.weight"))
        assert (id(parameter) in decaying) == (not spared), name
    last = [
        parameter for group in learner.optimiser.param_groups if group["last_layer"] for parameter in group["params"]
    ]
    assert {id(parameter) for parameter in last} == {id(parameter) for parameter in learner.lesson.task.last_layers()}
    assert len(last) == 2


def test_average_moves_by_its_momentum_and_stays_frozen() -> None:
    student = wrap(build_student("vit-nano", seed=0), name="s", mean=(0.5,) * 3, std=(0.5,) * 3)
    average = average_of(student)
    before = {name: value.clone() for name, value in average.state_dict().items()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    update_average(average, student, 0.9)
    for name, value in average.state_dict().items():
        torch.testing.assert_close(value, before[name] + 0.1, rtol=1e-5, atol=1e-6)
    assert not average.training
    assert not any(parameter.requires_grad for parameter in average.parameters())
