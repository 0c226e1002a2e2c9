"""Steps 2 and 3: what is cached is what on-the-fly encoding gives, and a stopped run goes on."""

import pytest
import torch
from fake_folder import NAMES, random_text, write_autoencoder, write_pictures

from dataset.cache import claim_folder, read_pair
from dataset.encode_folder import FolderEncoder
from dataset.jointdit_dataset import CachedPairs, PicturePairs
from dataset.preprocess_args import PairsArgs, PromptsArgs
from dataset.prompt_features import encode_prompts, read_prompt_features, read_prompts, write_prompt_features
from library.args import parse
from library.encoding import LatentEncoder, PairEncoder, PromptEncoder
from library.errors import UserError
from library.flux.text import TextFeatures
from library.flux.weights import load_autoencoder

META = {"depth_transform": "none"}
MADE_BY = {"clip_l": "c", "t5xxl": "t", "t5_length": 5, "text_mask": False}


class FakeTextEncoders:
    """Features that depend on the prompt only, in place of gigabytes of encoders."""

    t5_length = 5

    def encode(self, prompts, *, with_mask, with_ids) -> TextFeatures:
        texts = [random_text(1, length=5, width=48, pooled=32, seed=sum(prompt.encode())) for prompt in prompts]
        return TextFeatures(
            tokens_BLD=torch.cat([text.tokens_BLD for text in texts]),
            pooled_BD=torch.cat([text.pooled_BD for text in texts]),
        )


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "ae.safetensors"
    write_autoencoder(path)
    latents = LatentEncoder(autoencoder=load_autoencoder(path), posterior="sample", seed=3)
    return PairEncoder(latents=latents, prompts=PromptEncoder(encoders=FakeTextEncoders()))


def fill(folder, encoder, *, shard_size=None, text=True, dtype=torch.float32, **settings) -> int:
    """Run step 2 on a folder with given encoders; return how many samples were made."""
    pictures = PicturePairs(folder, depth_transform="none", max_bad_samples=settings.get("max_bad_samples", 0))
    stamp = claim_folder(pictures.layout.cache_meta, META | {"text": text}, flag="--image_folder")
    return FolderEncoder(
        pairs=pictures,
        latents=encoder.latents,
        prompts=encoder.prompts if text else None,
        batch_size=3,
        dtype=dtype,
        stamp=stamp,
        **settings,
    ).run(shard_size=shard_size)


def cache_files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "cache").iterdir())}


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
