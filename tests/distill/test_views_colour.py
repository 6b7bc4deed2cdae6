"""Colour matrices and stain jitter against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from histill.distill.views import colour

MIDDLE = 0.5


def draws(count, **chosen):
    """Draws that change nothing, apart from the chosen columns."""
    uniform = np.full((1, count), MIDDLE)
    for column, value in chosen.items():
        uniform[0, int(column[1:])] = value
    return uniform


def mapped(affine, colours):
    return colours @ affine[:, :3].T + affine[:, 3]


@pytest.mark.parametrize(
    ("draw", "count"), [(colour.draw_colour, colour.COLOUR_DRAWS), (colour.draw_stain, colour.STAIN_DRAWS)]
)
def test_no_strength_and_middle_draws_are_the_identity(draw, count):
    identity = np.concatenate([np.eye(3), np.zeros((3, 1))], axis=1)
    for uniform, strength in ((np.random.default_rng(0).random((5, count)), 0.0), (draws(count), 1.0)):
        affine = draw(uniform, strength)
        np.testing.assert_allclose(affine, np.broadcast_to(identity, affine.shape), atol=1e-12)
    assert np.abs(draw(np.random.default_rng(0).random((5, count)), 1.0) - identity).max() > 0.02


def test_each_colour_setting_does_what_it_says():
    some = np.random.default_rng(0).random((50, 3))
    grey = np.repeat(np.linspace(0, 1, 5)[:, None], 3, axis=1)
    top = 1.0  # the limit of a draw: the greatest change

    brightness = colour.draw_colour(draws(4, c0=top), 1.0)[0]
    np.testing.assert_allclose(mapped(brightness, some), some * (1 + colour.BRIGHTNESS))

    contrast = colour.draw_colour(draws(4, c1=top), 1.0)[0]
    pivot = colour.CONTRAST_PIVOT
    np.testing.assert_allclose(mapped(contrast, some), pivot + (1 + colour.CONTRAST) * (some - pivot))

    saturation = colour.draw_colour(draws(4, c2=0.0), 1.0)[0]
    np.testing.assert_allclose(mapped(saturation, grey), grey, atol=1e-12)
    np.testing.assert_allclose(mapped(saturation, some) @ colour.LUMA, some @ colour.LUMA)
    assert (np.ptp(mapped(saturation, some), axis=1) < np.ptp(some, axis=1)).all()

    hue = colour.draw_colour(draws(4, c3=top), 1.0)[0]
    np.testing.assert_allclose(mapped(hue, grey), grey, atol=1e-12)
    np.testing.assert_allclose(mapped(hue, some).sum(1), some.sum(1))
    third = colour.draw_colour(draws(4, c3=top), 1 / 3 / colour.HUE_TURNS)[0]
    np.testing.assert_allclose(mapped(third, np.eye(3)), np.roll(np.eye(3), 1, axis=1), atol=1e-12)


def unit(vector):
    return vector / np.linalg.norm(vector)


def test_stain_changes_the_amounts_of_haematoxylin_and_eosin_apart():
    haematoxylin, eosin = unit(colour.HAEMATOXYLIN), unit(colour.EOSIN)
    density = 0.8 * haematoxylin + 0.3 * eosin + 0.1 * unit(np.cross(haematoxylin, eosin))
    more = 1 + colour.CONCENTRATION
    changed = mapped(colour.draw_stain(draws(10, c0=1.0), 1.0)[0], density)
    np.testing.assert_allclose(changed, density + 0.8 * (more - 1) * haematoxylin)
    changed = mapped(colour.draw_stain(draws(10, c1=1.0), 1.0)[0], density)
    np.testing.assert_allclose(changed, density + 0.3 * (more - 1) * eosin)
    changed = mapped(colour.draw_stain(draws(10, c3=0.0), 1.0)[0], density)
    np.testing.assert_allclose(changed, density - colour.OFFSET * eosin)
    tilted = unit(haematoxylin + colour.DIRECTION * np.array([1.0, 0, 0]))
    changed = mapped(colour.draw_stain(draws(10, c4=1.0), 1.0)[0], 0.8 * haematoxylin)
    np.testing.assert_allclose(changed, 0.8 * tilted)


def test_stain_is_applied_to_optical_densities():
    rng = np.random.default_rng(3)
    image = rng.uniform(0, 1, (4, 3, 6, 6))
    image[0, 0, 0, 0] = 0.0  # black has no density; it is taken as 1 of 255
    stain = colour.draw_stain(rng.random((4, colour.STAIN_DRAWS)), 1.0)
    density = -np.log(np.maximum(image, 1 / 255))
    changed = np.einsum("nij,njyx->niyx", stain[:, :, :3], density) + stain[:, :, 3, None, None]
    result = torch.empty(4, 3, 6, 6)
    lightened = torch.from_numpy(image).float().clamp(min=colour.DARKEST)
    colour.apply_stain(lightened, torch.from_numpy(stain).float(), result)
    np.testing.assert_allclose(result, np.exp(-changed), rtol=2e-5)


def test_colour_is_applied_per_crop():
    rng = np.random.default_rng(4)
    image, affine = rng.random((5, 3, 6, 8)), rng.standard_normal((5, 3, 4))
    expected = np.einsum("nij,njyx->niyx", affine[:, :, :3], image) + affine[:, :, 3, None, None]
    result = torch.empty(5, 3, 6, 8)
    colour.apply_affine(torch.from_numpy(image).float(), torch.from_numpy(affine).float(), result)
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_white_stays_light_and_tissue_stays_purple_at_the_usual_strength():
    rng = np.random.default_rng(5)
    count = 500
    stain, matrix = (
        draw(rng.random((count, columns)), 1.0)
        for draw, columns in ((colour.draw_stain, colour.STAIN_DRAWS), (colour.draw_colour, colour.COLOUR_DRAWS))
    )

    def changed(rgb):
        density = np.einsum("nij,j->ni", stain[:, :, :3], -np.log(rgb)) + stain[:, :, 3]
        rgb_N3 = np.einsum("nij,nj->ni", matrix[:, :, :3], np.exp(-density)) + matrix[:, :, 3]
        return rgb_N3.clip(0, 1)

    assert changed(np.array([0.95, 0.94, 0.95])).min() > 0.75
    nucleus = changed(np.array([0.35, 0.20, 0.55]))
    assert (nucleus[:, 2] > nucleus[:, 1]).all()  # never green
    assert (nucleus[:, 0] > nucleus[:, 1] - 0.05).all()
    assert nucleus.std(axis=0).min() > 0.01


def look(scanner, seed=0, count=40, **strengths):
    generator = np.random.default_rng(seed)
    counts = (colour.COLOUR_DRAWS, colour.STAIN_DRAWS, colour.SCANNER_DRAWS)
    uniforms = [generator.random((count, each)) for each in counts]
    return uniforms, colour.draw_look(*uniforms, scanner=scanner, **({"colour": 0.0, "stain": 0.0} | strengths))


def test_a_scanner_is_a_gamma_a_mixing_that_keeps_grey_and_noise():
    uniforms, found = look(1.0)
    signed = 2 * uniforms[2] - 1
    values = np.random.default_rng(1).uniform(0.1, 1.0, (40, 3))
    expected = values ** (1 + colour.GAMMA) ** signed[:, :3]
    logs = np.einsum("nij,nj->ni", found.stain_N34[:, :, :3], np.log(values))
    np.testing.assert_allclose(np.exp(logs), expected)
    grey = np.full((40, 3, 1), 0.6)
    np.testing.assert_allclose(found.colour_N34[:, :, :3] @ grey, grey)
    assert found.noise_N.min() >= 0
    assert found.noise_N.max() <= colour.NOISE


def test_a_scanner_comes_after_the_stain_and_the_jitter():
    uniforms, both = look(1.0, colour=1.0, stain=1.0)
    _, scanner = look(1.0)
    stain, jitter = colour.draw_stain(uniforms[1], 1.0), colour.draw_colour(uniforms[0], 1.0)
    np.testing.assert_allclose(both.stain_N34, scanner.stain_N34[:, :, :3] @ stain)
    np.testing.assert_allclose(both.colour_N34, scanner.colour_N34[:, :, :3] @ jitter)


def test_noise_has_its_deviation_and_differs_between_crops():
    images = torch.zeros(6, 3, 64, 64)
    places = np.random.default_rng(0).random((6, 4))
    colour.add_noise(images, np.full(6, 0.02), places)
    np.testing.assert_allclose(images.std((1, 2, 3)), 0.02, rtol=0.05)
    correlation = np.corrcoef(images.flatten(1))
    assert np.abs(correlation - np.eye(6)).max() < 0.1
