"""The view maker: what its draws depend on, what it writes where, and its settings."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from histill.distill.views import ViewConfig, make_views
from histill.errors import ConfigError

CONFIG = ViewConfig(global_px=32, local_px=14, n_local=3, blur_probability=0.5)
NAMES = ("global_GBCHW", "local_LBCHW", "clean_GBCHW")
SIZES = np.array([[48, 48], [40, 30], [25, 48], [48, 47], [33, 33]])
POSITIONS = np.array([7, 1_000_003, 0, 8, 55])


@pytest.fixture(scope="module")
def tiles():
    return torch.randint(0, 256, (5, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def same(first, second):
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in NAMES)


@pytest.mark.parametrize("teacher_view", ["same", "clean", "other"])
def test_views_depend_on_seed_and_position_alone(tiles, teacher_view):
    config = replace(CONFIG, teacher_view=teacher_view, scanner=1.0)
    together = make_views(tiles, SIZES, POSITIONS, config, seed=3)
    for order in ([4, 2, 0], [1], [3, 3, 3, 3, 3, 3, 1]):
        apart = make_views(tiles[order], SIZES[order], POSITIONS[order], config, seed=3)
        for name in NAMES:
            assert torch.equal(getattr(apart, name), getattr(together, name)[:, order]), (order, name)
    assert same(together, make_views(tiles, SIZES, POSITIONS, config, seed=3))


def test_threads_change_nothing_and_keep_their_number(tiles, three_threads):
    several = make_views(tiles, SIZES, POSITIONS, CONFIG, seed=3)
    assert torch.get_num_threads() == three_threads
    torch.set_num_threads(1)
    assert same(several, make_views(tiles, SIZES, POSITIONS, CONFIG, seed=3))


def test_an_error_in_a_thread_is_raised_and_the_number_of_threads_kept(tiles, three_threads):
    with pytest.raises(IndexError):
        make_views(tiles, SIZES[:, :1], POSITIONS, CONFIG, seed=3)
    assert torch.get_num_threads() == three_threads


def test_seed_position_and_crop_all_matter(tiles):
    one = tiles[:1].expand(4, -1, -1, -1)
    sizes = np.repeat(SIZES[:1], 4, axis=0)
    views = make_views(one, sizes, np.array([5, 6, 5, 2**40]), CONFIG, seed=3)
    crops = [*views.global_GBCHW[:, [0, 1, 3]].flatten(0, 1)]
    crops += [*make_views(one, sizes, np.array([5, 6, 7, 8]), CONFIG, seed=4).global_GBCHW[:, :2].flatten(0, 1)]
    for first in range(len(crops)):
        for second in range(first):
            assert (crops[first] - crops[second]).abs().mean() > 0.01
    assert torch.equal(views.global_GBCHW[:, 0], views.global_GBCHW[:, 2])
    assert (views.local_LBCHW[0] - views.local_LBCHW[1]).abs().mean() > 0.01


def test_more_crops_leave_the_earlier_ones_as_they_are(tiles):
    few = make_views(tiles, SIZES, POSITIONS, CONFIG, seed=3)
    many = make_views(tiles, SIZES, POSITIONS, replace(CONFIG, n_global=3, n_local=5), seed=3)
    assert torch.equal(many.global_GBCHW[:2], few.global_GBCHW)
    assert torch.equal(many.local_LBCHW[:3], few.local_LBCHW)


def test_steps_of_any_length_give_the_same(tiles, monkeypatch):
    from histill.distill.views import make

    views = make_views(tiles, SIZES, POSITIONS, CONFIG, seed=3)
    for chunk in (1, 2**15, 2**30):
        monkeypatch.setattr(make, "CPU_CHUNK", chunk)
        assert same(views, make_views(tiles, SIZES, POSITIONS, CONFIG, seed=3))


def test_a_wider_frame_around_the_tiles_changes_nothing(tiles):
    framed = torch.full((5, 3, 60, 77), 255, dtype=torch.uint8)
    framed[:, :, :48, :48] = tiles
    first = make_views(tiles, SIZES, POSITIONS, CONFIG, seed=3)
    second = make_views(framed, SIZES, POSITIONS, CONFIG, seed=3)
    for name in NAMES:
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=0, atol=1e-6)


def test_strength_nought_is_the_plain_crop(tiles):
    plain = replace(CONFIG, colour=0.0, stain=0.0, blur_probability=0.0)
    whole = replace(plain, global_area=(1.0, 1.0), flips=False, rotations=False, global_px=48, n_global=1)
    views = make_views(tiles[:1], SIZES[:1], POSITIONS[:1], whole, seed=3)
    torch.testing.assert_close(views.global_GBCHW[0], tiles[:1] / 255, rtol=0, atol=1e-6)
    clean = make_views(tiles, SIZES, POSITIONS, replace(CONFIG, teacher_view="clean"), seed=3)
    assert torch.equal(make_views(tiles, SIZES, POSITIONS, plain, seed=3).global_GBCHW, clean.clean_GBCHW)


def test_the_clean_view_is_the_same_cut_in_other_colours(tiles):
    soft = torch.nn.functional.avg_pool2d(tiles.float(), 9, 1, 4).to(torch.uint8)
    views = make_views(soft, SIZES, POSITIONS, replace(CONFIG, teacher_view="clean"), seed=3)
    changed, clean = views.global_GBCHW, views.clean_GBCHW
    assert changed is not clean
    assert (changed - clean).abs().mean() > 0.01
    grey = torch.stack([changed, clean]).mean(dim=3).flatten(3)
    grey = grey - grey.mean(dim=3, keepdim=True)
    correlation = torch.nn.functional.cosine_similarity(*grey, dim=2)
    assert correlation.min() > 0.9
    same_view = make_views(soft, SIZES, POSITIONS, CONFIG, seed=3)
    assert same_view.clean_GBCHW is same_view.global_GBCHW
    assert torch.equal(same_view.global_GBCHW, changed)


def test_values_fill_0_to_1_even_at_full_strength(tiles):
    strong = replace(CONFIG, colour=3.0, stain=3.0)
    views = make_views(tiles, SIZES, POSITIONS, strong, seed=3)
    for name in NAMES:
        values = getattr(views, name)
        assert values.dtype == torch.float32
        assert values.min() == 0
        assert values.max() == 1
        assert not values.requires_grad
        assert not values.is_inference()


def test_each_kind_of_change_reaches_its_share_of_the_crops(tiles):
    many = np.arange(200)
    one, sizes = tiles[:1].expand(200, -1, -1, -1), np.repeat(SIZES[:1], 200, axis=0)
    plain = replace(CONFIG, n_local=0, colour=0.0, stain=0.0, blur_probability=0.0)
    base = make_views(one, sizes, many, plain, seed=1).global_GBCHW
    for change, share in (({"blur_probability": 0.3}, 0.3), ({"colour": 1.0}, 1.0), ({"stain": 1.0}, 1.0)):
        views = make_views(one, sizes, many, replace(plain, **change), seed=1).global_GBCHW
        moved = ((views - base).abs().flatten(2).amax(2) > 1e-3).float().mean()
        assert float(moved) == pytest.approx(share, abs=0.06)


def test_memory_is_used_again_where_it_fits(tiles):
    config = replace(CONFIG, teacher_view="clean")
    expected = make_views(tiles, SIZES, POSITIONS, config, seed=3)
    used = make_views(tiles, SIZES, POSITIONS + 1, config, seed=3)
    again = make_views(tiles, SIZES, POSITIONS, config, seed=3, out=used)
    assert same(again, expected)
    for name in NAMES:
        assert getattr(again, name).data_ptr() == getattr(used, name).data_ptr()
    shorter = make_views(tiles[:2], SIZES[:2], POSITIONS[:2], config, seed=3, out=used)
    assert torch.equal(shorter.local_LBCHW, expected.local_LBCHW[:, :2])
    from_same = make_views(tiles, SIZES, POSITIONS, CONFIG, seed=3)
    assert same(make_views(tiles, SIZES, POSITIONS, config, seed=3, out=from_same), expected)


def test_no_local_crops(tiles):
    views = make_views(tiles, SIZES, POSITIONS, replace(CONFIG, n_local=0, local_px=0), seed=3)
    assert views.local_LBCHW.shape[:3] == (0, 5, 3)
    assert torch.equal(views.global_GBCHW, make_views(tiles, SIZES, POSITIONS, CONFIG, seed=3).global_GBCHW)


@pytest.mark.parametrize("name", ["global_px", "local_px"])
def test_a_crop_size_that_was_not_chosen_is_refused(tiles, name):
    with pytest.raises(ConfigError, match=f"views.{name}"):
        make_views(tiles, SIZES, POSITIONS, replace(CONFIG, **{name: 0}), seed=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("global_px", -1),
        ("local_px", -14),
        ("n_global", 0),
        ("n_local", -1),
        ("global_area", (0.0, 1.0)),
        ("global_area", (0.5, 0.4)),
        ("local_area", (0.1, 1.1)),
        ("local_area", (float("nan"), 0.5)),
        ("aspect", (-1.0, 1.0)),
        ("aspect", (1.0, float("inf"))),
        ("colour", -0.1),
        ("colour", float("nan")),
        ("stain", 3.5),
        ("blur_probability", 1.5),
        ("blur_sigma_px", (0.0, 1.0)),
        ("blur_sigma_px", (2.0, 1.0)),
        ("teacher_view", "blurred"),
    ],
)
def test_settings_out_of_range_are_refused_with_their_name(name, value):
    with pytest.raises(ConfigError) as error:
        ViewConfig(**{name: value})
    assert f"views.{name}" in str(error.value)
    assert "allowed" in str(error.value)


def test_the_settings_import_no_torch():
    code = (
        "import sys; from histill.distill.views.config import ViewConfig; "
        "print(ViewConfig().n_local, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["8", "False"]


def test_the_other_rendering_shows_the_same_piece_of_tissue(tiles):
    """Another look of the same crop: with looks of no strength it is the crop itself; with them it differs."""
    plain = replace(CONFIG, teacher_view="other", colour=0.0, stain=0.0, blur_probability=0.0)
    seen = make_views(tiles, SIZES, POSITIONS, plain, seed=3)
    assert torch.equal(seen.clean_GBCHW, seen.global_GBCHW)
    looks = make_views(tiles, SIZES, POSITIONS, replace(plain, stain=1.0, scanner=1.0), seed=3)
    change = (looks.clean_GBCHW - looks.global_GBCHW).abs().mean((2, 3, 4))
    assert (change > 0.01).all()
    clean = make_views(tiles, SIZES, POSITIONS, replace(plain, teacher_view="clean"), seed=3).clean_GBCHW
    for rendered in (looks.clean_GBCHW, looks.global_GBCHW):  # noise tiles: the pattern stays, whatever the look
        for one, other in zip(rendered.flatten(0, 1), clean.flatten(0, 1), strict=True):
            assert np.corrcoef(one.flatten(), other.flatten())[0, 1] > 0.9


def test_without_a_scanner_views_are_what_they_were(tiles):
    """The scanner's draws come last: they move no other draw."""
    with_it = make_views(tiles, SIZES, POSITIONS, replace(CONFIG, scanner=1e-9), seed=3)
    without = make_views(tiles, SIZES, POSITIONS, CONFIG, seed=3)
    torch.testing.assert_close(with_it.global_GBCHW, without.global_GBCHW, rtol=0, atol=1e-5)
