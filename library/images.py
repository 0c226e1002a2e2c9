"""The only file that knows image formats: pictures of any mode, depth as arrays or pictures, and the files we write.

Inside the program a picture is float32 (3, h, w) in [0, 1] and depth is float32 (h, w) disparity, near = large.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from library.errors import UserError
from library.files import write_atomically

DEPTH_KINDS = ("disparity", "depth")
DEPTH_NOTE = "relative disparity: near = large, far = small; scale and offset are unknown"

_EXR_CHANNELS = ("Z", "depth", "disparity", "Y", "R", "V")
_INTEGER_16 = ("I;16", "I;16L", "I;16B", "I;16N")

# Pillow hands these on to a PostScript interpreter, which runs what a picture of unknown origin tells it to.
_RUN_PROGRAMS = ("EPS",)
_NOTES = "jointdit"
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height

# far (dark) to near (light); lightness rises all the way, so the picture reads in greyscale too
_COLORS = ((13, 8, 52), (56, 20, 104), (122, 30, 112), (190, 48, 92), (235, 98, 62), (250, 168, 66), (252, 246, 188))


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedPicture:
    """A picture cut and resized to fill a size: uint8 (h, w, 3), and the upright original's width and height."""

    rgb_hw3: np.ndarray
    width: int
    height: int


def read_rgb(path: str | Path, *, flag: str = "--input_image") -> Tensor:
    """Read a picture of any mode as float32 (3, h, w) in [0, 1].

    Its EXIF rotation is applied, transparency lies on white, of an animation the first frame is taken, 16-bit grey
    keeps its precision (Pillow itself reads 16-bit colour as 8 bits). Raises `UserError` naming `flag` and the file.
    """
    image = _open_picture(Path(path), flag=flag)
    if image.mode in (*_INTEGER_16, "I", "F"):
        grey = _unit_range(np.asarray(image), path=Path(path), flag=flag)
        return torch.from_numpy(grey).expand(3, *grey.shape).contiguous()
    array = np.array(_to_rgb(image))
    return torch.from_numpy(array).permute(2, 0, 1).contiguous().float() / 255


def read_fitted(path: str | Path, *, size_for: Callable[[int, int], tuple[int, int]], flag: str) -> FittedPicture:
    """Read a picture as `read_rgb` does and make it fill a size: scale it to cover that, cut off evenly what sticks
    out.

    `size_for(width, height)` gets the upright picture's size before its pixels are decoded and returns the (width,
    height) to fill; a `UserError` of its own passes through. Raises `UserError` naming `flag` and the file.
    """
    path = Path(path)
    size = wanted = (0, 0)

    def prepare(image: Image.Image) -> None:
        nonlocal size, wanted
        turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
        size = image.size[::-1] if turned else image.size
        wanted = size_for(*size)
        # JPEG can be decoded at 1/2, 1/4 or 1/8 for a fraction of the time; twice what is needed loses nothing visible.
        scale = 2 * max(wanted[0] / size[0], wanted[1] / size[1])
        image.draft(None, (max(1, int(image.width * scale)), max(1, int(image.height * scale))))

    image = _open_picture(path, flag=flag, prepare=prepare)
    if image.mode in (*_INTEGER_16, "I", "F"):
        grey = _unit_range(np.asarray(image), path=path, flag=flag)
        image = Image.fromarray((grey * 255).round().astype(np.uint8))
    rgb = _to_rgb(image)
    fitted = rgb.resize(wanted, Image.Resampling.LANCZOS, box=_covering_box(rgb.size, wanted))
    return FittedPicture(rgb_hw3=np.asarray(fitted), width=size[0], height=size[1])


def fit_depth(disparity_hw: Tensor, *, width: int, height: int) -> Tensor:
    """Cut and resize a map as `read_fitted` does its picture, (height, width) float32; bilinear, so that no value is
    passed over or under."""
    image = Image.fromarray(disparity_hw.float().numpy())
    fitted = image.resize((width, height), Image.Resampling.BILINEAR, box=_covering_box(image.size, (width, height)))
    return torch.from_numpy(np.array(fitted))


def write_noted_png(path: str | Path, rgb_hw3: np.ndarray, notes: Mapping[str, Any]) -> None:
    """Write uint8 (h, w, 3) as a PNG, atomically, with JSON `notes` inside that `read_notes` reads."""
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text(_NOTES, json.dumps(notes, sort_keys=True))
    with write_atomically(path) as temporary:
        # A higher level takes three times as long for a file a tenth smaller.
        Image.fromarray(rgb_hw3).save(temporary, format="PNG", pnginfo=chunk, compress_level=1)


def read_notes(path: str | Path) -> dict[str, Any] | None:
    """Read what `write_noted_png` noted, without decoding the picture; None for a picture without notes."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            notes = json.loads(image.info.get(_NOTES, "null"))
    except (OSError, SyntaxError, ValueError):
        return None
    return notes if isinstance(notes, dict) else None


def read_depth(
    path: str | Path, *, kind: str = "disparity", flag: str = "--input_depth", may_be_flat: bool = False
) -> Tensor:
    """Read a depth map as float32 (h, w) disparity, near = large, of any scale.

    `.npy` of floats or integers, 8- or 16-bit grey pictures, float TIFF, `.exr`; integers are divided by their type's
    largest value. With `kind="depth"` the file holds distances: the result is 1 / distance, and where the distance is
    infinite, zero or negative (sky, no measurement) 0, the farthest. Raises `UserError` naming `flag` and the file
    for what can't be read and for maps with NaN, without size or, unless it `may_be_flat`, of one value everywhere.
    """
    path = Path(path)
    if kind not in DEPTH_KINDS:
        raise ValueError(f"depth kind {kind!r} is none of {', '.join(DEPTH_KINDS)}")
    _check_file(path, flag=flag)
    readers = {".npy": _read_npy, ".exr": _read_exr}
    values = readers.get(path.suffix.lower(), _read_depth_picture)(path, flag=flag)
    if values.size == 0:
        raise UserError(f"{flag} {path}: has no pixels ({_size(values)}); give a depth map with rows and columns")
    if np.isnan(values).any():
        raise UserError(f"{flag} {path}: holds {int(np.isnan(values).sum())} NaN values; fill them first")
    if kind == "depth":
        valid = np.isfinite(values) & (values > 0)
        with np.errstate(over="ignore"):
            values = np.divide(1, values, out=np.zeros_like(values), where=valid)
        if not np.isfinite(values).all():
            raise UserError(f"{flag} {path}: holds distances below 1e-38; set them to 0, which is no measurement")
    if not np.isfinite(values).all():
        raise UserError(
            f"{flag} {path}: holds infinite disparity, or beyond float32; for distances say --depth_kind depth"
        )
    if not may_be_flat and values.min() == values.max():
        raise UserError(f"{flag} {path}: has the same value everywhere; give a depth map with near and far")
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def write_rgb(path: str | Path, rgb_3hw: Tensor) -> None:
    """Write colours in [0, 1] as an 8-bit picture, rounded, atomically; the ending chooses the format."""
    with write_atomically(path) as temporary:
        to_picture(rgb_3hw).save(temporary)


def to_picture(rgb_3hw: Tensor) -> Image.Image:
    """Return colours in [0, 1] as an 8-bit picture, rounded."""
    array = (rgb_3hw.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(array))


def write_depth_png16(path: str | Path, disparity_hw: Tensor) -> None:
    """Write disparity in [0, 1] as a 16-bit grey PNG, rounded, atomically; its text chunk says which end is near."""
    array = (disparity_hw.detach().cpu().double().clamp(0, 1) * 65535).round().numpy().astype(np.uint16)
    note = PngImagePlugin.PngInfo()
    note.add_text("Depth", DEPTH_NOTE)
    with write_atomically(path) as temporary:
        Image.fromarray(np.ascontiguousarray(array)).save(temporary, format="PNG", pnginfo=note)


def write_depth_npy(path: str | Path, disparity_hw: Tensor) -> None:
    """Write a map as a float32 `.npy`, unchanged, atomically."""
    with write_atomically(path) as temporary, temporary.open("wb") as file:
        np.save(file, disparity_hw.detach().cpu().float().numpy())


def colorize(disparity_hw: Tensor) -> Tensor:
    """Colour a map in [0, 1] for the eye, (3, h, w) in [0, 1]: dark blue far, pale yellow near. Never measure on it."""
    table = torch.tensor(_COLORS, dtype=torch.float32) / 255
    place = disparity_hw.detach().cpu().float().clamp(0, 1) * (len(_COLORS) - 1)
    low = place.long().clamp(max=len(_COLORS) - 2)
    colors_hw3 = torch.lerp(table[low], table[low + 1], (place - low).unsqueeze(-1))
    return colors_hw3.permute(2, 0, 1).contiguous()


def _check_file(path: Path, *, flag: str) -> None:
    if not path.exists():
        raise UserError(f"{flag} {path}: no such file")
    if not path.is_file():
        raise UserError(f"{flag} {path}: is a folder; give a file")
    if path.stat().st_size == 0:
        raise UserError(f"{flag} {path}: is empty (size 0)")


def _open_picture(path: Path, *, flag: str, prepare: Callable[[Image.Image], None] | None = None) -> Image.Image:
    """Open and decode the first frame of a picture, turned as its EXIF data says.

    `prepare` gets the picture when its header is read and its pixels aren't.
    """
    _check_file(path, flag=flag)
    Image.init()
    formats = sorted(set(Image.OPEN) - set(_RUN_PROGRAMS))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=formats) as image:
                if prepare is not None:
                    prepare(image)
                image.load()
                return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise UserError(f"{flag} {path}: is not a picture in any format known here, whatever its ending says") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{flag} {path}: is too large to open safely ({error})") from None
    except PermissionError as error:
        raise UserError(f"{flag} {path}: may not be read ({error.strerror})") from None
    except (UserError, MemoryError):
        raise
    except Exception as error:  # damaged files make the readers of the many formats raise nearly everything
        raise UserError(f"{flag} {path}: is damaged or cut short ({error or type(error).__name__})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Turn an 8-bit picture of any mode into RGB, transparency on white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _covering_box(size: tuple[int, int], target: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the centred (left, top, right, bottom) of a picture of `size` that has the aspect of `target`.

    Where nothing is scaled it lies on whole pixels, so that they come out as they are.
    """
    width, height = size
    keep_width = min(float(width), height * target[0] / target[1])
    keep_height = min(float(height), width * target[1] / target[0])
    left, top = (width - keep_width) / 2, (height - keep_height) / 2
    if (keep_width, keep_height) == target:
        left, top = left // 1, top // 1
    return left, top, left + keep_width, top + keep_height


def _read_depth_picture(path: Path, *, flag: str) -> np.ndarray:
    image = _open_picture(path, flag=flag)
    if image.mode in ("P", "PA", "1"):
        image = image.convert("RGB" if image.mode != "1" else "L")
    return _unit_range(_one_channel(np.asarray(image), path=path, flag=flag), path=path, flag=flag, bounded=False)


def _read_npy(path: Path, *, flag: str) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{flag} {path}: is not a .npy array of numbers ({error})") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise UserError(f"{flag} {path}: is not a .npy array of real numbers")
    return _unit_range(_one_channel(array, path=path, flag=flag), path=path, flag=flag, bounded=False)


def _read_exr(path: Path, *, flag: str) -> np.ndarray:
    try:
        import OpenEXR
    except ImportError:
        raise UserError(f"{flag} {path}: reading EXR needs one more package: pip install -e '.[exr]'") from None
    try:
        channels: dict[str, Any] = OpenEXR.File(str(path), separate_channels=True).channels()
    except Exception as error:  # the package raises bare RuntimeErrors for every kind of damage
        raise UserError(f"{flag} {path}: is not an EXR file that can be read ({error})") from None
    name = next((each for each in _EXR_CHANNELS if each in channels), None)
    if name is None:
        raise UserError(f"{flag} {path}: has the channels {', '.join(channels)}, none of {', '.join(_EXR_CHANNELS)}")
    return np.array(channels[name].pixels, dtype=np.float32)


def _one_channel(array: np.ndarray, *, path: Path, flag: str) -> np.ndarray:
    """Return the (h, w) map inside (h, w), (1, h, w), (h, w, 1) or equal colour channels with or without alpha."""
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 3 and array.shape[2] in (2, 4):
        array = array[:, :, :-1]
    if array.ndim == 3 and array.shape[2] in (1, 3):
        if not (array == array[:, :, :1]).all():
            raise UserError(f"{flag} {path}: is a colour picture, not a depth map; give one channel of depth")
        array = array[:, :, 0]
    if array.ndim != 2:
        raise UserError(f"{flag} {path}: has the shape {_size(array)}; a depth map is rows x columns")
    return array


def _unit_range(array: np.ndarray, *, path: Path, flag: str, bounded: bool = True) -> np.ndarray:
    """Return float32; integers divided by their type's largest value, floats as they are (`bounded`: within [0, 1])."""
    if array.dtype.kind == "b":
        return array.astype(np.float32)
    if array.dtype.kind in "iu":
        largest = np.iinfo(array.dtype).max
        if array.dtype == np.int32 and array.size and 0 <= array.min() and array.max() <= 65535:
            largest = 65535  # Pillow gives some 16-bit files as 32-bit integers
        return (array.astype(np.float64) / largest).astype(np.float32)
    with np.errstate(over="ignore"):  # what is too large becomes infinite
        array = array.astype(np.float32)
    if bounded and array.size and not (array.min() >= 0 and array.max() <= 1):
        raise UserError(f"{flag} {path}: is a floating-point picture with values outside 0 to 1; scale it first")
    return array


def _size(array: np.ndarray) -> str:
    return " x ".join(map(str, array.shape))
