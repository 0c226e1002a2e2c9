"""Flags of the preprocessing steps 2 and 3."""

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import torch

from library.args import AutoencoderArgs, NoEffect, RuntimeArgs, TextEncoderArgs, flag
from library.errors import UserError
from library.flags import given
from library.modality import DEPTH_TRANSFORMS
from library.training_args import PRECISIONS

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EncodingArgs(RuntimeArgs, TextEncoderArgs, AutoencoderArgs):
    """What both steps share."""

    save_precision: str = flag("fp32", help="precision of the cached latents and features", choices=tuple(PRECISIONS))
    is_attnmask_training: bool = flag(False, help="mask the padding of the T5 features, and keep the mask")
    batch_size: int = flag(4, help="prompts encoded at once", minimum=1)

    no_effect: ClassVar = {
        "pretrained_model_name_or_path": NoEffect(reason="no transformer runs in preprocessing"),
        "is_txt_ids_training": NoEffect(reason="position ids aren't cached; give it to train.py", values=0),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks_to_swap:
            log.warning("--blocks_to_swap has no effect here: no transformer runs in preprocessing")

    @property
    def dtype(self) -> torch.dtype:
        """Type of the cached floats."""
        return PRECISIONS[self.save_precision]


@dataclass(frozen=True, kw_only=True)
class PairsArgs(EncodingArgs):
    """Step 2: latents of image and depth, features of the prompt."""

    image_folder: Path = flag(help="prepared folder: processed_images, depthmaps, text_prompts", metavar="FOLDER")
    depth_transform: str = flag(
        "none", help="none: disparity, near is large; inverse: near is small", choices=DEPTH_TRANSFORMS
    )
    posterior: str = flag(
        "sample", help="cache a sample of the autoencoder's posterior or its mean", choices=("sample", "mean")
    )
    seed: int = flag(42, help="decides the posterior's noise, together with each sample's name", minimum=0)
    text: bool = flag(
        True,
        help="cache the captions' features; --no_text leaves them out (94 % of a sample at full size), and train.py "
        "encodes the captions itself",
    )
    shard_size: int | None = flag(
        None, help="write tar shards of so many samples each (default: one file a sample)", minimum=1
    )
    max_bad_samples: int = flag(
        0, help="damaged or missing samples that are named and left out; one more stops the step (per process)",
        minimum=0,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.text:
            for name in given(self, (item.name for item in fields(TextEncoderArgs))):
                log.warning("--%s has no effect with --no_text", name)
            if self.is_attnmask_training:
                raise UserError("--is_attnmask_training: there are no features to mask with --no_text; leave one away")


@dataclass(frozen=True, kw_only=True)
class PromptsArgs(EncodingArgs):
    """Step 3: features of the empty and of the evaluation prompts."""

    evaluation_prompts: Path = flag(
        Path("dataset/evaluation_prompts.txt"), help="prompts of the previews, one a line", metavar="FILE"
    )
    output_folder: Path = flag(
        Path("."), help="where empty_prompts and evaluation_prompts are written", metavar="FOLDER"
    )
