"""What a teacher, a student, an encoder and a model bundle are. The tables import no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from histill.models.students import STUDENTS, StudentSpec, build_student, init_from_teacher
from histill.models.teachers import TEACHERS, TeacherSpec

if TYPE_CHECKING:
    from histill.models.bundle import Bundle, read_bundle, write_bundle
    from histill.models.calibrate import channel_statistics, fold_standardisation
    from histill.models.encoder import Encoder, Tokens, load_encoder, tokens_of, wrap

__all__ = [
    "STUDENTS",
    "TEACHERS",
    "Bundle",
    "Encoder",
    "StudentSpec",
    "TeacherSpec",
    "Tokens",
    "build_student",
    "channel_statistics",
    "fold_standardisation",
    "init_from_teacher",
    "load_encoder",
    "read_bundle",
    "tokens_of",
    "wrap",
    "write_bundle",
]

_WHERE = {
    "Bundle": "bundle",
    "Encoder": "encoder",
    "Tokens": "encoder",
    "channel_statistics": "calibrate",
    "fold_standardisation": "calibrate",
    "load_encoder": "encoder",
    "read_bundle": "bundle",
    "tokens_of": "encoder",
    "wrap": "encoder",
    "write_bundle": "bundle",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch on first use."""
    if name in _WHERE:
        return getattr(importlib.import_module(f"histill.models.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'histill.models' has no attribute {name!r}")
