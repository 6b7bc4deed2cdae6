"""What a TIFF says of its own scale: Aperio's description, OME-XML, resolution tags."""

from __future__ import annotations

import math
from collections.abc import Mapping
from xml.etree import ElementTree

import tifffile

from histill.slides.slide import ScaleFacts

__all__ = ["scale_facts"]

_TAG_UNIT_UM = {2: 25400.0, 3: 10000.0}  # TIFF ResolutionUnit: inch, centimetre
_OME_UNIT_UM = {"m": 1e6, "dm": 1e5, "cm": 1e4, "mm": 1e3, "µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "Å": 1e-4}


def scale_facts(
    page: tifffile.TiffPage, vendor: str, ome_xml: str | None, image_name: str
) -> tuple[ScaleFacts, dict[str, str]]:
    """Collect what the file states of its scale.

    Parameters
    ----------
    page
        The page of level 0.
    vendor
        ``aperio``, ``ome-tiff`` or ``generic-tiff``.
    ome_xml
        The OME-XML of an OME-TIFF.
    image_name
        Name of the OME image that is read; the first image when none has it.

    Returns
    -------
    facts
        The vendor's mpp and objective power, and what the resolution tags would mean.
    properties
        The same as text, named as OpenSlide names them.
    """
    properties = {"tiff.ImageDescription": page.description} if page.description else {}
    tiff_mpp_xy = _of_tags(page, properties)
    vendor_mpp_xy, power = None, None
    if vendor == "aperio":
        fields = dict(_aperio_fields(page.description))
        properties |= {f"aperio.{name}": value for name, value in fields.items()}
        mpp, power = _positive(fields.get("MPP")), _positive(fields.get("AppMag"))
        vendor_mpp_xy = (mpp, mpp) if mpp else None
    elif vendor == "ome-tiff" and ome_xml:
        vendor_mpp_xy, power = _of_ome(ome_xml, image_name)
    return ScaleFacts(vendor_mpp_xy=vendor_mpp_xy, objective_power=power, tiff_mpp_xy=tiff_mpp_xy), properties


def _aperio_fields(description: str) -> list[tuple[str, str]]:
    pairs = [part.split("=", 1) for part in description.split("|")[1:] if "=" in part]
    return [(name.strip(), value.strip()) for name, value in pairs]


def _of_tags(page: tifffile.TiffPage, properties: dict[str, str]) -> tuple[float, float] | None:
    unit_um = _TAG_UNIT_UM.get(int(page.tags.valueof("ResolutionUnit", default=2)))
    mpp = []
    for name in ("XResolution", "YResolution"):
        value = page.tags.valueof(name)
        if isinstance(value, tuple) and len(value) == 2 and value[0] and value[1]:
            per_unit = value[0] / value[1]
            properties[f"tiff.{name}"] = f"{per_unit:.17g}"
            mpp.append(unit_um / per_unit if unit_um else None)
    if len(mpp) != 2 or mpp[0] is None or mpp[1] is None:
        return None
    return mpp[0], mpp[1]


def _of_ome(ome_xml: str, image_name: str) -> tuple[tuple[float, float] | None, float | None]:
    """(mpp, objective power) of one image of an OME-XML."""
    try:
        root = ElementTree.fromstring(ome_xml)
    except ElementTree.ParseError:
        return None, None
    images = root.findall("{*}Image")
    named = [image for image in images if image.get("Name") == image_name] or images
    pixels = named[0].find("{*}Pixels") if named else None
    if pixels is None:
        return None, None
    x, y = (_length_um(pixels.attrib, f"PhysicalSize{axis}") for axis in "XY")
    settings = named[0].find("{*}ObjectiveSettings")
    power = None
    if settings is not None:
        for objective in root.iterfind("{*}Instrument/{*}Objective"):
            if objective.get("ID") == settings.get("ID"):
                power = _positive(objective.get("NominalMagnification"))
    return (None if x is None or y is None else (x, y)), power


def _length_um(attributes: Mapping[str, str], name: str) -> float | None:
    value = _positive(attributes.get(name))
    unit_um = _OME_UNIT_UM.get(attributes.get(f"{name}Unit", "µm"))
    return value * unit_um if value and unit_um else None


def _positive(text: str | None) -> float | None:
    try:
        value = float(text.replace(",", ".")) if text else 0.0
    except ValueError:
        return None
    return value if value > 0 and math.isfinite(value) else None
