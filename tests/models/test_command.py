from __future__ import annotations

import json
import subprocess
import sys

import pytest

from histill.cli import main
from histill.models import STUDENTS, TEACHERS


def test_every_teacher_in_100_columns(capsys):
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    for spec in TEACHERS.values():
        rows = [line.split() for line in lines if line.startswith(f"{spec.name} ")]
        assert len(rows) == 2  # facts, and source: no row is folded
        assert rows[1][1] == spec.source
    virchow = next(line for line in lines if line.startswith("virchow2 ")).split()
    assert " ".join(virchow[1:]) == "631.2 M 1280 14 224 0.25-2 cls+mean CC-BY-NC-ND-4.0 yes no: ND"


def test_unknown_is_shown_as_unknown(capsys):
    main(["models"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("openmidnight ")).split()
    assert row[-3:] == ["?", "?", "?"]


def test_students(capsys):
    assert main(["models", "--students"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in STUDENTS)
    assert "85.7 M" in text
    assert "h-optimus-0" not in text


@pytest.mark.parametrize(("argv", "table"), [(["--json"], TEACHERS), (["--students", "--json"], STUDENTS)])
def test_json(capsys, argv, table):
    assert main(["models", *argv]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(table)
    assert [row["params"] for row in rows] == [spec.params for spec in table.values()]


def test_values_may_follow_the_options(capsys):
    assert main(["models", "--students", "False", "--json", "True"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "h-optimus-0"


def test_unknown_option():
    with pytest.raises(SystemExit) as caught:
        main(["models", "--jsno"])
    assert caught.value.code == 2


def test_it_imports_no_torch():
    code = "import sys; from histill.cli import main; main(['models']); assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
