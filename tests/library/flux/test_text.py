import json
import logging

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from library.errors import UserError
from library.flux.text import TextEncoders, TextFeatures, load_clip, load_t5, load_text_encoders, text_ids

WORDS = ["a", "red", "blue", "ball", "box", "on", "grass"]
CLIP_LENGTH, T5_LENGTH = 8, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both encoders as single files with their JSON and tokenizers beside them."""
    path = tmp_path_factory.mktemp("text")
    letters = list("abcdefghijklmnopqrstuvwxyz")
    tokens = ["!", "?", "*", *letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    clip_tokenizer = CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])
    clip_tokenizer.save_pretrained(path / "tokenizer")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -9.0)]
    pieces += [("\u2581" + word, -2.0) for word in WORDS] + [(letter, -9.0) for letter in letters]
    t5_tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    t5_tokenizer.save_pretrained(path / "tokenizer_2")

    torch.manual_seed(0)
    clip = CLIPTextModel(clip_config(len(clip_tokenizer), clip_tokenizer.eos_token_id)).eval()
    t5 = T5EncoderModel(t5_config(len(t5_tokenizer))).eval()
    save_file({f"text_model.{n}": t for n, t in clip.state_dict().items()}, path / "clip_l.safetensors")
    write(
        path / "clip_l.json",
        {"num_attention_heads": 2, "bos_token_id": 55, "eos_token_id": clip_tokenizer.eos_token_id},
    )
    save_file(t5_tensors(t5), path / "t5xxl_fp16.safetensors")
    write(path / "t5xxl_fp16.json", {"token_length": T5_LENGTH, "relative_attention_max_distance": 16})
    return path


def clip_config(vocabulary, eos):
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        projection_dim=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        hidden_act="gelu",
        bos_token_id=0,
        eos_token_id=eos,
        pad_token_id=0,
    )


def t5_config(vocabulary):
    return T5Config(
        vocab_size=vocabulary,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=3,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )


def t5_tensors(model):
    return {n: t.clone() for n, t in model.state_dict().items() if n != "encoder.embed_tokens.weight"}


def write(path, value):
    path.write_text(json.dumps(value))


def copy_clip(folder, path, change):
    """Write a changed copy of the CLIP file and its JSON; return its path."""
    tensors = load_file(folder / "clip_l.safetensors")
    save_file(change(tensors), path / "clip_l.safetensors")
    (path / "clip_l.json").write_bytes((folder / "clip_l.json").read_bytes())
    return path / "clip_l.safetensors"


def same(one, two):
    left, right = one.state_dict(), two.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_clip_loads_without_prefix_and_with_the_extras_of_real_files(folder, tmp_path):
    extras = {"logit_scale": torch.ones(()), "text_projection.weight": torch.ones(16, 16)}
    extras["embeddings.position_ids"] = torch.arange(CLIP_LENGTH)[None]
    plain = copy_clip(folder, tmp_path, lambda t: {n.removeprefix("text_model."): v for n, v in t.items()} | extras)
    assert same(load_clip(folder / "clip_l.safetensors"), load_clip(plain))


def test_clip_loads_from_a_transformers_folder(folder, tmp_path):
    clip = load_clip(folder / "clip_l.safetensors")
    clip.save_pretrained(tmp_path)
    assert same(clip, load_clip(tmp_path))


def test_clip_settings_may_stand_in_the_header(folder, tmp_path):
    settings = (folder / "clip_l.json").read_text()
    file = tmp_path / "clip.safetensors"
    save_file(load_file(folder / "clip_l.safetensors"), file, metadata={"jointdit": settings})
    assert load_clip(file).config.num_attention_heads == 2


def test_the_json_of_another_model_in_the_same_folder_is_passed_over(folder, tmp_path):
    file = copy_clip(folder, tmp_path, lambda t: t)
    write(tmp_path / "config.json", {"_class_name": "FluxTransformer2DModel", "num_attention_heads": 3})
    assert load_clip(file).config.num_attention_heads == 2


def test_clip_pools_at_its_first_eos_and_has_no_gradients(folder):
    clip = load_clip(folder / "clip_l.safetensors")
    eos = clip.config.eos_token_id
    ids = torch.tensor([[55, 3, 4, eos, 5, eos, 0, 0]])
    out = clip(input_ids=ids)
    assert torch.equal(out.pooler_output[0], out.last_hidden_state[0, 3])
    assert not any(p.requires_grad for p in clip.parameters()) and not clip.training


def test_an_eos_id_of_2_pools_at_the_highest_id(folder, tmp_path):
    file = copy_clip(folder, tmp_path, lambda t: t)
    write(tmp_path / "clip_l.json", {"num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 2})
    out = load_clip(file)(input_ids=torch.tensor([[55, 2, 4, 2, 56, 3, 0, 0]]))
    assert torch.equal(out.pooler_output[0], out.last_hidden_state[0, 4])


def test_the_activation_is_a_setting_of_its_own(folder):
    ids = torch.tensor([[55, 3, 4, 56]])
    exact, quick = (load_clip(folder / "clip_l.safetensors", activation=a) for a in ("gelu", "quick_gelu"))
    assert exact.config.hidden_act == "gelu"
    assert not torch.allclose(exact(input_ids=ids).pooler_output, quick(input_ids=ids).pooler_output, atol=1e-5)


def test_a_missing_tensor_is_named(folder, tmp_path):
    file = copy_clip(folder, tmp_path, lambda t: {n: v for n, v in t.items() if "final_layer_norm" not in n})
    with pytest.raises(UserError, match=r"--clip_l .*clip_l.safetensors: lacks final_layer_norm.bias"):
        load_clip(file)


def test_an_unknown_tensor_is_named(folder, tmp_path):
    file = copy_clip(folder, tmp_path, lambda t: t | {"surprise.weight": torch.ones(1)})
    with pytest.raises(UserError, match=r"--clip_l .*has the unknown surprise.weight"):
        load_clip(file)


def test_a_configuration_that_contradicts_the_tensors_is_refused(folder, tmp_path):
    file = copy_clip(folder, tmp_path, lambda t: t)
    write(tmp_path / "clip_l.json", {"num_attention_heads": 2, "hidden_size": 17})
    with pytest.raises(UserError, match=r"--clip_l .*hidden_size = 17, its tensors 16"):
        load_clip(file)


def test_heads_that_nobody_knows_are_asked_for(folder, tmp_path):
    file = copy_clip(folder, tmp_path, lambda t: t)
    (tmp_path / "clip_l.json").unlink()
    with pytest.raises(UserError, match=r"--clip_l .*12 heads don't divide its width 16.*clip_l.json"):
        load_clip(file)


def test_another_checkpoint_given_for_a_flag_is_refused(folder):
    with pytest.raises(UserError, match="--t5xxl .*clip_l.safetensors: no tensor shared.weight"):
        load_t5(folder / "clip_l.safetensors")
    with pytest.raises(UserError, match="--clip_l .*nowhere.safetensors: no such file"):
        load_clip(folder / "nowhere.safetensors")


def test_t5_loads_with_and_without_its_tied_and_unused_tensors(folder, tmp_path):
    tensors = load_file(folder / "t5xxl_fp16.safetensors")
    extras = {
        "encoder.embed_tokens.weight": tensors["shared.weight"].clone(),
        "decoder.final_layer_norm.weight": torch.ones(16),
        "lm_head.weight": torch.ones(2, 16),
    }
    save_file(
        tensors | extras, tmp_path / "t5.safetensors", metadata={"jointdit": '{"relative_attention_max_distance": 16}'}
    )
    (plain, length), (full, default) = load_t5(folder / "t5xxl_fp16.safetensors"), load_t5(tmp_path / "t5.safetensors")
    assert same(plain, full) and (length, default) == (T5_LENGTH, 512)
    assert full.encoder.embed_tokens.weight is full.shared.weight
    assert full.config.num_heads == 3 and full.config.is_gated_act and full.config.relative_attention_max_distance == 16


def test_t5_loads_from_shards(folder, tmp_path):
    t5, _ = load_t5(folder / "t5xxl_fp16.safetensors")
    t5.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert same(t5, load_t5(tmp_path)[0])
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="--t5xxl .*which isn't there"):
        load_t5(tmp_path)


@pytest.fixture(scope="module")
def encoders(folder):
    return load_text_encoders(folder / "clip_l.safetensors", folder / "t5xxl_fp16.safetensors")


def test_prompts_become_features(encoders, folder):
    prompts = ["a red ball", " "]
    text = encoders.encode(prompts)
    assert text.tokens_BLD.shape == (2, T5_LENGTH, 16) and text.pooled_BD.shape == (2, 16)
    assert text.mask_BL is None and text.ids_BL3 is None
    ids, mask = encoders.t5_token_ids(prompts)
    assert mask.sum(dim=1).tolist() == [4, 1]
    again = encoders.t5(input_ids=ids).last_hidden_state
    assert torch.allclose(text.tokens_BLD, again)
    assert torch.allclose(encoders.encode(prompts[:1]).pooled_BD, text.pooled_BD[:1], atol=1e-6)


def test_padding_attends_unless_a_mask_is_asked_for(encoders):
    plain, masked = (encoders.encode(["a red ball"], with_mask=m) for m in (False, True))
    assert masked.mask_BL.tolist() == [[True] * 4 + [False] * 2]
    assert not torch.allclose(plain.tokens_BLD[:, :4], masked.tokens_BLD[:, :4], atol=1e-4)
    short = encoders.t5(input_ids=encoders.t5_token_ids(["a red ball"])[0][:, :4]).last_hidden_state
    assert torch.allclose(masked.tokens_BLD[:, :4], short, atol=1e-5)


def test_ids_count_along_the_first_axis_if_asked_for(encoders):
    ids = encoders.encode(["a"], with_ids=True).ids_BL3
    assert torch.equal(ids, text_ids(1, T5_LENGTH)) and ids[0, :, 0].tolist() == list(range(T5_LENGTH))
    assert not ids[..., 1:].any()


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(encoders, caplog):
    with caplog.at_level(logging.WARNING):
        encoders.encode(["a red ball on a blue box"])
    assert "the last 2 of its 8 T5 tokens aren't read" in caplog.text
    caplog.clear()
    encoders.encode(["a red ball"])
    assert not caplog.text


def test_the_token_length_can_be_given(folder):
    files = folder / "clip_l.safetensors", folder / "t5xxl_fp16.safetensors"
    assert load_text_encoders(*files, t5_length=9, dtype=torch.bfloat16).encode(["a"]).tokens_BLD.shape == (1, 9, 16)


def test_a_tokenizer_that_is_another_models_is_refused(encoders, folder):
    parts = {"clip": encoders.clip, "t5": encoders.t5, "t5_length": 4}
    with pytest.raises(UserError, match="--clip_tokenizer .*: its eos id 1 isn't the encoder's 56"):
        TextEncoders(clip_tokenizer=encoders.t5_tokenizer, t5_tokenizer=encoders.t5_tokenizer, **parts)
    with pytest.raises(UserError, match="--t5_tokenizer .*: 57 tokens, but the encoder's vocabulary has 37"):
        TextEncoders(clip_tokenizer=encoders.clip_tokenizer, t5_tokenizer=encoders.clip_tokenizer, **parts)


def test_a_tokenizer_that_cannot_be_had_is_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    files = folder / "clip_l.safetensors", folder / "t5xxl_fp16.safetensors"
    with pytest.raises(UserError, match="--clip_tokenizer .*missing: no such folder"):
        load_text_encoders(*files, clip_tokenizer=tmp_path / "missing")
    with pytest.raises(UserError, match="--t5_tokenizer nobody/nothing: .*give a folder"):
        load_text_encoders(*files, t5_tokenizer="nobody/nothing")


def test_features_broadcast_and_move():
    text = TextFeatures(
        tokens_BLD=torch.ones(1, 3, 4),
        pooled_BD=torch.ones(1, 5),
        mask_BL=torch.ones(1, 3),
        ids_BL3=torch.ones(1, 3, 3),
    )
    wide = text.expand((2, 6))
    assert wide.tokens_BLD.shape == (2, 6, 3, 4) and wide.pooled_BD.shape == (2, 6, 5)
    assert wide.mask_BL.shape == (2, 6, 3) and wide.ids_BL3.shape == (2, 6, 3, 3)
    half = text.to(dtype=torch.bfloat16)
    assert half.tokens_BLD.dtype == half.pooled_BD.dtype == torch.bfloat16 and half.ids_BL3.dtype == torch.float32
