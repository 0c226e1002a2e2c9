"""Tar shards: the same samples as files of their own, whole or absent, in any order of writing."""

import json
import tarfile

import pytest
import torch
from fake_folder import NAMES, write_pictures
from filled_folder import cache_files, fill

from dataset.jointdit_dataset import CachedPairs
from dataset.listing import list_cache
from library.batches import Batch
from library.errors import UserError
from library.loading import BadSample


def everything(folder) -> Batch:
    pairs = CachedPairs(folder, depth_transform="none")
    return pairs.collate([pairs.read(index) for index in range(len(pairs.names))])


@pytest.fixture
def sharded(tmp_path, encoder):
    layout = write_pictures(tmp_path)
    assert fill(tmp_path, encoder, shard_size=3) == 8
    return layout


def test_shards_hold_what_files_hold(tmp_path, sharded, encoder):
    assert sorted(cache_files(tmp_path)) == [
        "meta.json",
        *(f"shard_{number:06d}.{ending}" for number in range(3) for ending in ("json", "tar")),
    ]
    write_pictures(tmp_path / "files")
    fill(tmp_path / "files", encoder)
    left, right = everything(tmp_path), everything(tmp_path / "files")
    assert left.names == right.names == NAMES
    assert torch.equal(left.rgb_BChw, right.rgb_BChw) and torch.equal(left.text.tokens_BLD, right.text.tokens_BLD)
    with tarfile.open(sharded.shard(1)) as tar:
        assert tar.getnames() == [f"{name}.safetensors" for name in NAMES[3:6]]
        content = tar.extractfile(f"{NAMES[4]}.safetensors").read()
    assert content == (tmp_path / "files" / "cache" / f"{NAMES[4]}.safetensors").read_bytes()


@pytest.mark.parametrize("lost", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_a_stopped_run_makes_the_same_shards(tmp_path, sharded, encoder, lost):
    first = cache_files(tmp_path)
    for number in lost:
        sharded.shard_index(number).unlink()  # a shard without one isn't finished
    assert fill(tmp_path, encoder, shard_size=3) == sum((3, 3, 2)[number] for number in lost)
    assert cache_files(tmp_path) == first
    assert fill(tmp_path, encoder, shard_size=3) == 0


def test_pictures_that_come_later_get_shards_of_their_own(tmp_path, sharded, encoder):
    first = cache_files(tmp_path)
    write_pictures(tmp_path, names=("0_first", "zz_last"))
    assert fill(tmp_path, encoder, shard_size=3) == 2
    assert {name: content for name, content in cache_files(tmp_path).items() if name in first} == first
    assert everything(tmp_path).names == tuple(sorted((*NAMES, "0_first", "zz_last")))
    write_pictures(tmp_path, names=("file",))
    assert fill(tmp_path, encoder) == 1
    assert len(everything(tmp_path).names) == 11


def test_damaged_shards_are_named(tmp_path, sharded):
    pairs = CachedPairs(tmp_path, depth_transform="none")
    path = sharded.shard(1)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(BadSample, match=rf"--image_folder .*shard_000001\.tar, {NAMES[4]}: cut short"):
        pairs.read(4)
    path.unlink()
    with pytest.raises(BadSample, match=r"shard_000001\.tar, .*: no such file"):
        pairs.read(4)
    sharded.shard_index(1).write_text("{")
    with pytest.raises(UserError, match=r"shard_000001\.json: damaged"):
        CachedPairs(tmp_path, depth_transform="none")


def test_a_shard_of_another_cache_is_refused(tmp_path, sharded):
    path = sharded.shard_index(2)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stamp": "other"}))
    with pytest.raises(UserError, match=r"shard_000002\.json: its shard was made by other models"):
        list_cache(sharded, stamp=json.loads(sharded.shard_index(0).read_text())["stamp"], flag="--image_folder")
