"""The demo's page, from made-up results."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.images import write_depth_npy, write_rgb

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def load(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


demo_page = load("demo_page")


@pytest.fixture
def results(tmp_path):
    """One result of each task, and the inputs they name."""
    rgb_3hw, disparity_hw = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(0)), torch.eye(24, 32)
    write_rgb(tmp_path / "inputs" / "image_1.png", rgb_3hw)
    write_depth_npy(tmp_path / "inputs" / "depth_1.npy", disparity_hw)
    given = {
        "depth_estimation": {"input_image": str(tmp_path / "inputs" / "image_1.png"), "prompt": " "},
        "joint_generation": {"prompt": "a <red> ball & a box"},
        "depth_to_image": {"input_depth": str(tmp_path / "inputs" / "depth_1.npy"), "prompt": "a cone"},
    }
    for task, values in given.items():
        write_rgb(tmp_path / task / "a.png", rgb_3hw)
        write_depth_npy(tmp_path / task / "a_depth.npy", disparity_hw)
        (tmp_path / task / "a.json").write_text(json.dumps({"task": task, "seed": 7, **values}))
    return tmp_path


def test_page_shows_given_made_and_true(results):
    exhibits = demo_page.read_exhibits(results, truth=results / "inputs")
    kinds = {exhibit.task: [picture.kind for picture in exhibit.pictures] for exhibit in exhibits}
    assert kinds == {
        "depth_estimation": ["given", "made", "truth"],
        "joint_generation": ["made", "made"],
        "depth_to_image": ["given", "made"],
    }


def test_page_is_self_contained(results):
    text = demo_page.page(demo_page.read_exhibits(results))
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == 7 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "{{" not in text and "http" not in text
    assert "prefers-color-scheme: dark" in text
    assert "a &lt;red&gt; ball &amp; a box" in text and "<red>" not in text


def test_page_says_how_each_result_is_made_again(results):
    commands = {exhibit.task: exhibit.command for exhibit in demo_page.read_exhibits(results)}
    assert commands["joint_generation"] == (
        "python inference.py --gen_type joint_generation --text_prompt 'a <red> ball & a box' --seed 7"
    )
    assert "--text_prompt" not in commands["depth_estimation"]  # the empty prompt need not be said


def test_no_results_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^--folder .*: holds no results; run scripts/demo.sh$"):
        demo_page.read_exhibits(tmp_path)
