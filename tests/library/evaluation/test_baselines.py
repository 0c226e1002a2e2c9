import torch

from library.evaluation.baselines import PatchStatistics, constant_map, luminance_map, patches, repeated_map


def test_maps_have_the_pictures_shape():
    rgb = torch.rand(2, 3, 16, 24)
    for pred in (constant_map(rgb), luminance_map(rgb), repeated_map(torch.rand(16, 24), rgb)):
        assert pred.shape == (2, 16, 24)
    assert torch.allclose(luminance_map(torch.ones_like(rgb)), torch.ones(2, 16, 24))


def test_pca_reproduces_pictures_of_as_many_dimensions_as_components():
    generator = torch.Generator().manual_seed(0)
    basis = torch.rand(4, 3 * 8 * 8, generator=generator)
    weights = torch.rand(6, 4, generator=generator) / 4
    pictures = (weights @ basis).reshape(6, 3, 8, 8)
    statistics = PatchStatistics()
    for half in pictures.split(3):
        statistics.add(half)
    assert torch.allclose(statistics.fit(components=4).reconstruct(pictures), pictures, atol=1e-3)
    assert not torch.allclose(statistics.fit(components=1).reconstruct(pictures), pictures, atol=1e-3)


def test_patches_are_cut_and_put_back_in_place():
    pictures = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    statistics = PatchStatistics()
    statistics.add(torch.rand(64, 3, 16, 24, generator=torch.Generator().manual_seed(1)))
    assert patches(pictures).shape == (12, 192)
    assert torch.allclose(statistics.fit(components=192).reconstruct(pictures), pictures, atol=1e-4)
