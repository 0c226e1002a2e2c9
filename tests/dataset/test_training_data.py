"""Training on what preprocessing leaves: several sizes, text on the fly, mirroring, bad samples; unfit caches."""

import json

import pytest
import torch
from fake_folder import NAMES, write_autoencoder, write_base, write_cache, write_pictures, write_prompts
from filled_folder import fill
from safetensors.torch import load_file
from tiny_model import tiny_model
from training_processes import TrainingRun

from dataset.training_data import open_training_data
from library.args import parse
from library.batches import text_tensors
from library.errors import UserError
from library.files import write_json
from library.training_args import TrainingArgs

SMALL = ("--lora_rank", "4", "--vector_in_ranks", "4", "8", "--txt_in_rank", "8", "--save_precision", "fp32")
RUN = ("--max_train_steps", "6", "--device", "cpu", "--num_threads", "1", "--learning_rate", "1e-2", *SMALL)


def train(folder, name: str, *flags: str, processes: int = 1) -> dict:
    """Train in processes of their own; return the add-ons and the log's lines."""
    where = ("--output_dir", str(folder / "experiments"), "--exp_name", name)
    run = TrainingRun([*RUN, *where, *flags], folder=folder, processes=processes)
    assert run.wait() == [0] * processes, run.said()
    experiment = folder / "experiments" / name
    lines = [json.loads(line) for line in (experiment / "log.jsonl").read_text().splitlines()]
    return {"addons": experiment / "jointdit_addons.safetensors", "lines": lines, "said": run.said()}


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """A cache of latents of three sizes, a backbone and prompts that fit."""
    folder = tmp_path_factory.mktemp("sizes")
    write_autoencoder(folder / "ae.safetensors")
    for number, name in enumerate(NAMES):
        write_cache(folder / "data", names=(name,), side=(4, 6, 4, 8)[number % 4])
    write_prompts(folder)
    write_base(folder / "base.safetensors")
    return folder


def cached(folder) -> tuple[str, ...]:
    return (
        *("--image_folder", str(folder / "data"), "--is_latent_training", "--prompt_folder", str(folder)),
        *("--pretrained_model_name_or_path", str(folder / "base.safetensors"), "--train_batch_size", "2"),
    )


@pytest.mark.slow
def test_several_sizes_train_alike_however_they_are_dealt(sizes):
    two = ("--gradient_accumulation_steps", "2")
    alone = train(sizes, "alone", *cached(sizes), *two, "--save_state", "--validation_folder", str(sizes / "data"),
                  "--val_every_n_steps", "3")  # fmt: skip
    shared = train(sizes, "shared", *cached(sizes), processes=2)
    for left, right in zip((line for line in alone["lines"] if "loss" in line), shared["lines"], strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-5)
    train(sizes, "resumed", *cached(sizes), *two, "--save_state", "--max_train_steps", "3")
    resumed = train(sizes, "resumed", *cached(sizes), *two, "--save_state", "--resume", "latest")
    assert resumed["addons"].read_bytes() == alone["addons"].read_bytes()


@pytest.mark.slow
def test_pictures_with_text_on_the_fly_and_mirroring(tmp_path):
    weights = [
        item
        for name, path in tiny_model().items()
        if name != "jointdit_addons_path"
        for item in (f"--{name}", str(path))
    ]
    write_pictures(tmp_path / "data")
    (tmp_path / "data" / "processed_images" / f"{NAMES[3]}.png").write_bytes(b"no picture")
    common = (*weights, "--image_folder", str(tmp_path / "data"), "--train_batch_size", "2")
    plain = train(tmp_path, "plain", *common, "--max_bad_samples", "1")
    assert plain["said"].count("skipped, and replaced by others") == 1 and NAMES[3] in plain["said"]
    mirrored = train(tmp_path, "mirrored", *common, "--max_bad_samples", "1", "--flip_aug")
    assert load_file(plain["addons"]).keys() == load_file(mirrored["addons"]).keys()
    assert plain["addons"].read_bytes() != mirrored["addons"].read_bytes()


def text_on_the_fly(folder, encoder) -> tuple[str, ...]:
    """Cache latents without text; return the flags of training on them."""
    names = ("pretrained_model_name_or_path", "clip_l", "t5xxl")
    write_pictures(folder / "data")
    fill(folder / "data", encoder, text=False)
    given = (item for name in names for item in (f"--{name}", str(tiny_model()[name])))
    return ("--image_folder", str(folder / "data"), "--is_latent_training", "--train_batch_size", "2", *given)


@pytest.mark.slow
def test_latents_cached_and_text_on_the_fly(tmp_path, encoder):
    flags = text_on_the_fly(tmp_path, encoder)
    done = train(tmp_path, "default", *flags)
    assert [line["step"] for line in done["lines"]] == [1, 2, 3, 4, 5, 6]
    named = train(tmp_path, "named", *flags, "--text_encoder_device", "cpu")
    assert named["addons"].read_bytes() == done["addons"].read_bytes()


def test_text_encoders_lie_where_they_are_told(tmp_path, encoder):
    flags = ("--max_train_steps", "1", "--text_encoder_device", "cpu", *text_on_the_fly(tmp_path, encoder))
    # Training computes where no network of this test may get to.
    data = open_training_data(parse(flags, TrainingArgs), device=torch.device("cuda:99"), dtype=torch.bfloat16)
    held = {(weight.device.type, weight.dtype) for network in data.networks for weight in network.parameters()}
    assert held == {("cpu", torch.float32)} and data.text_precision == torch.float32
    batch = data.encode(data.pairs.collate([data.pairs.read(index) for index in range(2)]))
    moved = text_tensors(batch.to("meta").text)
    assert {name: (value.device.type, value.dtype) for name, value in moved.items()} == {
        "tokens_BLD": ("meta", torch.float32),
        "pooled_BD": ("meta", torch.float32),
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_text_encoders_on_the_cpu_feed_a_gpu(tmp_path, encoder):
    flags = (*text_on_the_fly(tmp_path, encoder), "--device", "cuda")
    both = [train(tmp_path, name, *flags, *more)["lines"]
            for name, more in (("gpu", ()), ("cpu", ("--text_encoder_device", "cpu")))]  # fmt: skip
    for one, other in zip(*both, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-2)


def open_data(folder, *flags: str):
    args = parse([*cached(folder), "--max_train_steps", "1", *flags], TrainingArgs)
    return open_training_data(args, device="cpu", dtype=None)


def test_cached_pairs_need_no_encoders(sizes, caplog):
    data = open_data(sizes, "--text_encoder_device", "cuda:99")
    assert data.encode is None and len(data.pairs.names) == 8 and data.prompts.prompts == ("one", "two")
    assert (data.networks, data.text_precision) == ((), None)
    assert data.encoders == {"ae": "a", "clip_l": "c", "t5xxl": "t", "image_folder's cache": data.pairs.stamp}
    assert caplog.messages == ["--text_encoder_device has no effect: all text is cached"]


def test_prompts_changed_since_step_3_are_named(sizes, tmp_path, monkeypatch, caplog):
    (tmp_path / "dataset").mkdir()
    usual = tmp_path / "dataset" / "evaluation_prompts.txt"
    write_prompts(tmp_path)
    monkeypatch.chdir(tmp_path)
    data = ("--image_folder", str(sizes / "data"), "--is_latent_training", "--max_train_steps", "1")
    for prompts, told in (("one\ntwo\n", 0), ("one\nthree\n", 1)):
        usual.write_text(prompts)
        open_training_data(parse(data, TrainingArgs), device="cpu", dtype=None)
        assert len(caplog.messages) == told
    assert "--evaluation_prompts has no effect" in caplog.text and "run it again" in caplog.text


def test_prompts_and_models_that_are_not_read_are_named(sizes, tmp_path, encoder, caplog):
    (tmp_path / "same.txt").write_text("one\ntwo\n")
    (tmp_path / "other.txt").write_text("three\n")
    open_data(sizes, "--evaluation_prompts", str(tmp_path / "same.txt"))
    assert caplog.messages == []
    open_data(sizes, "--evaluation_prompts", str(tmp_path / "other.txt"), "--t5_tokenizer", "x", "--ae", "nowhere")
    said = (
        "--ae nowhere: no such file or folder; wh",
        "--t5_tokenizer has no effect: all text",
        "--evaluation_prompts has",
    )
    assert all(message.startswith(start) for message, start in zip(caplog.messages, said, strict=True))
    caplog.clear()
    flags = ("--max_train_steps", "1", *text_on_the_fly(tmp_path, encoder), "--prompt_folder", str(sizes))
    open_training_data(parse(flags, TrainingArgs), device=torch.device("cpu"), dtype=torch.float32)
    assert caplog.messages[0].startswith("--prompt_folder has no effect: this cache has no text: prompts are encoded")


def test_a_prompt_folder_without_prompts_is_named(sizes):
    with pytest.raises(UserError, match=r"--prompt_folder nowhere: has no .*\(--clip_l, --t5xxl: must be given"):
        open_data(sizes, "--prompt_folder", "nowhere")


def test_a_device_that_is_not_there_is_named(tmp_path, encoder):
    flags = ("--max_train_steps", "1", "--text_encoder_device", "cuda:99", *text_on_the_fly(tmp_path, encoder))
    with pytest.raises(UserError, match=r"--text_encoder_device cuda:99: this PyTorch sees \d+ CUDA devices; name an"):
        open_training_data(parse(flags, TrainingArgs), device=torch.device("cpu"), dtype=torch.float32)


def test_other_models_than_the_caches_are_refused(sizes, tmp_path):
    with pytest.raises(UserError, match=r"--ae .*ae\.safetensors: isn't the model that made the cache"):
        open_data(sizes, "--ae", str(sizes / "ae.safetensors"))
    with pytest.raises(UserError, match="--is_attnmask_training: the cache of .* was made without it"):
        open_data(sizes, "--is_attnmask_training")
    layout = write_cache(tmp_path)
    write_json(layout.cache_meta, json.loads(layout.cache_meta.read_text()) | {"t5xxl": "another"})
    with pytest.raises(UserError, match=r"--validation_folder .* another t5xxl \(another\) than that .*\(t\)"):
        open_data(sizes, "--validation_folder", str(tmp_path))


def test_cached_latents_are_not_mirrored(sizes):
    with pytest.raises(UserError, match="--flip_aug: cached latents can't be mirrored"):
        open_data(sizes, "--flip_aug")
