"""Padding and resizing."""

import pytest
import torch

from library.sizes import crop, is_stretched, pad_to_multiple, processing_size, resize


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 17, 31), (2, 3, 16, 33), (5, 48)])
def test_padding_comes_back(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    padded = pad_to_multiple(x)
    assert padded.shape[-1] % 16 == 0 and padded.shape[-2] % 16 == 0 and padded.shape[-1] - shape[-1] < 16
    assert torch.equal(crop(padded, height=shape[-2], width=shape[-1]), x)
    assert torch.equal(padded[..., -1, -1], x[..., -1, -1])


def test_resizing_keeps_range_and_identity() -> None:
    x = torch.rand(3, 40, 24, generator=torch.Generator().manual_seed(0))
    assert resize(x, height=40, width=24) is x
    small = resize(x, height=9, width=7)
    assert small.shape == (3, 9, 7) and small.min() >= x.min() and small.max() <= x.max()


@pytest.mark.parametrize("size", [(77, 131), (31, 8), (200, 300)])
def test_resizing_leaves_no_maps_range_by_a_last_bit(size: tuple[int, int]) -> None:
    maps = torch.stack([torch.full((128, 218), value) for value in (1.0, 0.3, 0.0)])
    resized = resize(maps, height=size[0], width=size[1])
    assert torch.equal(resized, maps[:, :1, :1].expand(3, *size))


def test_only_a_visible_change_of_the_aspect_is_a_stretch() -> None:
    assert is_stretched((480, 640), (480, 480)) and is_stretched((480, 480), (480, 640))
    assert not is_stretched((667, 1000), (688, 1024)) and not is_stretched((34, 50), (11, 16))


def test_processing_size_keeps_the_aspect() -> None:
    assert processing_size(1000, 2000, short_side=128) == (128, 256)
    assert processing_size(90, 30, short_side=128) == (384, 128)
    assert processing_size(37, 91, short_side=0) == (37, 91)
