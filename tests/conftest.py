"""Shared data for the tests: required under CI, skipped with a reason on a user's machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two programs whose threads wait for each other by spinning crawl on few cores; each worker has one.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def _folder(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        message = f"needs the project's test data in {folder}, which is not part of the repository"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real tiles, slides and a real pretrained teacher."""
    return _folder("data")


@pytest.fixture(scope="session")
def shared_parity() -> Path:
    """Reference outputs of the original implementations."""
    return _folder("parity")
