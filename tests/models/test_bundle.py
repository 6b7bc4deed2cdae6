from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from histill.errors import ModelError
from histill.models import STUDENTS, TEACHERS, build_student, load_encoder, read_bundle, wrap, write_bundle
from histill.models.bundle import teacher_record

MEAN, STD = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)

TIMM_ALONE = """
import sys, timm
from safetensors.torch import load_file, save_file
folder, images, out = sys.argv[1:]
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
cfg = model.pretrained_cfg
assert "histill" not in sys.modules
import torch
mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
with torch.no_grad():
    tokens = model.forward_features((load_file(images)["images"] - mean) / std)
    pooled = model(load_file(images)["images"])
save_file({"tokens": tokens, "pooled": pooled}, out)
"""


def write(folder, name="vit-nano", *, seed=0, **options):
    model = build_student(name, seed=seed).eval()
    options = {"mean": MEAN, "std": STD, "input_px": 224, "provenance": {}} | options
    write_bundle(folder, model, STUDENTS[name], **options)
    return model


@pytest.mark.parametrize("name", ["vit-tiny", "h0-mini"])
def test_timm_alone_opens_it(tmp_path, name):
    model = write(tmp_path / "student", name)
    images = torch.rand(1, 3, 98, 56, generator=torch.Generator().manual_seed(0))
    save_file({"images": images}, tmp_path / "images.safetensors")
    arguments = [str(tmp_path / part) for part in ("student", "images.safetensors", "out.safetensors")]
    environment = {"PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # no PYTHONPATH
    subprocess.run([sys.executable, "-c", TIMM_ALONE, *arguments], check=True, env=environment, cwd=tmp_path)
    got = load_file(tmp_path / "out.safetensors")
    with torch.no_grad():
        tokens = wrap(model, name="x", mean=MEAN, std=STD)(images)
    torch.testing.assert_close(got["tokens"][:, 0], tokens.cls_BD, atol=1e-5, rtol=0)
    torch.testing.assert_close(got["tokens"][:, 5:], tokens.patches_BHWD.flatten(1, 2), atol=1e-5, rtol=0)
    assert got["pooled"].shape == (1, STUDENTS[name].embed_dim)


def test_read_again(tmp_path):
    model = write(tmp_path / "b", input_px=56, embedding="cls+mean", licence="MIT", provenance={"config": {"lr": 0.1}})
    bundle = read_bundle(tmp_path / "b")
    encoder = bundle.encoder
    assert all(torch.equal(value, encoder.model.state_dict()[name]) for name, value in model.state_dict().items())
    assert (encoder.mean, encoder.std, encoder.input_px) == (MEAN, STD, 56)
    assert (encoder.embedding, encoder.licence) == ("cls+mean", "MIT")
    assert bundle.provenance["config"] == {"lr": 0.1}
    assert bundle.provenance["params"] == STUDENTS["vit-nano"].params
    assert bundle.provenance["content_hash"] == encoder.content_hash()
    assert (bundle.architecture, bundle.model_args) == (
        STUDENTS["vit-nano"].architecture,
        STUDENTS["vit-nano"].model_args,
    )


def test_a_bundle_describes_its_successor(tmp_path):
    write(tmp_path / "b")
    old = read_bundle(tmp_path / "b")
    write_bundle(tmp_path / "c", old.encoder.model, old, mean=MEAN, std=STD, input_px=224, provenance={})
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (tmp_path / "c" / "model.safetensors").read_bytes()


def test_the_real_teacher_as_a_bundle(shared_data, tmp_path):
    plain = read_bundle(shared_data / "teacher-vits14")
    assert plain.provenance == {}
    encoder = plain.encoder
    write_bundle(tmp_path / "t", encoder.model, plain, mean=encoder.mean, std=encoder.std, input_px=518, provenance={})
    again = read_bundle(tmp_path / "t").encoder
    images = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(images).cls_BD, encoder(images).cls_BD)
    assert again.content_hash() == encoder.content_hash()


def test_half_precision_is_stored_in_float32(tmp_path):
    model = build_student("vit-nano", seed=0).to(torch.bfloat16)
    write_bundle(tmp_path / "b", model, STUDENTS["vit-nano"], mean=MEAN, std=STD, input_px=224, provenance={})
    assert {tensor.dtype for tensor in load_file(tmp_path / "b" / "model.safetensors").values()} == {torch.float32}


def test_an_older_bundle_is_replaced_and_nothing_else_is(tmp_path):
    write(tmp_path / "b", seed=0)
    write(tmp_path / "b", seed=1)
    fresh = build_student("vit-nano", seed=1).state_dict()
    assert torch.equal(read_bundle(tmp_path / "b").encoder.model.state_dict()["cls_token"], fresh["cls_token"])
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "slide.svs").write_text("pixels")
    with pytest.raises(ModelError, match="not overwritten"):
        write(tmp_path / "precious")
    assert (tmp_path / "precious" / "slide.svs").read_text() == "pixels"
    (tmp_path / "precious" / "config.json").write_text('{"steps": 3}')  # a run
    with pytest.raises(ModelError, match="not overwritten"):
        write(tmp_path / "precious")
    assert {path.name for path in tmp_path.iterdir()} == {"b", "precious"}


def test_an_error_leaves_no_half_bundle(tmp_path):
    with pytest.raises(TypeError):
        write(tmp_path / "b", provenance={"config": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_description_of_another_model(tmp_path):
    model = build_student("vit-micro", seed=0)
    with pytest.raises(ModelError, match="not that of the model"):
        write_bundle(tmp_path / "b", model, STUDENTS["vit-nano"], mean=MEAN, std=STD, input_px=224, provenance={})
    assert not (tmp_path / "b").exists()


def teacher(name):
    spec = TEACHERS[name]
    return {"name": name, "licence": spec.licence, "derivatives": spec.derivatives, "source_url": spec.source_url}


def card(tmp_path, **options):
    write(tmp_path / "b", **options)
    text = (tmp_path / "b" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    return head.splitlines(), body


def test_card(tmp_path):
    provenance = {"teacher": teacher("h-optimus-0"), "metrics": {"probe AUC": 0.6543, "note": "x"}}
    head, body = card(tmp_path, provenance=provenance, licence="Apache-2.0", embedding="cls+mean")
    assert "license: apache-2.0" in head
    assert "library_name: timm" in head
    assert "- pathology" in head
    assert "WARNING" not in body
    assert "| teacher | h-optimus-0 |" in body
    assert "| licence of the teacher | Apache-2.0 |" in body
    assert "Embedding: **cls+mean**, the class token and the mean of the patch tokens, 256 numbers" in body
    assert "| probe AUC | 0.6543 |" in body
    assert "903,168" in body
    code = body.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert str(list(MEAN)) in code


def test_card_runs(tmp_path, monkeypatch):
    _, body = card(tmp_path, embedding="cls+mean", input_px=28)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with torch.no_grad():
        exec(body.split("```python\n")[1].split("```")[0], names)
        expected = load_encoder("local-dir:b").embed(names["images"])
    torch.testing.assert_close(names["embedding"], expected, atol=1e-5, rtol=0)


def test_card_says_loudly_that_the_teacher_forbids_derivatives(tmp_path):
    head, body = card(tmp_path, provenance={"teacher": teacher("virchow2")})
    assert "WARNING" in body
    assert "virchow2 (CC-BY-NC-ND-4.0) FORBIDS DERIVATIVES" in body
    assert "license: other" in head
    assert "license_name: not-stated" in head
    assert "its owner has not stated one yet" in body


def test_card_says_that_a_licence_is_unknown(tmp_path):
    _, body = card(tmp_path, provenance={"teacher": teacher("openmidnight")})
    assert "It is not known whether the licence of the teacher openmidnight allows derived works" in body


def test_own_card(tmp_path):
    write(tmp_path / "b", card="# mine\n")
    assert (tmp_path / "b" / "README.md").read_text() == "# mine\n"


@pytest.mark.parametrize(("licence", "derivatives"), [("MIT", True), ("own terms", None), (None, None)])
def test_teacher_record(tmp_path, licence, derivatives):
    write(tmp_path / "b", licence=licence)
    encoder = load_encoder(f"local-dir:{tmp_path / 'b'}")
    record = json.loads(json.dumps(teacher_record(encoder)))
    assert record["name"] == "b"  # no path of this machine on a public card
    assert record["licence"] == licence
    assert record["derivatives"] is derivatives
    assert record["content_hash"] == encoder.content_hash()
