import pytest
import torch

from library.evaluation.colors import ColorFinder, Palette, found_share

ALBEDO = {"red": (0.72, 0.03, 0.035), "blue": (0.035, 0.13, 0.72), "grey": (0.2, 0.205, 0.215)}


def nearest(rgb_3hw, mask_hw):
    seen = rgb_3hw[:, mask_hw].mean(1).square()
    return min(ALBEDO, key=lambda name: float((torch.tensor(ALBEDO[name]) - seen).square().sum()))


@pytest.fixture(scope="module")
def finder():
    return ColorFinder(Palette(albedo=ALBEDO, nearest=nearest))


def painted(*squares, background="grey"):
    """A picture with squares (colour, top, left, side) on a plain background."""
    picture = torch.tensor(ALBEDO[background])[:, None, None].sqrt().expand(3, 128, 128).clone()
    for name, top, left, side in squares:
        picture[:, top : top + side, left : left + side] = torch.tensor(ALBEDO[name]).sqrt()[:, None, None]
    return picture


def test_painted_squares_are_found_and_the_background_is_not(finder):
    pictures = torch.stack([painted(("red", 20, 20, 16), ("blue", 80, 70, 12)), painted()])
    assert finder.find(pictures) == [{"red", "blue"}, set()]


def test_a_shaded_square_keeps_its_name(finder):
    picture = painted(("red", 20, 20, 16), background="blue")
    picture[:, 20:28, 20:36] *= 0.7
    assert finder.find(picture[None]) == [{"red"}]


def test_small_thin_and_border_regions_are_no_objects(finder):
    small = painted(("red", 20, 20, 6))
    line = painted()
    line[:, 40:42, 10:100] = torch.tensor(ALBEDO["red"]).sqrt()[:, None, None]
    floor = painted()
    floor[:, 90:] = torch.tensor(ALBEDO["red"]).sqrt()[:, None, None]
    assert finder.find(torch.stack([small, line, floor])) == [set(), set(), set()]


def test_a_tile_with_the_colour_of_the_border_is_background(finder):
    picture = painted(("red", 0, 0, 40), ("red", 60, 60, 30), background="blue")
    assert finder.find(picture[None]) == [set()]


def test_colours_outside_the_palette_have_no_name(finder):
    picture = painted()
    picture[:, 30:60, 30:60] = torch.tensor([0.2, 0.9, 0.2])[:, None, None]
    assert finder.find(picture[None]) == [set()]


def test_shares_count_words_not_pictures():
    assert found_share([{"red", "blue"}, set()], [{"red"}, {"red", "grey"}]) == pytest.approx(1 / 3)
    assert found_share([set()], [set()]) != found_share([set()], [set()])  # NaN: nothing was asked for
