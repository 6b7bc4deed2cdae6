from __future__ import annotations

import math
from pathlib import Path

import pytest

from histill.errors import DataError
from histill.slides.scale import Scale, ScaleError, read_overrides, resolve_scale
from histill.slides.slide import ScaleFacts, SlideError

ALL = ScaleFacts(vendor_mpp_xy=(0.2499, 0.2501), objective_power=20, tiff_mpp_xy=(0.5, 0.5))


def _facts(**without: None) -> ScaleFacts:
    fields = {"vendor_mpp_xy": ALL.vendor_mpp_xy, "objective_power": ALL.objective_power, "tiff_mpp_xy": (1.0, 1.0)}
    return ScaleFacts(**{**fields, **without})


def test_the_order_is_override_vendor_objective_tiff() -> None:
    assert resolve_scale(ALL, override=0.3, trust_tiff=True, where="s") == Scale(0.3, "override")
    assert resolve_scale(ALL, trust_tiff=True, where="s") == Scale(pytest.approx(0.25), "vendor")
    assert resolve_scale(_facts(vendor_mpp_xy=None), trust_tiff=True, where="s") == Scale(0.5, "objective")
    only_tiff = _facts(vendor_mpp_xy=None, objective_power=None)
    assert resolve_scale(only_tiff, trust_tiff=True, where="s") == Scale(1.0, "tiff")


@pytest.mark.parametrize(("power", "mpp"), [(40, 0.25), (20, 0.5), (10, 1.0)])
def test_objective_power(power: float, mpp: float) -> None:
    assert resolve_scale(ScaleFacts(objective_power=power), where="s").mpp == mpp


def test_a_slide_that_says_nothing_is_refused_with_the_remedy() -> None:
    with pytest.raises(ScaleError, match=r"a\.svs[\s\S]*--mpp-override") as caught:
        resolve_scale(ScaleFacts(), where="a.svs")
    assert isinstance(caught.value, SlideError)
    assert "slide,mpp" in str(caught.value)
    assert "--trust-tiff-resolution" not in str(caught.value)
    with pytest.raises(ScaleError):
        resolve_scale(ScaleFacts(), trust_tiff=True, where="a.svs")


def test_tiff_tags_are_offered_only_when_they_could_be_true() -> None:
    with pytest.raises(ScaleError, match=r"0\.5 x 0\.5[\s\S]*--trust-tiff-resolution"):
        resolve_scale(ScaleFacts(tiff_mpp_xy=(0.5, 0.5)), where="s")
    for nonsense in ((352.8, 352.8), (0.5, 1.0)):  # 72 dpi; not square
        with pytest.raises(ScaleError) as caught:
            resolve_scale(ScaleFacts(tiff_mpp_xy=nonsense), where="s")
        assert "--trust-tiff-resolution" not in str(caught.value)
    with pytest.raises(ScaleError, match=r"352\.8"):
        resolve_scale(ScaleFacts(tiff_mpp_xy=(352.8, 352.8)), trust_tiff=True, where="s")


@pytest.mark.parametrize("mpp", [0.0499, 5.01, 0.0, -0.5, math.inf, math.nan, 1e6])
def test_an_impossible_claim_is_an_error_and_the_next_one_does_not_stand_in(mpp: float) -> None:
    with pytest.raises(ScaleError, match=r"0\.05 to 5"):
        resolve_scale(ScaleFacts(vendor_mpp_xy=(mpp, mpp), objective_power=20), where="s")
    with pytest.raises(ScaleError, match=r"0\.05 to 5"):
        resolve_scale(ScaleFacts(vendor_mpp_xy=(0.5, mpp), objective_power=20), where="s")
    with pytest.raises(ScaleError, match=r"--mpp-override"):
        resolve_scale(ALL, override=mpp, where="s")
    with pytest.raises(ScaleError, match="objective"):
        resolve_scale(ScaleFacts(objective_power=10 / mpp if mpp else 0.0), where="s")


@pytest.mark.parametrize("mpp", [0.05, 5.0])
def test_the_limits_belong_to_the_range(mpp: float) -> None:
    assert resolve_scale(ScaleFacts(vendor_mpp_xy=(mpp, mpp)), where="s").mpp == mpp


def test_pixels_that_are_not_square_are_refused() -> None:
    assert resolve_scale(ScaleFacts(vendor_mpp_xy=(0.5, 0.504)), where="s").mpp == pytest.approx(0.502)
    with pytest.raises(ScaleError, match="not square"):
        resolve_scale(ScaleFacts(vendor_mpp_xy=(0.5, 0.506)), where="s")
    with pytest.raises(ScaleError, match="not square"):
        resolve_scale(ScaleFacts(tiff_mpp_xy=(0.506, 0.5)), trust_tiff=True, where="s")


def _table(folder: Path, text: str) -> Path:
    path = folder / "mpp.csv"
    path.write_bytes(text.encode("utf-8"))
    return path


def test_overrides_are_read(tmp_path: Path) -> None:
    text = '\ufeffslide,note,mpp\r\na__b,"x, y",0.25\r\nc,, 0.5\r\n'
    assert read_overrides(_table(tmp_path, text)) == {"a__b": 0.25, "c": 0.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lacks the column slide"),
        ("slide,mp\na,0.5\n", "lacks the column mpp[\\s\\S]*did you mean mp"),
        ("slide,mpp\n", "no rows"),
        ("slide,mpp\na,0.5\na,0.25\n", "line 3[\\s\\S]*a"),
        ("slide,mpp\na,0.5\nb,large\n", "line 3[\\s\\S]*'large'"),
        ("slide,mpp\na,nan\n", "line 2"),
        ("slide,mpp\na,50\n", "0.05 to 5"),
        ("slide,mpp\n,0.5\n", "names no slide"),
        ("slide,mpp\na\n", "line 2"),
        ("slide,mpp\na,0.5,c\n", "line 2"),
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_overrides(_table(tmp_path, text))


def test_a_table_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_overrides(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"slide,mpp\n\xff\xfe\x00,0.5\n")
    with pytest.raises(DataError, match="UTF-8"):
        read_overrides(tmp_path / "binary.csv")
