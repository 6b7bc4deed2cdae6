from __future__ import annotations

import numpy as np
import pytest

from histill.errors import ConfigError
from histill.synthetic import STAINS, StainSpec, beer_lambert, stain_spec


def test_beer_lambert_gives_the_published_haematoxylin_density() -> None:
    concentrations_HWS = np.zeros((1, 3, 3), np.float32)
    concentrations_HWS[0, 1, 0] = 1.0  # haematoxylin alone
    concentrations_HWS[0, 2] = (0.5, 0.2, 0.0)
    light_HWC = beer_lambert(concentrations_HWS, STAINS["ruifrok"])
    assert light_HWC.dtype == np.float32
    np.testing.assert_array_equal(light_HWC[0, 0], 1.0)
    np.testing.assert_allclose(light_HWC[0, 1], (10**-0.650, 10**-0.704, 10**-0.286), rtol=1e-3)
    # 0.5 haematoxylin + 0.2 eosin of the published vectors (0.650, 0.704, 0.286) and (0.072, 0.990, 0.105)
    np.testing.assert_allclose(light_HWC[0, 2], (10**-0.3394, 10**-0.550, 10**-0.164), rtol=5e-3)


def test_density_is_linear_in_the_concentrations() -> None:
    concentrations_HWS = np.random.default_rng(0).random((5, 4, 3), np.float32)
    for stain in STAINS.values():
        once, twice = beer_lambert(concentrations_HWS, stain), beer_lambert(2 * concentrations_HWS, stain)
        np.testing.assert_allclose(twice, once**2, rtol=1e-5)


def test_every_stain_has_bluish_haematoxylin_and_pink_eosin() -> None:
    for name, stain in STAINS.items():
        assert stain.name == name
        assert stain.haematoxylin[2] < min(stain.haematoxylin[:2]), "blue light passes haematoxylin most easily"
        assert stain.eosin[0] < stain.eosin[2] < stain.eosin[1], "red light passes eosin most, green least"


def test_an_unknown_stain_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean harris"):
        stain_spec("haris")


@pytest.mark.parametrize("vector", [(0.1, -0.1, 0.5), (0.0, 0.0, 0.0)])
def test_a_vector_that_is_no_density_is_refused(vector: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="stain mine, eosin"):
        StainSpec(name="mine", haematoxylin=(0.6, 0.7, 0.3), eosin=vector, residual=(0.3, 0.6, 0.8))
