"""The check agrees with what training refuses, counts what is there, and looks at everything once."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_folder import NAMES, write_pictures
from PIL import Image

from dataset.check import CheckArgs, check_folder, find_tokens, main
from dataset.check_report import Report
from dataset.contact_sheet import SheetRow, write_contact_sheet
from dataset.inspection import BAD, DOUBTS, FATAL
from dataset.jointdit_dataset import PicturePairs
from dataset.layout import Layout
from dataset.tally import Tally, find_equal
from library.args import parse
from library.data_order import DataOrder, MicroBatches
from library.errors import UserError
from library.flux.text import load_text_encoders
from library.images import write_rgb
from library.loading import load_batches

BROKEN = NAMES[3]
SIZE = 32


def check(folder: Path, *flags: str) -> Report:
    return check_folder(parse(["--image_folder", str(folder), *flags], CheckArgs))


def found(report: Report) -> dict[str, int]:
    """Every finding that was made."""
    return {kind: report.tally.counts[kind] for kind in BAD | FATAL | DOUBTS if report.tally.counts[kind]}


def train_on_pictures(folder: Path, *, max_bad_samples: int) -> None:
    """Read one epoch as training does."""
    pairs = PicturePairs(folder, depth_transform="none", max_bad_samples=max_bad_samples)
    order = DataOrder(count=len(pairs.names), batch_size=1, buckets=pairs.buckets)
    epoch = MicroBatches(order=order, start=0, stop=order.steps_for(1))
    for batch in load_batches(pairs, epoch, workers=0, pin=False, max_bad_samples=max_bad_samples):
        assert batch.rgb_BChw.isfinite().all() and batch.depth_BChw.isfinite().all()


def no_depth(layout: Layout) -> None:
    layout.depthmap(BROKEN).unlink()


def no_caption(layout: Layout) -> None:
    layout.prompt(BROKEN).unlink()


def no_partners(layout: Layout) -> None:
    no_depth(layout)
    no_caption(layout)


def cut_image(layout: Layout) -> None:
    whole = layout.image(BROKEN).read_bytes()
    layout.image(BROKEN).write_bytes(whole[: len(whole) // 2])


def empty_image(layout: Layout) -> None:
    layout.image(BROKEN).write_bytes(b"")


def cut_depth(layout: Layout) -> None:
    whole = layout.depthmap(BROKEN).read_bytes()
    layout.depthmap(BROKEN).write_bytes(whole[:200])


def pickled_depth(layout: Layout) -> None:
    np.save(layout.depthmap(BROKEN), np.array([{"a": 1}], dtype=object), allow_pickle=True)


def change_depth(layout: Layout, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(layout.depthmap(BROKEN), change(np.load(layout.depthmap(BROKEN))))


def with_corner(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def put(depth_hw: np.ndarray) -> np.ndarray:
        depth_hw[0, 0] = value
        return depth_hw

    return put


def nan_depth(layout: Layout) -> None:
    change_depth(layout, with_corner(np.nan))


def infinite_depth(layout: Layout) -> None:
    change_depth(layout, with_corner(np.inf))


def huge_depth(layout: Layout) -> None:
    change_depth(layout, lambda depth_hw: with_corner(1e300)(depth_hw.astype(np.float64)))


def constant_depth(layout: Layout) -> None:
    change_depth(layout, np.zeros_like)


def colour_depth(layout: Layout) -> None:
    change_depth(layout, lambda depth_hw: np.stack([depth_hw, depth_hw * 2, depth_hw], -1))


def other_size(layout: Layout) -> None:
    change_depth(layout, lambda depth_hw: depth_hw[:-4])


def replace_pair(layout: Layout, size: int) -> None:
    write_rgb(layout.image(BROKEN), torch.rand(3, size, size))
    change_depth(layout, lambda _: np.random.default_rng(0).random((size, size), dtype=np.float32))


def small_pair(layout: Layout) -> None:
    replace_pair(layout, 12)


def larger_pair(layout: Layout) -> None:
    replace_pair(layout, 48)


def last_of_its_size(layout: Layout) -> None:
    larger_pair(layout)
    nan_depth(layout)


def latin_caption(layout: Layout) -> None:
    layout.prompt(BROKEN).write_bytes("caf\xe9".encode("latin-1"))


def empty_caption(layout: Layout) -> None:
    layout.prompt(BROKEN).write_text("\n")


def long_caption(layout: Layout) -> None:
    layout.prompt(BROKEN).write_text("a red ball\n" + "a blue box and " * 20 + "a cone\n")


def blank_image(layout: Layout) -> None:
    write_rgb(layout.image(BROKEN), torch.full((3, SIZE, SIZE), 0.5))


def copied_image(layout: Layout) -> None:
    shutil.copy(layout.image(NAMES[0]), layout.image(BROKEN))


def second_ending(layout: Layout) -> None:
    write_rgb(layout.image(BROKEN).with_suffix(".jpg"), torch.rand(3, SIZE, SIZE))


def lone_files(layout: Layout) -> None:
    np.save(layout.depthmap("nobody"), np.random.rand(4, 4))
    layout.prompt("nobody").write_text("a red ball")


def nothing(layout: Layout) -> None:
    pass


# What is done to a folder, what the check must find, and how many bad samples must be allowed.
PICTURES = [
    (nothing, {}, 0),
    (no_depth, {"no_depth": 1}, 1),
    (no_caption, {"no_caption": 1}, 1),
    (no_partners, {"no_depth": 1, "no_caption": 1}, 2),
    (cut_image, {"image": 1}, 1),
    (empty_image, {"image": 1}, 1),
    (cut_depth, {"depth": 1}, 1),
    (pickled_depth, {"depth": 1}, 1),
    (nan_depth, {"depth_nan": 1}, 1),
    (infinite_depth, {"depth_infinite": 1}, 1),
    (huge_depth, {"depth_infinite": 1}, 1),
    (constant_depth, {"depth_constant": 1}, 1),
    (colour_depth, {"depth": 1}, 1),
    (other_size, {"pair_sizes": 1}, 9),
    (small_pair, {"small": 1}, 1),
    (latin_caption, {"caption": 1}, 1),
    (larger_pair, {}, 0),
    (last_of_its_size, {"depth_nan": 1}, 9),
    (empty_caption, {"empty_caption": 1}, 0),
    (long_caption, {"long_t5": 1, "long_clip": 1}, 0),
    (blank_image, {"blank": 1}, 0),
    (copied_image, {"same_image": 1}, 0),
    (lone_files, {"lone_depth": 1, "lone_caption": 1}, 0),
]


@pytest.mark.parametrize(("damage", "expected", "needed"), PICTURES, ids=[row[0].__name__ for row in PICTURES])
def test_it_agrees_with_training_on_pictures(tmp_path, damage, expected, needed):
    damage(write_pictures(tmp_path, size=SIZE))
    for allowed in (0, 1, 2):
        report = check(tmp_path, "--max_bad_samples", str(allowed))
        assert found(report) == expected
        try:
            train_on_pictures(tmp_path, max_bad_samples=allowed)
        except UserError as error:
            assert not report.would_run, error
            assert BROKEN in " ".join(report.verdicts[0].reasons)
        else:
            assert report.would_run
        assert report.would_run == (needed <= allowed)


def test_a_second_ending_takes_no_part(tmp_path):
    second_ending(write_pictures(tmp_path))
    report = check(tmp_path)
    assert found(report) == {"same_name": 1} and report.would_run and report.images == len(NAMES)


def test_a_file_overwritten_in_place(tmp_path):
    layout = write_pictures(tmp_path, size=SIZE)
    for path in (layout.processed_images, layout.depthmaps, layout.text_prompts):
        os.utime(path, (1, 1))  # long ago, so that the folder's index counts
    assert check(tmp_path).would_run
    larger_pair_in_place = np.random.default_rng(0).random((48, 48), dtype=np.float32)
    with layout.depthmap(BROKEN).open("r+b") as file:
        np.save(file, larger_pair_in_place)
    with layout.image(BROKEN).open("r+b") as file:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(file, "PNG")
    report = check(tmp_path, "--max_bad_samples", "8")
    assert found(report) == {"overwritten": 1} and not report.would_run
    with pytest.raises(UserError, match="when the folder was listed"):
        train_on_pictures(tmp_path, max_bad_samples=8)


def test_an_empty_folder_would_fail(tmp_path):
    report = check(tmp_path)
    assert not report.would_run
    assert "has no images in processed_images" in report.verdicts[0].reasons[0]


def test_figures_are_those_of_the_files(tmp_path):
    layout = write_pictures(tmp_path, size=SIZE)
    np.save(layout.depthmap(NAMES[0]), np.linspace(-2, 7, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE))
    layout.prompt(NAMES[1]).write_text("one\ntwo words\n\nand three words\n")
    figures = check(tmp_path).figures()
    assert figures["ranges"]["disparity"] == [-2, 7]
    assert figures["sizes"] == {"image": {"32 x 32": 8}}
    assert figures["captions"] == 10 and figures["ranges"]["words"] == [1, 3]
    assert figures["counts"]["depthmaps"] == figures["counts"]["images"] == 8
    low, high = figures["ranges"]["image"]
    assert 0 <= low < 0.01 and 0.99 < high <= 1


def test_the_command(tmp_path, monkeypatch, capsys):
    layout = write_pictures(tmp_path / "data")
    sheet, figures = tmp_path / "sheet.png", tmp_path / "figures.json"
    flags = ["--sheet", str(sheet), "--sheet_samples", "3", "--json", str(figures)]

    def run(*argv: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["check", *argv])
        with pytest.raises(SystemExit) as done:
            main()
        return done.value.code, capsys.readouterr().out

    status, out = run(str(tmp_path / "data"), *flags)
    assert status == 0 and "training on the pictures would run" in out and len(out.splitlines()) < 40
    assert json.loads(figures.read_text())["would_run"] is True
    with Image.open(sheet) as image:
        assert image.width > 1000 and image.height > 300
    no_depth(layout)
    status, out = run("--image_folder", str(tmp_path / "data"), "--sheet_samples", "0")
    assert status == 1 and f"1 images without a depth map: {BROKEN}" in out
    assert "training on the pictures would fail" in out and "contact sheet" not in out


def test_flags_are_checked(tmp_path):
    with pytest.raises(UserError, match=r"--image_folder .*nowhere: no such folder"):
        check(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"--sheet a.jpg: the contact sheet is a PNG"):
        check(tmp_path, "--sheet", "a.jpg")
    assert parse(["--image_folder", str(tmp_path)], CheckArgs).sheet_path.parts[:2] == ("outputs", "check")


def test_tokens_are_counted_by_the_given_tokenizers(tmp_path):
    write_pictures(tmp_path, size=SIZE)
    plain = find_tokens(parse(["--image_folder", str(tmp_path)], CheckArgs))
    assert plain[1] == "the embedded model's tokenizer"
    encoders = load_text_encoders(plain[0].clip[1], plain[0].t5[1])
    assert plain[0].t5_length == encoders.t5_length
    assert plain[0].clip_length == encoders.clip.config.max_position_embeddings
    flags = [f"--t5xxl={plain[0].t5[1]}", "--t5xxl_max_token_length", "3"]
    tokens, said = find_tokens(parse(["--image_folder", str(tmp_path), *flags], CheckArgs))
    assert tokens.t5_length == 3 and f"T5: that of {plain[0].t5[1]}" in said
    assert found(check(tmp_path, *flags)) == {"long_t5": len(NAMES)}
    with pytest.raises(UserError, match=r"--t5_tokenizer nowhere: no such folder"):
        check(tmp_path, "--t5_tokenizer", "nowhere")


def test_parts_add_up_to_the_whole():
    whole, parts = Tally(), [Tally() for _ in range(3)]
    for number in range(30):
        for tally in (whole, parts[number // 10]):
            tally.note("odd" if number % 2 else "even", str(number))
            tally.stretch("number", number, number)
            tally.measure("digits", (len(str(number)),))
            tally.digests += bytes([number % 7]) * 16
    for part in parts[1:]:
        parts[0].merge(part)
    assert parts[0] == whole
    assert whole.examples["odd"] == [("1", ""), ("3", ""), ("5", "")]
    assert find_equal(whole.digests).tolist() == [[place % 7, place] for place in range(7, 30)]
    assert len(find_equal(b"")) == len(find_equal(b"1" * 16)) == 0


def test_a_contact_sheet_takes_any_shape(tmp_path):
    rows = [
        SheetRow(name="wide", caption="word " * 200, rgb_3hw=torch.rand(3, 4, 900), disparity_hw=torch.zeros(900, 4)),
        SheetRow(name="empty \N{SNOWMAN}", caption=""),
    ]
    write_contact_sheet(tmp_path / "sheet.png", rows, columns=1)
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.height > image.width / 2


@pytest.mark.slow
def test_workers_change_nothing(tmp_path):
    layout = write_pictures(tmp_path, names=tuple(f"{number:04d}" for number in range(100)), size=16)
    layout.depthmap("0050").unlink()
    one, two = (check(tmp_path, "--workers", workers).figures() for workers in ("1", "2"))
    assert one == two and one["findings"]["no_depth"] == 1
