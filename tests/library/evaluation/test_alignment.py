import math

import pytest
import torch

from library.evaluation.alignment import ALIGNMENTS, DepthRange, fit_affine
from library.evaluation.metrics import DEPTH_METRICS, DepthProtocol, mean_scores, psnr, shuffled

RANGE = DepthRange(low=0.1, high=20)


def random_depth(seed: int = 0) -> torch.Tensor:
    return 0.5 + 9 * torch.rand(12, 10, generator=torch.Generator().manual_seed(seed))


def test_the_table_has_the_named_alignments():
    assert set(ALIGNMENTS) == {"affine_depth", "affine_disparity", "affine_disparity_capped"}


@pytest.mark.parametrize(
    ("name", "relative"),
    [
        ("affine_depth", lambda depth: 0.3 * depth - 0.1),
        ("affine_depth", lambda depth: 5 - 0.2 * depth),
        ("affine_disparity", lambda depth: 0.4 / depth + 0.05),
        ("affine_disparity_capped", lambda depth: 0.4 / depth + 0.05),
    ],
)
def test_an_affine_copy_is_recovered_exactly(name, relative):
    depth = random_depth()
    score = DepthProtocol(alignment=name, depth_range=RANGE).score(relative(depth), depth)
    assert score["absrel"] < 1e-5
    assert score["delta1"] == 1


def test_sky_takes_no_part():
    depth = random_depth()
    prediction = 1 / depth
    depth[:3] = math.inf
    prediction[:3] = 7
    assert DepthProtocol(alignment="affine_disparity", depth_range=RANGE).score(prediction, depth)["absrel"] < 1e-6


def test_pixels_with_no_prediction_are_left_out_of_the_fit_but_not_of_the_score():
    depth = random_depth()
    prediction = 1 / depth
    prediction[0, 0] = 0
    aligned = ALIGNMENTS["affine_disparity"](prediction, depth, valid_hw=RANGE.valid(depth), depth_range=RANGE)
    assert torch.allclose(aligned[1:].float(), depth[1:], rtol=1e-5)
    assert aligned[0, 0] == RANGE.high


def test_the_capped_alignment_stops_at_the_largest_true_depth():
    depth = torch.tensor([[1.0, 2.0, 4.0]])
    prediction = torch.tensor([[1.0, 0.5, -9.0]])
    aligned = ALIGNMENTS["affine_disparity_capped"](prediction, depth, valid_hw=RANGE.valid(depth), depth_range=RANGE)
    assert aligned[0, 2] == 4
    plain = ALIGNMENTS["affine_disparity"](prediction, depth, valid_hw=RANGE.valid(depth), depth_range=RANGE)
    assert plain[0, 2] == 20


def test_a_constant_prediction_becomes_the_harmonic_mean_depth():
    depth = torch.tensor([[1.0, 4.0]])
    aligned = ALIGNMENTS["affine_disparity"](
        torch.full_like(depth, 0.5), depth, valid_hw=RANGE.valid(depth), depth_range=RANGE
    )
    assert torch.allclose(aligned, torch.full_like(aligned, 1.6))
    assert fit_affine(torch.tensor([]), torch.tensor([])) == (0, 0)


def test_metrics_of_known_numbers():
    pred, true = torch.tensor([1.2, 2.0, 9.0]).double(), torch.tensor([1.0, 2.0, 3.0]).double()
    values = {name: float(metric(pred, true)) for name, metric in DEPTH_METRICS.items()}
    assert values["absrel"] == pytest.approx((0.2 + 0 + 2) / 3)
    assert values["delta1"] == values["delta3"] == pytest.approx(2 / 3)
    assert values["rmse"] == pytest.approx(math.sqrt((0.04 + 36) / 3))
    assert values["log_rmse"] == pytest.approx(math.sqrt((math.log(1.2) ** 2 + math.log(3) ** 2) / 3))
    assert values["log10"] == pytest.approx((math.log10(1.2) + math.log10(3)) / 3)
    assert float(DEPTH_METRICS["silog"](3 * true, true)) == pytest.approx(0, abs=1e-5)


def test_an_image_without_ground_truth_is_left_out_of_the_mean_and_one_without_a_prediction_is_not():
    protocol = DepthProtocol(alignment="affine_disparity", depth_range=RANGE)
    depth = torch.linspace(1, 2, 16).reshape(4, 4)
    good = protocol.score(1 / depth, depth)
    empty = protocol.score(torch.ones(4, 4), torch.full((4, 4), math.inf))
    assert mean_scores([empty, good]) == good
    assert math.isnan(mean_scores([empty])["absrel"])
    spoiled = (1 / depth).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(math.nan))
    assert math.isnan(mean_scores([good, protocol.score(spoiled, depth)])["absrel"])


def test_a_range_must_be_ordered():
    with pytest.raises(ValueError, match="0 < low < high"):
        DepthRange(low=2, high=1)


def test_psnr_of_a_known_error_per_image():
    true = torch.zeros(2, 3, 4, 4)
    error = torch.tensor([0.1, 0.01]).reshape(2, 1, 1, 1)
    assert psnr(true + error, true).tolist() == pytest.approx([20, 40], abs=1e-4)


def test_shuffling_pairs_every_sample_with_its_neighbour():
    assert shuffled(torch.arange(4)).tolist() == [1, 2, 3, 0]
