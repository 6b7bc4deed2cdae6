from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard

from histill.errors import ConfigError, ModelError
from histill.export.command import run
from histill.export.hub import public_record
from histill.models.bundle import write_benchmarks

PRIVATE = {
    "teacher": "local-dir:/home/somebody/models/teacher",
    "student": "vit-nano",
    "tiles": "/data/hospital/tiles",
    "hold_out_slides": ["H-2024-000123", "H-2024-000124"],
}


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path):
    """No token and no network: nothing may leave, whatever the machine has."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_STORED_TOKENS_PATH", str(tmp_path / "no-tokens"))


def export(bundle, out, *more):
    return run([str(bundle), "--to", "hub", "--out", str(out), *more])


def test_the_folder(make_bundle, tmp_path):
    bundle = make_bundle(tmp_path / "nano", config=PRIVATE, metrics={"labels: linear_auc": 0.9123})
    row = {"benchmark": "EVA", "data": "bach", "pooling": "cls", "score": "balanced accuracy", "date": "2026-11-01"}
    write_benchmarks(bundle, [row | {"value": 0.8, "low": 0.75, "high": 0.85, "note": None, "histill": "0.1.0"}])
    assert export(bundle, tmp_path / "hub") == 0
    out = tmp_path / "hub"
    names = ["README.md", "config.json", "histill.json", "model.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert (out / "model.safetensors").read_bytes() == (bundle / "model.safetensors").read_bytes()
    for name in names[:3]:
        text = (out / name).read_text()
        assert not any(word in text for word in ("/home", "/data", "somebody/models", "H-2024", str(tmp_path))), name
    record = json.loads((out / "histill.json").read_text())
    assert record["config"] == {
        "teacher": "local-dir:teacher",
        "student": "vit-nano",
        "tiles": "tiles",
        "hold_out_slides": "2 slides",
    }
    assert record["licence"] == "MIT"
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "mit"
    assert card.data.eval_results[0].metric_value == 0.8
    for heading in ("Intended use", "Limits", "Training data", "Licence", "Benchmarks"):
        assert card.text.count(f"## {heading}\n") == 1
    assert "0.7500 to 0.8500" in card.text
    assert "inherited from the teacher" in card.text
    assert "| tiles | 11 |" in card.text
    assert json.loads((out / "config.json").read_text())["pretrained_cfg"]["license"] == "MIT"
    assert export(bundle, out) == 0, "a hub folder may be written again"


def test_without_benchmarks_the_card_says_so(bundle, tmp_path):
    export(bundle, tmp_path / "hub")
    assert "No benchmark was run" in (tmp_path / "hub" / "README.md").read_text()


def test_an_own_licence_stays(make_bundle, tmp_path):
    export(make_bundle(tmp_path / "nano", licence="Apache-2.0"), tmp_path / "hub")
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "Apache-2.0, chosen by its owner" in text
    assert "license: apache-2.0" in text


def test_links_are_no_paths():
    record = {"a": "https://x.org/y", "b": ["hf-hub:org/name", "~/x/y", "plain"], "c": {"d": "/a/b.csv", "e": 3}}
    assert public_record(record) == {
        "a": "https://x.org/y",
        "b": ["hf-hub:org/name", "y", "plain"],
        "c": {"d": "b.csv", "e": 3},
        "licence": None,
    }


@pytest.mark.parametrize("derivatives", [False, None])
def test_a_forbidding_licence_is_not_pushed(make_bundle, tmp_path, derivatives):
    teacher = {"name": "t", "licence": "CC-BY-NC-ND-4.0", "derivatives": derivatives}
    bundle = make_bundle(tmp_path / "nano", teacher=teacher)
    with pytest.raises(ModelError, match="not uploaded"):
        export(bundle, tmp_path / "hub", "--push", "org/name")
    assert not (tmp_path / "hub").exists()
    assert export(bundle, tmp_path / "hub") == 0
    assert "WARNING" in (tmp_path / "hub" / "README.md").read_text()


def test_one_forbidding_teacher_of_two_is_enough(make_bundle, tmp_path):
    second = {"name": "t2", "licence": "CC-BY-NC-ND-4.0", "derivatives": False}
    bundle = make_bundle(tmp_path / "nano", further_teachers=[second], config={"student": ["vit-nano", "vit-tiny"]})
    with pytest.raises(ModelError, match=r"MIT, CC-BY-NC-ND-4\.0"):
        export(bundle, tmp_path / "hub", "--push", "org/name")
    assert export(bundle, tmp_path / "hub") == 0
    text = (tmp_path / "hub" / "README.md").read_text()
    assert text.count("The licence of the teacher t2 (CC-BY-NC-ND-4.0) FORBIDS DERIVATIVES") == 2, "on top and below"
    assert "| teacher | t2 |" in text
    assert "This model: not stated." in text, "two licences: none is inherited"
    assert "| students of the run | vit-nano, vit-tiny |" in text


def test_no_token_no_upload(bundle, tmp_path):
    with pytest.raises(ConfigError, match="no token"):
        export(bundle, tmp_path / "hub", "--push", "org/name")
    assert not (tmp_path / "hub").exists()


def test_no_hub_no_upload(bundle, tmp_path, monkeypatch):
    """A real call that nobody answers: the folder stays."""
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    from huggingface_hub import HfApi

    monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9"))
    with pytest.raises(ConfigError, match=r"(?s)did not take the upload.*hf upload org/name"):
        export(bundle, tmp_path / "hub", "--push", "org/name")
    assert (tmp_path / "hub" / "README.md").is_file()


def test_other_weights_than_the_record_says(make_bundle, tmp_path):
    bundle, other = make_bundle(tmp_path / "nano"), make_bundle(tmp_path / "other", seed=1)
    (bundle / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="not those that histill"):
        export(bundle, tmp_path / "hub")


def test_a_plain_folder_has_no_origin(make_bundle, tmp_path):
    bundle = make_bundle(tmp_path / "nano")
    (bundle / "histill.json").unlink()
    with pytest.raises(ModelError, match="it has no histill"):
        export(bundle, tmp_path / "hub")


def test_another_bundle_is_never_replaced(make_bundle, tmp_path):
    bundle, other = make_bundle(tmp_path / "nano"), make_bundle(tmp_path / "other", seed=1)
    before = (other / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="holds something else"):
        export(bundle, other)
    assert (other / "model.safetensors").read_bytes() == before


def test_relative_paths_of_settings_are_cut_too():
    settings = {
        "tiles": "ward7/dr-miller/tiles",
        "checks": {"tables": ["ward7/a.csv"]},
        "labelled": ["ward7/dr-miller/cells.csv,column=label,weight=2.0"],
        "init": "local-dir:ward7/start",
        "optimiser": {"base_lr": 0.1},
    }
    shown = public_record({"config": settings})["config"]
    assert shown == {
        "tiles": "tiles",
        "checks": {"tables": ["a.csv"]},
        "labelled": ["cells.csv,column=label,weight=2.0"],
        "init": "local-dir:start",
        "optimiser": {"base_lr": 0.1},
    }


def test_the_card_says_the_scale(make_bundle, tmp_path):
    export(make_bundle(tmp_path / "nano", mpp=0.5), tmp_path / "hub")
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "at 0.5 microns per pixel" in text
    assert "| microns per pixel | 0.5 |" in text
