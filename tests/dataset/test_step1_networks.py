"""Step 1's networks, real classes with tiny random weights: resizing, disparity, captions, and what is kept."""

import json
import shutil

import numpy as np
import pytest
import torch
from nasty_pictures import noisy, saved
from test_step1_pictures import report, run_step1, tree
from tiny_networks import write_depth_anything, write_dpt, write_florence, write_llava

from dataset.annotators.captions import Captioner
from dataset.annotators.depth import DepthNetwork, network_size, resize_back, resize_for_network, to_disparity
from dataset.annotators.groups import finish_groups, group_by, write_group
from dataset.layout import Layout
from library.errors import UserError
from library.files import write_text
from library.images import read_depth

CPU = torch.device("cpu")
SIZES = [(512, 512), (512, 768), (768, 512), (518, 518), (517, 519), (100, 300), (37, 41), (540, 960), (333, 555),
         (14, 14)]  # fmt: skip


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    write_depth_anything(folder / "depth")
    write_depth_anything(folder / "metric", metric=True)
    write_dpt(folder / "dpt")
    write_llava(folder / "llava")
    write_llava(folder / "chat", chat_template="USER: <image> {{ messages[0]['content'][1]['text'] }} ASSISTANT:")
    return folder


@pytest.fixture
def pictures(tmp_path):
    """Five noisy pictures, so that each gets another depth map and caption."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.png").write_bytes(saved(noisy(number)))
    return folder


def flags(networks, *more):
    return ("--resolution", "32", "--device", "cpu", "--depth_model", str(networks / "depth"), "--caption_model",
            str(networks / "llava"), "--caption_tokens", "6", "--depth_batch_size", "2", "--caption_batch_size", "3",
            *more)  # fmt: skip


@pytest.mark.parametrize("height, width", SIZES)
def test_pictures_are_resized_by_the_stated_rule(height, width):
    to_height, to_width = network_size(height, width, multiple=14)
    short, long = sorted((to_height, to_width))
    assert short == 518 and to_height % 14 == to_width % 14 == 0
    assert abs(long - 518 * max(height, width) / min(height, width)) <= 7
    ramp = torch.linspace(0, 1, width).expand(1, 3, height, width)
    resized = resize_for_network(ramp, multiple=14)
    assert resized.shape == (1, 3, to_height, to_width)
    torch.testing.assert_close(resized, _cubic(_cubic(ramp, 2, to_height), 3, to_width), atol=2e-5, rtol=0)


def _cubic(x, axis, size):
    """Cubic convolution (a = -0.75) along one axis, pixel centres at halves, edges repeated, no smoothing."""
    length = x.shape[axis]
    place = (torch.arange(size, dtype=torch.float64) + 0.5) * length / size - 0.5
    first = place.floor()
    result = 0
    for step in (-1, 0, 1, 2):
        distance = (place - first - step).abs()
        near = (1.25 * distance - 2.25) * distance**2 + 1
        far = -0.75 * (((distance - 5) * distance + 8) * distance - 4)
        weight = torch.where(distance <= 1, near, far)
        taken = x.double().index_select(axis, (first + step).long().clamp(0, length - 1))
        result = result + taken * weight.view([-1 if each == axis else 1 for each in range(x.ndim)])
    return result.float()


def test_maps_are_resized_back_with_the_corners_on_each_other():
    map_Bhw = torch.randn(2, 37, 53, generator=torch.Generator().manual_seed(0))
    back = resize_back(map_Bhw, height=10, width=90)
    assert back.shape == (2, 10, 90)
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        torch.testing.assert_close(back[:, row, column], map_Bhw[:, row, column])


def test_depth_anything_sees_what_its_authors_feed_it(networks):
    model = write_depth_anything(networks / "again")
    rgb = torch.rand(2, 3, 40, 60, generator=torch.Generator().manual_seed(0))
    disparity = DepthNetwork(str(networks / "depth"), device=CPU).estimate(rgb)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    resized = torch.nn.functional.interpolate(rgb, size=(518, 784), mode="bicubic", align_corners=False)
    with torch.no_grad():
        raw = model(pixel_values=(resized - mean[:, None, None]) / std[:, None, None]).predicted_depth
    expected = torch.nn.functional.interpolate(raw[:, None], size=(40, 60), mode="bilinear", align_corners=True)[:, 0]
    torch.testing.assert_close(disparity, expected)
    assert disparity.dtype == torch.float32 and disparity.std() > 0


def test_networks_that_give_distance_are_turned_round(networks):
    rgb = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    distance = DepthNetwork(str(networks / "metric"), output="disparity", device=CPU).estimate(rgb)
    disparity = DepthNetwork(str(networks / "metric"), device=CPU).estimate(rgb)
    torch.testing.assert_close(disparity, to_disparity(distance))
    values = to_disparity(torch.tensor([[[2.0, 4.0, 0.0, -1.0, float("inf"), 1e-9]]]))
    torch.testing.assert_close(values, torch.tensor([[[0.5, 0.25, 0, 0, 0, 1 / (2.0 * 1e-3)]]]))
    assert not to_disparity(torch.zeros(1, 2, 2)).any()


def test_other_depth_networks_are_fed_by_their_own_processor(networks):
    network = DepthNetwork(str(networks / "dpt"), device=CPU)
    disparity = network.estimate(torch.rand(3, 3, 48, 64, generator=torch.Generator().manual_seed(0)))
    assert network.says == "disparity" and disparity.shape == (3, 48, 64) and torch.isfinite(disparity).all()


def test_networks_that_cannot_be_used_are_named(networks, tmp_path):
    with pytest.raises(UserError, match=r"--depth_model .*/none: can't be loaded"):
        DepthNetwork(str(tmp_path / "none"), device=CPU)
    with pytest.raises(UserError, match=r"--depth_model .*/llava: can't be loaded"):
        DepthNetwork(str(networks / "llava"), output="depth", device=CPU)
    with pytest.raises(UserError, match=r"--depth_model .*/llava: is a llava, .*; say --depth_output"):
        DepthNetwork(str(networks / "llava"), device=CPU)
    with pytest.raises(UserError, match=r"--caption_model .*/dpt: takes no pictures and text together"):
        Captioner(str(networks / "dpt"), device=CPU)
    from safetensors.torch import load_file, save_file

    holed = tmp_path / "holed"
    shutil.copytree(networks / "depth", holed)
    tensors = load_file(holed / "model.safetensors")
    del tensors["head.conv1.weight"]
    save_file(tensors, holed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"holed: 1 of its tensors are missing or don't fit, the first head.conv1"):
        DepthNetwork(str(holed), device=CPU)
    torch.save(tensors, holed / "pytorch_model.bin")
    (holed / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holed: can't be loaded"):  # a pickle is never opened
        DepthNetwork(str(holed), device=CPU)


def noise(count):
    return [np.asarray(noisy(number, 24, 20 + 4 * number)) for number in range(count)]


def test_captions_of_a_batch_are_those_of_its_pictures(networks):
    captioner = Captioner(str(networks / "llava"), max_new_tokens=8, device=CPU)
    assert captioner.prompts == ["USER: <image>\nDescribe this image? ASSISTANT:"]
    together = captioner.describe(noise(4))
    assert together == [captioner.describe([each])[0] for each in noise(4)]
    assert len({lines[0] for lines in together}) > 1
    assert all(len(lines) == 1 and len(lines[0].split()) <= 8 for lines in together)  # the question isn't repeated


def test_prompts_of_different_lengths_are_filled_up_in_front(networks):
    captioner = Captioner(str(networks / "llava"), max_new_tokens=4, prompts=["a <image>"], device=CPU)
    inputs = captioner.processor(images=noise(2), text=["a <image>", "red <image> ball box on"], padding=True)
    ids = np.array(inputs["input_ids"])
    assert (ids[0, :3] == captioner.tokenizer.pad_token_id).all() and ids[1, 0] != captioner.tokenizer.pad_token_id


def test_prompts_go_through_the_chat_template_unless_they_place_the_picture(networks):
    chat = Captioner(str(networks / "chat"), max_new_tokens=3, prompts=["a red ball", "box <image> left"], device=CPU)
    assert chat.prompts == ["USER: <image> a red ball ASSISTANT:", "box <image> left"]
    (lines,) = chat.describe(noise(1))
    assert 1 <= len(lines) <= 2 and all("\n" not in line for line in lines)


def test_networks_that_are_asked_for_a_task(tmp_path):
    write_florence(tmp_path / "florence", seed=2)  # with most seeds it says nothing
    captioner = Captioner(str(tmp_path / "florence"), max_new_tokens=6, device=CPU)
    assert captioner.prompts == ["<DETAILED_CAPTION>"]
    together = captioner.describe(noise(3))
    assert together == [captioner.describe([each])[0] for each in noise(3)] and all(together)


def test_the_whole_step(networks, pictures, monkeypatch):
    prompt = Layout(pictures).prompt("3")
    write_text(prompt, "mine\nand mine too\n")
    assert run_step1(pictures, *flags(networks), monkeypatch=monkeypatch, stages=()) == 0
    layout = Layout(pictures)
    maps = [read_depth(layout.depthmap(str(number))) for number in range(5)]
    assert all(each.shape == (32, 32) and each.dtype == torch.float32 for each in maps)
    assert prompt.read_text() == "mine\nand mine too\n"
    assert all(layout.prompt(str(number)).read_text().strip() for number in range(5))
    before = tree(pictures)
    assert run_step1(pictures, *flags(networks), monkeypatch=monkeypatch, stages=()) == 0
    assert tree(pictures) == before
    # any file that goes missing comes back the same, though its batch is half done
    layout.depthmap("1").unlink()
    for number in range(3):
        layout.prompt(str(number)).unlink()
    assert run_step1(pictures, *flags(networks), monkeypatch=monkeypatch, stages=()) == 0
    assert tree(pictures) == before


def test_stages_can_be_left_out_and_added(networks, pictures, monkeypatch, caplog):
    assert run_step1(pictures, *flags(networks), monkeypatch=monkeypatch) == 0
    assert not Layout(pictures).depthmaps.exists() and not Layout(pictures).text_prompts.exists()
    assert run_step1(pictures, *flags(networks), monkeypatch=monkeypatch, stages=["--skip_captions"]) == 0
    assert len(list(Layout(pictures).depthmaps.iterdir())) == 5 and not Layout(pictures).text_prompts.exists()


def test_flags_of_a_stage_that_is_left_out_are_named(networks, pictures, monkeypatch, capsys):
    assert run_step1(pictures, *flags(networks), monkeypatch=monkeypatch) == 0
    warned = [line.split()[1] for line in capsys.readouterr().err.splitlines() if "has no effect here" in line]
    assert warned == ["--depth_model", "--depth_batch_size", "--caption_model", "--caption_tokens",
                      "--caption_batch_size"]  # fmt: skip


def test_a_map_of_one_value_is_named_and_not_written(networks, pictures, monkeypatch):
    class Flat:
        def estimate(self, rgb_B3hw):
            maps = rgb_B3hw[:, 0].clone()
            maps[0] = 7
            return maps

    monkeypatch.setattr("dataset.annotators.depth.DepthNetwork", lambda *args, **options: Flat())
    assert run_step1(pictures, *flags(networks), monkeypatch=monkeypatch, stages=["--skip_captions"]) == 0
    problems = [line for line in report(pictures) if line["outcome"] != "ready"]
    assert [line["name"] for line in problems] == ["0", "2", "4"]
    assert problems[0]["outcome"] == "no depth map" and "one value everywhere" in problems[0]["reason"]
    assert {path.stem for path in Layout(pictures).depthmaps.iterdir()} == {"1", "3"}


def test_depth_of_the_users_is_cut_like_its_picture(pictures, tmp_path, monkeypatch):
    theirs = tmp_path / "theirs"
    (theirs / "sub").mkdir(parents=True)
    across = np.tile(np.arange(1, 49, dtype=np.float32), (40, 1))
    np.save(theirs / "0.npy", across)  # as large as the picture: 48 x 40, of which the middle 40 x 40 is taken
    np.save(theirs / "1.npy", across[:30, :30])  # another aspect
    np.save(theirs / "2.npy", np.full((40, 48), np.nan))
    np.save(theirs / "3.npy", np.arange(1024, dtype=np.float32).reshape(32, 32) + 1)  # as large as the processed one
    take = ["--skip_captions", "--depth_from", str(theirs), "--depth_kind", "depth", "--resolution", "32"]
    assert run_step1(pictures, monkeypatch=monkeypatch, stages=take) == 0
    layout = Layout(pictures)
    distance = 1 / read_depth(layout.depthmap("0"))
    torch.testing.assert_close(distance[0, [0, 15, 31]], torch.tensor([5.1, 23.9, 43.9]), atol=0.3, rtol=0)
    torch.testing.assert_close(1 / read_depth(layout.depthmap("3")).flatten(), torch.arange(1, 1025.0))
    reasons = {line["name"]: line["reason"] for line in report(pictures) if line["outcome"] == "no depth map"}
    assert set(reasons) == {"1", "2", "4"}
    assert "1.npy: is 30 x 30, its picture 48 x 40; give it the same aspect" in reasons["1"]
    assert "1920 NaN" in reasons["2"] and "holds none for 4.png" in reasons["4"]


def test_captions_of_the_users_are_copied(pictures, monkeypatch):
    (pictures / "0.txt").write_bytes("\ufeffa ball \r\n\r\n two balls\r\n".encode())
    (pictures / "1.txt").write_bytes(b"\xff\xfe\x00")
    (pictures / "2.txt").write_bytes(b" \n")
    take = ["--skip_depth", "--captions_from", str(pictures), "--resolution", "32"]
    assert run_step1(pictures, monkeypatch=monkeypatch, stages=take) == 0
    assert Layout(pictures).prompt("0").read_bytes() == b"a ball\ntwo balls\n"
    reasons = {line["name"]: line["reason"] for line in report(pictures) if line["outcome"] == "no caption"}
    assert (
        "can't be read as UTF-8" in reasons["1"] and "is empty" in reasons["2"] and "holds none for 3" in reasons["3"]
    )


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--depth_kind", "depth"], "--depth_kind: goes together with --depth_from; give both or neither"),
        (["--depth_from", "/nowhere", "--depth_kind", "depth"], "--depth_from /nowhere: no such folder"),
        (
            ["--captions_from", "/", "--skip_captions"],
            "--captions_from /: --skip_captions is given too; leave one away",
        ),
    ],
)
def test_flags_that_do_not_fit(pictures, monkeypatch, capsys, wrong, message):
    assert run_step1(pictures, *wrong, monkeypatch=monkeypatch, stages=()) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"


def test_groups_are_formed_in_order_and_written_as_wholes(tmp_path):
    groups = list(group_by("aBcDefGh", size=2, key=str.isupper))
    assert groups == [["a", "c"], ["B", "D"], ["e", "f"], ["G"], ["h"]]

    def fail(path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_group(tmp_path, {"a": lambda path: path.write_text("a"), "b": fail})
    finish_groups(tmp_path)
    assert not list(tmp_path.iterdir())
    write_group(tmp_path, {"a": lambda path: path.write_text("first")})
    (tmp_path / ".whole-3").mkdir()
    for name in "ab":
        (tmp_path / ".whole-3" / name).write_text("second")
    finish_groups(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "first", "b": "second"}


def test_report_lines_are_json_of_their_own(pictures, monkeypatch):
    assert run_step1(pictures, "--resolution", "32", monkeypatch=monkeypatch) == 0
    first = json.loads((pictures / "step1.jsonl").read_text().splitlines()[0])
    assert first == {"source": "0.png", "outcome": "ready", "name": "0", "original": "raw_images/0.png",
                     "size": [48, 40], "processed": [32, 32]}  # fmt: skip
