import pytest
import torch

from library.evaluation.feature_distance import feature_distance, frechet


def normal(count, *, seed, mean=0.0, scale=1.0):
    return mean + scale * torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_distance_of_normal_distributions_is_the_formula():
    first, second = normal(4000, seed=1), normal(4000, seed=2, mean=0.5, scale=2.0)
    assert frechet(first, second) == pytest.approx(6 * (0.5**2 + (2 - 1) ** 2), rel=0.05)
    covariances = [torch.cov(each.T) for each in (first, second)]
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.sqrt().sum()
    expected = (first.mean(0) - second.mean(0)).square().sum() + sum(c.trace() for c in covariances) - 2 * roots
    assert frechet(first, second) == pytest.approx(float(expected), rel=1e-9)


def test_the_distance_is_symmetric_and_zero_for_itself():
    first, second = normal(5, seed=1), normal(9, seed=2)  # fewer samples than features too
    assert frechet(first, second) == pytest.approx(frechet(second, first), rel=1e-9)
    assert frechet(first, first) == pytest.approx(0, abs=1e-9)


def test_more_real_pictures_have_a_ratio_of_about_one_and_others_more():
    real = normal(400, seed=1)
    assert feature_distance(normal(400, seed=2), real).ratio == pytest.approx(1, abs=0.25)
    assert feature_distance(normal(400, seed=2, mean=1), real).ratio > 10
    assert feature_distance(normal(1, seed=2).expand(400, -1), real).ratio > 10  # always the same picture


def test_a_copy_of_the_real_pictures_is_no_nearer_than_other_real_ones():
    real = normal(100, seed=1)
    assert feature_distance(real, real).ratio == pytest.approx(1, abs=1e-6)


def test_as_many_generated_as_real_pictures_are_needed():
    with pytest.raises(ValueError, match="found 3 and 4"):
        feature_distance(normal(3, seed=1), normal(4, seed=2))
