import pytest
import torch

from dataset.evaluation_scenes import SHAPE_FINDER, shape_finder
from dataset.synthetic import GENERATOR_VERSION, HELD_OUT_SEED, render_batch
from dataset.synthetic.geometry import KINDS
from dataset.synthetic.palette import COLOURS
from library.errors import UserError
from library.evaluation.shapes import VIEW, ColorCells, FinderSettings, ShapeFinder, SolidNet, load_finder, save_finder
from library.evaluation.shapes import views as views_of

COUNT = 24


@pytest.fixture(scope="module")
def finder():
    return shape_finder()


@pytest.fixture(scope="module")
def batch():
    return render_batch(HELD_OUT_SEED, range(500, 500 + COUNT))


def pairs(batch, key):
    return [{(item["colour"], item["shape"]) for item in record["objects"] if item[key]} for record in batch.records]


def share(found, wanted):
    return sum(len(a & b) for a, b in zip(found, wanted, strict=True)) / sum(map(len, wanted))


def test_named_solids_of_true_pictures_are_found_and_little_else(finder, batch):
    found, named, seen = finder.find(batch.rgb_B3hw), pairs(batch, "named"), pairs(batch, "visible_pixels")
    assert share(found, named) > 0.8
    assert share(seen, found) > 0.75
    assert share(found, named[1:] + named[:1]) < 0.25


@pytest.mark.parametrize("color", [(0.5, 0.5, 0.5), (0.6, 0.75, 0.9), (0.75, 0.66, 0.5)])
def test_a_picture_without_objects_has_none(finder, color):
    assert finder.find(torch.tensor(color)[None, :, None, None].expand(1, 3, 128, 128)) == [set()]


def test_answers_do_not_depend_on_the_batch(finder, batch):
    three = batch.rgb_B3hw[:3]
    assert finder.find(three) == [each for picture in three for each in finder.find(picture[None])]
    alone = torch.cat([finder.features(picture[None]) for picture in three])
    assert torch.allclose(finder.features(three), alone, atol=1e-5)


def test_other_sizes_are_resized(finder, batch):
    larger = torch.nn.functional.interpolate(batch.rgb_B3hw, scale_factor=2, mode="bilinear")
    assert share(finder.find(larger), finder.find(batch.rgb_B3hw)) > 0.8


def test_a_view_is_centred_on_its_object():
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[0, 4:8, 20:28] = True
    rgb = mask[:, None].expand(1, 3, 32, 32).float().repeat_interleave(4, 2).repeat_interleave(4, 3)
    view = views_of(rgb, mask)[0]
    rows, columns = (view[3] > 0).any(1).nonzero().flatten(), (view[3] > 0).any(0).nonzero().flatten()
    assert view.shape == (4, VIEW, VIEW)
    assert int(rows[0] + rows[-1]) == int(columns[0] + columns[-1]) == VIEW - 1
    assert len(columns) == pytest.approx(VIEW / 1.4, abs=1) and len(rows) == pytest.approx(VIEW / 2.8, abs=1)
    assert ((view[0] > 0) == (view[3] > 0)).float().mean() > 0.95


def test_a_saved_finder_answers_the_same_and_belongs_to_its_scenes(tmp_path):
    torch.manual_seed(0)
    settings = FinderSettings(solids=("ball", "box"), colors=("red", "blue", "grey"), generator_version=7, min_cells=2)
    finder = ShapeFinder(cells=ColorCells(colors=3), solids=SolidNet(solids=2), settings=settings)
    path = tmp_path / "finder.safetensors"
    save_finder(path, finder)
    names = {"solids": settings.solids, "colors": settings.colors}
    again = load_finder(path, generator_version=7, **names)
    rgb = torch.rand(2, 3, 128, 128)
    assert again.settings == settings
    assert torch.allclose(again.features(rgb), finder.features(rgb), atol=1e-2)
    with pytest.raises(UserError, match="trained on scenes of generator version 7, not 8; make it with"):
        load_finder(path, generator_version=8, **names)
    with pytest.raises(UserError, match="no such file; make it with"):
        load_finder(tmp_path / "none.safetensors", generator_version=7, **names)


def test_the_stored_finder_is_small_and_knows_every_colour_and_solid(finder):
    assert SHAPE_FINDER.stat().st_size <= 300_000
    settings = finder.settings
    assert (settings.colors, settings.solids) == (COLOURS, KINDS) and settings.generator_version == GENERATOR_VERSION
