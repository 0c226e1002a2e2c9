"""Training pairs: both modes read what is there and name what isn't."""

import numpy as np
import pytest
import torch
from fake_folder import NAMES, write_cache, write_pictures

from dataset.cache import claim_folder
from dataset.jointdit_dataset import CachedPairs, PicturePairs, centre_crop, read_captions, read_picture_files
from library.batches import Batch, PixelBatch
from library.data_order import DataOrder, MicroBatches
from library.errors import UserError
from library.loading import BadSample, batches_of, load_batches, readable
from library.randomness import generator_for


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


def test_pairs_are_mirrored_together(tmp_path):
    write_pictures(tmp_path)
    plain, mirrored = (PicturePairs(tmp_path, depth_transform="none", mirror=mirror) for mirror in (False, True))
    turned = 0
    for step in range(20):
        one, other = (pairs.read(2, generator=generator_for(1, "reading", step, 0)) for pairs in (plain, mirrored))
        assert torch.equal(one[1], plain.read(2)[1]), "only --flip_aug mirrors"
        flipped = torch.equal(other[1], one[1].flip(-1))
        assert torch.equal(other[2], one[2].flip(-1) if flipped else one[2])
        assert flipped or torch.equal(other[1], one[1])
        turned += flipped
    assert 4 < turned < 16
    assert torch.equal(mirrored.read(2)[1], plain.read(2)[1]), "previews and validation aren't mirrored"


def test_captions_are_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\n  two  \r\n", encoding="utf-8")
    assert read_captions(path) == ("one", "two")
    path.write_text("\n")
    assert read_captions(path) == (" ",)
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"--image_folder .*a\.txt: is not UTF-8"):
        read_captions(path)
    with pytest.raises(UserError, match=r"b\.txt: can't be read"):
        read_captions(tmp_path / "b.txt")


def test_images_of_any_ending(tmp_path):
    layout = write_pictures(tmp_path)
    layout.image(NAMES[0]).rename(layout.image(NAMES[0]).with_suffix(".PNG"))
    pairs = PicturePairs(tmp_path, depth_transform="none")
    assert list(pairs.names) == list(NAMES) and pairs.read(0)[0] == NAMES[0]


def read_names(pairs, order: DataOrder, *, start: int = 0, stop: int = 12, workers: int = 0, bound: int = 0):
    micro_batches = MicroBatches(order=order, start=start, stop=stop)
    return [b.names for b in load_batches(pairs, micro_batches, workers=workers, pin=False, max_bad_samples=bound)]


def test_bad_samples_are_named_once_and_replaced_in_the_same_way_always(tmp_path, caplog):
    layout = write_cache(tmp_path)
    pairs = CachedPairs(tmp_path, depth_transform="none")
    order = DataOrder(count=8, batch_size=2, accumulation=2, seed=3)
    whole = read_names(pairs, order)
    layout.cached(NAMES[5]).write_bytes(b"nothing")
    layout.cached(NAMES[1]).unlink()
    seen = read_names(pairs, order, bound=2)
    said = [record.message for record in caplog.records if record.message.startswith("skipped, and replaced")]
    assert len(said) == 2 and any(NAMES[5] in line for line in said) and any(NAMES[1] in line for line in said)
    bad = {NAMES[1], NAMES[5]}
    substitutes = []
    for before, after in zip(whole, seen, strict=True):
        for left, right in zip(before, after, strict=True):
            assert (right == left) if left not in bad else (right not in bad)
            substitutes += [right] if left in bad else []
    assert len(substitutes) == 12 and len(set(substitutes)) > 2
    assert read_names(pairs, order, bound=2, workers=2) == seen
    assert read_names(pairs, order, bound=2, start=7) == seen[14:]
    for rank in (0, 1):
        half = DataOrder(count=8, batch_size=2, processes=2, rank=rank, seed=3)
        assert read_names(pairs, half, bound=2) == seen[rank::2]


def test_more_bad_samples_than_allowed_stop(tmp_path):
    layout = write_cache(tmp_path)
    pairs = CachedPairs(tmp_path, depth_transform="none")
    order = DataOrder(count=8, batch_size=2)
    for name in NAMES[2:4]:
        layout.cached(name).write_bytes(b"nothing")
    for workers in (0, 2):
        with pytest.raises(UserError, match="--max_bad_samples 1: more are damaged or missing; the last one: "):
            read_names(pairs, order, bound=1, workers=workers)
    for name in NAMES:
        layout.cached(name).unlink(missing_ok=True)
    with pytest.raises(UserError, match="--max_bad_samples 9: no sample of this size can be read"):
        read_names(pairs, order, bound=9)


def test_bad_samples_are_replaced_by_their_own_size(tmp_path):
    write_cache(tmp_path, names=NAMES[:4])
    layout = write_cache(tmp_path, names=NAMES[4:], side=6)
    pairs = CachedPairs(tmp_path, depth_transform="none")
    layout.cached(NAMES[6]).write_bytes(b"nothing")
    order = DataOrder(count=8, batch_size=2, buckets=pairs.buckets)
    seen = read_names(pairs, order, bound=1)
    assert all(len({name in NAMES[:4] for name in names}) == 1 for names in seen)
    assert {name for names in seen for name in names} == set(NAMES) - {NAMES[6]}


def test_both_modes_see_the_same_buckets(tmp_path):
    for name, size in zip(NAMES, (32, 48, 32, 64, 48, 32, 40, 32), strict=True):
        write_pictures(tmp_path, names=(name,), size=size)
        write_cache(tmp_path, names=(name,), side=size // 16 * 2)
    pictures, cached = PicturePairs(tmp_path, depth_transform="none"), CachedPairs(tmp_path, depth_transform="none")
    assert pictures.buckets.tolist() == cached.buckets.tolist() == [0, 1, 0, 2, 1, 0, 0, 0]
    assert list(batches_of(pictures, range(8), batch_size=3)) == [[0, 2, 5], [6, 7], [1, 4], [3]]


def test_what_is_read_again_and_again_is_tried_first(tmp_path, caplog):
    layout = write_cache(tmp_path)
    pairs = CachedPairs(tmp_path, depth_transform="none")
    layout.cached(NAMES[1]).write_bytes(b"nothing")
    assert readable(pairs, count=1) == [0]
    with pytest.raises(BadSample, match=rf"{NAMES[1]}\.safetensors: damaged"):
        readable(pairs, count=3)
    caplog.clear()
    assert readable(pairs, count=4, max_bad_samples=1) == [0, 2, 3]
    assert [record.message.startswith("left out: --image_folder") for record in caplog.records] == [True]
    layout.cached(NAMES[0]).write_bytes(b"nothing")
    with pytest.raises(UserError, match=rf"{NAMES[1]}\.safetensors: damaged"):
        readable(pairs, count=2, max_bad_samples=2)


def test_missing_partners_within_the_bound(tmp_path):
    layout = write_pictures(tmp_path)
    layout.depthmap(NAMES[2]).unlink()
    pairs = PicturePairs(tmp_path, depth_transform="none", max_bad_samples=1)
    assert len(pairs.names) == 8
    with pytest.raises(BadSample, match=rf"{NAMES[2]}\.npy: no such file"):
        pairs.read(2)
