"""Pixels: the two directions of each modality, and the channel rule."""

import pytest
import torch

from library.modality import MODALITIES, depth_to_pixels, normalize_disparity


def test_order_of_the_modality_axis() -> None:
    assert [(name, row.name, row.index) for name, row in MODALITIES.items()] == [
        ("rgb", "rgb", 0),
        ("depth", "depth", 1),
    ]


def test_rgb_round_trip() -> None:
    rgb = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    pixels = MODALITIES["rgb"].to_pixels(rgb)
    assert pixels.min() >= -1 and pixels.max() <= 1
    torch.testing.assert_close(MODALITIES["rgb"].from_pixels(pixels), rgb)
    assert MODALITIES["rgb"].from_pixels(torch.tensor([[[-3.0, 3.0]]])).tolist() == [[[0.0, 1.0]]]


@pytest.mark.parametrize("transform", ["none", "inverse"])
def test_depth_round_trip(transform: str) -> None:
    disparity = torch.rand(2, 6, 5, generator=torch.Generator().manual_seed(0)) * 40 - 7
    pixels = MODALITIES["depth"].to_pixels(disparity, transform=transform)
    assert pixels.shape == (2, 3, 6, 5) and torch.equal(pixels[:, 0], pixels[:, 2])
    assert pixels.amin(dim=(1, 2, 3)).tolist() == [-1, -1] and pixels.amax(dim=(1, 2, 3)).tolist() == [1, 1]
    near = disparity[0].flatten().argmax()
    assert pixels[0, 0].flatten()[near] == (1 if transform == "none" else -1)
    back = MODALITIES["depth"].from_pixels(pixels, transform=transform)
    torch.testing.assert_close(back, normalize_disparity(disparity))


def test_decoded_depth_is_clamped_before_the_mean() -> None:
    pixels = torch.tensor([3.0, 0.0, -1.0]).view(3, 1, 1)
    assert MODALITIES["depth"].from_pixels(pixels).item() == 0.5


def test_constant_maps_are_finite_and_wrong_transforms_refused() -> None:
    assert depth_to_pixels(torch.full((2, 2), 4.0)).unique().tolist() == [-1]
    with pytest.raises(ValueError, match="inverted"):
        depth_to_pixels(torch.rand(2, 2), transform="inverted")
