"""Tiny networks with random weights of the very classes that make depth maps and captions, as folders on disk."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    CLIPVisionConfig,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil
from transformers.models.florence2.configuration_florence2 import Florence2VisionConfig

WORDS = "USER : ASSISTANT Describe this image ? in one paragraph . a red blue ball box left of on the grass big".split()


def write_depth_anything(folder, *, seed=0, metric=False):
    """Depth Anything V2's classes: a DINOv2 with four layers and a DPT head."""
    torch.manual_seed(seed)
    backbone = Dinov2Config(
        image_size=518, patch_size=14, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=1,
        out_indices=[1, 2, 3, 4], apply_layernorm=True, reshape_hidden_states=False,
    )  # fmt: skip
    config = DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=16, reassemble_factors=[4, 2, 1, 0.5],
        neck_hidden_sizes=[4, 4, 8, 8], fusion_hidden_size=8, head_hidden_size=4,
        depth_estimation_type="metric" if metric else "relative", max_depth=20 if metric else None,
    )  # fmt: skip
    model = DepthAnythingForDepthEstimation(config).eval()
    with torch.no_grad():  # random weights are small; what they say shall vary over the picture
        for parameter in model.parameters():
            parameter.mul_(20 if parameter.ndim > 1 else 1)
        model.head.conv3.bias.fill_(1)
    model.save_pretrained(folder)
    return model


def write_dpt(folder, *, seed=0):
    """Write a DPT, a depth network that is fed by its processor."""
    torch.manual_seed(seed)
    config = DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[4, 4, 8, 8], fusion_hidden_size=8, is_hybrid=False,
        reassemble_factors=[4, 2, 1, 0.5], bias_in_fusion_residual=False,
    )  # fmt: skip
    DPTForDepthEstimation(config).eval().save_pretrained(folder)
    DPTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def word_tokenizer(words, **special):
    """Return a tokenizer that knows a few words and the sign for a picture."""
    vocabulary = {word: place for place, word in enumerate(dict.fromkeys(["<unk>", "<pad>", "<s>", "</s>", "<image>",
                                                                          *words]))}  # fmt: skip
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>"], **special,
    )  # fmt: skip


def write_florence(folder, *, seed=0):
    """Florence-2's classes: an encoder-decoder that is asked by signs of its own for tasks."""
    torch.manual_seed(seed)
    tokenizer = word_tokenizer([*WORDS, *"Describe in detail what is shown the .".split()],
                               extra_special_tokens={"image_token": "<image>"})  # fmt: skip
    vision = Florence2VisionConfig(embed_dim=[8, 16, 16, 16], num_heads=[2] * 4, num_groups=[2] * 4, depths=[1] * 4,
                                   window_size=4, projection_dim=16)  # fmt: skip
    text = BartConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=128,
        pad_token_id=1, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3,
    )  # fmt: skip
    config = Florence2Config(text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_id=4)
    model = Florence2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False)
    images.image_seq_length = 5
    Florence2Processor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)


def write_llava(folder, *, seed=0, chat_template=None):
    """LLaVA-1.5's classes: CLIP's vision tower, a projector and Llama; its tokenizer knows a few words."""
    torch.manual_seed(seed)
    tokenizer = word_tokenizer(WORDS)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        projection_dim=16,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=1, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=-1,
        image_seq_length=4,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)  # so that the answer depends on the picture
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1, chat_template=chat_template,
    ).save_pretrained(folder)  # fmt: skip
    return model
