"""Drawn tissue: an offline data set with known labels and registered renderings, for the demo and the tests."""

from __future__ import annotations

from histill.synthetic.scanners import SCANNERS, ScannerSpec, render, scanner_spec
from histill.synthetic.scene import MPP, SlideEffects, slide_effects
from histill.synthetic.stains import STAINS, StainSpec, beer_lambert, stain_spec
from histill.synthetic.tiles import LABELS_CSV, PAIRED_CSV, write_tile_set
from histill.synthetic.tissue import KINDS, Field, draw_field, draw_tile

__all__ = [
    "KINDS",
    "LABELS_CSV",
    "MPP",
    "PAIRED_CSV",
    "SCANNERS",
    "STAINS",
    "Field",
    "ScannerSpec",
    "SlideEffects",
    "StainSpec",
    "beer_lambert",
    "draw_field",
    "draw_tile",
    "render",
    "scanner_spec",
    "slide_effects",
    "stain_spec",
    "write_tile_set",
]
