"""Steps 2 and 3: what is cached is what on-the-fly encoding gives, and a stopped run goes on."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fake_folder import NAMES, write_pictures
from filled_folder import cache_files, fill
from killing import check_kills, killed_after
from safetensors.torch import load_file

from dataset.cache import read_pair
from dataset.jointdit_dataset import CachedPairs, PicturePairs, read_captions
from dataset.preprocess_args import PairsArgs, PromptsArgs
from dataset.prompt_features import encode_prompts, read_prompt_features, read_prompts, write_prompt_features
from library.args import parse
from library.batches import LatentBatch
from library.encoding import LatentEncoder, PairEncoder
from library.errors import UserError
from library.loading import BadSample
from library.randomness import generator_for

ROOT = Path(__file__).parents[2]
MADE_BY = {"clip_l": "c", "t5xxl": "t", "t5_length": 5, "text_mask": False}


def test_cached_and_on_the_fly_are_the_same(tmp_path, encoder):
    write_pictures(tmp_path)
    pictures = PicturePairs(tmp_path, depth_transform="none")
    assert fill(tmp_path, encoder) == 8
    cached = CachedPairs(tmp_path, depth_transform="none")
    assert list(cached.names) == list(pictures.names) == list(NAMES)
    from_cache = cached.collate([cached.read(index) for index in (5, 1)])
    on_the_fly = encoder.encode(pictures.collate([pictures.read(index) for index in (5, 1)]))
    assert from_cache.names == on_the_fly.names
    for name in ("rgb_BChw", "depth_BChw"):
        torch.testing.assert_close(getattr(from_cache, name), getattr(on_the_fly, name))
    assert torch.equal(from_cache.text.tokens_BLD, on_the_fly.text.tokens_BLD)


def test_a_stopped_run_goes_on(tmp_path, encoder):
    layout = write_pictures(tmp_path)
    fill(tmp_path, encoder)
    first = cache_files(tmp_path)
    layout.cached(NAMES[4]).unlink()
    (layout.cache / ".00000004.1.tmp.safetensors").write_bytes(b"half of it")
    assert fill(tmp_path, encoder) == 1
    assert cache_files(tmp_path) == first


def test_precision_and_posterior(tmp_path, encoder):
    layout = write_pictures(tmp_path, names=NAMES[:1])
    pictures = PicturePairs(tmp_path, depth_transform="none")
    mean = PairEncoder(
        latents=LatentEncoder(autoencoder=encoder.latents.autoencoder, posterior="mean"), prompts=encoder.prompts
    )
    fill(tmp_path, mean, dtype=torch.bfloat16)
    pixels = pictures.collate([pictures.read(0)])
    expected = encoder.latents.autoencoder.encode(pixels.rgb_BChw)[0].bfloat16()
    cached = CachedPairs(tmp_path, depth_transform="none")
    assert torch.equal(read_pair(layout.cached(NAMES[0]), stamp=cached.stamp).rgb_Chw, expected)
    batch = cached.collate([cached.read(0)]).to("cpu")
    assert batch.rgb_BChw.dtype == batch.text.tokens_BLD.dtype == torch.float32
    assert not torch.equal(encoder.encode(pixels).rgb_BChw, mean.encode(pixels).rgb_BChw)


def test_prompt_features_come_back(tmp_path, encoder):
    listed = tmp_path / "prompts.txt"
    listed.write_text("a red ball\n\n  a blue box \n", encoding="utf-8")
    prompts = read_prompts(listed)
    assert prompts == ("a red ball", "a blue box")
    features = encode_prompts(encoder.prompts, prompts)
    assert read_prompt_features(tmp_path, made_by=MADE_BY) is None
    write_prompt_features(tmp_path, features, made_by=MADE_BY, dtype=torch.float32)
    back = read_prompt_features(tmp_path, made_by=MADE_BY)
    assert back.prompts == prompts
    assert torch.equal(back.empty.tokens_BLD, features.empty.tokens_BLD)
    assert torch.equal(back.evaluation.pooled_BD, features.evaluation.pooled_BD)
    assert read_prompt_features(tmp_path, made_by=MADE_BY | {"t5xxl": "other"}) is None
    with pytest.raises(UserError, match="--evaluation_prompts .*nowhere.txt: can't be read"):
        read_prompts(tmp_path / "nowhere.txt")


RELEASED = (
    "--clip_l c --t5xxl t --ae a --sdpa --blocks_to_swap 8 --mixed_precision bf16 --save_precision bf16 --full_bf16"
)


def test_released_flags():
    args = parse(["--image_folder", "x", "--depth_transform", "none", *RELEASED.split()], PairsArgs)
    assert args.dtype == torch.bfloat16
    assert parse(RELEASED.split(), PromptsArgs).evaluation_prompts.name == "evaluation_prompts.txt"


def test_the_mark_that_some_editors_write_first_is_no_text(tmp_path):
    listed = tmp_path / "prompts.txt"
    listed.write_text("a red ball\n", encoding="utf-8-sig")
    assert read_prompts(listed) == read_captions(listed) == ("a red ball",)


def captions_of(pairs, index: int, draws: int = 40) -> list[str]:
    """The captions that so many readings of a sample give, first in pixels or latents, then as text."""
    samples = [pairs.read(index, generator=generator_for(5, "reading", step, 0)) for step in range(draws)]
    return [sample[-1] if isinstance(sample[-1], str) else sample[-1].captions[0] for sample in samples]


def test_several_captions_are_drawn_alike_in_both_modes(tmp_path, encoder):
    layout = write_pictures(tmp_path)
    layout.prompt(NAMES[2]).write_text("one\n\n two \nthree\n", encoding="utf-8")
    fill(tmp_path, encoder)
    pictures = PicturePairs(tmp_path, depth_transform="none")
    cached = CachedPairs(tmp_path, depth_transform="none")
    drawn = captions_of(pictures, 2)
    assert set(drawn) == {"one", "two", "three"} and drawn == captions_of(cached, 2)
    assert pictures.read(2)[-1] == cached.read(2)[1].captions[0] == "one"
    for step, caption in enumerate(drawn[:6]):
        generators = [generator_for(5, "reading", step, 0) for _ in range(2)]
        from_cache = cached.collate([cached.read(2, generator=generators[0]), cached.read(3)])
        on_the_fly = encoder.encode(pictures.collate([pictures.read(2, generator=generators[1]), pictures.read(3)]))
        assert torch.equal(from_cache.text.tokens_BLD, on_the_fly.text.tokens_BLD)
        assert torch.equal(from_cache.text.tokens_BLD[:1], encoder.prompts.encode([caption]).tokens_BLD)


def test_without_text_the_captions_are_kept(tmp_path, encoder):
    layout = write_pictures(tmp_path)
    layout.prompt(NAMES[1]).write_text("größer\nzwei\n", encoding="utf-8")
    fill(tmp_path, encoder, text=False)
    pairs = CachedPairs(tmp_path, depth_transform="none")
    assert not pairs.has_text and set(captions_of(pairs, 1)) == {"größer", "zwei"}
    batch = pairs.collate([pairs.read(0), pairs.read(1)])
    assert isinstance(batch, LatentBatch) and batch.prompts == (f"picture {NAMES[0]}", "größer")
    pictures = PicturePairs(tmp_path, depth_transform="none")
    on_the_fly = encoder.encode(pictures.collate([pictures.read(0), pictures.read(1)]))
    completed = encoder.prompts.complete(batch)
    assert torch.equal(completed.text.tokens_BLD, on_the_fly.text.tokens_BLD)
    torch.testing.assert_close(completed.rgb_BChw, on_the_fly.rgb_BChw)
    with pytest.raises(UserError, match="was made with text False, now it is True"):
        fill(tmp_path, encoder)


def test_no_text_flags(caplog):
    with caplog.at_level("WARNING", logger="dataset"):
        assert not parse(
            ["--image_folder", "x", "--no_text", "--t5xxl", "t", "--clip_activation", "quick_gelu"], PairsArgs
        ).text
    assert caplog.messages == [f"--{name} has no effect with --no_text" for name in ("t5xxl", "clip_activation")]
    with pytest.raises(UserError, match="--is_attnmask_training: there are no features to mask with --no_text"):
        parse(["--image_folder", "x", "--no_text", "--is_attnmask_training"], PairsArgs)


@pytest.mark.parametrize("shard_size", [None, 3])
def test_bad_pictures_are_left_out_up_to_a_bound(tmp_path, encoder, caplog, shard_size):
    layout = write_pictures(tmp_path)
    layout.image(NAMES[3]).write_bytes(b"no picture")
    layout.prompt(NAMES[5]).unlink()
    with pytest.raises(UserError, match=rf"text_prompts/{NAMES[5]}\.txt: missing"):
        fill(tmp_path, encoder, shard_size=shard_size)
    layout.prompt(NAMES[5]).write_bytes(b"\xff")
    with pytest.raises(UserError, match=rf"^--image_folder .*{NAMES[3]}\.png: is not a picture"):
        fill(tmp_path, encoder, shard_size=shard_size)
    with pytest.raises(UserError, match=rf"--max_bad_samples 1: more are bad; the last one: .*{NAMES[5]}\.txt"):
        fill(tmp_path, encoder, shard_size=shard_size, max_bad_samples=1)
    caplog.clear()
    fill(tmp_path, encoder, shard_size=shard_size, max_bad_samples=2)
    assert [record.message for record in caplog.records if record.levelname == "ERROR"][0].startswith("left out: ")
    pairs = CachedPairs(tmp_path, depth_transform="none")
    assert list(pairs.names) == [name for name in NAMES if name not in (NAMES[3], NAMES[5])]
    assert "2 images aren't cached" in caplog.text


def test_samples_of_another_cache_are_refused(tmp_path, encoder):
    for folder in (tmp_path / "one", tmp_path / "two"):
        write_pictures(folder)
        fill(folder, encoder, text=folder.name == "one")
    foreign = tmp_path / "two" / "cache" / f"{NAMES[6]}.safetensors"
    (tmp_path / "one" / "cache" / foreign.name).write_bytes(foreign.read_bytes())
    with pytest.raises(UserError, match=rf"{NAMES[6]}\.safetensors: was made by other models or settings") as caught:
        CachedPairs(tmp_path / "one", depth_transform="none").read(6)
    assert not isinstance(caught.value, BadSample), "such a sample isn't to be skipped"


def test_processes_share_the_work_and_change_nothing(tmp_path, encoder, monkeypatch):
    for folder in (tmp_path / "alone", tmp_path / "shared"):
        write_pictures(folder)
    assert fill(tmp_path / "alone", encoder) == 8
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        made.append(fill(tmp_path / "shared", encoder))
    assert made == [3, 5], "chunks of three, in turns"
    assert cache_files(tmp_path / "shared") == cache_files(tmp_path / "alone")


def run_command(folder, *more: str, processes: int = 1) -> None:
    """Run step 2 with the embedded model, as a person does."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, "dataset/preprocess_step2.py", "--image_folder", str(folder), *more]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_command_in_two_processes(tmp_path):
    flags = ("--device", "cpu", "--num_threads", "1", "--shard_size", "2", "--batch_size", "2", "--no_text")
    for name in ("alone", "shared"):
        write_pictures(tmp_path / name)
    run_command(tmp_path / "alone", *flags)
    run_command(tmp_path / "shared", *flags, processes=2)
    files = cache_files(tmp_path / "alone")
    assert len(files) == 9 and cache_files(tmp_path / "shared") == files


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", [None, 5])
def test_killed_twenty_times(tmp_path, encoder, shard_size):
    names = tuple(f"{index:08d}" for index in range(60))
    for folder in (tmp_path / "calm", tmp_path / "killed"):
        write_pictures(folder, names=names, size=64)
    begin = time.perf_counter()
    fill(tmp_path / "calm", encoder, shard_size=shard_size)
    once = time.perf_counter() - begin
    calm, folder = cache_files(tmp_path / "calm"), tmp_path / "killed"
    kills = 0
    for share in torch.rand(60, generator=generator_for(7, "kills")).tolist():
        if killed_after(share * once / 6, lambda: fill(folder, encoder, shard_size=shard_size)):
            assert cache_files(folder) == calm
            shutil.rmtree(folder / "cache")  # it came to its end: kill another run
            continue
        kills += 1
        for path in folder.glob("cache/[!.]*.safetensors"):
            load_file(path)
        for path in folder.glob("cache/[!.]*.json"):
            json.loads(path.read_text())
        if kills == 20:
            break
    assert kills == 20
    fill(folder, encoder, shard_size=shard_size)
    assert cache_files(folder) == calm


def test_prompts_of_a_broken_run_pass_for_nothing(tmp_path, encoder, monkeypatch):
    features = encode_prompts(encoder.prompts, ("a red ball",))
    write_prompt_features(tmp_path, features, made_by=MADE_BY, dtype=torch.float32)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dataset.prompt_features.write_text_features", killed)
        with pytest.raises(KeyboardInterrupt):
            write_prompt_features(tmp_path, features, made_by=MADE_BY | {"t5xxl": "other"}, dtype=torch.float32)
    assert read_prompt_features(tmp_path, made_by=MADE_BY) is None
    write_prompt_features(tmp_path, features, made_by=MADE_BY, dtype=torch.float32)
    assert read_prompt_features(tmp_path, made_by=MADE_BY).prompts == ("a red ball",)


@pytest.mark.slow
def test_step_3_killed_at_twenty_instants(tmp_path, encoder):
    def run(folder):
        features = encode_prompts(encoder.prompts, tuple(f"ball {number}" for number in range(8)))
        write_prompt_features(folder, features, made_by=MADE_BY, dtype=torch.float32)

    def files(folder):
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def whole_or_nothing(folder):
        found = read_prompt_features(folder, made_by=MADE_BY)
        assert found is None or len(found.prompts) == 8, "half a set passes for a whole one"

    expected = check_kills(tmp_path, run, content=files, kills=20, least_changes=20, afterwards=whole_or_nothing)
    assert len(expected) == 11
