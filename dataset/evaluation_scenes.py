"""The scenes of the embedded model's evaluation: held-out ones to measure on, training ones for the baselines.

Rendered when they are needed, since nothing but the generator's version, the seed and the size decides them.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dataset.synthetic import GENERATOR_VERSION, HELD_OUT_SEED, SceneBatch, render_batch
from dataset.synthetic.geometry import KINDS
from dataset.synthetic.palette import COLOURS, PALETTE, nearest_colour
from library.evaluation.baselines import PatchPCA, PatchStatistics
from library.evaluation.colors import ColorFinder, Palette
from library.evaluation.embedded import Answers, Setting
from library.evaluation.progress import Progress
from library.evaluation.scene_set import SceneSet, SeenObject
from library.evaluation.shapes import ShapeFinder, load_finder
from library.files import save_tensors
from library.modality import normalize_disparity

TRAINING_SEED = 0
RENDER_WORK = 3.0  # one scene, told in transformer calls, for the time left
ROOT = Path(__file__).resolve().parents[1]
SHAPE_FINDER = ROOT / "assets" / "evaluation" / "shape_finder.safetensors"
_RENDERED_AT_ONCE = 32


def color_finder() -> ColorFinder:
    """Return the finder of the palette's colours."""
    return ColorFinder(Palette(albedo=PALETTE, nearest=nearest_colour))


def shape_finder(path: Path = SHAPE_FINDER) -> ShapeFinder:
    """Return the finder of coloured solids.

    Raises:
        UserError: if its file isn't there or was trained on scenes of another generator.
    """
    return load_finder(path, solids=KINDS, colors=COLOURS, generator_version=GENERATOR_VERSION)


def evaluation_setting(
    model: Answers, *, scenes: int, training_scenes: int, size: int, progress: Progress, steps: int, depth_steps: int
) -> Setting:
    """Return all that measuring needs: `scenes` held-out ones, baselines of `training_scenes`, and the finders."""
    pca, mean_map_hw = training_statistics(training_scenes, size=size, progress=progress)
    return Setting(
        scenes=held_out_scenes(scenes, size=size, mean_map_hw=mean_map_hw, progress=progress),
        model=model,
        colors=color_finder(),
        shapes=shape_finder(),
        pca=pca,
        progress=progress,
        steps=steps,
        depth_steps=depth_steps,
    )


def baseline_scenes(scenes: int) -> int:
    """Return how many training scenes the baselines beside so many held-out ones are made of."""
    return min(2000, 16 * scenes)


def held_out_scenes(count: int, *, size: int, mean_map_hw: Tensor, progress: Progress) -> SceneSet:
    """Render the first `count` held-out scenes; `mean_map_hw` is the training scenes' mean disparity map."""
    progress.begin("held-out scenes")
    parts = list(rendered_batches(HELD_OUT_SEED, count, size=size, progress=progress))
    return SceneSet(
        rgb_N3hw=torch.cat([part.rgb_B3hw for part in parts]),
        disparity_Nhw=torch.cat([normalize_disparity(part.disparity_Bhw) for part in parts]),
        metric_Nhw=torch.cat([part.metric_Bhw for part in parts]),
        captions=[caption for part in parts for caption in part.captions],
        objects=[objects for part in parts for objects in _seen_objects(part)],
        mean_map_hw=mean_map_hw,
    )


def _seen_objects(batch: SceneBatch) -> list[list[SeenObject]]:
    """Return each scene's visible objects."""
    return [
        [
            SeenObject(color=item["colour"], shape=item["shape"], mask_hw=ids_hw == place, named=item["named"])
            for place, item in enumerate(record["objects"])
            if item["visible_pixels"]
        ]
        for record, ids_hw in zip(batch.records, batch.ids_Bhw, strict=True)
    ]


def training_statistics(count: int, *, size: int, progress: Progress) -> tuple[PatchPCA, Tensor]:
    """Return the linear PCA of patches (pictures and disparity alike) and the mean disparity map of training scenes.

    Kept in outputs/evaluation/, since rendering takes a while and the result never changes.
    """
    path = statistics_file(count, size)
    if not path.exists():
        progress.begin("training scenes")
        statistics, total_hw = PatchStatistics(), torch.zeros(size, size, dtype=torch.float64)
        for part in rendered_batches(TRAINING_SEED, count, size=size, progress=progress):
            disparity_Bhw = normalize_disparity(part.disparity_Bhw)
            statistics.add(part.rgb_B3hw)
            statistics.add(disparity_Bhw[:, None].expand(-1, 3, -1, -1))
            total_hw += disparity_Bhw.sum(0, dtype=torch.float64)
        pca = statistics.fit()
        mean_map_hw = (total_hw / count).float()
        save_tensors(path, {"mean_P": pca.mean_P, "basis_KP": pca.basis_KP, "mean_map_hw": mean_map_hw})
    stored = load_file(path)
    return PatchPCA(mean_P=stored["mean_P"], basis_KP=stored["basis_KP"]), stored["mean_map_hw"]


def statistics_file(count: int, size: int) -> Path:
    """Return where the statistics of training scenes are kept."""
    return ROOT / "outputs" / "evaluation" / f"training_scenes_v{GENERATOR_VERSION}_{count}_{size}.safetensors"


def rendered_batches(seed: int, count: int, *, size: int, progress: Progress) -> Iterator[SceneBatch]:
    """Yield the first `count` scenes of a seed in batches."""
    for start in range(0, count, _RENDERED_AT_ONCE):
        part = render_batch(seed, range(start, min(start + _RENDERED_AT_ONCE, count)), size)
        progress.advance(RENDER_WORK * len(part.captions))
        yield part
