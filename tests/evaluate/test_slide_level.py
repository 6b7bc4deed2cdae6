"""Slides and labels to a cross-validated area: folds, both classifiers, resume, refusals, the saved classifier."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from histill.cli import main
from histill.errors import ConfigError, DataError
from histill.evaluate.areas import RocArea
from histill.evaluate.config import TilesConfig
from histill.evaluate.eva.mil import MilSchedule, attention_mil, class_scores, refit_mil, start_mil
from histill.evaluate.results import read_result
from histill.evaluate.slide_features import read_labels, tiles_of
from histill.evaluate.slide_folds import folds_of
from histill.evaluate.slide_head import SlideHead, read_head
from histill.evaluate.statistics import draws, paired_test

DIM = 8
PROVENANCE = {"model": "RUN/student", "model_hash": "a" * 64, "embedding": "cls", "tile_px": 224}


def write_slide_features(path: Path, features: np.ndarray, provenance: dict[str, Any] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = features.astype(np.float32)
        file["coords"] = np.zeros((len(features), 2), np.int64)
        file.attrs.update(PROVENANCE if provenance is None else provenance)


def write_labels(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def cohort(folder: Path, *, patients: int = 12, classes: int = 2, seed: int = 0, strength: float = 4.0) -> Path:
    """Two slides a patient; a quarter of a slide's tiles carry its class in one column. Returns the table."""
    rng, rows = np.random.default_rng(seed), []
    for patient in range(patients):
        label = patient % classes
        for side in "ab":
            features = rng.standard_normal((int(rng.integers(4, 13)), DIM))
            features[: len(features) // 4 + 1, label] += strength
            slide = f"s{patient:02d}{side}"
            write_slide_features(folder / "F" / "features" / f"{slide}.h5", features)
            rows.append({"slide": slide, "label": f"class{label}", "patient": f"p{patient:02d}"})
    return write_labels(folder / "labels.csv", rows)


def arguments(folder: Path, *options: str, out: str = "OUT") -> list[str]:
    fixed = ["evaluate", "tiles", "--level", "slide", "--device", "cpu"]
    places = ["--features", str(folder / "F"), "--table", str(folder / "labels.csv"), "--out", str(folder / out)]
    return [*fixed, *places, "--folds", "3", "--runs", "2", *options]


def result_folder(folder: Path, out: str = "OUT") -> Path:
    return folder / out / "tiles" / "RUN_student__cls" / "slide"


def predictions(folder: Path) -> list[dict[str, str]]:
    with (result_folder(folder) / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    cohort(folder)
    assert main(arguments(folder, "--embeddings")) == 0
    return folder


# ------------------------------------------------------------------ what comes out


def test_the_scores_are_those_of_the_predictions(done: Path) -> None:
    result, rows = read_result(result_folder(done)), predictions(done)
    scores = {score.name: score for score in result.scores}
    assert result.headline == "abmil_auc"
    assert len(rows) == len({row["slide"] for row in rows}) == 24
    for kind in ("mean", "abmil"):
        positive = [float(row[f"{kind}_class1"]) for row in rows]
        truth = [row["label"] == "class1" for row in rows]
        assert scores[f"{kind}_auc_pooled"].value == pytest.approx(roc_auc_score(truth, positive), abs=1e-9)
        won, pairs = 0.0, 0
        for one, p in zip(rows, positive, strict=True):
            for other, q in zip(rows, positive, strict=True):
                if (one["label"], other["label"]) == ("class1", "class0") and one["fold"] == other["fold"]:
                    won, pairs = won + (p > q) + (p == q) / 2, pairs + 1
        assert scores[f"{kind}_auc"].value == pytest.approx(won / pairs, abs=1e-9)
        assert scores[f"{kind}_auc"].value > 0.8
        assert scores[f"{kind}_auc"].low <= scores[f"{kind}_auc"].value <= scores[f"{kind}_auc"].high
        recall = [np.mean([(p > 0.5) == t for p, t in zip(positive, truth, strict=True) if t == k]) for k in (0, 1)]
        assert scores[f"{kind}_balanced_accuracy"].value == pytest.approx(np.mean(recall))


def test_a_result_says_whose_features_and_which_settings(done: Path) -> None:
    result = read_result(result_folder(done))
    assert (result.encoder, result.pooling, result.weights) == ("RUN/student", "cls", "a" * 64)
    assert result.settings["folds"] == 3
    assert result.settings["level"] == "slide"
    assert result.data["seeds"] == [0, 1]
    assert result.data["clusters"] == "patient"
    assert result.data["schedule"]["epochs"] == 100


def test_the_report_shows_it_and_compares_two_encoders(tmp_path: Path, done: Path) -> None:
    cohort(tmp_path, seed=5, strength=1.0)
    for path in (tmp_path / "F" / "features").glob("*.h5"):
        with h5py.File(path, "a") as file:
            file.attrs["model"], file.attrs["model_hash"] = "RUN/other", "b" * 64
    assert main(arguments(tmp_path)) == 0
    page = tmp_path / "report.html"
    assert main(["report", str(done / "OUT"), str(tmp_path / "OUT"), "--out", str(page)]) == 0
    text = page.read_text()
    assert "abmil auc" in text
    assert "its results keep no sums by slide" not in text


def test_no_patient_is_trained_on_and_scored(tmp_path: Path) -> None:
    """Both slides of a patient have the same features and a label that means nothing: a leak would score 1."""
    rng, rows = np.random.default_rng(3), []
    for patient, label in enumerate(rng.permutation(np.arange(30) % 2)):
        features = 3 * rng.standard_normal((6, 40))
        for side in "ab":
            write_slide_features(tmp_path / "F" / f"s{patient:02d}{side}.h5", features)
            rows.append({"slide": f"s{patient:02d}{side}", "label": str(label), "patient": f"p{patient}"})
    write_labels(tmp_path / "labels.csv", rows)
    assert main(arguments(tmp_path, "--runs", "1")) == 0
    found = {score.name: score.value for score in read_result(result_folder(tmp_path)).scores}
    assert found["mean_auc"] < 0.8
    assert found["abmil_auc"] < 0.8
    fold = {row["slide"][:3]: set[str]() for row in predictions(tmp_path)}
    for row in predictions(tmp_path):
        fold[row["slide"][:3]].add(row["fold"])
    assert all(len(folds) == 1 for folds in fold.values())


def test_folds_part_fit_stop_and_test_by_patient(tmp_path: Path) -> None:
    table = read_labels(cohort(tmp_path))
    folds = folds_of(tmp_path / "labels.csv", table, 3)
    assert sorted(np.concatenate([fold.test for fold in folds]).tolist()) == list(range(24))
    for fold in folds:
        sides = [set(table.group_S[rows].tolist()) for rows in (fold.fit, fold.stop, fold.test)]
        assert sum(map(len, sides)) == len(set.union(*sides))
        assert all(len(set(table.label_S[rows].tolist())) == 2 for rows in (fold.fit, fold.stop, fold.test))


def test_a_split_of_the_table_is_kept_to(tmp_path: Path) -> None:
    path = cohort(tmp_path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        row["split"] = "val" if number < 4 else "test" if number >= 16 else "train"
    table = read_labels(write_labels(path, rows))
    (fold,) = folds_of(path, table, 5)
    assert (fold.fit.tolist(), fold.stop.tolist()) == (list(range(4, 16)), [0, 1, 2, 3])
    assert main(arguments(tmp_path)) == 0
    assert {row["slide"] for row in predictions(tmp_path)} == {row["slide"] for row in rows[16:]}


def test_three_classes_and_a_column_fold(tmp_path: Path) -> None:
    path = cohort(tmp_path, classes=3, patients=12)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows = [row | {"fold": "north" if int(row["patient"][1:]) < 6 else "south"} for row in rows]
    write_labels(path, rows)
    assert main(arguments(tmp_path)) == 0
    found, area = predictions(tmp_path), []
    assert {(row["slide"], row["fold"]) for row in found} == {(row["slide"], row["fold"]) for row in rows}
    for name in ("class0", "class1", "class2"):
        area.append(
            roc_auc_score([row["label"] == name for row in found], [float(row[f"mean_{name}"]) for row in found])
        )
    scores = {score.name: score.value for score in read_result(result_folder(tmp_path)).scores}
    assert scores["mean_auc_pooled"] == pytest.approx(np.mean(area), abs=1e-6)


def test_files_of_other_tools_are_named_by_their_encoder(tmp_path: Path) -> None:
    cohort(tmp_path)
    for path in (tmp_path / "F" / "features").glob("*.h5"):
        with h5py.File(path, "a") as file:
            for name in PROVENANCE:
                del file.attrs[name]
            file["features"].attrs["encoder"] = "uni_v2"
    assert main(arguments(tmp_path, "--runs", "1")) == 0
    assert read_result(tmp_path / "OUT" / "tiles" / "uni_v2__as-extracted" / "slide").encoder == "uni_v2"


# ------------------------------------------------------------------ the saved classifier


def test_the_saved_classifier_and_the_embeddings(done: Path) -> None:
    head = read_head(result_folder(done) / "abmil.safetensors")
    assert (head.classes, head.facts["weights"]) == (("class0", "class1"), "a" * 64)
    bags = [tiles_of(path) for path in sorted((done / "F" / "features").glob("*.h5"))]
    scores = head.predict(bags)
    assert scores.sum(axis=1) == pytest.approx(np.ones(24))
    assert np.mean((scores[:, 1] > 0.5) == (np.arange(24) // 2 % 2 == 1)) > 0.9
    with h5py.File(result_folder(done) / "embeddings.h5") as file:
        names = [name.decode() for name in file["slide"][:]]
        assert file["mean"][names.index("s03b")] == pytest.approx(bags[7].mean(axis=0), abs=1e-6)
        assert file["abmil"].shape == (24, 2, 128)
        hidden = bags[7] @ head.parameters["project.weight"][1].numpy() + head.parameters["project.bias"][1].numpy()
        torch_bag = torch.from_numpy(bags[7])[None, None].expand(2, -1, -1, -1)
        assert (
            attention_mil(head.parameters, torch_bag, torch.zeros(2, 1, len(bags[7]), dtype=torch.bool)).shape[2] == 1
        )
        low, high = hidden.min(axis=0), hidden.max(axis=0)
        assert ((file["abmil"][7, 1] >= low - 1e-5) & (file["abmil"][7, 1] <= high + 1e-5)).all()


def test_attention_is_where_the_class_is() -> None:
    rng, label = np.random.default_rng(0), np.arange(16) % 2
    bags = [rng.standard_normal((10, DIM)).astype(np.float32) for _ in label]
    for bag, k in zip(bags, label, strict=True):
        bag[:2, k] += 5
    parameters = refit_mil(bags, label, classes=2, seeds=(0, 1), schedule=MilSchedule(epochs=60))
    head = SlideHead(parameters=parameters, classes=("a", "b"), facts={})
    for bag in bags:
        weight = head.attention(bag)
        assert weight.sum() == pytest.approx(1.0, abs=1e-5)
        assert head.attention(bag[::-1]) == pytest.approx(weight[::-1], abs=1e-6)
        assert weight[:2].sum() > 0.3  # 0.2: as much as any tile


def test_scores_are_the_softmax_of_the_logits() -> None:
    bag = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    for classes in (2, 3):
        outputs = 1 if classes == 2 else classes
        parameters = start_mil(4, 6, outputs, MilSchedule())
        logits = attention_mil(parameters, torch.from_numpy(bag)[None, None], torch.zeros(1, 1, 5, dtype=torch.bool))
        expected = torch.softmax(logits[0, 0], 0) if classes == 3 else torch.sigmoid(logits[0, 0, 0])
        found = class_scores(parameters, [bag])[0, 0]
        assert (found if classes == 3 else found[1]) == pytest.approx(expected.numpy(), abs=1e-6)


def test_a_refit_goes_to_the_last_epoch() -> None:
    rng = np.random.default_rng(1)
    label = np.arange(8) % 2
    bags = [rng.standard_normal((4, 3)).astype(np.float32) + 2 * k for k in label]
    loss = []
    for epochs in (1, 20):
        parameters = refit_mil(bags, label, classes=2, seeds=(0,), schedule=MilSchedule(epochs=epochs))
        loss.append(-np.log(class_scores(parameters, bags)[0, np.arange(8), label]).mean())
    assert loss[1] < 0.5 * loss[0]


# ------------------------------------------------------------------ again, interrupted, changed


def test_the_same_command_again_trains_nothing(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    before = read_result(result_folder(done))
    for name in ("train_mil", "refit_mil", "fit_linear"):
        monkeypatch.setattr(f"histill.evaluate.slide_level.{name}", never)
    assert main(arguments(done)) == 0
    assert read_result(result_folder(done)).scores == before.scores


def test_a_killed_run_goes_on_with_the_next_fold(tmp_path: Path, done: Path, killed: Callable[..., None]) -> None:
    cohort(tmp_path)
    killed(arguments(tmp_path), r"abmil-fold-1", 1)
    parts = result_folder(tmp_path) / "parts"
    kept = {path.name: path.stat().st_mtime_ns for path in parts.glob("[!.]*.json")}
    assert sorted(name.split("-")[0] for name in kept) == ["abmil", "mean", "mean", "mean"]
    assert main(arguments(tmp_path)) == 0
    assert {name: (parts / name).stat().st_mtime_ns for name in kept} == kept
    assert read_result(result_folder(tmp_path)).scores == read_result(result_folder(done)).scores


def test_another_label_is_another_result(tmp_path: Path) -> None:
    path = cohort(tmp_path)
    assert main(arguments(tmp_path, "--runs", "1")) == 0
    first, head = read_result(result_folder(tmp_path)), read_head(result_folder(tmp_path) / "abmil.safetensors")
    text = path.read_text().replace("s00a,class0", "s00a,class1")
    path.write_text(text)
    assert main(arguments(tmp_path, "--runs", "1")) == 0
    assert read_result(result_folder(tmp_path)).scores != first.scores
    assert read_head(result_folder(tmp_path) / "abmil.safetensors").facts["key"] != head.facts["key"]


# ------------------------------------------------------------------ the area as a measure


def test_an_area_of_counts_is_that_of_repeated_slides() -> None:
    rng = np.random.default_rng(2)
    group = np.repeat([f"g{n}" for n in range(7)], 3)
    label = rng.permutation(np.arange(21) % 3)
    scores = rng.random((21, 3)).round(1)  # with ties
    area = RocArea.of(label, scores, (0, 1, 2), group)
    drawn = draws(7, resamples=20, seed=4)
    for counts, value in zip(drawn, area.values(drawn), strict=True):
        rows = np.concatenate([np.flatnonzero(group == f"g{n}") for n in range(7) for _ in range(int(counts[n]))])
        present = [k for k in range(3) if 0 < (label[rows] == k).sum() < len(rows)]
        expected = np.mean([roc_auc_score(label[rows] == k, scores[rows, k]) for k in present])
        assert value == pytest.approx(expected)


def test_a_paired_test_of_areas_sees_a_better_encoder() -> None:
    rng = np.random.default_rng(6)
    label, group = np.arange(60) % 2, np.arange(60)
    good, bad = label + rng.normal(0, 0.4, 60), label * 0.2 + rng.normal(0, 1, 60)
    areas = [RocArea.of(label, np.stack([-score, score], axis=1), (0, 1), group) for score in (good, bad)]
    found = paired_test(*areas)
    assert found.low is not None
    assert found.low > 0
    assert found.p < 0.05


# ------------------------------------------------------------------ refusals


def damaged(folder: Path, how: str) -> None:
    place, table = folder / "F" / "features", folder / "labels.csv"
    match how:
        case "missing":
            (place / "s03a.h5").unlink()
        case "one class":
            table.write_text(table.read_text().replace("class1", "class0"))
        case "two encoders":
            with h5py.File(place / "s03a.h5", "a") as file:
                file.attrs["model_hash"] = "c" * 64
        case "not finite":
            with h5py.File(place / "s03a.h5", "a") as file:
                file["features"][1, 2] = np.nan
        case "no tiles":
            write_slide_features(place / "s03a.h5", np.zeros((0, DIM)))
        case "torn":
            data = (place / "s03a.h5").read_bytes()
            (place / "s03a.h5").write_bytes(data[: len(data) // 2])
        case "twice":
            table.write_text(table.read_text() + "s00a,class0,p00\n")
        case "few patients":
            kept = [line for line in table.read_text().splitlines() if "class1" not in line or "p01" in line]
            table.write_text("\n".join(kept) + "\n")
        case "thin fold":
            lines = table.read_text().splitlines()
            rows = [f"{line},{'x' if 'p01' in line or 'p02' in line else 'y'}" for line in lines[1:]]
            table.write_text("\n".join([lines[0] + ",fold", *rows]) + "\n")
        case "empty":
            table.write_text(table.read_text().replace("s03a,class1,p03", "s03a,,p03"))
        case "both":
            lines = table.read_text().splitlines()
            table.write_text("\n".join([lines[0] + ",fold,split", *(f"{line},1,train" for line in lines[1:])]) + "\n")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "1 slides of the table have no features"),
        ("one class", "needs two classes"),
        ("two encoders", "features of two kinds"),
        ("not finite", "features are not finite"),
        ("no tiles", "a slide has no tiles"),
        ("torn", "this feature file is damaged"),
        ("twice", "stands in the table twice"),
        ("few patients", "3 folds with every class in each of them cannot be made"),
        ("thin fold", "trains on fewer than 2 patients of a class"),
        ("empty", "the column label has empty fields"),
        ("both", "a fold or a split, not both"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, how: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    cohort(tmp_path, patients=8)
    damaged(tmp_path, how)
    assert main(arguments(tmp_path)) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "OUT" / "tiles").exists() or not list((tmp_path / "OUT").rglob("results.json"))


def test_a_patient_in_two_folds_is_told(tmp_path: Path) -> None:
    path = cohort(tmp_path)
    lines = path.read_text().splitlines()
    rows = [f"{line},{number % 2}" for number, line in enumerate(lines[1:])]
    path.write_text("\n".join([lines[0] + ",fold", *rows]) + "\n")
    assert main(arguments(tmp_path, "--runs", "1")) == 0
    assert "12 patients in training and test" in (read_result(result_folder(tmp_path)).scores[0].note or "")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"level": "slide", "encoder": ("a",), "features": Path("F"), "table": Path("t")}, "an encoder is given too"),
        ({"level": "slide", "table": Path("t")}, "the folder that histill extract wrote is needed"),
        ({"level": "slide", "features": Path("F"), "table": Path("t"), "pooling": ("cls",)}, "cannot change"),
        ({"encoder": ("a",), "table": Path("t"), "features": Path("F")}, "for slides"),
        ({"encoder": ("a",), "table": Path("t"), "runs": 3}, "for slides"),
    ],
)
def test_options_of_the_other_level_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TilesConfig(out=Path("o"), **options).require_complete()


def test_a_damaged_classifier_is_refused(tmp_path: Path, done: Path) -> None:
    whole = (result_folder(done) / "abmil.safetensors").read_bytes()
    (tmp_path / "head.safetensors").write_bytes(whole[:-100])
    with pytest.raises(DataError, match="damaged"):
        read_head(tmp_path / "head.safetensors")
    with pytest.raises(DataError, match="do not fit"):
        read_head(result_folder(done) / "abmil.safetensors").predict([np.zeros((3, DIM + 1), np.float32)])


def test_larger_slides_give_the_networks_a_draw(tmp_path: Path) -> None:
    cohort(tmp_path)
    assert main(arguments(tmp_path, "--runs", "1", "--max-tiles", "3")) == 0
    result = read_result(result_folder(tmp_path))
    assert "of 24 slides abmil saw 3 drawn tiles" in (result.scores[0].note or "")
    part = next((result_folder(tmp_path) / "parts").glob("abmil-fold-0-*.json"))
    assert set(json.loads(part.read_text())["decides"]["tiles"]) == {3}
