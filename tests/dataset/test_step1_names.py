"""Step 1's order, names, shares and sizes."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from nasty_pictures import PNG, saved
from PIL import Image

from dataset.intake import FitRule, TooSmall, aspect_buckets
from dataset.layout import Layout
from dataset.sources import base_name, belongs_to, candidate_names, list_sources
from library.images import fit_depth, read_fitted, read_rgb


@pytest.mark.parametrize("resolution", [128, 256, 512, 1024])
def test_buckets_have_the_right_sizes(resolution):
    buckets = aspect_buckets(resolution)
    assert (resolution, resolution) in buckets
    assert {(height, width) for width, height in buckets} == set(buckets)
    assert all(side % 16 == 0 for size in buckets for side in size)
    areas = np.array([width * height for width, height in buckets]) / resolution**2
    assert areas.max() <= 1 and areas.min() > 0.8
    assert max(width / height for width, height in buckets) >= 4


def test_a_picture_is_scaled_to_cover_and_cut_in_the_middle():
    rule = FitRule(resolution=32)
    assert rule.size_for(40, 900) == (32, 32)
    with pytest.raises(TooSmall, match="31 x 900, smaller than 32 x 32"):
        rule.size_for(31, 900)
    assert FitRule(resolution=32, upscale=True).size_for(3, 2) == (32, 32)


@pytest.mark.parametrize("ending", ["PNG", "JPEG"])
def test_large_pictures_are_decoded_small_and_look_the_same(tmp_path, ending):
    y, x = np.mgrid[0:600, 0:800]
    waves = np.stack([128 + 100 * np.sin(x / 40), 128 + 100 * np.cos(y / 30), 255 * x / 800], axis=2)
    path = tmp_path / "picture"
    path.write_bytes(saved(Image.fromarray(waves.astype(np.uint8)), ending))
    fitted = read_fitted(path, size_for=lambda width, height: (64, 64), flag="--x")
    assert (fitted.width, fitted.height, fitted.rgb_hw3.shape) == (800, 600, (64, 64, 3))
    block = read_rgb(path)[:, :, 100:700].numpy()  # the middle, 600 x 600
    edges = np.linspace(0, 600, 65).round().astype(int)
    means = np.add.reduceat(np.add.reduceat(block, edges[:-1], 1), edges[:-1], 2)
    means /= np.diff(edges)[None, :, None] * np.diff(edges)[None, None, :]
    assert np.abs(means.transpose(1, 2, 0) * 255 - fitted.rgb_hw3).mean() < 3


@pytest.mark.parametrize("width, height", [(33, 32), (47, 32), (32, 35), (64, 32)])
def test_what_is_not_scaled_is_not_changed(tmp_path, width, height):
    colours = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(colours).save(path)
    left, top = (width - 32) // 2, (height - 32) // 2
    part = np.s_[top : top + 32, left : left + 32]
    assert np.array_equal(read_fitted(path, size_for=lambda *_: (32, 32), flag="--x").rgb_hw3, colours[part])
    map_hw = torch.from_numpy(colours[..., 0].astype(np.float32))
    assert torch.equal(fit_depth(map_hw, width=32, height=32), map_hw[part])


def test_names():
    assert base_name("a/b c/d.e.jpg") == "a__b c__d.e"
    assert list(zip(candidate_names("x.JPG"), range(4), strict=False)) == [
        ("x", 0), ("x~jpg", 1), ("x~jpg~2", 2), ("x~jpg~3", 3)]  # fmt: skip
    assert base_name("cafe\u0301.png") == base_name("caf\u00e9.png")  # two ways to write one letter
    long = [base_name("deep/" * 60 + f"{number}.png") for number in range(3)]
    assert len(set(long)) == 3 and all(len(name.encode()) <= 120 for name in long)


def test_processes_share_the_files_and_competitors_meet():
    paths = [f"{stem}{ending}" for stem in map(str, range(200)) for ending in (".png", ".jpg", ".PNG")]
    for processes in (1, 2, 3, 7):
        shares = [
            [path for path in paths if belongs_to(path, process=p, processes=processes)] for p in range(processes)
        ]
        assert sorted(sum(shares, [])) == sorted(paths)
        assert min(map(len, shares)) > 600 / processes / 2
        assert all({Path(path).stem for path in one}.isdisjoint(Path(path).stem for path in other)
                   for one in shares for other in shares if one is not other)  # fmt: skip


def test_sources_come_in_one_order_wherever_they_lie(tmp_path):
    for path in ("b/1.png", "b.png", "a/z/9.png", "a/b.png", "c.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(PNG)
    expected = ["a/b.png", "a/z/9.png", "b/1.png", "b.png", "c.png"]
    assert [source.relative for source in list_sources(Layout(tmp_path))] == expected
    (tmp_path / "raw_images" / "a").mkdir(parents=True)
    (tmp_path / "a/z").rename(tmp_path / "raw_images/a/z")
    (tmp_path / "b.png").rename(tmp_path / "raw_images/b.png")
    assert [source.relative for source in list_sources(Layout(tmp_path))] == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_may_not_be_listed_is_named(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    (source,) = list_sources(Layout(tmp_path))
    assert source.problem == "a folder that can't be listed (Permission denied)"
