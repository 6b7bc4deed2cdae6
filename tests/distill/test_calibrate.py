"""`histill calibrate` on a finished bundle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from histill.cli import main
from histill.distill.checking import held_out_paths, sample_tiles
from histill.models import read_bundle
from histill.tiles.images import ImageFolder


def calibrate(bundle: Path, tiles: Path, out: Path, *more: str) -> int:
    return main(["calibrate", "--bundle", str(bundle), "--tiles", str(tiles), "--out", str(out), *more])


@pytest.fixture(scope="module")
def calibrated(small_teacher: Path, small_tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "bundle"
    assert calibrate(small_teacher, small_tiles, out) == 0
    return out


def test_class_tokens_are_standardised_on_the_tiles(calibrated: Path, small_teacher: Path, small_tiles: Path) -> None:
    held_out = held_out_paths(small_tiles, (small_tiles / "labels.csv",))
    tiles = sample_tiles(ImageFolder.scan(small_tiles, hold_out=held_out), 1000, 56)
    with torch.no_grad():
        after, before = (read_bundle(folder).encoder(tiles).cls_BD for folder in (calibrated, small_teacher))
    torch.testing.assert_close(after.mean(0), torch.zeros(after.shape[1]), rtol=0, atol=1e-3)
    torch.testing.assert_close(after.std(0, unbiased=False), torch.ones(after.shape[1]), rtol=1e-3, atol=0)
    expected = (before - before.mean(0)) / before.std(0, unbiased=False)
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-3)


def test_report_keeps_both_scores_and_the_probe_does_not_change(calibrated: Path, small_teacher: Path) -> None:
    report = read_bundle(calibrated).provenance["calibration"]
    before, after = report["before"], report["after"]
    assert set(before) == set(after) == {"labels", "paired"}
    assert all(1 < rank <= 192 for rank in report["effective_rank"])
    assert after["labels"]["linear_auc"] == pytest.approx(before["labels"]["linear_auc"], abs=1e-3)
    assert after["paired"]["cosine"] < before["paired"]["cosine"]
    assert "calibration" not in read_bundle(small_teacher).provenance


def test_refusals(
    calibrated: Path, small_teacher: Path, small_tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        ((calibrated, small_tiles, tmp_path / "o"), "calibrated already"),
        ((small_teacher, small_tiles, small_teacher), "replace the old one"),
        ((small_teacher, tmp_path / "nowhere", tmp_path / "o"), "does not exist"),
        ((tmp_path / "nowhere", small_tiles, tmp_path / "o"), "nowhere"),
    ):
        assert calibrate(*arguments) == 1
        assert words in capsys.readouterr().err.replace("\n", " ")
    assert main(["calibrate", "--bundle", str(small_teacher), "--tiles", str(small_tiles)]) == 1
    assert "--out" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
