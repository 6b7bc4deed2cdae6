"""Scores into the card of the bundle that they were measured on, and of no other."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from histill import cli, files
from histill.errors import ModelError
from histill.evaluate.results import Result, Score, write_result
from histill.models import STUDENTS, build_student, load_encoder, read_bundle, write_bundle
from histill.models.bundle import write_benchmarks
from histill.models.card import with_benchmarks


def bundle_of(folder: Path, seed: int = 0) -> Path:
    style = {"mean": (0.7, 0.58, 0.7), "std": (0.21, 0.23, 0.18)}
    provenance = {"metrics": {"knn": 0.75}}
    model = build_student("vit-nano", seed=seed)
    write_bundle(folder, model, STUDENTS["vit-nano"], **style, input_px=56, provenance=provenance, licence="MIT")
    return folder


def scored(out: Path, weights: str, *, value: float | None = 0.4, pooling: str = "cls", encoder: str = "RUN") -> Path:
    result = Result(
        benchmark="hest",
        encoder=encoder,
        encoder_key="k",
        pooling=pooling,
        headline="pearson",
        scores=(Score(name="pearson", value=value, low=0.35, high=0.45, note="mean over 1 of 9 tasks | IDC"),),
        data={"root": "/home/someone/hest", "tasks": ["IDC"]},
        weights=weights,
        date="2026-03-04",
        settings={"input_px": 56, "precision": "fp32"},
    )
    write_result(result, out / "hest" / f"{encoder}__{pooling}")
    return out


def report(out: Path, bundle: Path) -> int:
    return cli.main(["report", str(out), "--out", str(out.parent / "page.html"), "--card", str(bundle)])


def test_scores_stand_in_card_and_record_once(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "student")
    weights = load_encoder(str(bundle)).content_hash()
    out = scored(tmp_path / "out", weights)
    scored(out, weights, value=None, pooling="cls+mean")
    scored(out, "f" * 64, value=0.9, encoder="teacher")
    before = (bundle / "README.md").read_text()
    assert report(out, bundle) == 0
    text = (bundle / "README.md").read_text()
    data = "hest, IDC, 56 px, fp32"
    assert f"| HEST | {data} | cls | pearson | 0.4000 | 0.3500 to 0.4500 | 2026-03-04 |" in text
    assert f"| HEST | {data} | cls+mean | pearson | not defined |" in text
    assert "0.9000" not in text  # the teacher's
    assert "/home/someone" not in text
    assert before.split("---\n", 2)[2].strip() in text  # the rest of the card stays
    head = ModelCard(text).data
    assert (head.license, head.library_name, head.model_name) == ("mit", "timm", "student")
    (entry,) = head.eval_results
    assert (entry.dataset_name, entry.dataset_config, entry.metric_value) == ("HEST", data, 0.4)
    assert entry.metric_args["low"] == 0.35
    metrics = files.read_json(bundle / "histill.json")["metrics"]
    assert metrics["knn"] == 0.75
    assert [(row["pooling"], row["value"]) for row in metrics["benchmarks"]] == [("cls", 0.4), ("cls+mean", None)]
    assert read_bundle(bundle).encoder.content_hash() == weights

    assert report(out, bundle) == 0
    assert (bundle / "README.md").read_text() == text
    scored(out, weights, value=0.5)
    assert report(out, bundle) == 0
    text = (bundle / "README.md").read_text()
    assert "0.4000" not in text
    assert text.count("## Benchmarks") == 1
    assert [each.metric_value for each in ModelCard(text).data.eval_results] == [0.5]


def test_another_bundle_is_refused_with_both_hashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (bundle_of(tmp_path / f"b{seed}", seed) for seed in (1, 2))
    hashes = [load_encoder(str(each)).content_hash() for each in (first, second)]
    out = scored(tmp_path / "out", hashes[0])
    before = {path.name: path.read_bytes() for path in second.iterdir()}
    assert report(out, second) == 1
    told = capsys.readouterr().err
    assert all(each in told for each in hashes)
    assert {path.name: path.read_bytes() for path in second.iterdir()} == before
    assert not (tmp_path / "page.html").exists()
    assert report(out, first) == 0


def test_two_results_of_one_score_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = bundle_of(tmp_path / "b")
    weights = load_encoder(str(bundle)).content_hash()
    out = scored(scored(tmp_path / "out", weights), weights, encoder="the same under another name")
    assert report(out, bundle) == 1
    assert "two results of the same score" in capsys.readouterr().err


ROW = {
    "benchmark": "PLISM",
    "data": "plism",
    "pooling": "cls",
    "score": "score",
    "value": 0.5,
    "low": None,
    "high": None,
    "note": None,
    "date": "2026-03-04",
    "histill": "1",
}


def test_what_others_wrote_stays() -> None:
    text = """---
license: mit
model-index:
- name: mine
  results:
  - task:
      type: image-classification
    dataset:
      name: Other
      type: other
    metrics:
    - type: accuracy
      value: 0.9
---

# Mine

Text before.
"""
    once = with_benchmarks(text, "n", [ROW])
    after = with_benchmarks(once + "\nText after.\n", "n", [ROW | {"value": 0.6}])
    assert after.index("Text before.") < after.index("0.6000") < after.index("Text after.")
    head = ModelCard(after).data
    assert head.model_name == "mine"
    assert [each.metric_value for each in head.eval_results] == [0.9, 0.6]
    assert "interval | date" in after


@pytest.mark.parametrize("damage", ["<!-- histill benchmarks: begin -->", "<!-- histill benchmarks: end -->"])
def test_a_damaged_card_is_named_and_left(tmp_path: Path, damage: str) -> None:
    bundle = bundle_of(tmp_path / "b")
    readme, record = bundle / "README.md", (bundle / "histill.json").read_bytes()
    readme.write_text(readme.read_text() + damage)
    with pytest.raises(ModelError, match=r"README\.md"):
        write_benchmarks(bundle, [ROW])
    readme.write_text("---\nlicense: [\n---\n")
    with pytest.raises(ModelError, match="YAML"):
        write_benchmarks(bundle, [ROW])
    assert (bundle / "histill.json").read_bytes() == record
    readme.unlink()
    write_benchmarks(bundle, [ROW])  # a card that is not there is written from the record
    assert "# b" in readme.read_text()


def test_a_plain_timm_folder_is_no_bundle(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path / "b")
    (bundle / "histill.json").unlink()
    with pytest.raises(ModelError, match="no bundle of histill"):
        write_benchmarks(bundle, [ROW])
