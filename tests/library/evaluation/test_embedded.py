import math

import pytest
import torch

from library.evaluation.baselines import PatchStatistics
from library.evaluation.colors import ColorFinder, Palette
from library.evaluation.embedded import GROUPS, Setting, absrel, measure, reference_depth, work
from library.evaluation.progress import Progress
from library.evaluation.report import MEASURES, compared, figures_of, markdown_table, missed, text_table
from library.evaluation.scene_set import SceneSet, SeenObject

ALBEDO = {"red": (0.72, 0.03, 0.035), "blue": (0.035, 0.13, 0.72), "yellow": (0.95, 0.76, 0.05)}
SIZE = 64


def nearest(rgb_3hw, mask_hw):
    seen = rgb_3hw[:, mask_hw].mean(1).square()
    return min(ALBEDO, key=lambda name: float((torch.tensor(ALBEDO[name]) - seen).square().sum()))


def scenes() -> SceneSet:
    """Three scenes: one coloured square each, before a wall that slants differently."""
    rgb = torch.full((3, 3, SIZE, SIZE), 0.5)
    metric = torch.empty(3, SIZE, SIZE)
    objects = []
    ramp = torch.linspace(0, 1, SIZE)
    slants = (ramp[:, None].expand(SIZE, SIZE), ramp.expand(SIZE, SIZE), ramp.flip(0).expand(SIZE, SIZE))
    for index, (name, albedo) in enumerate(ALBEDO.items()):
        mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        mask[10 + 8 * index : 26 + 8 * index, 14:34] = True
        rgb[index, :, mask] = torch.tensor(albedo).sqrt()[:, None]
        metric[index] = (2 + 6 * slants[index]).where(~mask, 1.5)
        objects.append([SeenObject(color=name, shape="box", mask_hw=mask, named=True)])
    metric[:, :4] = math.inf
    disparity = (1 / metric) * 1.5
    return SceneSet(
        rgb_N3hw=rgb,
        disparity_Nhw=disparity,
        metric_Nhw=metric,
        captions=list(ALBEDO),
        objects=objects,
        mean_map_hw=disparity.mean(0),
    )


class Oracle:
    """Knows the true scene of every prompt and picture."""

    def __init__(self, known: SceneSet) -> None:
        self.known = known

    def reconstruct_rgb(self, rgb_N3hw, *, noise=0.0):
        return rgb_N3hw + noise * 0.1

    def reconstruct_disparity(self, disparity_Nhw, *, noise=0.0):
        return disparity_Nhw + noise * 0.1

    def estimate_depth(self, rgb_N3hw, *, steps, purpose):
        distance = (rgb_N3hw[:, None] - self.known.rgb_N3hw[None]).square().flatten(2).sum(-1)
        return self.known.disparity_Nhw[distance.argmin(1)]

    def depth_to_image(self, disparity_Nhw, prompts, *, steps):
        return self.generate_jointly(prompts, steps=steps)[0]

    def generate_jointly(self, prompts, *, steps):
        places = [self.known.captions.index(prompt) for prompt in prompts]
        return self.known.rgb_N3hw[places], self.known.disparity_Nhw[places]


class Collapsed(Oracle):
    """Always makes the same pair."""

    def generate_jointly(self, prompts, *, steps):
        return super().generate_jointly([self.known.captions[0]] * len(prompts), steps=steps)


class KnownShapes:
    """Knows what is in the true pictures, and takes any other for the one it is nearest to."""

    def __init__(self, known: SceneSet) -> None:
        self.known = known

    def find(self, rgb_B3hw):
        distance = (rgb_B3hw[:, None] - self.known.rgb_N3hw[None]).square().flatten(2).sum(-1)
        return [self.known.seen_shapes()[place] for place in distance.argmin(1).tolist()]

    def features(self, rgb_B3hw):
        return rgb_B3hw.mean((2, 3))


def measured(kind: type[Oracle]) -> dict[str, float]:
    known = scenes()
    statistics = PatchStatistics()
    statistics.add(known.rgb_N3hw)
    setting = Setting(
        scenes=known,
        model=kind(known),
        colors=ColorFinder(Palette(albedo=ALBEDO, nearest=nearest)),
        shapes=KnownShapes(known),
        pca=statistics.fit(),
        progress=Progress(total=1),
    )
    return measure(setting, tuple(GROUPS))


def test_an_oracle_is_perfect_and_chance_is_not():
    values = measured(Oracle)
    assert values["depth_absrel"] == values["depth_absrel_autoencoder"] < 1e-5
    assert values["d2i_ratio"] < 0.01 and values["d2i_absrel_shuffled"] > 0.05
    assert values["joint_absrel"] < 1e-5 and values["joint_ratio"] < 0.01
    assert values["joint_absrel_true_pairs"] < 1e-5
    assert values["color_words"] == values["color_words_ceiling"] == values["d2i_color_words"] == 1
    assert values["color_words_shuffled"] == values["color_words_overlap"] == 0
    assert values["shape_words"] == values["shape_words_ceiling"] == values["d2i_shape_words"] == 1
    assert values["shape_words_shuffled"] == values["shape_words_overlap"] == 0
    assert values["shape_classifier_accuracy"] == values["shape_classifier_precision"] == 1
    assert values["feature_distance_ratio"] == values["feature_distance_ratio_ceiling"] == pytest.approx(1)
    assert values["ae_hue_kept"] == 1
    assert values["ae_psnr_rgb"] == pytest.approx(120)
    assert values["ae_psnr_rgb_noise"] == pytest.approx(40, abs=0.1)
    assert values["depth_absrel_constant"] > values["depth_absrel"]
    assert values["median_objects"] == 1 and values["colors"] == 3


def test_a_collapsed_generator_fails_the_ratios():
    values = measured(Collapsed)
    assert values["joint_absrel"] < 1e-5  # each pair agrees, but ...
    assert not values["joint_ratio"] <= 0.6  # ... no better than with any other
    assert values["d2i_ratio"] > 0.6
    assert values["color_words"] == values["shape_words"] == pytest.approx(1 / 3)
    assert {"joint_ratio", "d2i_ratio", "color_words", "shape_words"} <= set(missed(values))


def test_every_row_of_the_table_is_measured():
    values = measured(Oracle)
    assert {measure.key for measure in MEASURES} | {key for row in MEASURES for key in row.beside} <= values.keys()


def test_the_reference_leaves_out_far_pixels():
    depth = reference_depth(torch.tensor([[[1.0, 0.05, 0.2, 0.0]]]))
    assert depth.tolist() == [[[1.0, math.inf, 5.0, math.inf]]]


def test_an_empty_reference_counts_as_failed():
    far = reference_depth(torch.zeros(1, 8, 8))
    assert absrel(torch.rand(1, 8, 8), far) == 1


def test_work_grows_with_scenes_and_steps():
    assert work(["joint"], scenes=4, steps=20, depth_steps=8) == 2 * work(["joint"], scenes=2, steps=20, depth_steps=8)


def test_tables_show_value_baselines_and_verdict():
    values = {"ae_psnr_rgb": 36.62, "pca_psnr_rgb": 31.6, "depth_absrel": 0.075, "depth_absrel_mean_map": 0.14}
    lines = text_table(values).splitlines()
    psnr = next(line for line in lines if line.startswith("ae_psnr_rgb"))
    assert all(part in psnr for part in ("36.6", "31.6", ">= 36", "ok"))
    assert "MISSED" in next(line for line in lines if line.startswith("depth_absrel "))  # not a third of the mean map's
    assert missed(values) == ["depth_absrel"]
    assert "| autoencoder, picture, dB (`ae_psnr_rgb`) | 36.6 | pca_psnr_rgb 31.6 | >= 36 |" in markdown_table(values)
    assert compared(values, {"ae_psnr_rgb": 30.0}) == "ae_psnr_rgb: 30.0 -> 36.6"


def test_figures_are_numbers_under_the_names_of_measures():
    assert figures_of({"depth_absrel": 0.1, "ae_psnr_rgb": None, "scenes": 4, "colors": 12}) == {
        "depth_absrel": 0.1,
        "colors": 12,
    }
    assert figures_of(3) == figures_of([1]) == {}


def test_a_share_of_what_was_not_measured_is_not_judged():
    assert missed({"depth_absrel": 0.075}) == []
    assert missed({"depth_absrel": 0.09}) == ["depth_absrel"]
    assert missed({"depth_absrel": math.nan}) == ["depth_absrel"]


def test_parts_of_a_scene_set_must_match():
    known = scenes()
    with pytest.raises(ValueError, match="as many of each part"):
        SceneSet(
            rgb_N3hw=known.rgb_N3hw[:2],
            disparity_Nhw=known.disparity_Nhw,
            metric_Nhw=known.metric_Nhw,
            captions=known.captions,
            objects=known.objects,
            mean_map_hw=known.mean_map_hw,
        )
