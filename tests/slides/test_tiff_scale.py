from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from histill.slides.openslide_reader import OpenSlideReader
from histill.slides.slide import ScaleFacts
from histill.slides.tiff_reader import TiffReader

JPEG, JPEG2000, BOXES = "CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs", "boxes.tiff"


def test_an_objective_in_ome_xml(tmp_path: Path) -> None:
    path = tmp_path / "slide.ome.tif"
    xml = """<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Instrument ID="Instrument:0">
    <Objective ID="Objective:0" NominalMagnification="10"/><Objective ID="Objective:1" NominalMagnification="40"/>
    </Instrument><Image ID="Image:0" Name="slide"><ObjectiveSettings ID="Objective:1"/><Pixels ID="Pixels:0"
    DimensionOrder="XYCZT" Type="uint8" SizeX="96" SizeY="64" SizeC="3" SizeZ="1" SizeT="1" PhysicalSizeX="0.5"
    PhysicalSizeY="0.25"><Channel ID="Channel:0" SamplesPerPixel="3"/><TiffData/></Pixels></Image></OME>"""
    pixels = np.full((64, 96, 3), 200, np.uint8)
    tifffile.imwrite(path, pixels, tile=(32, 32), photometric="rgb", description=xml, metadata=None)
    slide = TiffReader(path)
    assert slide.vendor == "ome-tiff"
    assert slide.scale_facts == ScaleFacts(vendor_mpp_xy=(0.5, 0.25), objective_power=40)


@pytest.mark.parametrize("unit", ["INCH", "CENTIMETER", "NONE"])
def test_resolution_tags(tmp_path: Path, unit: str) -> None:
    path = tmp_path / "slide.tif"
    pixels = np.full((64, 96, 3), 200, np.uint8)
    per_unit = {"INCH": (50800, 25400), "CENTIMETER": (20000, 10000), "NONE": (2, 1)}[unit]
    tifffile.imwrite(path, pixels, tile=(32, 32), photometric="rgb", resolution=per_unit, resolutionunit=unit)
    expected = None if unit == "NONE" else pytest.approx((0.5, 1.0))
    for slide in (TiffReader(path), OpenSlideReader(path)):
        assert slide.scale_facts.tiff_mpp_xy == expected
        assert slide.scale_facts.vendor_mpp_xy is None


@pytest.mark.parametrize("name", [JPEG, JPEG2000, BOXES])
def test_both_readers_tell_the_same_of_a_file(shared_data: Path, name: str) -> None:
    fast, slow = TiffReader(shared_data / "slides" / name), OpenSlideReader(shared_data / "slides" / name)
    assert fast.levels == slow.levels
    assert fast.vendor == slow.vendor
    assert fast.scale_facts == slow.scale_facts
    expected = {
        JPEG: ScaleFacts(vendor_mpp_xy=(0.499, 0.499), objective_power=20),
        JPEG2000: ScaleFacts(),
        BOXES: ScaleFacts(tiff_mpp_xy=pytest.approx((10000 / 28.3464565,) * 2)),
    }
    assert slow.scale_facts == expected[name]
