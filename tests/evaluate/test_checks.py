from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import timm
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from histill.cli import main
from histill.distill.checking import Checker
from histill.errors import DataError
from histill.evaluate.checks import find_checks, kind_of, load_check
from histill.evaluate.probes import knn_probe, linear_probe
from histill.evaluate.results import read_result
from histill.evaluate.retrieval import paired_retrieval
from histill.models import load_encoder
from histill.tiles.images import ImageFolder


def write_csv(path: Path, header: str, rows: list[tuple]) -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n", encoding="utf-8")
    return path


def colours(images: torch.Tensor) -> torch.Tensor:
    """A model: mean and spread of the colours."""
    pixels = images.float().flatten(2)
    return torch.cat([pixels.mean(2), pixels.std(2)], dim=1)


def tile(seed: int, red: int, px: int = 24) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 60, size=(px, px, 3)) + np.array([red, 40, 90])
    return image.clip(0, 255).astype(np.uint8)


def labelled(folder: Path, header: str = "path,label,slide,split") -> tuple[Path, list[tuple]]:
    """Sixty tiles on ten slides; the class shows in the red channel."""
    (folder / "tiles").mkdir(parents=True)
    rows = []
    for i in range(60):
        label = "ab"[i % 2]
        name = f"tiles/{i}.jpg"
        image = tile(i, red=60 + 12 * (i % 2), px=24 if i % 3 else 32)
        (folder / name).write_bytes(simplejpeg.encode_jpeg(image, quality=95, colorsubsampling="444"))
        rows.append((name, label, f"s{i // 6}", "train" if i < 42 else "test"))
    return write_csv(folder / "labelled.csv", header, rows), rows


def paired(folder: Path) -> Path:
    (folder / "tiles").mkdir(parents=True)
    rows = []
    for i in range(12):
        for scanner in ("A", "B"):
            Image.fromarray(tile(i, red=10 * i + 3 * (scanner == "A"))).save(folder / f"tiles/{i}{scanner}.png")
            rows.append((f"tiles/{i}{scanner}.png", f"s{i // 6}", scanner, 24 * (i % 6), 0))
    return write_csv(folder / "paired.csv", "path,slide,scanner,x,y", rows)


def test_kind_is_told_by_the_columns(tmp_path):
    def of(header: str) -> str:
        return kind_of(write_csv(tmp_path / "t.csv", header, []))

    assert of("split,slide,label,path") == "labelled"
    assert of("path,slide,scanner,x,y") == "paired"
    assert of("path,label,slide,scanner,split,x,y") == "labelled"
    assert of("\ufeffpath,label,slide,split") == "labelled"  # as spreadsheets save it
    with pytest.raises(DataError, match=r"path, label, split\n(.|\n)*path,label,slide,split \(labelled\)"):
        of("path,label,split")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match="no columns"):
        kind_of(tmp_path / "empty.csv")
    with pytest.raises(DataError, match="does not exist"):
        kind_of(tmp_path / "none.csv")


def test_checks_are_found_directly_in_the_folder(tmp_path):
    labelled(tmp_path)
    write_csv(tmp_path / "a_paired.csv", "path,slide,scanner,x,y", [])
    write_csv(tmp_path / "other.csv", "name,value", [])
    (tmp_path / "latin.csv").write_bytes("größe,wert\n".encode("latin-1"))
    write_csv(tmp_path / "tiles" / "below.csv", "path,slide,scanner,x,y", [])
    (tmp_path / "folder.csv").mkdir()
    assert [path.name for path in find_checks(tmp_path)] == ["a_paired.csv", "labelled.csv"]


def test_tiles_are_decoded_and_resized_whole(tmp_path):
    path, rows = labelled(tmp_path)
    check = load_check(path, 14)
    assert check.images_NCHW.shape == (60, 3, 14, 14)
    assert check.images_NCHW.dtype == torch.uint8
    for i in (0, 1, 59):
        source = np.asarray(Image.open(tmp_path / rows[i][0]))
        expected = tv.resize(torch.from_numpy(source.copy()).permute(2, 0, 1).float(), [14, 14], antialias=True)
        assert (check.images_NCHW[i].float() - expected).abs().max() <= 2  # two JPEG decoders, one rounding
    assert check.columns["path"].tolist() == [row[0] for row in rows]
    assert check.unreadable == ()
    assert check.notes == ()


def test_features_go_batch_by_batch_without_gradients(tmp_path):
    check = load_check(labelled(tmp_path)[0], 14)
    sizes = []
    weight = torch.ones(1, requires_grad=True)

    def embed(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        assert images.dtype == torch.uint8
        out = (colours(images) * weight).to(torch.bfloat16)
        assert not out.requires_grad
        return out

    features = check.features(embed, batch=25)
    assert sizes == [25, 25, 10]
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, colours(check.images_NCHW), rtol=2**-8)
    with pytest.raises(DataError, match=r"shape \(25, 3, 14, 14\)"):
        check.features(lambda images: images, batch=25)
    with pytest.raises(DataError, match="59 rows, 60 tiles"):
        check.score(features[1:])


def test_labelled_scores_are_those_of_the_probes(tmp_path):
    path, rows = labelled(tmp_path)
    check = load_check(path, 14)
    features = check.features(colours)
    label, slide, split = (np.array([row[i] for row in rows]) for i in (1, 2, 3))
    data = (features[split == "train"], label[split == "train"], features[split == "test"], label[split == "test"])
    linear, knn = linear_probe(*data, train_groups_N=slide[split == "train"]), knn_probe(*data)
    scores = check.score(features)
    assert scores["linear_auc"] == linear.auc > 0.9
    assert scores["linear_balanced_accuracy"] == linear.balanced_accuracy
    assert (scores["knn_auc"], scores["knn_balanced_accuracy"]) == (knn.auc, knn.balanced_accuracy)
    assert scores["linear_auc_low"] <= scores["linear_auc"] <= scores["linear_auc_high"]
    assert check.score(features) == scores
    noise = check.score(np.random.default_rng(0).normal(size=features.shape))
    assert noise["linear_auc"] < 0.85


def test_val_tiles_are_neither_fitted_nor_scored(tmp_path):
    path, rows = labelled(tmp_path)
    rows = [(*row[:3], "val") if i in (40, 41, 58, 59) else row for i, row in enumerate(rows)]
    check = load_check(write_csv(path, "path,label,slide,split", rows), 14)
    features = check.features(colours)
    spoilt = features.copy()
    spoilt[[40, 41, 58, 59]] = 1e6
    assert check.score(spoilt) == check.score(features)


def test_one_test_slide_has_no_interval(tmp_path):
    path, rows = labelled(tmp_path)
    rows = [(*row[:2], "only" if row[3] == "test" else row[2], row[3]) for row in rows]
    check = load_check(write_csv(path, "path,label,slide,split", rows), 14)
    assert set(check.score(check.features(colours))) == {
        "linear_auc",
        "linear_balanced_accuracy",
        "knn_auc",
        "knn_balanced_accuracy",
    }


def test_paired_scores_are_those_of_retrieval(tmp_path):
    check = load_check(paired(tmp_path), 14)
    assert check.kind == "paired"
    features = check.features(colours)
    # the same x and y on two slides are two fields
    found = paired_retrieval(features, np.tile(["A", "B"], 12), np.repeat(np.arange(12), 2))
    assert check.score(features) == {"top_1": found.top_1, "top_10": found.top_10, "cosine": found.cosine}
    assert found.top_1 > 0.9


def test_unreadable_tiles_are_named_and_left_out(tmp_path):
    path, rows = labelled(tmp_path)
    damaged, missing, text = (tmp_path / rows[i][0] for i in (5, 17, 44))
    damaged.write_bytes(damaged.read_bytes()[:200])
    missing.unlink()
    text.write_text("not an image")
    check = load_check(path, 14)
    assert [tile.path for tile in check.unreadable] == ["tiles/5.jpg", "tiles/17.jpg", "tiles/44.jpg"]
    assert all(tile.reason for tile in check.unreadable)
    assert "No such file" in check.unreadable[1].reason
    assert check.notes == ("3 tiles unreadable and left out, first tiles/5.jpg",)
    kept = [i for i in range(60) if i not in (5, 17, 44)]
    assert check.columns["path"].tolist() == [rows[i][0] for i in kept]
    whole = load_check(labelled(tmp_path / "whole")[0], 14)
    torch.testing.assert_close(check.images_NCHW, whole.images_NCHW[kept])


def test_a_slide_on_both_sides_is_noted(tmp_path):
    path, rows = labelled(tmp_path)
    rows[-1] = (*rows[-1][:2], "s0", "test")
    check = load_check(write_csv(path, "path,label,slide,split", rows), 14)
    assert check.notes == ("1 slides are in train and test, first s0: scores are inflated",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [(r[0], "a", *r[2:]) if r[3] == "train" else r for r in rows], "train: a; test: a, b"),
        (lambda rows: [(r[0], "a", *r[2:]) if r[3] == "test" else r for r in rows], "test: a"),
        (lambda rows: [(*r[:3], "train") for r in rows], "two classes among the test tiles"),
        (lambda rows: rows[:10] + rows[42:], "at least 20 training tiles"),
        (lambda rows: [(*r[:2], "s0", r[3]) if r[3] == "train" else r for r in rows], "cannot be split(.|\n)*1 slides"),
        (lambda rows: [(*r[:2], "", r[3]) if i == 7 else r for i, r in enumerate(rows)], "line 9"),
        (lambda rows: [(*r[:3], "dev") if i == 7 else r for i, r in enumerate(rows)], "dev(.|\n)*train, val, test"),
        (lambda rows: [r[:3] if i == 7 else r for i, r in enumerate(rows)], "line 9"),
        (lambda rows: [(f"gone/{r[0]}", *r[1:]) for r in rows], "none of the 60 tiles(.|\n)*relative to"),
        (lambda rows: [], "no rows"),
    ],
)
def test_labelled_tables_that_cannot_be_scored(tmp_path, change, message):
    path, rows = labelled(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        load_check(write_csv(path, "path,label,slide,split", change(rows)), 14)
    assert "labelled.csv" in str(error.value)


def test_paired_tables_that_cannot_be_scored(tmp_path):
    path = paired(tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[1]]))
    with pytest.raises(DataError, match="one field twice"):
        load_check(path, 14)
    path.write_text("\n".join([lines[0], *(line for line in lines[1:] if ",A," in line)]))
    with pytest.raises(DataError, match="two scanners"):
        load_check(path, 14)


# ------------------------------------------------------------------ the same code as histill evaluate


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("patients", [False, True])
def test_a_training_logs_the_numbers_of_the_command(tmp_path, bundle, precision, patients):
    labels, rows = labelled(tmp_path / "labelled")
    if patients:  # two slides each: other clusters for the interval and for the choice of the strength
        rows = [(*row, f"p{i // 12}" if row[3] == "train" else f"q{i % 3}") for i, row in enumerate(rows)]
        write_csv(labels, "path,label,slide,split,patient", rows)
    fields = paired(tmp_path / "paired")
    (tmp_path / "labelled" / "tiles" / "3.jpg").write_bytes(b"no picture")
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16")
    source = ImageFolder.scan(tmp_path / "paired")
    checker = Checker((labels, fields), source, image_px=28, agreement_tiles=4, autocast=autocast)
    logged = checker.scores(load_encoder(bundle, input_px=28))
    options = ["--encoder", bundle, "--out", str(tmp_path / "out"), "--pooling", "cls", "--input-px", "28"]
    for benchmark, table in (("tiles", labels), ("paired", fields)):
        command = [benchmark, *options, "--precision", precision, "--device", "cpu", "--batch", "7"]
        assert main(["evaluate", *command, "--table", str(table)]) == 0
        (folder,) = (tmp_path / "out" / benchmark).iterdir()
        found = {score.name: score for score in read_result(folder).scores}
        for name, value in logged[table.stem].items():
            metric, _, end = name.partition("_auc_")
            told = getattr(found[f"{metric}_auc"], end) if end else found[name].value
            assert value == pytest.approx(told, abs=1e-12), name
    assert {"linear_auc_low", "linear_auc_high", "knn_balanced_accuracy"} < set(logged["labelled"])
    assert set(logged["paired"]) == {"top_1", "top_10", "cosine"}
    (encoder,) = (tmp_path / "out" / "tiles").iterdir()
    for note in checker.notes():
        assert note.removeprefix("labelled: ") in read_result(encoder).scores[0].note


@pytest.fixture(scope="module")
def networks(shared_data):
    """The real teacher, and its architecture at a random start; both give raw class tokens."""
    folder = f"local-dir:{shared_data / 'teacher-vits14'}"
    teacher = timm.create_model(folder, pretrained=True).eval().float()
    torch.manual_seed(0)
    untrained = timm.create_model(folder, pretrained=False).eval()
    mean, std = (torch.tensor(teacher.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))

    def embedder(model):
        return lambda images: model.forward_features((images.float() / 255 - mean) / std)[:, 0]

    return embedder(teacher), embedder(untrained)


def test_a_real_teacher_finds_fields_of_other_scanners(shared_data, tmp_path, networks):
    with (shared_data / "tiles" / "multiscanner.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["slide"] == "563479" and row["scanner"] != "AxioScan"]
    kept = [row for row in rows if row["scanner"] != "NanoZoomer2.0HT"]
    table = [(shared_data / "tiles" / r["path"], r["slide"], r["scanner"], r["x"], r["y"]) for r in kept]
    check = load_check(write_csv(tmp_path / "two.csv", "path,slide,scanner,x,y", table), 70)
    assert len(check.images_NCHW) == 74
    teacher, untrained = (check.score(check.features(embed)) for embed in networks)
    assert teacher["top_10"] > 0.5
    assert teacher["top_1"] > untrained["top_1"] + 0.1
    assert untrained["top_10"] < 0.3


@pytest.mark.slow
def test_starting_points_on_real_tiles(shared_data, networks):
    """The numbers that docs quote: at 112 px, raw class token."""
    paired_check = load_check(shared_data / "tiles" / "multiscanner.csv", 112)
    found = paired_check.score(paired_check.features(networks[0]))
    assert found == pytest.approx({"top_1": 0.578, "top_10": 0.760, "cosine": 0.977}, abs=0.01)
    labelled_check = load_check(shared_data / "tiles" / "mitosis.csv", 112)
    assert labelled_check.notes == ()
    scores = labelled_check.score(labelled_check.features(networks[0]))
    assert scores["linear_auc"] == pytest.approx(0.696, abs=0.01)


def test_a_table_that_cannot_be_opened_is_an_error_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may mark tiles as test tiles; only what is no CSV at all is passed over."""
    (tmp_path / "labels.csv").write_text("path,label,slide,split\n")
    (tmp_path / "notes.csv").write_text('a,"' + "x" * 200_000)
    assert [path.name for path in find_checks(tmp_path)] == ["labels.csv"]

    def refuse(*arguments: object, **options: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="cannot be read"):
        find_checks(tmp_path)
