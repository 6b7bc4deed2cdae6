"""The writers of small data sets, loaded by path: the test folders are no packages."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def sets() -> Any:
    """The module small_sets."""
    name = "eva_small_sets"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("small_sets.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
