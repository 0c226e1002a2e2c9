"""Captions by any image-text-to-text network of transformers; LLaVA-1.5 with the paper's prompt unless told otherwise.

Shape suffixes: B batch, L tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from dataset.annotators.loading import load_whole
from library.errors import UserError

PRECISIONS: dict[str, Any] = {"auto": "auto", "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# What each kind of network is asked; the first is the paper's. All others are asked `_QUESTION`.
_PROMPTS = {"llava": "USER: <image>\nDescribe this image? ASSISTANT:", "florence2": "<DETAILED_CAPTION>"}
_QUESTION = "Describe this image in one paragraph."
_IMAGE_TOKENS = ("<image>", "<|image_pad|>", "<image_soft_token>", "<IMG_CONTEXT>", "[IMG]")


class Captioner:
    """A network that describes pictures; it always takes the likeliest word, so equal batches get equal captions."""

    def __init__(
        self,
        name: str,
        *,
        prompts: Sequence[str] = (),
        max_new_tokens: int = 200,
        precision: str = "auto",
        device: torch.device,
    ) -> None:
        """Load `name`, a hub name or a local folder; each of `prompts` gives one caption (none: the kind's own).

        A prompt that holds the network's sign for the picture is used as it is. Any other goes through the chat
        template of the network, if it has one.

        Raises:
            UserError: it can't be loaded, or it isn't a network that takes pictures and text.
        """
        flag = f"--caption_model {name}"
        dtype = PRECISIONS[precision] if device.type != "cpu" or precision != "auto" else torch.float32
        self.processor: Any = load_whole(AutoProcessor, name, flag=flag)
        self.tokenizer: Any = getattr(self.processor, "tokenizer", None)
        if self.tokenizer is None or not hasattr(self.processor, "image_processor"):
            raise UserError(f"{flag}: takes no pictures and text together; give an image-text-to-text network")
        self.model: Any = load_whole(AutoModelForImageTextToText, name, flag=flag, dtype=dtype)
        self.model.to(device).eval()
        self.device = device
        self.max_new_tokens = max_new_tokens
        # What is generated follows the last token, so the shorter prompts of a batch are filled up in front.
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        kind = self.model.config.model_type
        self.prompts = [self._prepare(prompt) for prompt in prompts or (_PROMPTS.get(kind, _QUESTION),)]

    def describe(self, pictures: Sequence[np.ndarray]) -> list[list[str]]:
        """Return the captions of each picture, uint8 (h, w, 3), of any sizes: one line for each prompt."""
        columns = [self._answer(prompt, pictures) for prompt in self.prompts]
        return [[line for line in row if line] for row in zip(*columns, strict=True)]

    @torch.inference_mode()
    def _answer(self, prompt: str, pictures: Sequence[np.ndarray]) -> list[str]:
        inputs = self.processor(
            images=[[picture] for picture in pictures],  # one for each text; some kinds want that said by nesting
            text=[prompt] * len(pictures),
            return_tensors="pt",
            padding=True,
        ).to(self.device)
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[name] = value.to(self.model.dtype)
        answer_BL = self.model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        asked_BL = inputs["input_ids"]
        length = asked_BL.shape[1]
        if answer_BL.shape[1] >= length and torch.equal(answer_BL[:, :length], asked_BL):
            answer_BL = answer_BL[:, length:]
        texts = self.tokenizer.batch_decode(answer_BL, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]  # a line of a prompt file is a caption of its own

    def _prepare(self, prompt: str) -> str:
        """Put the prompt into the network's chat template, unless it says itself where the picture goes."""
        sign = getattr(self.processor, "image_token", None)
        if any(each in prompt for each in (sign, *_IMAGE_TOKENS) if each):
            return prompt
        if getattr(self.processor, "chat_template", None) is None:
            return prompt
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
