"""Flags of preprocessing step 1."""

import logging
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from dataset.intake import ORIGINALS
from library.args import DEVICES, Flags, find_device, flag
from library.errors import UserError
from library.flags import given
from library.images import DEPTH_KINDS
from library.sizes import PIXELS_PER_TOKEN

log = logging.getLogger(__name__)

DEPTH_MODEL = "depth-anything/Depth-Anything-V2-Large-hf"
DEPTH_OUTPUTS = ("auto", "disparity", "depth")
CAPTION_MODEL = "llava-hf/llava-1.5-7b-hf"
CAPTION_PRECISIONS = ("auto", "fp32", "fp16", "bf16")


@dataclass(frozen=True, kw_only=True)
class PictureArgs(Flags):
    """Pictures."""

    image_folder: Path = flag(help="folder of pictures, with any folders inside; it becomes the training set",
                              metavar="FOLDER")  # fmt: skip
    originals: str = flag(
        "move", help="move or copy them to raw_images/, or keep them where they are", choices=ORIGINALS
    )
    resolution: int = flag(
        512, help="side in pixels: short side to this, then the centre", minimum=PIXELS_PER_TOKEN, maximum=4096
    )
    buckets: bool = flag(False, help="keep about the aspect: sizes of about the area of --resolution squared")
    upscale: bool = flag(False, help="enlarge pictures that are too small (otherwise they are named and left out)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution % PIXELS_PER_TOKEN:
            raise UserError(f"--resolution {self.resolution}: must be a multiple of {PIXELS_PER_TOKEN}")
        if not self.image_folder.is_dir():
            found = "is a file" if self.image_folder.exists() else "no such folder"
            raise UserError(f"--image_folder {self.image_folder}: {found}; give a folder of pictures")


@dataclass(frozen=True, kw_only=True)
class DepthArgs(Flags):
    """Depth maps."""

    skip_depth: bool = flag(False, help="make no depth maps")
    depth_model: str = flag(
        DEPTH_MODEL, help="depth network of transformers: a hub name or a local folder", metavar="NAME"
    )
    depth_output: str = flag(
        "auto", help="what that network gives: disparity, depth, or what is known of its kind", choices=DEPTH_OUTPUTS
    )
    depth_batch_size: int = flag(8, help="pictures that the depth network sees at once", minimum=1)
    depth_from: Path | None = flag(
        None, help="take the depth maps below this folder (.npy, 16-bit .png, .exr) instead", metavar="FOLDER"
    )
    depth_kind: str | None = flag(None, help="what the maps of --depth_from hold", choices=DEPTH_KINDS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.depth_from is None) != (self.depth_kind is None):
            raise UserError("--depth_kind: goes together with --depth_from; give both or neither")
        _check_source(self.depth_from, "--depth_from", skipped=self.skip_depth, skip="--skip_depth")


@dataclass(frozen=True, kw_only=True)
class CaptionArgs(Flags):
    """Captions."""

    skip_captions: bool = flag(False, help="make no captions")
    caption_model: str = flag(
        CAPTION_MODEL, help="image-text-to-text network of transformers: a hub name or a local folder", metavar="NAME"
    )
    caption_prompt: tuple[str, ...] = flag(
        (), help="what to ask it; several make one caption (line) each (otherwise the paper's, or its kind's own)",
        metavar="TEXT",
    )  # fmt: skip
    caption_tokens: int = flag(200, help="longest caption, in its tokens", minimum=1)
    caption_batch_size: int = flag(8, help="pictures that the caption network sees at once", minimum=1)
    caption_precision: str = flag(
        "auto", help="of the caption network; auto: as it was saved, on a CPU fp32", choices=CAPTION_PRECISIONS
    )
    captions_from: Path | None = flag(
        None, help="take the captions (.txt) below this folder instead; it may be the image folder", metavar="FOLDER"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_source(self.captions_from, "--captions_from", skipped=self.skip_captions, skip="--skip_captions")


@dataclass(frozen=True, kw_only=True)
class Step1Args(PictureArgs, DepthArgs, CaptionArgs):
    """Step 1: pictures, depth maps and captions."""

    device: str = flag("auto", help="where the networks compute; auto takes CUDA, then MPS, then the CPU",
                       choices=DEVICES)  # fmt: skip
    num_threads: int = flag(0, help="CPU threads; 0 shares the cores among the local processes", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for group, stage, unused in (
            (DepthArgs, "depth", self.skip_depth or self.depth_from is not None),
            (CaptionArgs, "caption", self.skip_captions or self.captions_from is not None),
        ):
            for name in given(self, (item.name for item in fields(group))) if unused else ():
                if name.startswith(f"{stage}_") and not name.endswith(("_from", "_kind")):
                    log.warning("--%s has no effect here: no %s network runs", name, stage)

    def torch_device(self) -> torch.device:
        """Return the device to compute on; with several local processes each takes its own GPU."""
        return find_device(self.device)


def _check_source(folder: Path | None, name: str, *, skipped: bool, skip: str) -> None:
    if folder is None:
        return
    if skipped:
        raise UserError(f"{name} {folder}: {skip} is given too; leave one away")
    if not folder.is_dir():
        raise UserError(f"{name} {folder}: no such folder")
