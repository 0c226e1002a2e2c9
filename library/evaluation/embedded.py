"""The measures of the embedded model, each group one function over the same held-out scenes.

Protocols (rates are fractions, PSNR is the mean over pictures of dB in [0, 1]; sizes and seeds are fixed, so a figure
repeats):

- `ae_*`: the autoencoder's posterior mean, decoded and clipped to [0, 1]; depth is the disparity scaled to [0, 1] by
  picture. `*_noise`: Gaussian noise on the latents, its standard deviation a tenth of that of all latents of that
  modality.
- `ae_hue_kept`: share of objects with at least 50 visible pixels whose nearest palette colour the autoencoder leaves
  unchanged.
- `depth_*`: depth estimated from the true picture with the empty prompt, `affine_disparity` alignment, depth 0.1 ..
  20 m, sky invalid. The baselines (constant, per-pixel mean of training scenes, luminance, the autoencoder's
  reconstruction of the true map) stand in the prediction's place.
- `d2i_*`: a picture is generated from the true depth and the caption, its depth is estimated with the empty prompt,
  and compared with the given depth as above. `d2i_ratio` is that AbsRel over the one of shuffled pairs. A model deaf to
  the caption can keep it small: `d2i_color_words` and `d2i_shape_words` tell, as below.
- `joint_*`: picture and depth are generated from the caption, the depth of the picture is estimated again (the
  reference), both disparities in [0, 1] as they leave the decoder. The generated one is aligned by least squares over
  pixels where the reference is > 0.05, both are inverted (the aligned one clipped to 1/d in 0.1 .. 20), AbsRel over
  those pixels. This is `affine_disparity` with 1/reference as the true depth.
- `color_words`: share of the colours of objects named in the captions that are found in the jointly generated
  pictures; beside it the same against the next scene's caption (chance), in true renders through the autoencoder
  (ceiling), and how many of the next caption's colours a scene truly has, which no test can go below (overlap).
- `shape_words`: the same for coloured solids ("red cone"), as `library/evaluation/shapes.py` finds them; beside it
  also its own accuracy on true renders: the share of named ones it finds, and of what it finds the share that is there.
- `feature_distance_*`: the Frechet distance of jointly generated pictures to true ones over that of two halves of true
  ones, in the inner features of the same networks (`library/evaluation/feature_distance.py`); beside it the same for
  true renders through the autoencoder.

A shuffled pair is a sample and its successor in the cyclic order. A pair whose reference has fewer than 1 % usable
pixels (an all-far map) counts as AbsRel 1 in every measure of generated depth, so that failing can't be a way out.

Shapes: N scenes, h w pixels.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from library.evaluation.alignment import DepthRange
from library.evaluation.baselines import PatchPCA, constant_map, luminance_map, repeated_map
from library.evaluation.colors import ColorFinder, Palette, found_share
from library.evaluation.feature_distance import FeatureDistance, feature_distance
from library.evaluation.metrics import DepthProtocol, mean_scores, psnr, shuffled
from library.evaluation.progress import Progress
from library.evaluation.scene_set import SceneSet
from library.evaluation.shapes import Pair

DEPTH_PROTOCOL = DepthProtocol(alignment="affine_disparity", depth_range=DepthRange(low=0.1, high=20))
REFERENCE_MIN_DISPARITY = 0.05  # below it 1/d is mostly noise; 1/0.05 is the far end of the depth range too
LATENT_NOISE = 0.1  # of the latents' standard deviation
HUE_MIN_PIXELS = 50
TIMED_STEPS = 20
OWN_DEPTH = "depth"  # the purpose of depth estimation that is measured; every other one serves to look at pictures
TIMED_RUNS = 3
Word = TypeVar("Word")  # a colour, or a colour and a solid


class Answers(Protocol):
    """What is measured: the three tasks and the autoencoder for many samples at once (`generation.BatchedModel`).

    Pictures (N, 3, h, w) and disparity maps (N, h, w) are in [0, 1].
    """

    def reconstruct_rgb(self, rgb_N3hw: Tensor, *, noise: float = 0.0) -> Tensor:
        """Return pictures through the autoencoder, with noise of that share of the latents' standard deviation."""
        ...

    def reconstruct_disparity(self, disparity_Nhw: Tensor, *, noise: float = 0.0) -> Tensor:
        """Return disparity maps through the autoencoder, as `reconstruct_rgb` does pictures."""
        ...

    def estimate_depth(self, rgb_N3hw: Tensor, *, steps: int, purpose: str) -> Tensor:
        """Return the disparity of pictures; each purpose has noise of its own."""
        ...

    def depth_to_image(self, disparity_Nhw: Tensor, prompts: Sequence[str], *, steps: int) -> Tensor:
        """Return pictures for disparity maps and prompts."""
        ...

    def generate_jointly(self, prompts: Sequence[str], *, steps: int) -> tuple[Tensor, Tensor]:
        """Return pictures and disparity maps for prompts."""
        ...


class Shapes(Protocol):
    """What finds coloured solids in pictures and describes pictures by features (`shapes.ShapeFinder`)."""

    def find(self, rgb_B3hw: Tensor) -> list[set[Pair]]:
        """Return for each picture in [0, 1] the (colour, solid) pairs seen in it."""
        ...

    def features(self, rgb_B3hw: Tensor) -> Tensor:
        """Return features of each picture in [0, 1], (B, F)."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Everything that a group of measures may use."""

    scenes: SceneSet
    model: Answers
    colors: ColorFinder
    shapes: Shapes
    pca: PatchPCA
    progress: Progress
    steps: int = 12
    depth_steps: int = 8


def measure_set(setting: Setting) -> dict[str, float]:
    """Measure how hard the scenes are: depth baselines that look at no model, what is in the scenes, what is found."""
    scenes = setting.scenes
    baselines = {
        "constant": constant_map(scenes.rgb_N3hw),
        "mean_map": repeated_map(scenes.mean_map_hw, scenes.rgb_N3hw),
        "luminance": luminance_map(scenes.rgb_N3hw),
    }
    values: dict[str, float] = {}
    for name, pred_Nhw in baselines.items():
        values |= _depth_values(pred_Nhw, scenes.metric_Nhw, suffix=f"_{name}")
    named, seen = scenes.named_colors(), scenes.seen_colors()
    named_shapes, seen_shapes = scenes.named_shapes(), scenes.seen_shapes()
    found_shapes = setting.shapes.find(scenes.rgb_N3hw)
    large = [sum(item.pixels >= HUE_MIN_PIXELS for item in objects) for objects in scenes.objects]
    return values | {
        "median_objects": statistics.median(large),
        "colors": len(set().union(*seen)),
        "color_words_overlap": found_share(seen, _next(named)),
        "shape_words_overlap": found_share(seen_shapes, _next(named_shapes)),
        "shape_classifier_accuracy": found_share(found_shapes, named_shapes),
        "shape_classifier_precision": found_share(seen_shapes, found_shapes),
    }


def measure_autoencoder(setting: Setting) -> dict[str, float]:
    """Measure the autoencoder alone, beside a linear one of equal compression."""
    scenes, model = setting.scenes, setting.model
    depth_N3hw = scenes.disparity_Nhw[:, None].expand(-1, 3, -1, -1)
    rgb_N3hw, disparity_Nhw = model.reconstruct_rgb(scenes.rgb_N3hw), model.reconstruct_disparity(scenes.disparity_Nhw)
    noisy_rgb_N3hw = model.reconstruct_rgb(scenes.rgb_N3hw, noise=LATENT_NOISE)
    noisy_disparity_Nhw = model.reconstruct_disparity(scenes.disparity_Nhw, noise=LATENT_NOISE)
    return {
        "ae_psnr_rgb": _mean(psnr(rgb_N3hw, scenes.rgb_N3hw)),
        "ae_psnr_depth": _mean(psnr(disparity_Nhw, scenes.disparity_Nhw)),
        "ae_psnr_rgb_noise": _mean(psnr(noisy_rgb_N3hw, scenes.rgb_N3hw)),
        "ae_psnr_depth_noise": _mean(psnr(noisy_disparity_Nhw, scenes.disparity_Nhw)),
        "pca_psnr_rgb": _mean(psnr(setting.pca.reconstruct(scenes.rgb_N3hw), scenes.rgb_N3hw)),
        "pca_psnr_depth": _mean(psnr(setting.pca.reconstruct(depth_N3hw).mean(1), scenes.disparity_Nhw)),
        "ae_hue_kept": hue_kept(rgb_N3hw, scenes, setting.colors.palette),
        "color_words_ceiling": found_share(setting.colors.find(rgb_N3hw), scenes.named_colors()),
        "shape_words_ceiling": found_share(setting.shapes.find(rgb_N3hw), scenes.named_shapes()),
        "feature_distance_ratio_ceiling": _distance_to_true(setting, rgb_N3hw).ratio,
        **_depth_values(disparity_Nhw, scenes.metric_Nhw, suffix="_autoencoder"),
    }


def measure_depth(setting: Setting) -> dict[str, float]:
    """Measure depth estimation from true pictures."""
    scenes = setting.scenes
    pred_Nhw = setting.model.estimate_depth(scenes.rgb_N3hw, steps=setting.depth_steps, purpose=OWN_DEPTH)
    return _depth_values(pred_Nhw, scenes.metric_Nhw)


def measure_depth_to_image(setting: Setting) -> dict[str, float]:
    """Measure whether pictures generated from a depth map have that depth."""
    scenes, model = setting.scenes, setting.model
    rgb_N3hw = model.depth_to_image(scenes.disparity_Nhw, scenes.captions, steps=setting.steps)
    again_Nhw = model.estimate_depth(rgb_N3hw, steps=setting.depth_steps, purpose="depth_to_image again")
    own, chance = absrel(again_Nhw, scenes.metric_Nhw), absrel(again_Nhw, shuffled(scenes.metric_Nhw))
    return {
        "d2i_absrel": own,
        "d2i_absrel_shuffled": chance,
        "d2i_ratio": _ratio(own, chance),
        **_word_values(setting, rgb_N3hw, prefix="d2i_"),
    }


def measure_joint(setting: Setting) -> dict[str, float]:
    """Measure whether picture and depth generated together agree, and whether the picture shows the prompt.

    Pictures and depth maps of true scenes, put to the same test, tell what the estimate alone costs.
    """
    scenes, model = setting.scenes, setting.model
    true_Nhw = reference_depth(model.estimate_depth(scenes.rgb_N3hw, steps=setting.depth_steps, purpose="joint true"))
    rgb_N3hw, disparity_Nhw = model.generate_jointly(scenes.captions, steps=setting.steps)
    again_Nhw = model.estimate_depth(rgb_N3hw, steps=setting.depth_steps, purpose="joint again")
    depth_Nhw = reference_depth(again_Nhw)
    own, chance = absrel(disparity_Nhw, depth_Nhw), absrel(disparity_Nhw, shuffled(depth_Nhw))
    distance = _distance_to_true(setting, rgb_N3hw)
    return {
        "joint_absrel": own,
        "joint_absrel_shuffled": chance,
        "joint_absrel_true_pairs": absrel(scenes.disparity_Nhw, true_Nhw),
        "joint_ratio": _ratio(own, chance),
        **_word_values(setting, rgb_N3hw),
        "feature_distance_generated": distance.generated,
        "feature_distance_real": distance.real,
        "feature_distance_ratio": distance.ratio,
    }


def _word_values(setting: Setting, rgb_N3hw: Tensor, *, prefix: str = "") -> dict[str, float]:
    """Return which of the captions' colours and coloured solids generated pictures show, each beside chance."""
    found, named = setting.colors.find(rgb_N3hw), setting.scenes.named_colors()
    found_shapes, named_shapes = setting.shapes.find(rgb_N3hw), setting.scenes.named_shapes()
    return {
        f"{prefix}color_words": found_share(found, named),
        f"{prefix}color_words_shuffled": found_share(found, _next(named)),
        f"{prefix}shape_words": found_share(found_shapes, named_shapes),
        f"{prefix}shape_words_shuffled": found_share(found_shapes, _next(named_shapes)),
    }


def measure_speed(setting: Setting) -> dict[str, float]:
    """Time one joint pair in 20 steps, prompt to pixels, with the present threads: the median of 3 after a warm-up."""
    seconds = []
    for _ in range(TIMED_RUNS + 1):
        start = time.perf_counter()
        setting.model.generate_jointly(setting.scenes.captions[:1], steps=TIMED_STEPS)
        seconds.append(time.perf_counter() - start)
    return {"seconds_20_joint_steps": statistics.median(seconds[1:]), "threads": torch.get_num_threads()}


# By name: the function, and its cost in transformer calls per scene as (fixed, times steps, times depth_steps).
GROUPS: dict[str, tuple[Callable[[Setting], dict[str, float]], tuple[float, float, float]]] = {
    "set": (measure_set, (0, 0, 0)),
    "autoencoder": (measure_autoencoder, (16, 0, 0)),
    "depth": (measure_depth, (4, 0, 1)),
    "depth_to_image": (measure_depth_to_image, (8, 1, 1)),
    "joint": (measure_joint, (12, 1, 2)),
    "speed": (measure_speed, (0, 0, 0)),
}


def work(groups: Sequence[str], *, scenes: int, steps: int, depth_steps: int) -> float:
    """Return the size of an evaluation in transformer calls, for `Progress`."""
    costs = [GROUPS[name][1] for name in groups]
    return max(1.0, scenes * sum(fixed + each * steps + other * depth_steps for fixed, each, other in costs))


def measure(setting: Setting, groups: Sequence[str]) -> dict[str, float]:
    """Run the named groups of measures and return all their figures."""
    values: dict[str, float] = {}
    for name in groups:
        setting.progress.begin(name)
        values |= GROUPS[name][0](setting)
    return values


def absrel(pred_Nhw: Tensor, depth_Nhw: Tensor) -> float:
    """Return the mean AbsRel of relative disparities against depths; images with next to no true depth count as 1."""
    scores = []
    for pred_hw, depth_hw in zip(pred_Nhw, depth_Nhw, strict=True):
        usable = DEPTH_PROTOCOL.depth_range.valid(depth_hw).double().mean()
        scores.append(DEPTH_PROTOCOL.score(pred_hw, depth_hw)["absrel"] if usable >= 0.01 else 1.0)
    return sum(scores) / len(scores)


def reference_depth(disparity_Nhw: Tensor) -> Tensor:
    """Return 1/d of disparities in [0, 1], infinite where d <= 0.05 (those pixels take no part)."""
    far = torch.full_like(disparity_Nhw, math.inf)
    return torch.where(disparity_Nhw > REFERENCE_MIN_DISPARITY, 1 / disparity_Nhw, far)


def hue_kept(rgb_N3hw: Tensor, scenes: SceneSet, palette: Palette) -> float:
    """Return the share of objects of at least 50 visible pixels that keep their nearest palette colour."""
    kept = [
        palette.nearest(after_3hw, item.mask_hw) == palette.nearest(before_3hw, item.mask_hw)
        for after_3hw, before_3hw, seen in zip(rgb_N3hw, scenes.rgb_N3hw, scenes.objects, strict=True)
        for item in seen
        if item.pixels >= HUE_MIN_PIXELS
    ]
    return sum(kept) / len(kept) if kept else math.nan


def _depth_values(pred_Nhw: Tensor, metric_Nhw: Tensor, *, suffix: str = "") -> dict[str, float]:
    """Return `depth_*` for every depth metric, under names that end with `suffix`."""
    scores = [DEPTH_PROTOCOL.score(pred, depth) for pred, depth in zip(pred_Nhw, metric_Nhw, strict=True)]
    return {f"depth_{name}{suffix}": value for name, value in mean_scores(scores).items()}


def _distance_to_true(setting: Setting, rgb_N3hw: Tensor) -> FeatureDistance:
    """Return the distance of pictures to the scenes' true pictures."""
    return feature_distance(setting.shapes.features(rgb_N3hw), setting.shapes.features(setting.scenes.rgb_N3hw))


def _next(items: list[set[Word]]) -> list[set[Word]]:
    """Return the items shifted by one, the pairing that `shuffled` makes of tensors."""
    return items[1:] + items[:1]


def _ratio(own: float, chance: float) -> float:
    """Return own over chance; two equal values are 1, so that a generator of one single picture doesn't pass."""
    return own / chance if chance > 0 else 1.0


def _mean(values_N: Tensor) -> float:
    return float(values_N.mean())
