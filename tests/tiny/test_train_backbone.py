"""The embedded model's tokenizers, its backbone's training and the files both leave behind."""

import json

import pytest
import torch
import train_backbone
from flow_losses import draw_levels, guided_velocity, velocity_task
from object_cells import CELLS, pack_cells, read_object_cells, solids_and_colors
from safetensors.torch import load_file, save_file
from text_to_image import CLIP_FILE, FLUX_FILE, T5_FILE, load_model, new_model, save_model
from train_backbone import BackboneArgs, Trainer
from train_tokenizers import split_words, train_clip, train_t5, words_of
from transformers import AutoTokenizer

from dataset.layout import Layout
from dataset.make_scenes import ScenesArgs, make_scenes
from dataset.synthetic import render_batch
from dataset.synthetic.geometry import KINDS
from dataset.synthetic.palette import COLOURS
from library.errors import UserError
from library.files import save_tensors
from library.flux.latents import image_ids
from library.flux.text import TextFeatures, load_text_encoders
from library.flux.variants import VARIANTS
from library.flux.weights import load_flux

CAPTIONS = ["a red ball left of a blue box, on grass", "a large green cone on sand, under a cloudy sky", "a Blue box"]
CLIP_LENGTH, T5_LENGTH = 24, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scenes (captions only), their latents, and an output folder with both tokenizers."""
    root = tmp_path_factory.mktemp("backbone")
    for index in range(300):
        path = root / "scenes" / "text_prompts" / f"{index:08d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(CAPTIONS[index % 3] + "\n")
    latents = torch.randn(300, 16, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    objects = torch.randint(0, 49, (300, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    names = {"names": [f"{index:08d}" for index in range(300)]}
    save_tensors(root / "latents.safetensors", {"rgb": latents, "depth": latents.flip(0), "objects": objects}, names)
    train_clip(CAPTIONS, folder=root / "out" / "tokenizer", length=CLIP_LENGTH)
    train_t5(CAPTIONS, folder=root / "out" / "tokenizer_2", length=T5_LENGTH)
    return root


@pytest.fixture(scope="module")
def tokenizers(folder):
    return [AutoTokenizer.from_pretrained(folder / "out" / name) for name in ("tokenizer", "tokenizer_2")]


def samples_of(folder, tokenizers, tmp_path):
    return train_backbone.load_samples(
        folder / "scenes",
        latents=folder / "latents.safetensors",
        ae=tmp_path,
        clip_tokenizer=tokenizers[0],
        t5_tokenizer=tokenizers[1],
        limit=8,
    )


def command(folder, output, *more):
    base = ["--scenes", folder / "scenes", "--latents", folder / "latents.safetensors", "--output", output]
    return ["train_backbone.py", *map(str, base), "--batch_size", "2", "--num_threads", "1", *more]


def test_every_word_of_the_captions_is_one_token(tokenizers):
    words = words_of(CAPTIONS)
    assert "," not in "".join(words) and "blue" in words
    for tokenizer in tokenizers:
        assert split_words(tokenizer, words) == []


def test_any_text_has_tokens_and_capitals_count_as_small_letters(tokenizers):
    for tokenizer in tokenizers:
        assert tokenizer("A RED ball").input_ids == tokenizer("a red ball").input_ids
        assert len(tokenizer("zebra 42!", add_special_tokens=False).input_ids) >= 5
    clip, t5 = tokenizers
    assert clip.eos_token_id not in clip("Zürich, 日本", add_special_tokens=False).input_ids
    assert (t5.pad_token_id, t5.eos_token_id, t5.unk_token_id) == (0, 1, 2)
    assert t5.unk_token_id not in t5('the quick "brown" fox (jumps) over 1234567890; it\'s #1?').input_ids


def test_saved_files_load_as_released_ones_do(folder, tokenizers, tmp_path):
    clip_tokenizer, t5_tokenizer = tokenizers
    generator = torch.Generator().manual_seed(0)
    model = new_model(clip_tokenizer=clip_tokenizer, t5_tokenizer=t5_tokenizer, generator=generator)
    with torch.no_grad():
        model.flux.final_layer.linear.weight.normal_(generator=generator)
    save_model(model, tmp_path, t5_length=T5_LENGTH)
    assert all(name.startswith("text_model.") for name in load_file(tmp_path / CLIP_FILE))
    assert load_file(tmp_path / T5_FILE)["shared.weight"].dtype == torch.float16
    assert load_file(tmp_path / FLUX_FILE)["img_in.weight"].dtype == torch.bfloat16

    encoders = load_text_encoders(
        tmp_path / CLIP_FILE,
        tmp_path / T5_FILE,
        clip_tokenizer=folder / "out" / "tokenizer",
        t5_tokenizer=folder / "out" / "tokenizer_2",
    )
    text = encoders.encode(CAPTIONS[:2])
    flux = load_flux(tmp_path / FLUX_FILE)
    assert flux.config == VARIANTS["tiny"].flux and encoders.t5_length == T5_LENGTH
    x_BLD, t_B = torch.randn(2, 4, 64, generator=generator), torch.tensor([0.3, 0.8])
    guidance_B = torch.tensor([1.0, 3.5])
    velocity = flux(x_BLD, t_B=t_B, guidance_B=guidance_B, text=text, image_ids=image_ids(2, 2))
    again = load_model(tmp_path)
    ids = encoders.clip_token_ids(CAPTIONS[:2]), encoders.t5_token_ids(CAPTIONS[:2])[0]
    with torch.no_grad():
        answer = again(x_BLD, t_B=t_B, guidance_B=guidance_B, text=again.encode(*ids))
    assert torch.allclose(answer.velocity_BLD, velocity, atol=1e-4)
    assert velocity.std() > 0.1 and all(weight.requires_grad for weight in again.parameters())


def test_fused_blocks_equal_the_librarys(tokenizers):
    generator = torch.Generator().manual_seed(0)
    model = new_model(clip_tokenizer=tokenizers[0], t5_tokenizer=tokenizers[1], generator=generator)
    if model.fast is None:
        pytest.skip("no g++ here")
    with torch.no_grad():
        for weight in (*model.flux.parameters(), *model.heads.parameters()):
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    x_BLD, t_B = torch.randn(3, 9, 64, generator=generator), torch.rand(3, generator=generator)
    guidance_B = 1 + 5 * torch.rand(3, generator=generator)
    tokens, pooled = torch.randn(3, 5, 128, generator=generator), torch.randn(3, 64, generator=generator)

    def run(dtype):
        model.to(dtype).zero_grad()
        text = TextFeatures(tokens_BLD=tokens.to(dtype), pooled_BD=pooled.to(dtype))
        answer = model(x_BLD, t_B=t_B, guidance_B=guidance_B, text=text)
        answers = torch.cat([each.float().flatten(2) for each in answer], dim=2)
        targets = torch.randn(answers.shape, generator=torch.Generator().manual_seed(2))
        (answers * targets).sum().backward()
        trained = (*model.flux.named_parameters(), *model.heads.named_parameters())
        return answers.detach(), {name: weight.grad.float() for name, weight in trained}

    model.to(torch.bfloat16)  # so that both read the same weights
    exact, exact_gradients = run(torch.float32)
    fused, gradients = run(torch.bfloat16)
    for answer, exact_answer in zip(fused, exact, strict=True):
        assert (answer - exact_answer).norm() < 0.02 * exact_answer.norm()
    for name, gradient in gradients.items():
        assert (gradient - exact_gradients[name]).norm() < 0.05 * exact_gradients[name].norm(), name


def test_levels_cover_the_whole_range_and_the_clean_end():
    t_B = draw_levels(20_000, shift=1.8, clean_share=0.2, generator=torch.Generator().manual_seed(0))
    assert 0 < t_B.min() and t_B.max() < 1
    assert 0.1 < (t_B < 0.1).float().mean() < 0.2 and (t_B > 0.9).float().mean() > 0.03
    assert 0.4 < t_B.mean() < 0.6


def test_cells_say_which_solid_and_colour_they_show(tmp_path):
    make_scenes(ScenesArgs(output=tmp_path, count=2, size=64, seed=3))
    truth = render_batch(3, [0, 1], 64)
    code_Nhw = read_object_cells(tmp_path, ["00000000", "00000001"])
    assert code_Nhw.shape == (2, 16, 16) and pack_cells(code_Nhw).shape == (2, 16, CELLS)
    assert torch.equal(pack_cells(code_Nhw)[0, 0], code_Nhw[0, :4, :4].flatten())
    solid_Nhw, color_Nhw = solids_and_colors(code_Nhw)
    for number, record in enumerate(truth.records):
        shown_hw = truth.ids_Bhw[number].unfold(0, 4, 4).unfold(1, 4, 4).flatten(2).mode(-1).values
        assert len(shown_hw.unique()) > 1
        for place in shown_hw.unique().tolist():
            item = record["objects"][place] if place >= 0 else None
            where = shown_hw == place
            assert (solid_Nhw[number][where] == (1 + KINDS.index(item["shape"]) if item else 0)).all()
            assert (color_Nhw[number][where] == (1 + COLOURS.index(item["colour"]) if item else 0)).all()
    Layout(tmp_path).instance_map("00000001").unlink()
    with pytest.raises(UserError, match="--scenes .*00000001.png: no such file; make the scenes anew"):
        read_object_cells(tmp_path, ["00000001"])


def test_guidance_is_learnt_from_a_teacher(folder, tokenizers, tmp_path):
    generator = torch.Generator().manual_seed(0)
    teacher, model = (
        new_model(clip_tokenizer=tokenizers[0], t5_tokenizer=tokenizers[1], generator=generator).requires_grad_(each)
        for each in (False, True)
    )
    with torch.no_grad():
        for weight in teacher.flux.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    samples = samples_of(folder, tokenizers, tmp_path)
    trainer = Trainer(BackboneArgs(scenes=folder, output=tmp_path, batch_size=4), model, samples, teacher=teacher)
    batch = samples.draw(4, text_dropout=0.0, generator=generator)
    text, ones = teacher.encode(batch.clip_ids_BL, batch.t5_ids_BL), torch.ones(4)
    task = velocity_task(batch, torch.randn(4, 4, 64, generator=generator), t_B=torch.full((4,), 0.6), text=text)
    plain = teacher(task.noisy_BLD, t_B=task.t_B, guidance_B=ones, text=text).velocity_BLD.float()
    task.guidance_B[1] = 3.0
    guided = guided_velocity(teacher, task, batch, samples, count=2)
    torch.testing.assert_close(guided[0], plain[0], atol=0.02, rtol=0.02)
    empty = teacher.encode(samples.empty_clip_1L.long(), samples.empty_t5_1L.long())
    one = teacher(task.noisy_BLD[1:2], t_B=task.t_B[1:2], guidance_B=ones[:1], text=empty).velocity_BLD.float()
    torch.testing.assert_close(guided[1:], one + 3 * (plain[1:2] - one), atol=0.1, rtol=0.05)
    assert (guided[1] - plain[1]).norm() > 0.05 * plain[1].norm()

    before = {name: weight.clone() for name, weight in teacher.named_parameters()}
    next(trainer.run())
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.named_parameters())


def test_training_goes_on_where_it_stopped(folder, tokenizers, tmp_path):
    args = BackboneArgs(scenes=folder / "scenes", output=tmp_path, batch_size=4, muon_lr=0.02)
    samples = samples_of(folder, tokenizers, tmp_path)
    assert samples.clip_ids_NL.shape[1] < CLIP_LENGTH and len(samples[2:]) == 6

    def trainer():
        generator = torch.Generator().manual_seed(1)
        return Trainer(
            args, new_model(clip_tokenizer=tokenizers[0], t5_tokenizer=tokenizers[1], generator=generator), samples
        )

    one = trainer()
    steps = one.run()
    losses = [float(next(steps)) for _ in range(3)]
    one.save(tmp_path / "state.safetensors")
    losses += [float(next(steps)) for _ in range(2)]
    two = trainer()
    two.load(tmp_path / "state.safetensors")
    two.seconds, steps = one.seconds * 3 / 5, two.run()
    again = [float(next(steps)) for _ in range(2)]
    assert again == pytest.approx(losses[3:], rel=1e-2)
    assert two.step == 5


def test_the_command_writes_the_files_and_a_log(folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    output.mkdir()
    for name in ("tokenizer", "tokenizer_2"):
        (output / name).symlink_to(folder / "out" / name)
    monkeypatch.setattr("sys.argv", command(folder, output, "--minutes", "0.002"))
    monkeypatch.setattr(train_backbone, "HELD_OUT", 8)
    train_backbone.main()
    assert {FLUX_FILE, CLIP_FILE, T5_FILE, "clip_l.json", "t5xxl_fp16.json"} <= {p.name for p in output.iterdir()}
    log = json.loads((output / "training" / "log.json").read_text())
    assert log[-1]["step"] >= 1 and 0.5 < log[-1]["flow"] < 4
    assert "held-out" in capsys.readouterr().out
    assert json.loads((output / "t5xxl_fp16.json").read_text())["token_length"] == T5_LENGTH


def test_missing_tokenizers_and_captions_are_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", command(folder, tmp_path))
    with pytest.raises(UserError, match="--output .*holds no tokenizer/; make it with"):
        train_backbone.main()
    save_file({"rgb": torch.zeros(1, 16, 4, 4)}, tmp_path / "colours.safetensors")
    with pytest.raises(UserError, match="--latents .*not a file of .*cache_latents"):
        train_backbone.load_samples(
            folder / "scenes",
            latents=tmp_path / "colours.safetensors",
            ae=tmp_path,
            clip_tokenizer=None,
            t5_tokenizer=None,
            limit=None,
        )
    (tmp_path / "text_prompts").mkdir()
    (tmp_path / "text_prompts" / "00000001.txt").write_text("a red ball")  # the latents begin with 00000000
    for limit in (None, 1):
        with pytest.raises(UserError, match="--latents .*of other scenes than --scenes .* has captions of"):
            train_backbone.load_samples(
                tmp_path,
                latents=folder / "latents.safetensors",
                ae=tmp_path,
                clip_tokenizer=None,
                t5_tokenizer=None,
                limit=limit,
            )
    (tmp_path / "text_prompts" / "00000001.txt").unlink()
    with pytest.raises(UserError, match="--scenes .*no captions in text_prompts"):
        train_backbone.load_samples(
            tmp_path, latents=tmp_path, ae=tmp_path, clip_tokenizer=None, t5_tokenizer=None, limit=None
        )
