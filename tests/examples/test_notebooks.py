"""Notebooks of examples/: valid files without outputs, whose cells run from top to bottom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))

RUNNER = """
import json, sys

if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        cells = json.load(file)["cells"]
    names = {"__name__": "__main__"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    print("at the end:", json.dumps({name: value for name, value in names["auc"].items()}))
    print("figures:", len(names["plt"].get_fignums()), "weights:", float(names["weight"].mean()))
"""


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_there_is_the_notebook_from_slides_to_an_auc() -> None:
    assert "slides_to_auc.ipynb" in [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_holds_no_outputs(path: Path) -> None:
    """The format 4.5: each cell has an id of its own, a code cell its two fields for outputs, and text as lines."""
    notebook = read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        fields = {"cell_type", "id", "metadata", "source"}
        assert set(cell) == fields | ({"execution_count", "outputs"} if cell["cell_type"] == "code" else set())
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_from_slides_to_an_auc_runs(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(RUNNER)
    environment = os.environ | {"MPLBACKEND": "Agg", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "run.py"), str(EXAMPLES / "slides_to_auc.ipynb")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    auc = json.loads(next(line for line in lines if line.startswith("at the end: ")).partition(": ")[2])
    assert auc["abmil_auc"] > 0.6
    assert auc["mean_auc"] > 0.75
    _, figures, _, mean = lines[-1].split()
    assert figures == "1"
    assert float(mean) == pytest.approx(1.0, abs=1e-4)
