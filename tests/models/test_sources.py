from __future__ import annotations

import json
import shutil
import sys
import types

import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

from histill.errors import MissingExtraError, ModelError
from histill.models import STUDENTS, build_student, load_encoder, sources, write_bundle
from histill.models.sources import resolve
from histill.models.teachers import TEACHERS, TeacherSpec

HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "nano"
    model = build_student("vit-nano", seed=0)
    write_bundle(folder, model, STUDENTS["vit-nano"], mean=HALF, std=HALF, input_px=56, provenance={})
    return folder


@pytest.fixture
def bundle(written, tmp_path):
    return shutil.copytree(written, tmp_path / "nano")


def test_names_that_are_understood(bundle, monkeypatch):
    assert resolve("h-optimus-0").spec is TEACHERS["h-optimus-0"]
    assert resolve("h-optimus-0").prefix == "hf-hub"
    assert resolve("hf-hub:bioptimus/h0-mini").spec is TEACHERS["h0-mini"]  # the hub ignores case
    assert resolve("hf-hub:someone/else").spec is None
    assert resolve("timm:vit_small_patch14_reg4_dinov2.lvd142m").spec is TEACHERS["dinov2-s-reg4"]
    assert resolve("timm:vit_tiny_patch16_224").spec is None
    monkeypatch.chdir(bundle.parent)
    for name in (f"local-dir:{bundle}", str(bundle), "nano", "local-dir:nano", "./nano"):
        assert resolve(name).prefix == "local-dir"
        assert load_encoder(name).input_px == 56


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h-optimus-2", "h-optimus-1"),
        ("H-Optimus-0", "h-optimus-0"),
        ("nothing-like-it-42", "local-dir:FOLDER"),
        ("timm:vit_small_patch14_dinov3", "vit_small_patch14"),
        ("vit_tiny_patch16_224", "timm:vit_tiny_patch16_224"),
        ("bioptimus/H-optimus-0", "hf-hub:bioptimus/H-optimus-0 or local-dir:bioptimus/H-optimus-0"),
        ("hf:bioptimus/H-optimus-0", "hf-hub:"),
        ("timm:", "unknown prefix"),
        ("hf-hub:H-optimus-0", "hf-hub:ORG/NAME"),
        ("local-dir:/no/such/folder", "does not exist"),
        ("/no/such/folder", "does not exist"),
        ("timm:resnet18", "plain vision transformers"),
    ],
)
def test_names_that_are_not(name, message):
    with pytest.raises(ModelError, match=message):
        load_encoder(name)


def test_an_ambiguous_name_shows_both_spellings(bundle, monkeypatch):
    bundle.rename(bundle.parent / "uni")
    monkeypatch.chdir(bundle.parent)
    with pytest.raises(ModelError, match="hf-hub:MahmoodLab/UNI or local-dir:uni"):
        load_encoder("uni")
    assert load_encoder("local-dir:uni").embed_dim == 128


def test_a_run_folder_points_to_its_student(bundle, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"steps": 3}')
    bundle.rename(tmp_path / "run" / "student")
    with pytest.raises(ModelError, match="run/student"):
        load_encoder(f"local-dir:{tmp_path / 'run'}")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[]", "no JSON object"),
        ("config.json", '{"architecture": "vit_nano_of_mine"}', "lacks mean"),
        ("model.safetensors", None, "holds no weights"),
        ("model.safetensors", "", "damaged"),
        ("histill.json", "{", "not valid JSON"),
        ("histill.json", '{"embedding": "max"}', "unknown embedding"),
    ],
)
def test_damaged_folders_name_the_file(bundle, file, content, message):
    (bundle / file).unlink() if content is None else (bundle / file).write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        load_encoder(f"local-dir:{bundle}")
    assert str(bundle if content is None else bundle / file) in str(caught.value)


def test_cut_off_weights(bundle):
    path = bundle / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="damaged") as caught:
        load_encoder(f"local-dir:{bundle}")
    assert str(path) in str(caught.value)


def change(bundle, **model_args):
    path = bundle / "config.json"
    config = json.loads(path.read_text())
    config["model_args"] |= model_args
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("model_args", [{"depth": 5}, {"depth": 3}, {"embed_dim": 64}, {"no_such_argument": 1}])
def test_weights_that_do_not_fit(bundle, model_args):
    change(bundle, **model_args)
    with pytest.raises(ModelError, match="do not fit") as caught:
        load_encoder(f"local-dir:{bundle}")
    assert "model.safetensors" in str(caught.value)


def test_architecture_that_timm_lacks(bundle):
    config = json.loads((bundle / "config.json").read_text()) | {"architecture": "vit_small_patch14_reg5_dinov2"}
    (bundle / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="vit_small_patch14_reg4_dinov2"):
        load_encoder(f"local-dir:{bundle}")


@pytest.mark.parametrize(
    ("error", "message"),
    [(GatedRepoError, "hf auth login"), (RepositoryNotFoundError, "no such model"), (OSError, "could not be fetched")],
)
def test_a_hub_that_refuses(monkeypatch, error, message):
    def refuse(*args, **kwargs):
        raise error.__new__(error)

    monkeypatch.setattr(sources.timm.models, "load_model_config_from_hf", refuse)
    with pytest.raises(ModelError, match=message) as caught:
        load_encoder("h-optimus-0")
    assert "bioptimus/H-optimus-0" in str(caught.value)


TINY = {"img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2}


def tiny_spec(**changes):
    values = {
        "name": "tiny",
        "source": "hf-hub:me/tiny",
        "architecture": "vit_giant_patch14_reg4_dinov2",
        "model_args": {**TINY, "mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"},
        "input_px": 28,
        "patch_px": 14,
        "prefix_tokens": 5,
        "embed_dim": 32,
        "mean": HALF,
        "std": HALF,
        "embedding": "cls+mean",
        "licence": "MIT",
        "source_url": "https://example.org",
    }
    return TeacherSpec(**(values | changes))


def test_checkpoint_in_the_format_of_dinov2(monkeypatch, tmp_path):
    """A hub repository with nothing but a DINOv2 checkpoint, as OpenMidnight's."""
    model = timm.create_model("vit_giant_patch14_reg4_dinov2", num_classes=0, dynamic_img_size=True, **TINY).eval()
    torch.nn.init.normal_(model.cls_token)
    foreign = {"mask_token": torch.zeros(1, 32), "register_tokens": model.reg_token.detach()}
    position = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    for name, value in model.state_dict().items():
        if name not in ("reg_token", "cls_token", "pos_embed"):
            name = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
            foreign[name] = value
    foreign["cls_token"] = model.cls_token.detach() - position
    foreign["pos_embed"] = torch.cat([position, model.pos_embed.detach()], dim=1)
    torch.save(foreign, tmp_path / "teacher.pt")

    def download(repo, filename, **kwargs):
        if (repo, filename) == ("me/tiny", "teacher.pt"):
            return str(tmp_path / "teacher.pt")
        raise EntryNotFoundError.__new__(EntryNotFoundError)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda repo_id, filename, **kw: download(repo_id, filename))
    monkeypatch.setitem(TEACHERS, "tiny", tiny_spec(weights_file="teacher.pt"))
    encoder = load_encoder("tiny")
    images = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.forward_features((images - 0.5) / 0.5)
        torch.testing.assert_close(encoder(images).cls_BD, expected[:, 0])
        torch.testing.assert_close(encoder(images).patches_BHWD.flatten(1, 2), expected[:, 5:])
    assert (encoder.licence, encoder.embedding, encoder.embedding_dim) == ("MIT", "cls+mean", 64)


class FakeTransformer(torch.nn.Module):
    """Tokens that tell where they came from: 1 class token, 2 registers, then the mean of each patch."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(hidden_size=3, patch_size=2)
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, pixel_values):
        patches = torch.nn.functional.avg_pool2d(pixel_values, 2).flatten(2).transpose(1, 2)
        prefix = torch.tensor([7.0, 8.0, 9.0]).view(1, 3, 1).expand(len(patches), 3, 3)
        return types.SimpleNamespace(last_hidden_state=torch.cat([prefix, patches], dim=1) * self.weight)


@pytest.fixture
def fake_transformers(monkeypatch):
    asked = []

    def from_pretrained(name, *, trust_remote_code):
        asked.append((name, trust_remote_code))
        return FakeTransformer()

    module = types.ModuleType("transformers")
    module.AutoModel = types.SimpleNamespace(from_pretrained=from_pretrained)
    monkeypatch.setitem(sys.modules, "transformers", module)
    small = {"loader": "transformers", "embed_dim": 3, "patch_px": 2, "prefix_tokens": 3, "architecture": None}
    monkeypatch.setitem(TEACHERS, "tiny", tiny_spec(**small))
    monkeypatch.setitem(TEACHERS, "remote", tiny_spec(**small, name="remote", source="hf-hub:me/r", remote_code=True))
    monkeypatch.setitem(TEACHERS, "wide", tiny_spec(**{**small, "embed_dim": 4}, name="wide", source="hf-hub:me/w"))
    return asked


def test_teacher_of_transformers(fake_transformers):
    encoder = load_encoder("tiny")
    images = torch.rand(1, 3, 4, 6)
    tokens = encoder(images)
    assert torch.all(tokens.cls_BD == 7)
    expected = torch.nn.functional.avg_pool2d((images - 0.5) / 0.5, 2).permute(0, 2, 3, 1)
    torch.testing.assert_close(tokens.patches_BHWD, expected)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert fake_transformers == [("me/tiny", False)]


def test_remote_code_needs_consent(fake_transformers):
    with pytest.raises(ModelError, match="consent"):
        load_encoder("remote")
    assert fake_transformers == []
    load_encoder("remote", trust_remote_code=True)
    assert fake_transformers == [("me/r", True)]


def test_a_transformer_that_is_not_the_one_of_the_table(fake_transformers):
    with pytest.raises(ModelError, match="not the one of the table"):
        load_encoder("wide")


def test_transformers_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'histill\[hf\]'"):
        load_encoder("midnight-12k")
