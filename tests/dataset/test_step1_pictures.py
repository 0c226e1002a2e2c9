"""Step 1's pictures: of every kind of file what must become of it, and that none is ever lost."""

import errno
import json
import os
import re
import shutil
import sys
from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from nasty_pictures import BLUE, CASES, GREEN, JPEG, PNG, READY, picture, saved
from PIL import Image

from dataset import preprocess_step1
from dataset.intake import FitRule, Intake
from dataset.layout import Layout
from dataset.sources import list_sources
from library.cli import run_main
from library.errors import UserError

AS_ROOT = os.geteuid() == 0
ONLY_PICTURES = ("--skip_depth", "--skip_captions")


def run_step1(folder, *flags, monkeypatch, stages=ONLY_PICTURES):
    """Run the command as a user does, and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["preprocess_step1.py", "--image_folder", str(folder), *stages, *flags])
    try:
        run_main(preprocess_step1.main)
    except SystemExit as ended:
        return ended.code
    return 0


def report(folder):
    return [json.loads(line) for line in (folder / "step1.jsonl").read_bytes().splitlines()]


def tree(folder):
    """All files below a folder: path to content (or to where a link leads)."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[os.fsencode(path.relative_to(folder))] = os.readlink(path)
        elif path.is_file():
            found[os.fsencode(path.relative_to(folder))] = sha256(path.read_bytes()).hexdigest()
    return found


def originals(folder):
    """How often each content is there among what isn't step 1's own."""
    own = (b"processed_images/", b"step1.json", b"depthmaps/", b"text_prompts/")
    return Counter(content for path, content in tree(folder).items() if not path.startswith(own))


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    """All nasty files in one folder, taken once; with what was there before."""
    base = tmp_path_factory.mktemp("nasty")
    folder = base / "pictures"
    (base / "outside").mkdir()
    (base / "outside" / "picture.png").write_bytes(PNG)
    for case in CASES:
        path = folder / case.path
        path.parent.mkdir(parents=True, exist_ok=True)
        case.make(path)
    (folder / "nothing in here").mkdir()
    (folder / ".hidden.png").write_bytes(PNG)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "a.png").write_bytes(PNG)
    (folder / "hard link.png").hardlink_to(folder / "plain.png")
    before = originals(folder)
    with pytest.MonkeyPatch.context() as patch:
        assert run_step1(folder, "--resolution", "32", monkeypatch=patch) == 0
    return folder, before


def test_there_are_enough_kinds():
    assert len(CASES) >= 40 and len({case.path for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: ascii(case.path))
def test_each_file_ends_as_it_must(nasty, case):
    folder, _ = nasty
    path = f"{case.path}/inside.png" if case.path == "folder.png" else case.path
    (line,) = [line for line in report(folder) if line["source"] == path]
    if case.path == "forbidden.png" and AS_ROOT:
        assert line["outcome"] == READY
        return
    assert line["outcome"] == case.outcome
    if case.outcome != READY:
        assert re.search(case.reason, line["reason"])
        assert os.path.lexists(folder / path), "what isn't used stays where it is"
        return
    if case.name is not None:
        assert line["name"] == case.name
    assert line["original"] == (path if case.linked else f"raw_images/{path}")
    assert (folder / line["original"]).exists() and (case.linked or not (folder / path).exists())
    with Image.open(Layout(folder).image(line["name"])) as image:
        assert (image.mode, image.size) == ("RGB", (32, 32))
        if case.corner is not None:
            np.testing.assert_allclose(image.getpixel((3, 3)), case.corner, atol=12)


def test_nothing_is_lost_doubled_or_left_half_done(nasty):
    folder, before = nasty
    assert originals(folder) == before
    assert (folder / ".hidden.png").exists() and (folder / ".hidden" / "a.png").exists()
    lines = report(folder)
    assert len({line["source"] for line in lines}) == len(lines) == len(CASES) + 1  # the hard link
    names = [line["name"] for line in lines if line["outcome"] == READY]
    assert len(set(names)) == len(names)
    there = {path.name for path in Layout(folder).processed_images.iterdir()}
    assert there == {f"{name}.png" for name in names}
    assert all(len(name.encode()) <= 130 for name in names)


def test_a_second_run_changes_nothing(nasty, monkeypatch):
    folder, _ = nasty
    before = tree(folder)
    assert run_step1(folder, "--resolution", "32", monkeypatch=monkeypatch) == 0
    assert tree(folder) == before


def test_every_problem_is_named_on_the_screen(tmp_path, monkeypatch, capsys):
    (tmp_path / "good.png").write_bytes(PNG)
    (tmp_path / "two\nlines\x1b.png").write_bytes(b"no picture")
    for number in range(12):
        (tmp_path / f"small {number:02d}.png").write_bytes(saved(picture(8, 8)))
    assert run_step1(tmp_path, "--resolution", "32", monkeypatch=monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "small 00.png: too small: 8 x 8, smaller than 32 x 32"
    assert lines[-2:] == ["... and 3 more", f"1 not read, 1 ready, 12 too small; see {tmp_path}/step1.jsonl"]
    shutil.rmtree(tmp_path / "raw_images")
    for number in range(12):
        (tmp_path / f"small {number:02d}.png").unlink()
    assert run_step1(tmp_path, "--resolution", "32", monkeypatch=monkeypatch) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("two\\nlines\\x1b.png: not read: is not a picture")
    assert "holds no picture that can be used" in captured.err


@pytest.mark.parametrize("how", ["move", "copy", "keep"])
def test_originals(tmp_path, monkeypatch, how):
    (tmp_path / "a.png").write_bytes(PNG)
    for _ in range(2):
        assert run_step1(tmp_path, "--resolution", "32", "--originals", how, monkeypatch=monkeypatch) == 0
        assert (tmp_path / "a.png").exists() == (how != "move")
        assert (tmp_path / "raw_images" / "a.png").exists() == (how != "keep")
    (line,) = report(tmp_path)
    assert line["original"] == ("a.png" if how == "keep" else "raw_images/a.png")
    # whatever was done first, moving afterwards leaves one original
    assert run_step1(tmp_path, "--resolution", "32", monkeypatch=monkeypatch) == 0
    assert originals(tmp_path) == {sha256(PNG).hexdigest(): 1}


@pytest.mark.parametrize("how", ["move", "copy"])
def test_originals_with_the_longest_names_and_odd_permissions(tmp_path, monkeypatch, how):
    path = tmp_path / ("x" * 251 + ".png")
    path.write_bytes(PNG)
    path.chmod(0o440)
    os.utime(path, (1e9, 1e9))
    assert run_step1(tmp_path, "--resolution", "32", "--originals", how, monkeypatch=monkeypatch) == 0
    stored = (tmp_path / "raw_images" / path.name).stat()
    assert (stored.st_mode & 0o777, stored.st_mtime) == (0o440, 1e9)
    assert len(list(tmp_path.rglob("*"))) == (7 if how == "copy" else 6)


def test_originals_go_to_another_disk(tmp_path, monkeypatch):
    def other_disk(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    (tmp_path / "a.png").write_bytes(PNG)
    monkeypatch.setattr(Path, "rename", other_disk)
    assert run_step1(tmp_path, "--resolution", "32", monkeypatch=monkeypatch) == 0
    assert (tmp_path / "raw_images" / "a.png").read_bytes() == PNG and not (tmp_path / "a.png").exists()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    def full(*values):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a.png").write_bytes(PNG)
    monkeypatch.setattr("dataset.intake.write_noted_png", full)
    assert run_step1(tmp_path, "--resolution", "32", monkeypatch=monkeypatch) == 2
    expected = f"error: --image_folder {tmp_path}: No space left on device; make room and run it again"
    assert capsys.readouterr().err.splitlines()[-1] == expected
    assert (tmp_path / "a.png").read_bytes() == PNG


def test_another_picture_of_a_taken_path_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(PNG)
    assert run_step1(tmp_path, "--resolution", "32", monkeypatch=monkeypatch) == 0
    (tmp_path / "a.png").write_bytes(saved(picture(color=GREEN)))
    assert run_step1(tmp_path, "--resolution", "32", monkeypatch=monkeypatch) == 0
    stored, fresh = report(tmp_path)
    assert stored["outcome"] == READY and fresh["outcome"] == "left out" and "rename this one" in fresh["reason"]
    assert sum(originals(tmp_path).values()) == 2
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    assert run_step1(tmp_path, "--resolution", "32", monkeypatch=monkeypatch) == 0
    assert [line["name"] for line in report(tmp_path)] == ["a", "b"]


def test_what_is_in_the_way_in_raw_images_is_never_written_over(tmp_path, monkeypatch):
    (tmp_path / "raw_images" / "b.png").mkdir(parents=True)
    (tmp_path / "raw_images" / "a.png").symlink_to("/nowhere")
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.png").write_bytes(PNG)
    (tmp_path / "c.png").write_bytes(PNG)
    assert run_step1(tmp_path, "--resolution", "32", monkeypatch=monkeypatch) == 0
    reasons = [line.get("reason", "") for line in report(tmp_path) if line["outcome"] == "left out"]
    assert sum("holds something else of this path" in reason for reason in reasons) == 2
    assert os.readlink(tmp_path / "raw_images" / "a.png") == "/nowhere"
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes() == PNG


def test_hidden_files_of_the_users_stay(tmp_path, monkeypatch):
    theirs = (tmp_path / ".notes.2024.tmp.txt", tmp_path / "raw_images" / ".a.1.tmp.png")
    theirs[1].parent.mkdir()
    begun = (tmp_path / ".step1.7.tmp.jsonl", tmp_path / "raw_images" / ".copy.7.tmp")
    for path in (*theirs, *begun, tmp_path / "a.png"):
        path.write_bytes(PNG)
    assert run_step1(tmp_path, "--resolution", "32", monkeypatch=monkeypatch) == 0
    assert all(path.exists() for path in theirs) and not any(path.exists() for path in begun)


def test_a_picture_that_is_taken_away_during_the_run_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    layout = Layout(tmp_path)
    (source,) = list_sources(layout)
    (tmp_path / "a.png").unlink()
    outcome = Intake(layout, rule=FitRule(resolution=32), originals="move").take(source)
    assert (outcome.outcome, outcome.reason) == ("not read", "can't be read (No such file or directory)")


def test_names_stay_when_more_pictures_come(tmp_path, monkeypatch):
    (tmp_path / "b.png").write_bytes(PNG)
    assert run_step1(tmp_path, "--resolution", "32", monkeypatch=monkeypatch) == 0
    (tmp_path / "b.jpg").write_bytes(JPEG)  # sorts before the picture that has the name
    assert run_step1(tmp_path, "--resolution", "32", monkeypatch=monkeypatch) == 0
    assert [(line["source"], line["name"]) for line in report(tmp_path)] == [("b.jpg", "b~jpg"), ("b.png", "b")]
    Layout(tmp_path).image("b").unlink()
    assert run_step1(tmp_path, "--resolution", "32", monkeypatch=monkeypatch) == 0
    assert [line["name"] for line in report(tmp_path)] == ["b~jpg", "b"]


def test_a_changed_picture_is_named_and_one_processed_by_others_taken_over(tmp_path, monkeypatch):
    for name in ("changed", "theirs", "their jpeg", "damaged"):
        (tmp_path / f"{name}.png").write_bytes(PNG)
    processed = Layout(tmp_path).processed_images
    processed.mkdir()
    (processed / "theirs.png").write_bytes(saved(picture(48, 48, color=GREEN)))
    (processed / "their jpeg.jpg").write_bytes(JPEG)
    (processed / "damaged.png").write_bytes(b"")
    assert run_step1(tmp_path, "--resolution", "32", "--originals", "keep", monkeypatch=monkeypatch) == 0
    (tmp_path / "changed.png").write_bytes(saved(picture(64, 64)))
    theirs = (processed / "theirs.png").read_bytes()
    assert run_step1(tmp_path, "--resolution", "32", "--originals", "keep", monkeypatch=monkeypatch) == 0
    changed, damaged, jpeg, taken_over = report(tmp_path)
    assert (jpeg["name"], jpeg["image"]) == ("their jpeg", "processed_images/their jpeg.jpg")
    assert not (processed / "their jpeg.png").exists()
    assert "has changed since it became changed" in changed["reason"]
    assert "processed_images/damaged.png: is empty" in damaged["reason"]
    assert taken_over["outcome"] == READY and taken_over["processed"] == [48, 48]
    assert (processed / "theirs.png").read_bytes() == theirs


def test_errors_name_the_flag(tmp_path, monkeypatch, capsys):
    def error(folder, *flags):
        assert run_step1(folder, *flags, monkeypatch=monkeypatch) == 2
        return capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")

    (tmp_path / "a.png").write_bytes(PNG)
    assert error(tmp_path / "none") == f"--image_folder {tmp_path}/none: no such folder; give a folder of pictures"
    assert error(tmp_path / "a.png").startswith(f"--image_folder {tmp_path}/a.png: is a file")
    assert error(tmp_path, "--resolution", "500") == "--resolution 500: must be a multiple of 16"
    assert error(tmp_path, "--originals", "burn").startswith("--originals burn: must be one of move, copy, keep")
    assert run_step1(tmp_path, "--resolution", "32", monkeypatch=monkeypatch) == 0
    capsys.readouterr()
    assert error(tmp_path, "--resolution", "16").startswith(
        f"--resolution 16: the pictures in {tmp_path}/processed_images were made with 32; use the same, or begin anew"
    )
    settings = (tmp_path / "step1.json").read_text()
    (tmp_path / "step1.json").write_text("{")
    assert error(tmp_path, "--resolution", "32").startswith(f"--image_folder {tmp_path}/step1.json: can't be read")
    (tmp_path / "step1.json").write_text(settings)
    (tmp_path / "b.png").write_bytes(PNG)
    shutil.rmtree(tmp_path / "raw_images")
    (tmp_path / "raw_images").write_text("a file is in the way")
    assert error(tmp_path, "--resolution", "32").startswith(f"--originals move: {tmp_path}/b.png can't be moved to")


def test_one_run_at_a_time(tmp_path):
    from dataset.step1_folder import hold_folder

    with hold_folder(Layout(tmp_path)):
        with pytest.raises(UserError, match="another run of this step is at work"), hold_folder(Layout(tmp_path)):
            pass
    with hold_folder(Layout(tmp_path)):
        pass


def test_upscale_and_buckets(tmp_path, monkeypatch):
    (tmp_path / "small.png").write_bytes(saved(picture(9, 7)))
    (tmp_path / "wide.png").write_bytes(saved(picture(300, 100)))
    (tmp_path / "tall.jpg").write_bytes(saved(picture(100, 140), "JPEG"))
    assert run_step1(tmp_path, "--resolution", "64", "--buckets", "--upscale", monkeypatch=monkeypatch) == 0
    sizes = {line["source"]: line["processed"] for line in report(tmp_path)}
    assert sizes == {"small.png": [64, 64], "tall.jpg": [48, 80], "wide.png": [96, 32]}


def test_colours_on_white_and_blue_survive(nasty):
    folder, _ = nasty
    with Image.open(Layout(folder).image("plain")) as image:
        np.testing.assert_allclose(image.getpixel((28, 28)), BLUE, atol=12)
