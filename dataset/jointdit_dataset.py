"""Training pairs of a prepared image folder: cached latents, or pictures to be encoded on the fly.

Both are map-style and stateless: what sample `index` is depends on the folder's content and on the given generator
only; the order is `library.data_order`'s.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dataset.cache import CachedPair, pair_from_bytes, read_meta, stamp_of
from dataset.layout import IMAGE_SUFFIXES, Layout
from dataset.listing import list_cache, list_pictures
from dataset.shards import read_member
from library.batches import (
    Batch,
    LatentBatch,
    PixelBatch,
    concatenate_text,
    number_text,
    stack_same_size,
    text_rows,
)
from library.errors import UserError
from library.files import read_lines
from library.flux.text import EMPTY_PROMPT
from library.images import read_depth, read_rgb
from library.loading import BadSample
from library.modality import MODALITIES
from library.sizes import PIXELS_PER_TOKEN

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """What varies each time a sample is read: which caption, as a share of their number in [0, 1), and mirroring."""

    caption: float = 0.0
    mirrored: bool = False

    @classmethod
    def of(cls, generator: torch.Generator | None) -> "Draws":
        """Draw; without a generator the first caption and no mirroring."""
        if generator is None:
            return cls()
        caption, mirrored = torch.rand(2, generator=generator).tolist()
        return cls(caption=caption, mirrored=mirrored < 0.5)

    def choose(self, count: int) -> int:
        """Index of the caption among `count`."""
        return int(self.caption * count)


class CachedPairs:
    """Samples that `preprocess_step2.py` has encoded, as files of their own or in shards."""

    def __init__(
        self, folder: Path, *, depth_transform: str, with_ids: bool = False, flag: str = "--image_folder"
    ) -> None:
        """Open the cache of `folder`; `with_ids` adds the text positions to the features.

        Raises:
            UserError: no cache, an empty one, or one made with another depth transform.
        """
        self.layout = Layout(folder)
        self.flag = flag
        self.with_ids = with_ids
        meta = read_meta(self.layout.cache_meta, flag=flag)
        self.stamp = stamp_of(meta or {})
        self.index = list_cache(self.layout, stamp=self.stamp, flag=flag)
        if meta is None or not len(self.index):
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
        self.buckets = self.index.buckets(multiple=1)
        if self.index.notes["uncached"]:
            log.warning(
                "%s %s: %d images aren't cached and take no part (%s, ...); preprocess_step2.py adds them",
                flag, folder, self.index.notes["uncached"], self.index.notes["first_uncached"],
            )  # fmt: skip

    @property
    def names(self) -> Sequence[str]:
        """Names of all cached samples, sorted."""
        return self.index.names

    @property
    def has_text(self) -> bool:
        """Whether the features of the captions are cached; otherwise the captions themselves are."""
        return bool(self.meta.get("text", True))

    def read(self, index: int, *, generator: torch.Generator | None = None) -> tuple[str, CachedPair]:
        """Read one cached sample with one of its captions.

        Raises:
            BadSample: its file is missing or damaged.
            UserError: it was made by other models than the cache, or its size isn't the index's.
        """
        row = self.index[index]
        content, where = read_member(self.layout, row, flag=self.flag)
        pair = pair_from_bytes(content, where=where, stamp=self.stamp)
        check_size(where, tuple(pair.rgb_Chw.shape[-2:]), listed=(row.height, row.width), index=self.layout.cache_index)
        draws = Draws.of(generator)
        if pair.text is not None:
            chosen = draws.choose(len(pair.text.pooled_BD))
            text, captions = text_rows(pair.text, slice(chosen, chosen + 1)), pair.captions[chosen : chosen + 1]
        elif not self.has_text:
            text, captions = None, (pair.captions[draws.choose(len(pair.captions))],)
        else:
            raise UserError(f"{where}: holds no text features; delete it and run the preprocessing step again")
        return row.name, CachedPair(rgb_Chw=pair.rgb_Chw, depth_Chw=pair.depth_Chw, text=text, captions=captions)

    def collate(self, samples: list[tuple[str, CachedPair]]) -> Batch | LatentBatch:
        """Stack cached samples of one size."""
        names = tuple(name for name, _ in samples)
        pairs = [pair for _, pair in samples]
        rgb_BChw = stack_same_size([pair.rgb_Chw for pair in pairs], names, what="the image latent")
        depth_BChw = stack_same_size([pair.depth_Chw for pair in pairs], names, what="the depth latent")
        if not self.has_text:
            prompts = tuple(pair.captions[0] for pair in pairs)
            return LatentBatch(rgb_BChw=rgb_BChw, depth_BChw=depth_BChw, prompts=prompts, names=names)
        text = concatenate_text([pair.text for pair in pairs if pair.text is not None])
        return Batch(
            rgb_BChw=rgb_BChw,
            depth_BChw=depth_BChw,
            text=number_text(text) if self.with_ids else text,
            names=names,
        )


class PicturePairs:
    """Samples as files: an image, a disparity map and a text of one name each."""

    def __init__(
        self,
        folder: Path,
        *,
        depth_transform: str,
        mirror: bool = False,
        max_bad_samples: int = 0,
        flag: str = "--image_folder",
    ) -> None:
        """List the images of `folder` and check that each has its partners; `mirror` flips half of what is read.

        Raises:
            UserError: no images, or more than `max_bad_samples` partners missing; one is named.
        """
        self.layout = Layout(folder)
        self.flag = flag
        self.depth_transform = depth_transform
        self.mirror = mirror
        self.index = list_pictures(self.layout)
        if not len(self.index):
            raise UserError(f"{flag} {folder}: has no images in {self.layout.processed_images.name}/; prepare it first")
        missing = self.index.notes["missing"]
        if missing > max_bad_samples:
            raise UserError(
                f"{flag} {self.index.notes['first_missing']}: missing ({missing} of {len(self.index)} images lack "
                "theirs); make it, or take the image away"
            )
        self.buckets = self.index.buckets(multiple=PIXELS_PER_TOKEN)

    @property
    def names(self) -> Sequence[str]:
        """Names of all images, sorted."""
        return self.index.names

    def read(self, index: int, *, generator: torch.Generator | None = None) -> tuple[str, Tensor, Tensor, str]:
        """Read one sample: name, RGB and depth pixels (3, h, w) in [-1, 1], one of its captions.

        Raises:
            BadSample: a file is missing or damaged, image and depth map differ in size, or are too small.
            UserError: the size isn't the index's.
        """
        row = self.index[index]
        files = self.read_files(row.name)
        size = (files.rgb_3hw.shape[-2], files.rgb_3hw.shape[-1])
        where = f"{self.flag} {self.layout.depthmap(row.name)}"
        check_size(where, size, listed=(row.height, row.width), index=self.layout.pictures_index)
        draws = Draws.of(generator)
        rgb, depth = MODALITIES["rgb"], MODALITIES["depth"]
        rgb_pixels = rgb.to_pixels(centre_crop(files.rgb_3hw))
        depth_pixels = depth.to_pixels(centre_crop(files.disparity_hw), transform=self.depth_transform)
        if self.mirror and draws.mirrored:
            rgb_pixels, depth_pixels = rgb_pixels.flip(-1), depth_pixels.flip(-1)
        return row.name, rgb_pixels, depth_pixels, files.captions[draws.choose(len(files.captions))]

    def read_files(self, name: str) -> "PictureFiles":
        """Read a sample's files as they are.

        Raises:
            BadSample: a file is missing or damaged, image and depth map differ in size, or are too small.
        """
        try:
            return read_picture_files(find_image(self.layout, name), layout=self.layout, flag=self.flag)
        except UserError as error:
            raise BadSample(str(error)) from None

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
    """What a sample's files hold: colours (3, h, w) in [0, 1], disparity (h, w) of any scale, and its captions."""

    rgb_3hw: Tensor
    disparity_hw: Tensor
    captions: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The first caption."""
        return self.captions[0]


def read_picture_files(image: Path, *, layout: Layout, flag: str = "--image_folder") -> PictureFiles:
    """Read an image and its partners.

    Raises:
        UserError: a file is missing or damaged, image and depth map differ in size, or are too small.
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
    return PictureFiles(
        rgb_3hw=rgb_3hw, disparity_hw=disparity_hw, captions=read_captions(layout.prompt(name), flag=flag)
    )


def read_captions(path: Path, *, flag: str = "--image_folder") -> tuple[str, ...]:
    """Read a sample's captions, one a line; empty lines don't count, and without any it is the empty prompt.

    Raises:
        UserError: no such file, or not UTF-8.
    """
    try:
        return read_lines(path) or (EMPTY_PROMPT,)
    except UnicodeDecodeError:
        raise UserError(f"{flag} {path}: is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{flag} {path}: can't be read ({error.strerror or error})") from None


def find_image(layout: Layout, name: str) -> Path:
    """Path of a sample's processed image, whatever its ending; NAME.png where there is none."""
    for suffix in IMAGE_SUFFIXES:
        for spelled in (suffix, suffix.upper()):
            path = layout.processed_images / f"{name}{spelled}"
            if path.exists():
                return path
    return layout.image(name)


def check_size(where: str, size: tuple[int, ...], *, listed: tuple[int, int], index: Path) -> None:
    """Compare a sample's (rows, columns) with those in its folder's index, by which batches are put together.

    Raises:
        UserError: they differ: a file was overwritten in place.
    """
    if listed[0] and size != listed:
        raise UserError(
            f"{where}: has {size[0]} x {size[1]} rows and columns, but {listed[0]} x {listed[1]} when the folder was "
            f"listed; delete {index} and start again"
        )


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
