"""Files of a result: names, what they hold, and that nothing is overwritten."""

import json
from pathlib import Path

import torch

from library.images import read_depth, read_rgb
from library.results import Result, file_hash, name_from, save_result, versions


def test_a_result_is_saved_whole_and_never_overwritten(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    result = Result(
        rgb_3hw=torch.rand(3, 5, 7, generator=generator), depth_hw=torch.rand(5, 7, generator=generator), seed=3
    )
    paths = [save_result(tmp_path / "new", name="a", result=result, record={"task": "x"}) for _ in range(3)]
    assert [path.name for path in paths] == ["a.json", "a_2.json", "a_3.json"]
    assert sorted(path.name for path in (tmp_path / "new").glob("a_2*")) == [
        "a_2.json", "a_2.png", "a_2_depth.npy", "a_2_depth.png", "a_2_depth_color.png"
    ]  # fmt: skip
    record = json.loads(paths[0].read_text())
    assert record["task"] == "x" and record["seed"] == 3 and "near = large" in record["depth"]
    for entry in record["files"].values():
        assert file_hash(tmp_path / "new" / entry["file"]) == entry["sha256"]
    assert torch.equal(read_depth(tmp_path / "new" / "a_depth.npy"), result.depth_hw)
    assert read_rgb(tmp_path / "new" / "a.png").shape == (3, 5, 7)


def test_names_from_prompts() -> None:
    assert name_from("A red ball, on a Blue box!") == "a-red-ball-on-a-blue-box"
    assert name_from(" ") == "sample" and name_from("../..") == "sample"
    assert len(name_from("word " * 60)) <= 44 and len(name_from("w" * 200)) == 40


def test_versions_are_told() -> None:
    assert {"python", "torch", "transformers"} <= versions().keys()
