from __future__ import annotations

import copy

import pytest
import torch

from histill.errors import DataError, ModelError
from histill.models import (
    STUDENTS,
    build_student,
    channel_statistics,
    fold_standardisation,
    read_bundle,
    wrap,
    write_bundle,
)

HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def images():
    return torch.rand(40, 3, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def encoder():
    model = build_student("vit-nano", seed=0).eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        model.norm.weight.add_(torch.randn(128, generator=generator) * 0.2)
        model.norm.bias.add_(torch.randn(128, generator=generator) * 3)
    return wrap(model, name="nano", mean=HALF, std=HALF)


@torch.no_grad()
def cls(encoder, images):
    return encoder(images).cls_BD.double()


def test_statistics_do_not_depend_on_the_batches(encoder, images):
    whole = cls(encoder, images)
    for sizes in ([40], [1, 2, 37], [7] * 5 + [5]):
        mean_D, std_D = channel_statistics(encoder, images.split(sizes))
        assert mean_D.dtype == std_D.dtype == torch.float64
        torch.testing.assert_close(mean_D, whole.mean(0), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(std_D, whole.std(0, correction=0), atol=1e-6, rtol=1e-5)


def test_streaming_keeps_its_digits():
    """A spread of 1 around 100,000 is lost by the sum of squares in float32, not here."""

    class Shifted(torch.nn.Module):
        name, embed_dim = "shifted", 4

        def forward(self, values):
            return type("T", (), {"cls_BD": values.flatten(1)[:, :4] + 1e5})()

    values = torch.randn(1000, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean_D, std_D = channel_statistics(Shifted(), values.split(10))
    torch.testing.assert_close(std_D, values.flatten(1)[:, :4].std(0, correction=0), rtol=1e-9, atol=0)
    torch.testing.assert_close(mean_D, values.flatten(1)[:, :4].mean(0) + 1e5, rtol=1e-12, atol=0)


def test_folded_outputs_are_the_standardised_ones(encoder, images):
    before = cls(encoder, images)
    mean_D, std_D = channel_statistics(encoder, images.split(8))
    shapes = {name: value.shape for name, value in encoder.model.state_dict().items()}
    other = encoder.model.blocks[0].attn.qkv.weight.clone()
    fold_standardisation(encoder.model, mean_D, std_D)
    after = cls(encoder, images)
    torch.testing.assert_close(after, (before - mean_D) / std_D, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.mean(0), torch.zeros(128).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(after.std(0, correction=0), torch.ones(128).double(), atol=1e-5, rtol=0)
    assert {name: value.shape for name, value in encoder.model.state_dict().items()} == shapes
    assert torch.equal(encoder.model.blocks[0].attn.qkv.weight, other)


def test_patch_tokens_get_the_same_map(encoder, images):
    with torch.no_grad():
        before = encoder(images[:2]).patches_BHWD.double()
    mean_D, std_D = channel_statistics(encoder, [images])
    fold_standardisation(encoder.model, mean_D, std_D)
    with torch.no_grad():
        after = encoder(images[:2]).patches_BHWD.double()
    torch.testing.assert_close(after, (before - mean_D) / std_D, atol=1e-4, rtol=1e-4)


def test_folding_is_exact_in_float64(encoder, images):
    exact = copy.deepcopy(encoder).double()
    exact.normalise = lambda batch: (batch.double() - 0.5) / 0.5
    before = cls(exact, images)
    mean_D, std_D = channel_statistics(exact, [images])
    fold_standardisation(exact.model, mean_D, std_D)
    torch.testing.assert_close(cls(exact, images), (before - mean_D) / std_D, atol=1e-9, rtol=1e-9)


def test_a_linear_probe_gives_the_same_answers(encoder, images):
    exact = copy.deepcopy(encoder).double()
    exact.normalise = lambda batch: (batch.double() - 0.5) / 0.5
    target = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def probe(features):
        design = torch.cat([features[:, :20], torch.ones(40, 1).double()], dim=1)
        return design @ torch.linalg.lstsq(design, target).solution

    before = probe(cls(exact, images))
    fold_standardisation(exact.model, *channel_statistics(exact, [images]))
    torch.testing.assert_close(probe(cls(exact, images)), before, atol=1e-6, rtol=1e-6)


def test_a_calibrated_model_is_still_an_ordinary_bundle(encoder, images, tmp_path):
    fold_standardisation(encoder.model, *channel_statistics(encoder, [images]))
    spec = STUDENTS["vit-nano"]
    write_bundle(
        tmp_path / "b", encoder.model, spec, mean=HALF, std=HALF, input_px=224, provenance={"calibrated": True}
    )
    again = read_bundle(tmp_path / "b")
    assert again.provenance["calibrated"] is True
    torch.testing.assert_close(cls(again.encoder, images), cls(encoder, images), atol=1e-6, rtol=0)


def test_a_constant_channel(encoder, images):
    with torch.no_grad():
        encoder.model.norm.weight[5] = 0
        encoder.model.norm.weight[9] = 0
    with pytest.raises(ModelError, match="2 of 128 channels: 5, 9"):
        channel_statistics(encoder, [images])


def test_identical_images_do_not_pass_as_variation(encoder, images):
    with pytest.raises(ModelError, match="128 of 128 channels"):
        channel_statistics(encoder, [images[:1].repeat(6, 1, 1, 1), images[:1]])


def test_too_few_images(encoder, images):
    with pytest.raises(DataError, match="1 images"):
        channel_statistics(encoder, [images[:1]])
    with pytest.raises(DataError, match="0 images"):
        channel_statistics(encoder, [])


def test_statistics_that_cannot_be_folded(encoder):
    model = encoder.model
    weight = model.norm.weight.clone()
    with pytest.raises(ModelError, match="another model"):
        fold_standardisation(model, torch.zeros(3), torch.ones(3))
    with pytest.raises(ModelError, match="do not vary"):
        fold_standardisation(model, torch.zeros(128), torch.zeros(128))
    with pytest.raises(ModelError, match="do not vary"):
        fold_standardisation(model, torch.full((128,), torch.nan), torch.ones(128))
    assert torch.equal(model.norm.weight, weight)
    model.norm = torch.nn.Identity()
    with pytest.raises(ModelError, match="LayerNorm"):
        fold_standardisation(model, torch.zeros(128), torch.ones(128))
