"""Small PLISM, HEST, EVA and PathoROB folders of drawn tissue, in the layouts of the originals."""

from __future__ import annotations

from histill.synthetic.benchmarks.write import BENCHMARKS, ROOTS_JSON, write_benchmarks

__all__ = ["BENCHMARKS", "ROOTS_JSON", "write_benchmarks"]
