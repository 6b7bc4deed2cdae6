from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from histill import files
from histill.errors import ConfigError, ModelError
from histill.export import run as export_run
from histill.export.command import run
from histill.export.verify import check, difference, draw_tiles
from histill.models import load_encoder
from histill.models.engines import open_engine
from histill.tiles.open import open_tiles

# a finder that refuses histill stands before all others: neither an installed nor a source copy can be imported
ALONE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "histill":
            raise ImportError("histill is not here")
sys.meta_path.insert(0, Refuse())
"""

ONNX_ALONE = (
    ALONE
    + """
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
names = [each.name for each in session.get_inputs()], [each.name for each in session.get_outputs()]
assert names == (["images"], ["cls", "patches"]), names
cls, patches = session.run(None, {"images": np.load(sys.argv[2])})
np.savez(sys.argv[3], cls=cls, patches=patches)
assert not any(name in sys.modules for name in ("histill", "torch", "timm"))
"""
)

TIMM_ALONE = (
    ALONE
    + """
import json, timm, torch
from safetensors.torch import load_file, save_file
model = timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True).eval()
mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
with torch.no_grad():
    tokens = model.forward_features((load_file(sys.argv[2])["images"].float() / 255 - mean) / std)
save_file({"tokens": tokens.contiguous()}, sys.argv[3])
assert "histill" not in sys.modules
"""
)


def alone(code, *arguments):
    environment = {"PATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def images(count=3):
    return torch.randint(0, 256, (count, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def command(bundle, tiles, out, to, *more):
    return run([str(bundle), "--to", to, "--out", str(out), "--tiles", str(tiles), "--verify-tiles", "6", *more])


@pytest.fixture(scope="module")
def onnx_export(bundle, tiles, tmp_path_factory):
    out = tmp_path_factory.mktemp("onnx") / "export"
    assert command(bundle, tiles, out, "onnx") == 0
    return out


def test_onnxruntime_alone_opens_it(bundle, onnx_export, tmp_path):
    np.save(tmp_path / "images.npy", images().permute(0, 2, 3, 1).contiguous().numpy())
    alone(ONNX_ALONE, onnx_export / "model.onnx", tmp_path / "images.npy", tmp_path / "out.npz")
    got = np.load(tmp_path / "out.npz")
    with torch.no_grad():
        tokens = load_encoder(str(bundle))(images())
    np.testing.assert_allclose(got["cls"], tokens.cls_BD, atol=1e-4, rtol=0)
    np.testing.assert_allclose(got["patches"], tokens.patches_BHWD, atol=1e-4, rtol=0)


def test_the_record(bundle, onnx_export, capsys):
    record = json.loads((onnx_export / "export.json").read_text())
    model, verified = record["model"], record["verification"]
    assert sorted(path.name for path in onnx_export.iterdir()) == ["export.json", "model.onnx"]
    assert model["files"] == [["model.onnx", files.sha256_file(onnx_export / "model.onnx")]]
    assert model["content_hash"] == load_encoder(str(bundle)).content_hash()
    assert (model["parameters"], model["input_px"], model["engines"]) == (903_168, 56, ["onnxruntime"])
    assert record["input"] == {"name": "images", "type": "uint8", "shape": ["B", 56, 56, 3], "scale": "RGB in 0..255"}
    assert verified["tiles"] == 6
    assert 0 < verified["engines"]["onnxruntime"]["patches"]["max_difference"] < 1e-4
    assert record["bundle"]["teachers"][0]["licence"] == "MIT"
    assert record["licence_notice"] is None


def test_an_export_is_opened_as_an_engine(bundle, onnx_export):
    engine = open_engine(str(onnx_export), engine="onnxruntime", batch=2)
    expected = open_engine(str(bundle))
    torch.testing.assert_close(engine(images()).cls_BD, expected(images()).cls_BD, atol=1e-4, rtol=0)
    assert engine.content_hash() == expected.content_hash()
    for name in ("embed_dim", "patch_px", "prefix_tokens", "input_px", "mean", "std", "embedding", "licence"):
        assert getattr(engine, name) == getattr(expected, name)
    assert open_engine(str(onnx_export), engine="auto").engine == "onnxruntime"
    with pytest.raises(ConfigError, match="not verified with this engine"):
        open_engine(str(onnx_export))
    with pytest.raises(ModelError, match="one size"):
        open_engine(str(onnx_export), engine="onnxruntime", input_px=84)


def test_a_changed_file_is_refused(onnx_export, tmp_path):
    for path in onnx_export.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damaged = bytearray((tmp_path / "model.onnx").read_bytes())
    damaged[-1000] ^= 1
    (tmp_path / "model.onnx").write_bytes(damaged)
    with pytest.raises(ModelError, match="not what was verified"):
        open_engine(str(tmp_path), engine="onnxruntime")
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(ModelError, match="missing"):
        open_engine(str(tmp_path), engine="onnxruntime")
    (tmp_path / "export.json").write_text('{"model": {"kind": "onnx"}}')
    with pytest.raises(ModelError, match="damaged"):
        open_engine(str(tmp_path), engine="onnxruntime")


def test_normalised_input(bundle, tiles, tmp_path):
    out = tmp_path / "export"
    assert command(bundle, tiles, out, "openvino", "--no-pixels") == 0
    record = json.loads((out / "export.json").read_text())
    assert record["input"]["type"] == "float32"
    import openvino

    encoder = load_encoder(str(bundle))
    found = openvino.Core().compile_model(out / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(
        encoder.normalise(images()).numpy()
    )
    with torch.no_grad():
        tokens = encoder(images())
    np.testing.assert_allclose(found["cls"], tokens.cls_BD, atol=1e-4, rtol=0)
    engine = open_engine(str(out), engine="openvino-fp32")
    torch.testing.assert_close(engine(images()).patches_BHWD, tokens.patches_BHWD, atol=1e-4, rtol=0)


def test_int8_and_a_table(bundle, tiles, shared_data, tmp_path, capsys):
    table = tiles / "labels.csv"
    names = sorted(path.name for path in tiles.glob("*-*.png"))
    rows = [f"{name},{'ab'[i % 2]},s{i},{'train' if i < 24 else 'test'}" for i, name in enumerate(names)]
    table.write_text("\n".join(["path,label,slide,split", *rows]) + "\n")
    out = tmp_path / "export"
    real = shared_data / "tiles" / "unlabelled"
    assert command(bundle, real, out, "int8", "--calibrate-tiles", "16", "--table", str(table)) == 0
    record = json.loads((out / "export.json").read_text())
    found = record["verification"]["engines"]["openvino-int8"]
    assert record["calibration"]["tiles"] == 16
    assert 0.99 <= found["cls"]["mean_cosine"] < 0.99999, "int8 that changes nothing would not be int8"
    assert set(found["scores"]["linear_auc"]) == {"bundle", "export", "untrained", "retention"}
    size = {name: (out / name).stat().st_size for name in ("model.bin",)}["model.bin"]
    assert size < 0.5 * (bundle / "model.safetensors").stat().st_size
    engine, exact = open_engine(str(out), engine="openvino-int8"), open_engine(str(bundle))
    assert torch.cosine_similarity(engine(images()).cls_BD, exact(images()).cls_BD).mean() > 0.9
    assert engine.content_hash() != exact.content_hash()
    assert "linear_auc" in capsys.readouterr().out


def test_a_wrong_export_leaves_nothing_behind(bundle, tiles, tmp_path, monkeypatch):
    """A graph of other weights is what a faulty exporter would write."""
    real = export_run.write_onnx

    def faulty(encoder, path, *, pixels):
        with torch.no_grad():
            weight = encoder.model.blocks[0].attn.qkv.weight
            weight[0, 0] += 0.5
            real(encoder, path, pixels=pixels)
            weight[0, 0] -= 0.5

    monkeypatch.setattr(export_run, "write_onnx", faulty)
    with pytest.raises(ModelError, match=r"(?s)was not kept.*largest difference"):
        command(bundle, tiles, tmp_path / "export", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_older_export_outlives_a_failure(bundle, tiles, onnx_export, monkeypatch):
    before = {path.name: path.read_bytes() for path in onnx_export.iterdir()}
    monkeypatch.setattr(export_run, "write_onnx", lambda *_, **__: (_ for _ in ()).throw(ModelError("no")))
    with pytest.raises(ModelError):
        command(bundle, tiles, onnx_export, "onnx")
    assert before == {path.name: path.read_bytes() for path in onnx_export.iterdir()}


def test_difference_by_hand():
    bundle = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    export = torch.tensor([[4.0, 3.0], [0.0, 1.0]])
    found = difference(export, bundle)
    assert found.max_difference == 1
    assert found.mean_cosine == pytest.approx((24 / 25 + 1) / 2)
    assert found.min_cosine == pytest.approx(24 / 25)
    # means (2, 2) and (1.5, 3): rows (2, 1), (-2, -1) against (1.5, 1), (-1.5, -1)
    assert found.centred_cosine == pytest.approx(4 / (5 * 3.25) ** 0.5)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino-fp32", "openvino-bf16", "openvino-int8"])
def test_bounds(engine):
    tokens = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    check(engine, {"cls": difference(tokens, tokens)}, None)
    for worse in (tokens.roll(1, 0), tokens * float("nan")):
        with pytest.raises(ModelError, match=f"{engine}, patches"):
            check(engine, {"cls": difference(tokens, tokens), "patches": difference(worse, tokens)}, None)
    one_bad = tokens.clone()
    one_bad[7] = -one_bad[7]
    with pytest.raises(ModelError, match="was not kept"):
        check(engine, {"cls": difference(one_bad, tokens)}, None)
    good = {"cls": difference(tokens, tokens)}
    check(engine, good, {"linear_auc": {"retention": None}, "knn_auc": {"retention": 0.0}})
    with pytest.raises(ModelError, match="linear_auc"):
        check(engine, good, {"linear_auc": {"retention": 0.5}})


def test_tiles_are_drawn_alike_and_the_unreadable_passed_over(tiles):
    source = open_tiles(tiles)
    assert len(source) == 33
    assert draw_tiles(source, 99, 56).shape == (32, 56, 56, 3)
    np.testing.assert_array_equal(draw_tiles(source, 99, 56)[:4], draw_tiles(source, 4, 56))


def test_refusals(bundle, tiles, onnx_export, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "work.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not overwritten"):
        command(bundle, tiles, tmp_path / "taken", "onnx")
    with pytest.raises(ModelError, match="an export already"):
        command(onnx_export, tiles, tmp_path / "out", "onnx")
    with pytest.raises(ConfigError, match="--tiles is missing"):
        run([str(bundle), "--to", "onnx", "--out", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="multiples of 14"):
        command(bundle, tiles, tmp_path / "out", "onnx", "--input-px", "60")
    with pytest.raises(ConfigError, match="calibrate on some"):
        command(bundle, tiles, tmp_path / "out", "int8", "--verify-tiles", "31")
    with pytest.raises(SystemExit, match="2"):  # a combination of options that cannot be
        command(bundle, tiles, tmp_path / "out", "onnx", "--push", "a/b")
    assert not (tmp_path / "out").exists()


def test_timm_alone_opens_the_hub_folder(bundle, tmp_path):
    assert run([str(bundle), "--to", "hub", "--out", str(tmp_path / "hub")]) == 0
    save_file({"images": images()}, tmp_path / "images.safetensors")
    alone(TIMM_ALONE, tmp_path / "hub", tmp_path / "images.safetensors", tmp_path / "out.safetensors")
    with torch.no_grad():
        tokens = load_encoder(str(bundle))(images())
    got = load_file(tmp_path / "out.safetensors")["tokens"]
    torch.testing.assert_close(got[:, 0], tokens.cls_BD, atol=1e-5, rtol=0)
    torch.testing.assert_close(got[:, 5:], tokens.patches_BHWD.flatten(1, 2), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_real_teacher_in_int8(shared_data, tmp_path):
    out = tmp_path / "export"
    arguments = [str(shared_data / "teacher-vits14"), "--to", "int8", "--out", str(out), "--input-px", "224"]
    tables = ["--tiles", str(shared_data / "tiles/mitosis"), "--table", str(shared_data / "tiles/multiscanner.csv")]
    assert run([*arguments, *tables]) == 0
    found = json.loads((out / "export.json").read_text())["verification"]["engines"]["openvino-int8"]
    assert found["cls"]["mean_cosine"] >= 0.999
    assert found["patches"]["mean_cosine"] >= 0.999
    assert found["cls"]["centred_cosine"] >= 0.99, "the part that all tokens share must not hide a bad export"
