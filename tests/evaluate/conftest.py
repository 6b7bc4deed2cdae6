"""What tests of several benchmarks share: a small encoder, sets in the original layouts, a process that is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from histill.models import STUDENTS, build_student, write_bundle


@pytest.fixture(scope="session")
def sets() -> Any:
    """The module eva/small_sets, loaded by path: the test folders are no packages."""
    name = "eva_small_sets"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "eva" / "small_sets.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a small student of 28 px, whose random layers do something."""
    model = build_student("vit-nano", seed=7)
    with torch.no_grad():
        for block in model.blocks:
            block.ls1.gamma.fill_(1.0)
            block.ls2.gamma.fill_(1.0)
    folder = tmp_path_factory.mktemp("encoders") / "student"
    style = {"mean": (0.7, 0.58, 0.7), "std": (0.21, 0.23, 0.18)}
    write_bundle(folder, model, STUDENTS["vit-nano"], **style, input_px=28, provenance={})
    return str(folder)


KILLED = """
import json, os, re, signal, sys
import histill.evaluate.command, histill.evaluate.jobs
from histill.cli import main

def start(argv, pattern, number, prelude):
    exec(prelude)
    left = number

    def watch(event, arguments):
        nonlocal left
        if event == "os.rename" and re.search(pattern, os.fspath(arguments[1])):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    with open(os.devnull, "w") as sink:
        os.dup2(sink.fileno(), 1)
    return main(argv)

for line in sys.stdin:
    child = os.fork()
    if not child:
        os._exit(start(**json.loads(line)))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def killed() -> Iterator[Callable[..., None]]:
    """Start the command line in a process of its own and kill it (SIGKILL) when it is about to put a file in its place.

    The interpreter tells of every rename (an audit hook), so that the moment is the same on every machine, and none of
    our code is replaced. ``prelude`` may make a schedule or a block smaller. The processes are forked off one that has
    imported what they need, which takes longer than all that they do.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # no threads before the fork
    with subprocess.Popen(
        [sys.executable, "-c", KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None

        def run(argv: Sequence[str], pattern: str, number: int, prelude: str = "") -> None:
            order = {"argv": list(argv), "pattern": pattern, "number": number, "prelude": prelude}
            server.stdin.write(json.dumps(order) + "\n")
            server.stdin.flush()
            assert int(server.stdout.readline()) == -signal.SIGKILL, "it was not killed"

        yield run
        server.stdin.close()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Note the arguments of every call of a function from now on; the function itself stays as it is."""

    def note(owner: Any, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        whole, noted = getattr(owner, name), []

        def noting(*args: Any, **options: Any) -> Any:
            noted.append((args, options))
            return whole(*args, **options)

        monkeypatch.setattr(owner, name, noting)
        return noted

    return note
