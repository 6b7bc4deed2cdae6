from __future__ import annotations

import functools
import socket
from pathlib import Path

import pytest
from rich.console import Console

from histill.demo import benchmarks, measure
from histill.demo.config import DemoConfig
from histill.demo.run import demo


def _no_network(*_: object) -> None:
    raise AssertionError("the demo must not use the network")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo of the fewest slides and of one step, made without a network."""
    out = tmp_path_factory.mktemp("demo") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _no_network)
        patch.setattr(socket, "getaddrinfo", _no_network)
        patch.setattr(measure, "speeds", functools.partial(measure.speeds, rounds=3))
        patch.setattr(benchmarks, "TILES", 16)
        report = demo(DemoConfig(out=out, steps=2, slides=6), console=Console(quiet=True))
    assert report == out / "report.html"
    return out
