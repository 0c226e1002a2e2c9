"""The index of a prepared folder: quick on many samples, never out of date, and free of looks at single samples."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from fake_folder import NAMES, write_cache, write_pictures

import dataset.listing
import dataset.sample_index
from dataset.cache import stamp_of
from dataset.jointdit_dataset import CachedPairs, PicturePairs
from dataset.layout import Layout
from dataset.listing import depthmap_size, list_cache, list_pictures
from dataset.sample_index import Names, Row, SampleIndex, read_index, write_index
from library.errors import UserError

MANY = 20_000


@pytest.fixture
def settled(monkeypatch):
    """Take folders as settled at once, so that tests needn't wait two seconds."""
    for module in (dataset.sample_index, dataset.listing):
        monkeypatch.setattr(module, "SETTLED_NS", -1)


def stand_ins(folder: Path, ending: str) -> None:
    folder.mkdir(parents=True)
    for number in range(MANY):
        (folder / f"{number:08d}{ending}").touch()


def test_names_are_a_sequence():
    listed = ["a", "", "größer", "z" * 40]
    names = Names.of(listed)
    assert list(names) == listed and len(names) == 4 and names[-1] == listed[-1]
    assert names[1:3] == listed[1:3] and "größer" in names
    with pytest.raises(IndexError):
        names[4]
    assert list(Names.of([])) == []


def test_many_pictures_are_listed_and_indexed_quickly(tmp_path, settled):
    layout = Layout(tmp_path)
    for folder, ending in (
        (layout.processed_images, ".png"),
        (layout.depthmaps, ".npy"),
        (layout.text_prompts, ".txt"),
    ):
        stand_ins(folder, ending)
    start = time.process_time()
    pairs = PicturePairs(tmp_path, depth_transform="none")
    listed = time.process_time() - start
    assert len(pairs.names) == MANY and pairs.names[MANY - 1] == f"{MANY - 1:08d}" and pairs.buckets is None
    start = time.process_time()
    again = PicturePairs(tmp_path, depth_transform="none")
    assert time.process_time() - start < listed / 5 and listed < 3
    assert list(again.names) == list(pairs.names)


def test_a_start_opens_no_sample(tmp_path, settled, monkeypatch):
    write_pictures(tmp_path)
    write_cache(tmp_path)
    PicturePairs(tmp_path, depth_transform="none")
    CachedPairs(tmp_path, depth_transform="none")

    def refuse(*_):
        raise AssertionError("a sample was looked at")

    for name in ("scan", "depthmap_size", "latent_size"):
        monkeypatch.setattr(dataset.listing, name, refuse)
    assert list(PicturePairs(tmp_path, depth_transform="none").names) == list(NAMES)
    assert list(CachedPairs(tmp_path, depth_transform="none").names) == list(NAMES)


def test_changes_of_the_folder_are_seen(tmp_path, settled):
    layout = write_pictures(tmp_path, names=NAMES[:4])
    assert len(list_pictures(layout)) == 4
    write_pictures(tmp_path, names=NAMES[4:5])
    assert len(list_pictures(layout)) == 5
    layout.image(NAMES[0]).unlink()
    assert list(list_pictures(layout).names) == list(NAMES[1:5])
    np.save(tmp_path / "other.npy", np.random.rand(48, 16).astype(np.float32))
    os.replace(tmp_path / "other.npy", layout.depthmap(NAMES[1]))
    assert list_pictures(layout)[0] == Row(name=NAMES[1], height=48, width=16)
    layout.prompt(NAMES[2]).unlink()
    assert list_pictures(layout).notes == {"missing": 1, "first_missing": str(layout.prompt(NAMES[2]))}


def test_a_folder_that_just_changed_is_listed_again(tmp_path):
    layout = write_pictures(tmp_path)
    list_pictures(layout)
    stored = read_index(layout.pictures_index, [layout.processed_images, layout.depthmaps, layout.text_prompts])
    assert stored is not None and not stored.fresh


def test_sizes_of_files_that_changed_are_read_again(tmp_path, settled, monkeypatch):
    layout = write_cache(tmp_path)
    stamp = CachedPairs(tmp_path, depth_transform="none").stamp
    looked_at = []
    plain = dataset.listing.latent_size
    monkeypatch.setattr(dataset.listing, "latent_size", lambda path: looked_at.append(path.stem) or plain(path))
    monkeypatch.setattr(dataset.listing, "SETTLED_NS", 0)
    write_cache(tmp_path, names=NAMES[2:3], side=6)
    index = list_cache(layout, stamp=stamp, flag="--image_folder")
    assert looked_at == [NAMES[2]]
    assert (index[2].height, index[1].height) == (6, 4)
    assert index.buckets(multiple=1).tolist() == [0, 0, 1, 0, 0, 0, 0, 0]


def test_overwriting_in_place_is_noticed_when_read(tmp_path, settled):
    layout = write_pictures(tmp_path)
    PicturePairs(tmp_path, depth_transform="none")
    other = write_pictures(tmp_path / "other", size=48)
    for path in (layout.image(NAMES[3]), layout.depthmap(NAMES[3])):
        path.write_bytes((other.root / path.relative_to(tmp_path)).read_bytes())
    pairs = PicturePairs(tmp_path, depth_transform="none")
    with pytest.raises(
        UserError, match=r"has 48 x 48 rows and columns, but 32 x 32 when .*delete .*pictures\.safetens"
    ):
        pairs.read(3)


def test_a_damaged_or_unwritable_index_is_done_without(tmp_path, settled, caplog):
    layout = write_pictures(tmp_path)
    list_pictures(layout)
    layout.pictures_index.write_bytes(b"nothing")
    assert len(list_pictures(layout)) == 8
    layout.pictures_index.unlink()
    layout.pictures_index.parent.rmdir()
    layout.pictures_index.parent.write_text("in the way")
    with caplog.at_level("INFO", logger="dataset"):
        assert len(list_pictures(layout)) == 8
    assert "can't be kept" in caplog.text


def test_index_comes_back(tmp_path, settled):
    rows = [Row(name="b", height=64, width=48, shard=2, offset=512, length=99), Row(name="a", height=32, width=32)]
    index = SampleIndex.of(rows, {"stamp": "s"})
    write_index(tmp_path / "index" / "i.safetensors", index, folders={"cache": 0}, began=5)
    stored = read_index(tmp_path / "index" / "i.safetensors", [tmp_path / "cache"])
    assert stored.fresh and stored.began == 5 and stored.index.notes == {"stamp": "s"}
    assert [stored.index[number] for number in range(2)] == rows[::-1]


def test_buckets_number_the_sizes():
    def buckets(*sizes: tuple[int, int], multiple: int = 16) -> list[int] | None:
        rows = [Row(name=str(number), height=h, width=w) for number, (h, w) in enumerate(sizes)]
        found = SampleIndex.of(rows, {}).buckets(multiple=multiple)
        return None if found is None else found.tolist()

    assert buckets((32, 64), (64, 32), (32, 64), (32, 79)) == [0, 1, 0, 0]
    assert buckets((32, 32), (40, 47)) is None and buckets((0, 0), (32, 32)) is None and buckets((0, 0)) is None
    assert buckets((16, 16), (32, 32), (0, 0), (32, 32)) == [0, 1, 1, 1]


def test_headers_of_depth_maps(tmp_path):
    path = tmp_path / "depth.npy"
    for shape, size in (((5, 7), (5, 7)), ((1, 5, 7), (5, 7)), ((5, 7, 3), (5, 7)), ((5,), (0, 0))):
        np.save(path, np.zeros(shape, dtype=np.float32))
        assert depthmap_size(path) == size
    path.write_bytes(b"nothing")
    assert depthmap_size(path) == depthmap_size(tmp_path / "nowhere.npy") == (0, 0)


def test_stamps_tell_caches_apart():
    assert stamp_of({"ae": "1"}) == stamp_of({"ae": "1"}) != stamp_of({"ae": "2"})
