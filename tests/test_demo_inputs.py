"""The demo's inputs are held-out scenes of the generator as it is."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.synthetic import GENERATOR_VERSION, HELD_OUT_SEED, render_batch
from library.images import read_depth, read_rgb

FOLDER = Path(__file__).resolve().parents[1] / "assets" / "demo"
MADE_BY = json.loads((FOLDER / "made_by.json").read_text(encoding="utf-8"))
AGAIN = "run python scripts/tiny/make_demo_inputs.py"


def test_of_this_generator_and_never_trained_on():
    assert MADE_BY["generator_version"] == GENERATOR_VERSION, AGAIN
    assert MADE_BY["seed"] == HELD_OUT_SEED


@pytest.mark.parametrize("place", range(3))
def test_scene_is_what_the_generator_renders(place):
    scene = render_batch(HELD_OUT_SEED, [MADE_BY["shown"][place]], 128)
    rgb_3hw, disparity_hw = read_rgb(FOLDER / f"image_{place + 1}.png"), read_depth(FOLDER / f"depth_{place + 1}.npy")
    # Single edge pixels may fall on the other side on another machine.
    assert (rgb_3hw - scene.rgb_B3hw[0]).abs().mean() < 0.005, AGAIN
    assert np.median((disparity_hw - scene.disparity_Bhw[0]).abs()) < 1e-5, AGAIN
    assert torch.isfinite(disparity_hw).all()
    assert (FOLDER / f"prompt_{place + 1}.txt").read_text(encoding="utf-8").strip() == scene.captions[0], AGAIN


def test_prompts_are_captions_of_held_out_scenes():
    captions = render_batch(HELD_OUT_SEED, MADE_BY["spoken"], 128).captions
    assert (FOLDER / "prompts.txt").read_text(encoding="utf-8").splitlines() == captions, AGAIN
