from __future__ import annotations

import numpy as np
import pytest

from histill.errors import ConfigError
from histill.synthetic import (
    SCANNERS,
    STAINS,
    ScannerSpec,
    beer_lambert,
    draw_tile,
    render,
    scanner_spec,
    slide_effects,
)


def test_ideal_scanner_gives_the_beer_lambert_colour() -> None:
    concentrations_HWS = np.zeros((2, 2, 3), np.float32)
    concentrations_HWS[0, 0, 0] = 1.0
    image_HWC = render(concentrations_HWS, STAINS["ruifrok"], SCANNERS["ideal"], 0)
    assert image_HWC.dtype == np.uint8
    np.testing.assert_array_equal(image_HWC[0, 0], (57, 50, 132))  # 255 * 10^-(0.650, 0.704, 0.286)
    np.testing.assert_array_equal(image_HWC[1, 1], 255)


def test_each_step_does_what_it_says() -> None:
    concentrations_HWS = np.full((16, 16, 3), (0.3, 0.2, 0.0), np.float32)
    stain = STAINS["harris"]
    light_C = beer_lambert(concentrations_HWS, stain)[0, 0]

    def scan(**settings: object) -> np.ndarray:
        scanner = ScannerSpec(name="test", **settings)  # type: ignore[arg-type]
        return render(concentrations_HWS, stain, scanner, 5).reshape(-1, 3) / 255.0

    np.testing.assert_allclose(scan(gamma=2.0)[0], light_C**2, atol=0.003)
    np.testing.assert_allclose(scan(white=(0.9, 0.8, 0.7))[0], light_C * (0.9, 0.8, 0.7), atol=0.003)
    swap = ((0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0))
    np.testing.assert_allclose(scan(matrix=swap)[0], light_C[[1, 0, 2]], atol=0.003)
    np.testing.assert_allclose(scan(blur_px=2.0)[0], light_C, atol=0.003)
    noisy = scan(noise=0.05)
    np.testing.assert_allclose(noisy.std(axis=0), 0.05 * np.sqrt(light_C), rtol=0.2)
    np.testing.assert_allclose(noisy.mean(axis=0), light_C, atol=0.012)


def test_blur_lowers_contrast_and_keeps_the_mean() -> None:
    concentrations_HWS = draw_tile("lymphoid", 96, 3, slide_effects(1))
    sharp = render(concentrations_HWS, STAINS["mayer"], SCANNERS["ideal"], 0)
    soft = render(concentrations_HWS, STAINS["mayer"], ScannerSpec(name="soft", blur_px=2.0), 0)
    assert soft.std() < 0.9 * sharp.std()
    assert abs(soft.mean() - sharp.mean()) < 1.0


def test_same_section_is_registered_and_coloured_differently() -> None:
    concentrations_HWS = draw_tile("gland", 128, 11, slide_effects(4))
    looks = [("harris", "aurora"), ("mayer", "cinder"), ("gill", "boreas"), ("carazzi", "dusk")]
    images = [render(concentrations_HWS, STAINS[a], SCANNERS[b], 0).astype(np.float64) for a, b in looks]
    densities = [-np.log10((image + 1) / 256).sum(axis=-1) for image in images]
    for index in range(1, len(looks)):
        correlation = np.corrcoef(densities[0].ravel(), densities[index].ravel())[0, 1]
        shifted = np.corrcoef(densities[0].ravel(), np.roll(densities[index], 4, axis=1).ravel())[0, 1]
        assert correlation > 0.95
        assert correlation > shifted + 0.1, "a shift of four pixels must show"
        assert np.abs(images[0].mean((0, 1)) - images[index].mean((0, 1))).max() > 8.0


def test_noise_follows_the_seed() -> None:
    concentrations_HWS = draw_tile("stroma", 64, 0, slide_effects(0))
    first, again, other = (render(concentrations_HWS, STAINS["gill"], SCANNERS["dusk"], seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.3


def test_all_scanners_differ() -> None:
    concentrations_HWS = draw_tile("tumour", 64, 0, slide_effects(0))
    means = [render(concentrations_HWS, STAINS["harris"], spec, 0).mean((0, 1)) for spec in SCANNERS.values()]
    for index, mean in enumerate(means):
        for other in means[:index]:
            assert np.abs(mean - other).max() > 3.0


def test_wrong_scanners_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean boreas"):
        scanner_spec("borealis")
    with pytest.raises(ConfigError, match="sums to 1"):
        ScannerSpec(name="tinted", matrix=((1.0, 0.1, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)))
    with pytest.raises(ConfigError, match="gamma"):
        ScannerSpec(name="flat", gamma=0.0)
