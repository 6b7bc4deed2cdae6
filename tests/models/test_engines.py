from __future__ import annotations

import importlib.abc
import sys

import pytest
import timm
import torch
from timm.layers import GluMlp, SwiGLU
from timm.models.vision_transformer import ParallelScalingBlock

import histill
from histill.errors import ConfigError, DataError, MissingExtraError, ModelError
from histill.models import STUDENTS, build_student, load_encoder, wrap, write_bundle
from histill.models.engines import ENGINES, open_engine, with_openvino
from histill.models.engines.capture import TokenGraph
from histill.models.engines.choose import in_turns
from histill.models.engines.open import engine_of
from histill.models.engines.simplify import simplify

MEAN, STD = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
EXACT = ("torch-fp32", "onnxruntime", "openvino-fp32")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines") / "nano"
    model = build_student("vit-nano", seed=0).eval()
    write_bundle(
        folder,
        model,
        STUDENTS["vit-nano"],
        mean=MEAN,
        std=STD,
        input_px=56,
        provenance={},
        embedding="cls+mean",
        licence="MIT",
    )
    return folder


def images(count=5, px=56):
    return torch.randint(0, 256, (count, 3, px, px), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def expected(bundle, batch_BCHW):
    """By hand: normalise, timm's own features, cut off the prefix."""
    model = load_encoder(str(bundle)).model
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    with torch.no_grad():
        tokens = model.forward_features((batch_BCHW.float() / 255 - mean) / std)
    side = batch_BCHW.shape[-1] // 14
    return tokens[:, 0], tokens[:, 5:].reshape(len(batch_BCHW), side, side, -1)


@pytest.mark.parametrize("name", ["torch-fp32", "torch-bf16", "onnxruntime", "openvino-fp32", "openvino-bf16"])
def test_the_contract(bundle, name):
    if name == "openvino-bf16":
        from histill.models.engines.with_openvino import has_bf16

        if not has_bf16():
            pytest.skip("this processor has no bf16")
    engine = open_engine(str(bundle), engine=name, batch=2)  # 5 images: two full batches and a part
    assert (engine.name, engine.engine, engine.device) == (str(bundle), name, "cpu")
    assert (engine.embed_dim, engine.patch_px, engine.prefix_tokens, engine.input_px) == (128, 14, 5, 56)
    assert (engine.mean, engine.std, engine.licence) == (MEAN, STD, "MIT")
    assert (engine.embedding, engine.embedding_dim) == ("cls+mean", 256)
    tokens = engine(images())
    assert tokens.cls_BD.dtype == tokens.patches_BHWD.dtype == torch.float32
    cls_BD, patches_BHWD = expected(bundle, images())
    assert tokens.patches_BHWD.shape == (5, 4, 4, 128)
    if name in EXACT:
        torch.testing.assert_close(tokens.cls_BD, cls_BD, atol=1e-4, rtol=0)
        torch.testing.assert_close(tokens.patches_BHWD, patches_BHWD, atol=1e-4, rtol=0)
    else:
        assert torch.cosine_similarity(tokens.cls_BD, cls_BD).min() > 0.999
        assert torch.cosine_similarity(tokens.patches_BHWD, patches_BHWD, dim=-1).min() > 0.999
    first = tokens.cls_BD.clone()
    engine(images().flip(0))
    assert torch.equal(first, tokens.cls_BD), "a later batch wrote into an earlier result"


def test_the_hash_tells_what_changes_the_numbers(bundle):
    encoder = load_encoder(str(bundle))
    weights = encoder.content_hash()
    hashes = {name: engine_of(encoder, name).content_hash() for name in ("torch-fp32", "torch-bf16", "openvino-fp32")}
    assert hashes["torch-fp32"] == hashes["openvino-fp32"] == weights
    assert hashes["torch-bf16"] != weights
    with torch.no_grad():
        encoder.model.norm.bias[0] += 1
    assert engine_of(encoder, "torch-fp32").content_hash() != weights


def test_another_size(bundle):
    engine = open_engine(str(bundle), engine="openvino-fp32", input_px=84)
    _, patches_BHWD = expected(bundle, images(2, 84))
    torch.testing.assert_close(engine(images(2, 84)).patches_BHWD, patches_BHWD, atol=1e-4, rtol=0)
    with pytest.raises(DataError, match=r"uint8 \(B, 3, 84, 84\)"):
        engine(images(2, 56))


@pytest.mark.parametrize("bad", [images(2, 42), images(2).float(), images(2)[:0], images(2)[0]])
def test_wrong_images(bundle, bad):
    with pytest.raises(DataError, match="uint8"):
        open_engine(str(bundle))(bad)


def test_a_fixed_batch_is_filled_up(bundle):
    engine = open_engine(str(bundle), batch=4)
    seen = []

    def run(images_BCHW):
        seen.append(len(images_BCHW))
        return engine.run(images_BCHW)

    import dataclasses

    fixed = dataclasses.replace(engine, fixed_batch=True, run=run)
    torch.testing.assert_close(fixed(images(6)).cls_BD, engine(images(6)).cls_BD, atol=1e-5, rtol=0)
    assert seen == [4, 4]


def test_rotary_embeddings_survive_the_graph():
    model = timm.create_model("eva02_tiny_patch14_224", num_classes=0, depth=2, dynamic_img_size=True).eval()
    encoder = wrap(model, name="eva", mean=MEAN, std=STD, input_px=84)
    pixels = images(2, 84)
    with torch.no_grad():
        tokens = encoder(pixels)
        cls_BD, patches_BHWD = TokenGraph(encoder, pixels=True)(pixels.permute(0, 2, 3, 1))
    torch.testing.assert_close(cls_BD, tokens.cls_BD)
    torch.testing.assert_close(patches_BHWD, tokens.patches_BHWD)
    assert encoder.model.dynamic_img_size, "the encoder itself must not be changed"


def random_model(**arguments):
    """In float64, and nothing in it is zero or one."""
    model = timm.create_model(
        arguments.pop("name", "vit_tiny_patch16_224"), num_classes=0, img_size=32, depth=2, embed_dim=48, **arguments
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


@pytest.mark.parametrize(
    ("arguments", "gone"),
    [
        ({"name": "vit_giant_patch14_reg4_dinov2", "patch_size": 16, "num_heads": 4}, {"LayerScale", "GluMlp"}),
        ({"num_heads": 3, "init_values": 0.1}, {"LayerScale"}),
        ({"num_heads": 3, "qkv_bias": False, "proj_bias": False, "init_values": 0.1}, {"LayerScale"}),
        ({"num_heads": 3, "qk_norm": True, "mlp_layer": GluMlp}, {"GluMlp"}),
        ({"num_heads": 3, "scale_mlp_norm": True, "mlp_layer": GluMlp}, {"GluMlp"}),
    ],
)
def test_a_simplified_model_is_the_same(arguments, gone):
    model = random_model(**arguments)
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model.forward_features(pixels)
        assert {type(module).__name__ for module in model.modules()} >= gone | {"Attention"}
        simplify(model)
        assert not {type(module).__name__ for module in model.modules()} & (gone | {"Attention"})
        torch.testing.assert_close(model.forward_features(pixels), before, atol=1e-9, rtol=1e-9)
    assert all(block.norm1.bias is None and block.attn.value.bias is None for block in model.blocks)


@pytest.mark.parametrize(
    "arguments", [{"block_fn": ParallelScalingBlock}, {"scale_attn_norm": True, "mlp_layer": SwiGLU}]
)
def test_what_is_not_known_stays(arguments):
    model = random_model(num_heads=3, init_values=0.1, **arguments)
    before = [(name, type(module), id(module)) for name, module in model.named_modules()]
    simplify(model)
    assert [(name, type(module), id(module)) for name, module in model.named_modules()] == before


def test_auto_says_what_it_measured(bundle, capsys):
    engine = open_engine(str(bundle), engine="auto", batch=2)
    said = capsys.readouterr().err
    assert engine.engine in ENGINES
    assert said.startswith(f"engine auto: {engine.engine} ")
    rates = {
        word: float(rate) for word, rate in (pair.split() for pair in said.split(": ")[-1].rstrip(")\n").split(", "))
    }
    assert {"torch-fp32", "torch-bf16"} <= set(rates)
    assert max(rates, key=rates.get) == engine.engine


def test_turns_are_taken_in_turn():
    order = []
    times = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert "".join(order) == "ab" + "ababab"
    assert [len(each) for each in times.values()] == [3, 3]


def test_refusals(bundle):
    with pytest.raises(ConfigError, match="did you mean openvino-fp32"):
        open_engine(str(bundle), engine="openvino-fp23")
    with pytest.raises(ModelError, match="--to int8"):
        open_engine(str(bundle), engine="openvino-int8")
    with pytest.raises(ConfigError, match="processor only"):
        open_engine(str(bundle), engine="onnxruntime", device="cuda")
    with pytest.raises(ModelError, match="no model of this name"):
        open_engine("no-such-model")


class _Absent(importlib.abc.MetaPathFinder):
    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    ("engine", "library", "extra"),
    [
        ("onnxruntime", "onnxruntime", "onnx"),
        ("onnxruntime", "onnxscript", "onnx"),
        ("openvino-fp32", "openvino", "openvino"),
    ],
)
def test_a_missing_library_is_named(bundle, monkeypatch, engine, library, extra):
    for name in [name for name in sys.modules if name == library or name.startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Absent(library), *sys.meta_path])
    with pytest.raises(MissingExtraError, match=rf"(?s){library} is not installed.*histill\[{extra}\]"):
        open_engine(str(bundle), engine=engine)


@pytest.mark.slow
def test_compiled(bundle):
    engine = open_engine(str(bundle), engine="torch-compile-bf16", batch=4)
    cls_BD, _ = expected(bundle, images())
    assert torch.cosine_similarity(engine(images()).cls_BD, cls_BD).min() > 0.999


def test_an_engine_embeds_by_the_models_rule(tmp_path):
    facts = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "input_px": 56, "provenance": {}}
    write_bundle(tmp_path / "b", build_student("vit-nano", seed=0), STUDENTS["vit-nano"], embedding="cls+mean", **facts)
    images = torch.randint(0, 256, (3, 3, 56, 56), dtype=torch.uint8)
    engine = histill.open_engine(str(tmp_path / "b"), engine="torch-fp32")
    with torch.inference_mode():
        expected = load_encoder(str(tmp_path / "b")).embed(images)
    assert engine.embedding_dim == expected.shape[1]
    torch.testing.assert_close(engine.embed(images), expected)


@pytest.mark.parametrize(("bf16", "expected"), [(True, "bf16"), (False, "f32")])
def test_bf16_is_never_asked_of_a_processor_without_it(bf16, expected, monkeypatch):
    """OpenVINO would emulate it, several times slower than float32, without a word."""
    monkeypatch.setattr("histill.models.engines.with_openvino.has_bf16", lambda: bf16)
    assert with_openvino.precision_of("openvino-int8") == expected
    assert with_openvino.precision_of("openvino-fp32") == "f32"
