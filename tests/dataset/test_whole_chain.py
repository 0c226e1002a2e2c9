"""From nothing to a trained step, with the commands as a person gives them, on scenes and on a real picture."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.cache import read_meta, read_pair, stamp_of, write_pair
from dataset.jointdit_dataset import CachedPairs
from dataset.layout import Layout

ROOT = Path(__file__).resolve().parents[2]

# scikit-image's Motorcycle (Middlebury 2014, quarter size): from its documentation.
FOCAL, BASELINE, OFFSET = 994.978, 0.193001, 31.086  # pixels, metres, pixels
SIDE = 496


def run(*words: str | Path, expected: int = 0) -> str:
    """Run a module's command from the project's folder and return what it said."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == expected, done.stderr
    return done.stdout


@pytest.mark.slow
def test_200_scenes_through_all_steps_to_training(tmp_path):
    scenes, data, figures = tmp_path / "scenes", tmp_path / "data", tmp_path / "figures.json"
    run("-m", "dataset.make_scenes", "--output", scenes, "--count", "200", "--size", "64")
    made, taken = Layout(scenes), Layout(data)
    shutil.copytree(made.processed_images, data)
    depth = ["--depth_from", made.metric_depth, "--depth_kind", "depth"]
    run("-m", "dataset.preprocess_step1", "--image_folder", data, "--resolution", "64",
        "--captions_from", made.text_prompts, *depth)  # fmt: skip
    for name in ("00000000", "00000111", "00000199"):  # nothing was scaled: what comes out is what was rendered
        assert taken.prompt(name).read_text(encoding="utf-8") == made.prompt(name).read_text(encoding="utf-8")
        with Image.open(made.image(name)) as before, Image.open(taken.image(name)) as after:
            assert np.array_equal(np.asarray(before), np.asarray(after))
        np.testing.assert_allclose(np.load(taken.depthmap(name)), np.load(made.depthmap(name)), rtol=1e-6)
    look = ["-m", "dataset.check", data, "--json", figures, "--sheet", tmp_path / "sheet.png"]
    assert "training on the pictures would run" in run(*look)
    assert "has no cached latents" in run(*look, "--is_latent_training", expected=1)
    run("-m", "dataset.preprocess_step2", "--image_folder", data)
    run("-m", "dataset.preprocess_step3", "--output_folder", tmp_path)
    said = run(*look)
    assert "training on the pictures would run" in said
    assert "training on the cache (--is_latent_training) would run" in said
    found = json.loads(figures.read_text())
    assert found["counts"]["images"] == found["counts"]["cached"] == 200
    assert not any(found["findings"].values())
    assert found["sizes"]["latent"] == {"16 x 8 x 8": 200}
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 1000
    train = ["train.py", "--image_folder", data, "--max_train_steps", "2", "--prompt_folder", tmp_path]
    run(*train, "--is_latent_training", "--output_dir", tmp_path, "--exp_name", "cached")
    run(*train, "--output_dir", tmp_path, "--exp_name", "pictures")
    for name in ("cached", "pictures"):
        assert (tmp_path / name / "jointdit_addons.safetensors").is_file()


def as_released(source: Layout, target: Path) -> None:
    """Write a cache of ours in the released code's form."""
    pairs = CachedPairs(Path(source.root), depth_transform="none")
    for index in range(len(pairs.names)):
        name, pair = pairs.read(index)
        kinds = {
            "image_latents": pair.rgb_Chw,
            "depth_latents": pair.depth_Chw,
            "clip_latents": pair.text.pooled_BD,
            "t5_latents": pair.text.tokens_BLD,
        }
        for kind, tensor in kinds.items():
            (target / kind).mkdir(parents=True, exist_ok=True)
            torch.save(tensor.clone(), target / kind / f"{name}.pt")  # read pairs are views of a file's bytes
    (target / "depth_transform.json").write_text('{"depth_transform": "none"}')


@pytest.mark.slow
def test_an_imported_cache_trains_and_broken_ones_are_refused_by_both(tmp_path):
    data, old, new = tmp_path / "data", tmp_path / "old", tmp_path / "new"
    run("-m", "dataset.make_scenes", "--output", data, "--count", "4", "--size", "32")
    run("-m", "dataset.preprocess_step2", "--image_folder", data)
    as_released(Layout(data), old)
    run("-m", "dataset.import_released", "--cache", old, "--output", new)
    train = ["train.py", "--max_train_steps", "1", "--output_dir", tmp_path, "--prompt_folder", tmp_path]
    cached = ["--image_folder", new, "--is_latent_training"]
    look = ["-m", "dataset.check", "--sheet_samples", "0"]
    for flags, run_status, check_status in (([], 2, 1), (["--trust_cache"], 0, 0)):
        run(*look, *cached, *flags, expected=check_status)
        run(*train, *cached, *flags, expected=run_status)
    same = [CachedPairs(folder, depth_transform="none").read(0)[1] for folder in (data, new)]
    assert torch.equal(same[0].depth_Chw, same[1].depth_Chw)
    assert torch.equal(same[0].text.tokens_BLD, same[1].text.tokens_BLD)
    stamp = stamp_of(read_meta(Layout(new).cache_meta, flag="--image_folder"))
    for path in Layout(new).cache.glob("*.safetensors"):
        pair = read_pair(path, stamp=stamp)
        write_pair(path, replace(pair, depth_Chw=pair.depth_Chw / 0), dtype=torch.float32, stamp=stamp)
    run(*look, *cached, "--trust_cache", expected=1)
    run(*train, *cached, "--trust_cache", expected=2)
    for path in Layout(data).depthmaps.glob("*.npy"):
        np.save(path, np.zeros((32, 32), dtype=np.float32))
    pictures = ["--image_folder", data]
    run(*look, *pictures, "--no_is_latent_training", expected=1)
    run(*train, *pictures, expected=2)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".npy", ".png"])
def test_depth_of_a_real_picture_comes_in_right(tmp_path, ending):
    data = pytest.importorskip("skimage.data", reason="needs scikit-image: pip install -e '.[eval]'")
    left, _, disparity_hw = data.stereo_motorcycle()
    part = np.s_[2 : 2 + SIDE, :740]  # such that the centre lies on whole pixels and nothing is resampled
    left, disparity_hw = left[part], disparity_hw[part].astype(np.float64)
    known = np.isfinite(disparity_hw) & (disparity_hw > 0)
    metres_hw = np.where(known, FOCAL * BASELINE / (np.where(known, disparity_hw, 0) + OFFSET), 0)
    assert 2.1 < metres_hw[known].min() < metres_hw[known].max() < 5.1
    pictures, maps = tmp_path / "pictures", tmp_path / "maps"
    for folder in (pictures, maps):
        folder.mkdir()
    Image.fromarray(left).save(pictures / "motorcycle.png")
    if ending == ".npy":
        np.save(maps / "motorcycle.npy", metres_hw.astype(np.float32))
    else:
        Image.fromarray((metres_hw * 10_000).round().astype(np.uint16)).save(maps / "motorcycle.png")
    flags = ["--resolution", str(SIDE), "--skip_captions", "--depth_from", maps, "--depth_kind", "depth"]
    run("-m", "dataset.preprocess_step1", "--image_folder", pictures, "--originals", "copy", *flags)
    imported_hw = np.load(Layout(pictures).depthmap("motorcycle"))
    edge = (disparity_hw.shape[1] - SIDE) // 2
    middle = np.s_[:, edge : edge + SIDE]
    assert imported_hw.shape == (SIDE, SIDE)
    assert np.array_equal(imported_hw == 0, ~known[middle])  # no measurement: as far as can be
    # Up to a factor the map that came in is the stereo disparity itself, moved by the cameras' offset.
    ratio = imported_hw[known[middle]] / (disparity_hw + OFFSET)[middle][known[middle]]
    unit = 1 / (FOCAL * BASELINE) * (1 if ending == ".npy" else 6.5535)
    assert np.abs(ratio / unit - 1).max() < (1e-6 if ending == ".npy" else 3e-5)
    with Image.open(Layout(pictures).image("motorcycle")) as image:
        assert np.array_equal(np.asarray(image), left[middle])
