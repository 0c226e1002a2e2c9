"""Noise levels of training pairs: their law, and what they depend on."""

import functools

import pytest
import torch
from golden_files import tensors

from library.flux.schedule import timestep_schedule
from library.timesteps import CLEAN_SHIFT, SAMPLINGS, SHIFT, sample_pair_timesteps, shifted_logit_normal

DRAWS = 20_000


@functools.cache
def draw(*, unbalanced):
    # One generator for all pairs: 20,000 generators would take longer than the draws.
    generator = torch.Generator().manual_seed(0)
    return sample_pair_timesteps(DRAWS, unbalanced=unbalanced, generators=[generator] * DRAWS)


@pytest.fixture(scope="module")
def recorded():
    return tensors("timestep_sampling")


def bound(probability):
    """Return four standard deviations of the share of DRAWS independent draws that hit."""
    return 4 * (probability * (1 - probability) / DRAWS) ** 0.5


def test_the_densities_are_the_recorded_closed_forms(recorded):
    z = torch.distributions.Normal(0, 1).icdf(recorded["quantile_levels"])
    for name, shift in (("f", 3.1582), ("g", 0.25)):
        quantiles = shifted_logit_normal(z, shift=shift)
        torch.testing.assert_close(quantiles, recorded[f"{name}_quantiles_closed_form"], atol=1e-5, rtol=0)
        torch.testing.assert_close(quantiles, recorded[f"{name}_quantiles"], atol=3e-3, rtol=0)


def test_half_of_the_pairs_share_a_level():
    t_MB = draw(unbalanced=True)
    assert t_MB.shape == (2, DRAWS) and t_MB.dtype == torch.float32
    assert t_MB.min() > 0 and t_MB.max() < 1
    equal = t_MB[0] == t_MB[1]
    assert abs(equal.float().mean() - 0.5) < bound(0.5)


def test_quantiles_of_shared_and_of_single_levels(recorded):
    rgb_B, depth_B = draw(unbalanced=True)
    levels = recorded["quantile_levels"]
    shared_B = rgb_B[rgb_B == depth_B]
    for quantile, level in zip(recorded["f_quantiles_closed_form"], levels, strict=True):
        below = (shared_B <= quantile).float().mean()
        assert abs(below - level) < 2**0.5 * bound(float(level))
    # A modality's own law: three quarters f, one quarter g.
    for t_B in (rgb_B, depth_B):
        for quantile in recorded["g_quantiles_closed_form"]:
            logit = torch.logit(quantile)
            normal = torch.distributions.Normal(0.0, 1.0)
            expected = 0.75 * normal.cdf(logit - torch.tensor(3.1582).log()) + 0.25 * normal.cdf(
                logit - torch.tensor(0.25).log()
            )
            assert abs((t_B <= quantile).float().mean() - expected) < bound(float(expected))


def test_the_joint_law_is_the_recorded_one(recorded):
    t_MB = draw(unbalanced=True)
    cells_MB = (t_MB * 20).long().clamp(max=19)
    share = torch.bincount(cells_MB[0] * 20 + cells_MB[1], minlength=400).view(20, 20) / DRAWS
    expected = recorded["hist2d_closed_form"]
    deviation = (expected * (1 - expected) / DRAWS).sqrt()
    assert ((share - expected).abs() <= 5 * deviation + 1e-4).all()
    torch.testing.assert_close(recorded["hist2d"], expected, atol=4e-4, rtol=0)


def test_the_ablation_draws_both_levels_alone(recorded):
    rgb_B, depth_B = draw(unbalanced=False)
    assert (rgb_B == depth_B).float().mean() < 1e-3
    z_MB = torch.stack([rgb_B, depth_B]).logit()
    assert abs(torch.corrcoef(z_MB)[0, 1]) < 4 / DRAWS**0.5
    for t_B in (rgb_B, depth_B):
        for quantile, level in zip(recorded["f_quantiles_closed_form"], recorded["quantile_levels"], strict=True):
            assert abs((t_B <= quantile).float().mean() - level) < bound(float(level))


def seeded(numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.mark.parametrize("unbalanced", [True, False])
def test_a_pair_does_not_depend_on_its_batch_mates(unbalanced):
    whole = sample_pair_timesteps(6, unbalanced=unbalanced, generators=seeded(range(6)))
    parts = [
        sample_pair_timesteps(2, unbalanced=unbalanced, generators=seeded(range(first, first + 2)))
        for first in (0, 2, 4)
    ]
    assert torch.equal(whole, torch.cat(parts, dim=1))
    assert len(whole.unique()) > 5


def test_shifts_move_the_levels():
    low, high = (sample_pair_timesteps(50, shift=shift, generators=seeded(range(50))) for shift in (1.0, 5.0))
    assert (low <= high).all() and (low < high).any()
    low, high = (sample_pair_timesteps(50, clean_shift=shift, generators=seeded(range(50))) for shift in (0.1, 0.5))
    assert (low <= high).all() and 5 <= (low < high).sum() < 50


def test_a_generator_for_each_pair_is_needed():
    with pytest.raises(ValueError, match="2 pairs need as many generators, not 1"):
        sample_pair_timesteps(2, generators=seeded([0]))


NORMAL = torch.distributions.Normal(0.0, 1.0)


def logit_normal_cdf(t, *, shift):
    return NORMAL.cdf(torch.logit(t) - torch.tensor(shift).log())


def shifted_uniform_cdf(t, *, shift):
    return t / (shift - (shift - 1) * t)


LAWS = {
    "shift": (logit_normal_cdf, SHIFT),
    "flux_shift": (logit_normal_cdf, 1.8776106),  # e^(0.5 + 0.65 (1024 - 256) / 3840)
    "sigmoid": (logit_normal_cdf, 1.0),
    "uniform": (shifted_uniform_cdf, 1.0),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_laws_of_the_levels_of_a_pair(name):
    cdf, shift = LAWS[name]
    sampling = SAMPLINGS[name]
    assert sampling.shift(SHIFT, 1024) == pytest.approx(shift, rel=1e-6)
    generator = torch.Generator().manual_seed(1)
    t_MB = sample_pair_timesteps(
        DRAWS, density=sampling.density, shift=sampling.shift(SHIFT, 1024), generators=[generator] * DRAWS
    )
    assert t_MB.min() > 0 and t_MB.max() < 1
    shared_B = t_MB[0] == t_MB[1]
    assert abs(shared_B.float().mean() - 0.5) < bound(0.5)
    for t in torch.tensor([0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95]):
        noisy, clean = float(cdf(t, shift=shift)), float(cdf(t, shift=CLEAN_SHIFT))
        # Of pairs with one level: f. Of the others: f for one modality, g for the other, either way round.
        assert abs((t_MB[0][shared_B] <= t).float().mean() - noisy) < 2**0.5 * bound(noisy)
        for t_B in t_MB:
            own = (noisy + clean) / 2
            assert abs((t_B[~shared_B] <= t).float().mean() - own) < 2**0.5 * bound(own)
        both = (t_MB[:, ~shared_B] <= t).all(dim=0).float().mean()
        assert abs(both - noisy * clean) < 2**0.5 * bound(noisy * clean)


def test_the_native_shift_is_that_of_the_sampler():
    # A schedule's middle level is shift / (1 + shift).
    middle = timestep_schedule(2, 1024)[1]
    assert middle / (1 - middle) == pytest.approx(SAMPLINGS["flux_shift"].shift(SHIFT, 1024), rel=1e-5)
