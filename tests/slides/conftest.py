"""The fake slide, loaded by path: the test folders are no packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def fake_slide() -> Any:
    """The class FakeSlide."""
    spec = importlib.util.spec_from_file_location("fake_slide", Path(__file__).with_name("fake_slide.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FakeSlide
