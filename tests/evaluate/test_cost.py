"""What an encoder costs: counts by hand, and a measurement that stands on real work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from histill.evaluate.cost import cost_of, count_macs, measure
from histill.evaluate.embedding import EncoderEmbedder
from histill.models import STUDENTS, build_student, wrap
from histill.models.encoder import Encoder

MEAN, STD = (0.7, 0.58, 0.7), (0.21, 0.23, 0.18)


def encoder_of(name: str, input_px: int = 56) -> Encoder:
    return wrap(build_student(name, seed=1), name=name, mean=MEAN, std=STD, input_px=input_px).eval()


@pytest.mark.parametrize(("name", "input_px"), [("vit-nano", 56), ("vit-tiny", 224), ("h0-mini", 98)])
def test_macs_are_those_of_a_count_by_hand(name: str, input_px: int) -> None:
    """Patch embedding, then per block qkv, two products of attention, projection and the layers of the MLP."""
    encoder = encoder_of(name)
    block = encoder.model.blocks[0]
    width, depth, patch = encoder.embed_dim, len(encoder.model.blocks), encoder.patch_px
    patches = (input_px // patch) ** 2
    tokens = patches + encoder.prefix_tokens
    layers = [m for m in block.mlp.modules() if isinstance(m, torch.nn.Linear)]
    mlp = sum(layer.in_features * layer.out_features for layer in layers)
    attention = 3 * width * width + width * width + 2 * tokens * width
    assert len(layers) in (2, 3)
    by_hand = patches * 3 * patch**2 * width + depth * tokens * (attention + mlp)
    assert count_macs(encoder, input_px) == by_hand


def test_vit_small_has_the_published_count() -> None:
    """DeiT-S at 224 px with patches of 16: 4.6 G in its paper (arXiv 2012.12877, table 5)."""
    import timm

    model = timm.create_model("vit_small_patch16_224", pretrained=False, num_classes=0)
    encoder = wrap(model, name="s", mean=MEAN, std=STD, input_px=224).eval()
    assert count_macs(encoder, 224) / 1e9 == pytest.approx(4.6, abs=0.05)


def test_a_measurement_names_all_that_it_depends_on() -> None:
    encoder = encoder_of("vit-nano")
    embedder = EncoderEmbedder.of(encoder, name="n", precision="fp32", batch=4)
    embedder.embed(np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), np.uint8))
    found = measure(embedder)
    assert found.parameters == STUDENTS["vit-nano"].params
    assert found.macs_per_tile == count_macs(encoder, 56)
    assert found.tiles == "tiles of a benchmark"
    assert 1 <= found.batch <= 4
    assert (found.input_px, found.precision, found.threads) == (56, "fp32", torch.get_num_threads())
    assert found.processor
    assert torch.__version__ in found.engine
    assert found.tiles_per_second > 0
    assert found.yardstick_gflops > 0
    if Path("/proc/self/clear_refs").exists():
        weights = sum(each.nbytes for each in encoder.parameters())
        assert found.memory_bytes is not None
        assert weights <= found.memory_bytes < weights + 2**30


def test_more_tiles_at_once_need_more_memory() -> None:
    """Eight hold at least their normalised images, 3 x 224 x 224 x 4 bytes each, more than one does."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux, which tells the peak of a part of a process")
    encoder = encoder_of("vit-nano", 224)
    embedders = [EncoderEmbedder.of(encoder, name="n", precision="fp32", batch=batch) for batch in (1, 64)]
    one, many = (measure(embedder) for embedder in embedders)
    assert (one.memory_batch, many.memory_batch) == (1, 8)
    assert many.memory_bytes - one.memory_bytes > 7 * 3 * 224 * 224 * 4


def test_it_is_measured_once_for_weights_size_precision_and_machine(tmp_path: Path) -> None:
    encoder = encoder_of("vit-nano")
    embedder = EncoderEmbedder.of(encoder, name="n", precision="fp32", batch=2)
    first = cost_of(embedder, tmp_path)
    assert first["tiles"] == "drawn tissue"  # nothing was embedded
    (path,) = tmp_path.iterdir()
    written = path.stat().st_mtime_ns
    both = EncoderEmbedder.of(encoder, name="m", pooling="cls+mean", precision="fp32", batch=2)
    assert cost_of(both, tmp_path) == first
    assert path.stat().st_mtime_ns == written
    cost_of(EncoderEmbedder.of(encoder, name="n", precision="fp32", input_px=28, batch=2), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
