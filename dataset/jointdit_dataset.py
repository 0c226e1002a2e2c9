"""Training pairs of a prepared image folder: cached latents, or pictures to be encoded on the fly.

Both are map-style and stateless: what sample `index` is depends on the folder's content only; the order is
`library.data_order`'s.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dataset.cache import CachedPair, read_meta, read_pair
from dataset.layout import Layout
from library.batches import Batch, PixelBatch, concatenate_text, number_text, stack_same_size
from library.errors import UserError
from library.images import read_depth, read_rgb
from library.modality import MODALITIES
from library.sizes import PIXELS_PER_TOKEN

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class CachedPairs:
    """Samples that `preprocess_step2.py` has encoded: `names` are those with a file in the cache folder."""

    def __init__(
        self, folder: Path, *, depth_transform: str, with_ids: bool = False, flag: str = "--image_folder"
    ) -> None:
        """Open the cache of `folder`; `with_ids` adds the text positions to the features.

        Raises:
            UserError: no cache, an empty one, or one made with another depth transform.
        """
        self.layout = Layout(folder)
        meta = read_meta(self.layout.cache_meta, flag=flag)
        self.names = sorted(path.stem for path in self.layout.cache.glob("[!.]*.safetensors"))
        if meta is None or not self.names:
            raise UserError(
                f"{flag} {folder}: has no cached latents; run dataset/preprocess_step2.py --image_folder {folder}, "
                "or leave --is_latent_training away"
            )
        if meta["depth_transform"] != depth_transform:
            raise UserError(
                f"--depth_transform {depth_transform}: the cache of {folder} was made with {meta['depth_transform']}; "
                "use the same"
            )
        self.meta = meta
        self.with_ids = with_ids
        if self.layout.processed_images.is_dir():
            missing = sorted({path.stem for path in list_images(self.layout.processed_images)} - set(self.names))
            if missing:
                log.warning(
                    "%s %s: %d images aren't cached and take no part (%s, ...); preprocess_step2.py adds them",
                    flag, folder, len(missing), missing[0],
                )  # fmt: skip

    buckets = None

    def read(self, index: int, *, generator: torch.Generator | None = None) -> tuple[str, CachedPair]:
        """Read one cached sample."""
        name = self.names[index]
        return name, read_pair(self.layout.cached(name))

    def collate(self, samples: list[tuple[str, CachedPair]]) -> Batch:
        """Stack cached samples of one size."""
        names = tuple(name for name, _ in samples)
        pairs = [pair for _, pair in samples]
        text = concatenate_text([pair.text for pair in pairs])
        return Batch(
            rgb_BChw=stack_same_size([pair.rgb_Chw for pair in pairs], names, what="the image latent"),
            depth_BChw=stack_same_size([pair.depth_Chw for pair in pairs], names, what="the depth latent"),
            text=number_text(text) if self.with_ids else text,
            names=names,
        )


class PicturePairs:
    """Samples as files: an image, a disparity map and a prompt of one name each."""

    def __init__(self, folder: Path, *, depth_transform: str, flag: str = "--image_folder") -> None:
        """List the images of `folder` and check that each has its partners.

        Raises:
            UserError: no images, or one without its depth map or prompt, named.
        """
        self.layout = Layout(folder)
        self.flag = flag
        self.depth_transform = depth_transform
        images = list_images(self.layout.processed_images)
        self.images = {path.stem: path for path in images}
        self.names = sorted(self.images)
        if not self.names:
            raise UserError(f"{flag} {folder}: has no images in {self.layout.processed_images.name}/; prepare it first")
        for partners, suffix in ((self.layout.depthmaps, ".npy"), (self.layout.text_prompts, ".txt")):
            there = {path.stem for path in partners.glob(f"*{suffix}")}
            missing = [name for name in self.names if name not in there]
            if missing:
                raise UserError(
                    f"{flag} {partners / (missing[0] + suffix)}: missing ({len(missing)} of {len(self.names)} images "
                    "lack theirs); make it, or take the image away"
                )

    buckets = None

    def read(self, index: int, *, generator: torch.Generator | None = None) -> tuple[str, Tensor, Tensor, str]:
        """Read one sample: name, RGB and depth pixels (3, h, w) in [-1, 1], prompt.

        Raises:
            UserError: a file is damaged, image and depth map differ in size, or are too small.
        """
        name = self.names[index]
        files = read_picture_files(self.images[name], layout=self.layout, flag=self.flag)
        rgb, depth = MODALITIES["rgb"], MODALITIES["depth"]
        rgb_pixels = rgb.to_pixels(centre_crop(files.rgb_3hw))
        depth_pixels = depth.to_pixels(centre_crop(files.disparity_hw), transform=self.depth_transform)
        return name, rgb_pixels, depth_pixels, files.prompt

    def collate(self, samples: list[tuple[str, Tensor, Tensor, str]]) -> PixelBatch:
        """Stack samples of one size."""
        names = tuple(sample[0] for sample in samples)
        return PixelBatch(
            rgb_BChw=stack_same_size([sample[1] for sample in samples], names, what="the image"),
            depth_BChw=stack_same_size([sample[2] for sample in samples], names, what="the depth map"),
            prompts=tuple(sample[3] for sample in samples),
            names=names,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureFiles:
    """What a sample's files hold: colours (3, h, w) in [0, 1], disparity (h, w) of any scale, and the prompt."""

    rgb_3hw: Tensor
    disparity_hw: Tensor
    prompt: str


def read_picture_files(image: Path, *, layout: Layout, flag: str = "--image_folder") -> PictureFiles:
    """Read an image and its partners.

    Raises:
        UserError: a file is damaged, image and depth map differ in size, or are too small.
    """
    name = image.stem
    rgb_3hw = read_rgb(image, flag=flag)
    disparity_hw = read_depth(layout.depthmap(name), flag=flag)
    width, height = rgb_3hw.shape[-1], rgb_3hw.shape[-2]
    if rgb_3hw.shape[-2:] != disparity_hw.shape:
        raise UserError(
            f"{flag} {layout.depthmap(name)}: is {disparity_hw.shape[1]} x {disparity_hw.shape[0]} but its image "
            f"{width} x {height}; make the depth map from the processed image"
        )
    if min(width, height) < PIXELS_PER_TOKEN:
        raise UserError(f"{flag} {image}: is {width} x {height}; each side must have {PIXELS_PER_TOKEN} pixels or more")
    try:
        prompt = layout.prompt(name).read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise UserError(f"{flag} {layout.prompt(name)}: is not UTF-8 text") from None
    return PictureFiles(rgb_3hw=rgb_3hw, disparity_hw=disparity_hw, prompt=prompt)


def list_images(folder: Path) -> list[Path]:
    """List the images of a folder by name."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != ".")


def centre_crop(x_Chw: Tensor) -> Tensor:
    """Cut both sides (the last two axes) to multiples of 16, keeping the centre."""
    height, width = x_Chw.shape[-2:]
    keep = [side - side % PIXELS_PER_TOKEN for side in (height, width)]
    top, left = (height - keep[0]) // 2, (width - keep[1]) // 2
    return x_Chw[..., top : top + keep[0], left : left + keep[1]]
