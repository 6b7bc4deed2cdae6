from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from histill.errors import DataError, ModelError
from histill.models import STUDENTS, build_student, load_encoder, tokens_of, wrap, write_bundle
from histill.models.known import known_of

MEAN, STD = (0.7, 0.58, 0.7), (0.21, 0.23, 0.18)


@pytest.fixture(scope="module")
def student():
    return build_student("vit-nano", seed=0).eval()


@pytest.fixture(scope="module")
def encoder(student):
    return wrap(student, name="nano", mean=MEAN, std=STD)


@pytest.fixture(scope="module")
def teacher(shared_data):
    return load_encoder(f"local-dir:{shared_data / 'teacher-vits14'}", input_px=112)


@pytest.fixture(scope="module")
def tiles(shared_data):
    paths = sorted((shared_data / "tiles" / "mitosis" / "normal").glob("*.jpg"))[:3]
    arrays = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)[:, :, :112, :112].contiguous()


def random_images(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_real_teacher_equals_plain_timm(shared_data, teacher, tiles):
    plain = timm.create_model(f"local-dir:{shared_data / 'teacher-vits14'}", pretrained=True).float().eval()
    cfg = plain.pretrained_cfg
    mean, std = torch.tensor(cfg["mean"]).view(3, 1, 1), torch.tensor(cfg["std"]).view(3, 1, 1)
    with torch.no_grad():
        expected = plain.forward_features((tiles / 255 - mean) / std)
        tokens = teacher(tiles)
    torch.testing.assert_close(tokens.cls_BD, expected[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.patches_BHWD.flatten(1, 2), expected[:, 1:], atol=1e-5, rtol=0)
    assert tokens.cls_BD.abs().mean() > 0.1  # real weights, not zeros


def test_real_teacher_knows_itself(teacher):
    assert (teacher.embed_dim, teacher.patch_px, teacher.prefix_tokens, teacher.input_px) == (384, 14, 1, 112)
    assert teacher.mean == (0.485, 0.456, 0.406)
    assert (teacher.embedding, teacher.licence, teacher.spec) == ("cls", None, None)
    assert sum(parameter.numel() for parameter in teacher.parameters()) == 22_056_192
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}  # float16 on disk


def test_uint8_and_float_inputs_are_equal(teacher, tiles):
    with torch.no_grad():
        assert torch.equal(teacher(tiles).cls_BD, teacher(tiles.float() / 255).cls_BD)


def test_grid_of_a_non_square_image_is_in_reading_order(encoder):
    images = random_images(1, 3, 28, 42)
    with torch.no_grad():
        tokens = encoder(images)
        flat = encoder.model.forward_features(encoder.normalise(images))
    assert tokens.patches_BHWD.shape == (1, 2, 3, 128)
    torch.testing.assert_close(tokens.patches_BHWD[0, 1, 2], flat[0, 5 + 1 * 3 + 2])
    torch.testing.assert_close(tokens.cls_BD, flat[:, 0])


def test_normalisation(encoder):
    white = torch.full((1, 3, 14, 14), 255, dtype=torch.uint8)
    expected = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(encoder.normalise(white)[0, :, 0, 0], expected)


def test_embedding_rules(student):
    images = random_images(2, 3, 28, 28)
    both = wrap(student, name="nano", mean=MEAN, std=STD, embedding="cls+mean")
    with torch.no_grad():
        tokens, vector = both(images), both.embed(images)
    assert vector.shape == (2, both.embedding_dim) == (2, 256)
    torch.testing.assert_close(vector[:, :128], tokens.cls_BD)
    torch.testing.assert_close(vector[:, 128:], tokens.patches_BHWD.flatten(1, 2).mean(1))
    cls = wrap(student, name="nano", mean=MEAN, std=STD)
    with torch.no_grad():
        torch.testing.assert_close(cls.embed(images), tokens.cls_BD)


@pytest.mark.parametrize("size", [(30, 28), (28, 0), (13, 13)])
def test_size_that_does_not_divide(encoder, size):
    with pytest.raises(ModelError, match="multiples of 14 px"):
        encoder(torch.zeros(1, 3, *size))


def test_nearest_sizes_are_offered(encoder):
    with pytest.raises(ModelError, match="98 x 14 or 112 x 14"):
        encoder(torch.zeros(1, 3, 100, 14))


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 14, 14, dtype=torch.int64), torch.zeros(3, 14, 14), torch.zeros(1, 1, 14, 14)]
)
def test_images_without_an_agreed_form(encoder, images):
    with pytest.raises(DataError, match="nano"):
        encoder(images)


def test_wrong_settings(student):
    with pytest.raises(ModelError, match="multiples of 14"):
        wrap(student, name="nano", mean=MEAN, std=STD, input_px=100)
    with pytest.raises(ModelError, match="cls, cls"):
        wrap(student, name="nano", mean=MEAN, std=STD, embedding="mean")
    with pytest.raises(ModelError, match="no class token"):
        wrap(
            timm.create_model("vit_base_patch16_siglip_gap_224", embed_dim=32, depth=1, num_heads=1, num_classes=0),
            name="gap",
            mean=MEAN,
            std=STD,
        )


def test_autocast(encoder):
    images = random_images(2, 3, 28, 28)
    with torch.no_grad():
        exact = encoder(images).cls_BD
        with torch.autocast("cpu", torch.bfloat16):
            rough = encoder(images).cls_BD
    assert torch.nn.functional.cosine_similarity(exact, rough.float()).min() > 0.99
    assert not torch.equal(exact, rough.float())


def test_a_wrapped_student_trains():
    model = build_student("vit-nano", seed=0)
    encoder = wrap(model, name="s", mean=MEAN, std=STD)
    assert encoder.training
    assert encoder.model is model
    encoder(random_images(2, 3, 14, 14)).patches_BHWD.square().sum().backward()
    assert model.patch_embed.proj.weight.grad.abs().sum() > 0
    assert set(encoder.state_dict()) == {f"model.{name}" for name in model.state_dict()}


def test_tokens_of_is_what_the_encoder_uses(encoder):
    images = random_images(1, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(tokens_of(encoder.model, encoder.normalise(images)).cls_BD, encoder(images).cls_BD)


def test_content_hash_sees_weights_and_normalisation():
    def hashed(seed, mean=MEAN):
        return wrap(build_student("vit-nano", seed=seed), name="x", mean=mean, std=STD).content_hash()

    assert len(hashed(0)) == 64
    assert hashed(0) == hashed(0)
    assert len({hashed(0), hashed(1), hashed(0, mean=STD)}) == 3
    model = build_student("vit-nano", seed=0)
    with torch.no_grad():
        model.norm.bias[7] += 1e-7
    assert wrap(model, name="x", mean=MEAN, std=STD).content_hash() != hashed(0)


def test_any_size_with_a_student_of_the_table():
    assert STUDENTS["vit-nano"].model_args["dynamic_img_size"]
    encoder = wrap(build_student("vit-nano", seed=0).eval(), name="s", mean=MEAN, std=STD)
    with torch.no_grad():
        assert encoder(random_images(1, 3, 98, 98)).patches_BHWD.shape == (1, 7, 7, 128)


def test_a_bundle_from_the_hub_keeps_its_rule_and_scale(tmp_path, monkeypatch):
    """The hub's own cache, as a download leaves it; no network."""
    snapshot = tmp_path / "models--me--student" / "snapshots" / ("0" * 40)
    facts = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "input_px": 56, "provenance": {}}
    model = build_student("vit-nano", seed=0)
    write_bundle(snapshot, model, STUDENTS["vit-nano"], embedding="cls+mean", mpp=1.0, **facts)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    encoder = load_encoder("hf-hub:me/student")
    assert encoder.embedding == "cls+mean"
    assert known_of("hf-hub:me/student").mpp == (1.0,)
    (snapshot / "histill.json").unlink()
    with pytest.warns(UserWarning, match=r"cannot be asked for histill\.json"):
        assert load_encoder("hf-hub:me/student").embedding == "cls"
    with pytest.warns(UserWarning, match=r"cannot be asked for histill\.json"):
        assert known_of("hf-hub:me/student").mpp is None
