from __future__ import annotations

import json

import pytest

from histill.errors import ConfigError
from histill.export.bench_command import run
from histill.export.command import run as export_command


def measured(capsys, *arguments):
    assert run([*map(str, arguments), "--json", "--rounds", "3", "--batch", "2", "--threads", "1"]) == 0
    return json.loads(capsys.readouterr().out)


def test_rows(bundle, make_bundle, tmp_path, capsys):
    other = make_bundle(tmp_path / "other", seed=1)
    found = measured(capsys, bundle, other, "--engine", "torch", "torch-bf16")
    rows = found["rows"]
    assert [(row["model"], row["engine"]) for row in rows] == [
        (str(model), engine) for model in (bundle, other) for engine in ("torch-fp32", "torch-bf16")
    ]
    assert (found["batch"], found["threads"], found["rounds"]) == (2, 1, 3)
    assert rows[0]["ratio"] == 1
    for row in rows:
        assert row["tiles_per_second"] == pytest.approx(2e3 / row["latency_p50_ms"], rel=2e-3)
        assert 0 < row["latency_p50_ms"] <= row["latency_p95_ms"]
        assert row["parameters"] == 903_168
        # 16 patches and 5 prefix tokens through 4 blocks of width 128 cannot be done with less or much more
        assert 21 * 0.8e6 < row["macs"] < 21 * 1.1e6
        assert row["memory_mb"] is None or 3.6 < row["memory_mb"] < 1000, "the weights alone are 3.6 MB"


def test_a_larger_image_costs_more(bundle, capsys):
    small, large = (measured(capsys, bundle, "--input-px", px)["rows"][0] for px in (56, 112))
    assert (small["input_px"], large["input_px"]) == (56, 112)
    assert 2.5 < large["macs"] / small["macs"] < 4


def test_the_table(bundle, capsys):
    assert run([str(bundle), "--rounds", "2", "--batch", "1"]) == 0
    said = capsys.readouterr().out
    assert "torch-fp32" in said
    assert "GMAC" in said


def test_refusals(bundle):
    with pytest.raises(ConfigError, match="can run this model"):
        run([str(bundle), "--engine", "openvino-int8"])
    with pytest.raises(ConfigError, match="no such engine"):
        run([str(bundle), "--engine", "tensorrt"])
    with pytest.raises(SystemExit, match="2"):
        run([str(bundle), "--batch", "0"])


def test_a_model_that_no_engine_can_run_is_not_left_out(bundle, tiles, tmp_path):
    assert export_command([str(bundle), "--to", "onnx", "--tiles", str(tiles), "--out", str(tmp_path / "onnx")]) == 0
    with pytest.raises(ConfigError, match="can run this model"):
        run([str(bundle), str(tmp_path / "onnx"), "--engine", "torch", "--rounds", "2"])


def test_devices(bundle, capsys):
    assert measured(capsys, bundle, "--device", "auto")["device"] in ("cpu", "cuda")
    with pytest.raises(ConfigError, match="no such device"):
        run([str(bundle), "--device", "banana"])
