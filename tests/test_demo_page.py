"""The demo's page, from made-up results."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from library.errors import UserError
from library.flags import flag_values, parse
from library.images import write_depth_npy, write_rgb
from library.inference_args import InferenceArgs

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
        flags = {"gen_type": task, "output_dir": str(tmp_path), "seed": [6, 7], "steps": None, "condition_noise": 0.0}
        flags |= {name: value for name, value in values.items() if name != "prompt"}
        flags["text_prompt"] = values["prompt"].strip() or None
        write_rgb(tmp_path / task / "a.png", rgb_3hw)
        write_depth_npy(tmp_path / task / "a_depth.npy", disparity_hw)
        (tmp_path / task / "a.json").write_text(json.dumps({"task": task, "seed": 7, "flags": flags, **values}))
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


def test_the_command_says_all_that_isnt_a_default_and_the_given_depth_is_read_by_it(results):
    path = results / "depth_to_image" / "a.json"
    near_is_large = demo_page.read_exhibits(results)[-1].pictures[0].rgb_3hw
    record = json.loads(path.read_text())
    record["flags"] |= {"steps": 3, "guidance_scale": 0.0, "output_resolution": [32, 24], "condition_noise": 0.5}
    record["flags"]["depth_kind"] = "depth"
    np.save(record["input_depth"], 1 / (torch.eye(24, 32).numpy() + 1))
    path.write_text(json.dumps(record))
    exhibit = demo_page.read_exhibits(results)[-1]
    values = flag_values(parse(shlex.split(exhibit.command)[2:], InferenceArgs))
    apart = {"seed": [7], "output_dir": "outputs"}
    assert {name: values[name] for name in record["flags"]} == record["flags"] | apart
    assert torch.equal(exhibit.pictures[0].rgb_3hw, near_is_large)


def test_a_constant_map_has_one_colour(results):
    write_depth_npy(results / "joint_generation" / "a_depth.npy", torch.full((24, 32), 0.5))
    _, made = demo_page.read_exhibits(results)[1].pictures
    assert made.rgb_3hw.shape == (3, 24, 32) and torch.equal(made.rgb_3hw, made.rgb_3hw[:, :1, :1].expand(3, 24, 32))


@pytest.mark.parametrize("content", ["{}", "[]", "x", '{"task": "other", "prompt": "", "seed": 1, "flags": {}}'])
def test_a_record_that_is_none_is_one_line(results, content):
    path = results / "joint_generation" / "a.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"^--folder {path}: isn't what inference.py says of a result; delete it"):
        demo_page.read_exhibits(results)


def test_files_that_are_gone_are_named_by_this_commands_flag(results):
    (results / "inputs" / "depth_1.npy").unlink()
    record = results / "depth_to_image" / "a.json"
    with pytest.raises(UserError, match=f"^--folder {record}: its input .*depth_1.npy: no such file$"):
        demo_page.read_exhibits(results)
    (results / "depth_to_image" / "a_depth.npy").unlink()
    with pytest.raises(UserError, match="^--folder .*a_depth.npy: no such file$"):
        demo_page.read_exhibits(results)


def test_no_results_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^--folder .*: holds no results; run scripts/demo.sh$"):
        demo_page.read_exhibits(tmp_path)
