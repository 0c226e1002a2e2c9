"""Training pairs: both modes read what is there and name what isn't."""

import numpy as np
import pytest
import torch
from fake_folder import NAMES, write_cache, write_pictures

from dataset.cache import claim_folder, fingerprint
from dataset.jointdit_dataset import CachedPairs, PicturePairs, centre_crop, read_picture_files
from library.batches import Batch, PixelBatch
from library.data_order import DataOrder, MicroBatches
from library.errors import UserError
from library.loading import BadSample, load_batches


def test_pictures_become_pixels(tmp_path):
    write_pictures(tmp_path)
    pairs = PicturePairs(tmp_path, depth_transform="none")
    batch = pairs.collate([pairs.read(0), pairs.read(3)])
    assert isinstance(batch, PixelBatch)
    assert batch.names == (NAMES[0], NAMES[3]) and batch.prompts[1] == f"picture {NAMES[3]}"
    assert batch.rgb_BChw.shape == batch.depth_BChw.shape == (2, 3, 32, 32)
    assert batch.depth_BChw.amin() == -1 and batch.depth_BChw.amax() == 1
    inverse = PicturePairs(tmp_path, depth_transform="inverse").read(0)[2]
    torch.testing.assert_close(inverse, -batch.depth_BChw[0])


def test_missing_partners_are_named(tmp_path):
    layout = write_pictures(tmp_path)
    layout.prompt(NAMES[2]).unlink()
    with pytest.raises(UserError, match=rf"--image_folder .*text_prompts/{NAMES[2]}\.txt: missing \(1 of 8"):
        PicturePairs(tmp_path, depth_transform="none")


def test_empty_folder(tmp_path):
    with pytest.raises(UserError, match="has no images in processed_images"):
        PicturePairs(tmp_path, depth_transform="none")


def test_sizes_of_image_and_depth_must_agree(tmp_path):
    layout = write_pictures(tmp_path)
    np.save(layout.depthmap(NAMES[0]), np.random.rand(16, 32))
    with pytest.raises(UserError, match="is 32 x 16 but its image 32 x 32"):
        PicturePairs(tmp_path, depth_transform="none").read(0)


def test_pictures_too_small_for_a_token(tmp_path):
    layout = write_pictures(tmp_path, size=15)
    with pytest.raises(UserError, match=rf"{NAMES[0]}.png: is 15 x 15; each side must have 16 pixels or more"):
        read_picture_files(layout.image(NAMES[0]), layout=layout)


def test_crop_keeps_the_centre():
    x = torch.arange(20 * 35).view(20, 35)
    cropped = centre_crop(x)
    assert cropped.shape == (16, 32)
    assert cropped[0, 0] == x[2, 1]


def test_cached_pairs(tmp_path):
    write_cache(tmp_path)
    pairs = CachedPairs(tmp_path, depth_transform="none")
    assert list(pairs.names) == list(NAMES)
    batch = pairs.collate([pairs.read(1), pairs.read(2)])
    assert isinstance(batch, Batch) and batch.rgb_BChw.shape == (2, 16, 4, 4)
    assert batch.text.tokens_BLD.shape == (2, 5, 48) and batch.text.mask_BL is None
    with pytest.raises(UserError, match="--depth_transform inverse: the cache of .* was made with none"):
        CachedPairs(tmp_path, depth_transform="inverse")


def test_no_cache(tmp_path):
    write_pictures(tmp_path)
    with pytest.raises(UserError, match="has no cached latents; run dataset/preprocess_step2.py"):
        CachedPairs(tmp_path, depth_transform="none")


def test_damaged_sample_is_named(tmp_path):
    layout = write_cache(tmp_path)
    whole = layout.cached(NAMES[0]).read_bytes()
    layout.cached(NAMES[0]).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadSample, match=rf"{NAMES[0]}\.safetensors: damaged"):
        CachedPairs(tmp_path, depth_transform="none").read(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_the_stream(tmp_path, workers):
    layout = write_cache(tmp_path)
    pairs = CachedPairs(tmp_path, depth_transform="none")
    micro_batches = MicroBatches(order=DataOrder(count=8, batch_size=3), start=0, stop=4)
    names = [batch.names for batch in load_batches(pairs, micro_batches, workers=workers, pin=False)]
    assert names == [tuple(NAMES[pick.sample] for pick in picks) for picks in micro_batches]
    layout.cached(NAMES[5]).write_bytes(b"nothing")
    with pytest.raises(UserError, match=rf"^--image_folder .*{NAMES[5]}"):
        list(load_batches(pairs, micro_batches, workers=workers, pin=False))


def test_samples_of_two_sizes(tmp_path):
    write_cache(tmp_path, names=NAMES[:1])
    write_cache(tmp_path, names=NAMES[1:2], side=6)
    pairs = CachedPairs(tmp_path, depth_transform="none")
    with pytest.raises(UserError, match="a batch needs one size"):
        pairs.collate([pairs.read(0), pairs.read(1)])


def test_a_cache_is_no_mix(tmp_path):
    meta = tmp_path / "cache" / "meta.json"
    claim_folder(meta, {"ae": "1", "seed": 3}, flag="--image_folder")
    claim_folder(meta, {"ae": "1", "seed": 3}, flag="--image_folder")
    with pytest.raises(UserError, match="was made with ae 1, now it is 2"):
        claim_folder(meta, {"ae": "2", "seed": 3}, flag="--image_folder")


def test_fingerprints_tell_files_apart(tmp_path):
    for name, content in (("a", b"1" * 100), ("b", b"1" * 99 + b"2")):
        (tmp_path / name).write_bytes(content)
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
