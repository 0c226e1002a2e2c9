"""Image files: every mode in, nothing truncated, round trips out, and one line for what can't be read."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from library.errors import UserError
from library.images import colorize, read_depth, read_rgb, write_depth_npy, write_depth_png16, write_rgb


@pytest.fixture
def rgb() -> torch.Tensor:
    return torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def disparity() -> torch.Tensor:
    return torch.rand(5, 7, generator=torch.Generator().manual_seed(0))


def _saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def test_rgb_round_trip_is_within_half_a_step(tmp_path: Path, rgb: torch.Tensor) -> None:
    write_rgb(tmp_path / "a.png", rgb)
    again = read_rgb(tmp_path / "a.png")
    assert again.dtype == torch.float32 and (again - rgb).abs().max() <= 0.5 / 255 + 1e-6
    write_rgb(tmp_path / "b.png", again)
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F"])
def test_every_mode_is_read(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.tif"
    if mode in "IF":
        value = 65535 if mode == "I" else 1.0
        Image.fromarray(np.full((4, 6), value, np.int32 if mode == "I" else np.float32)).save(path)
    elif mode in ("HSV",):
        path = _saved(Image.new("HSV", (6, 4), (0, 0, 255)).convert("RGB"), path)
    else:
        path = _saved(Image.new("RGB", (6, 4), "white").convert("LA" if mode == "LA" else mode)
                      if mode != "LAB" else Image.new("LAB", (6, 4), (255, 128, 128)), path)  # fmt: skip
    image = read_rgb(path)
    assert image.shape == (3, 4, 6)
    assert image.min() > 0.97 and image.max() <= 1


def test_16_bit_grey_keeps_its_precision(tmp_path: Path) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    path = _saved(Image.fromarray(values), tmp_path / "grey.png")
    image = read_rgb(path)
    assert len(image[0].unique()) == 65536 and image.max() == 1
    torch.testing.assert_close(read_depth(path), torch.from_numpy(values.astype(np.float64) / 65535).float())


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    half = _saved(Image.new("RGBA", (2, 2), (255, 0, 0, 0)), tmp_path / "clear.png")
    assert read_rgb(half).min() == 1
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([0, 0, 255] * 256)
    assert read_rgb(_saved(palette, tmp_path / "p.png", transparency=0)).min() == 1
    assert read_rgb(_saved(palette, tmp_path / "q.png"))[:, 0, 0].tolist() == [0, 0, 1]


def test_exif_rotation_and_first_frame(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 4), "black")
    exif = image.getexif()
    exif[0x0112] = 6
    assert read_rgb(_saved(image, tmp_path / "turned.jpg", exif=exif)).shape == (3, 6, 4)
    frames = [Image.new("RGB", (3, 2), color) for color in ("red", "blue")]
    path = _saved(frames[0], tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_rgb(path)[:, 0, 0].tolist() == [1, 0, 0]


def test_depth_round_trips(tmp_path: Path, disparity: torch.Tensor) -> None:
    write_depth_npy(tmp_path / "d.npy", disparity)
    assert torch.equal(read_depth(tmp_path / "d.npy"), disparity)
    write_depth_png16(tmp_path / "d.png", disparity)
    assert (read_depth(tmp_path / "d.png") - disparity).abs().max() <= 0.5 / 65535 + 1e-7
    assert "near = large" in Image.open(tmp_path / "d.png").text["Depth"]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.uint32, np.int64, np.float16, np.float64, bool])
def test_npy_of_every_type_is_scaled_by_its_type(tmp_path: Path, dtype: type) -> None:
    largest = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    np.save(tmp_path / "d.npy", np.array([[0, largest], [0, largest]], dtype=dtype)[..., None])
    assert read_depth(tmp_path / "d.npy").tolist() == [[0, 1], [0, 1]]


def test_metric_depth_becomes_disparity_and_sky_is_farthest(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.array([[2.0, np.inf], [0.5, -1.0]], dtype=np.float32))
    assert read_depth(tmp_path / "d.npy", kind="depth").tolist() == [[0.5, 0], [2, 0]]
    with pytest.raises(UserError, match="infinite disparity, or beyond float32; for distances say --depth_kind depth"):
        read_depth(tmp_path / "d.npy")


@pytest.mark.filterwarnings("error")
def test_numbers_beyond_float32_are_one_line(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.array([[1.0, 1e300], [2.0, 4.0]]))
    with pytest.raises(UserError, match="infinite disparity, or beyond float32"):
        read_depth(tmp_path / "d.npy")
    assert read_depth(tmp_path / "d.npy", kind="depth").tolist() == [[1, 0], [0.5, 0.25]]
    np.save(tmp_path / "d.npy", np.array([[1.0, 1e-39]]))
    with pytest.raises(UserError, match=r"d\.npy: holds distances below 1e-38; set them to 0"):
        read_depth(tmp_path / "d.npy", kind="depth")


def test_grey_stored_as_colour_is_depth_and_colour_is_not(tmp_path: Path, rgb: torch.Tensor) -> None:
    write_rgb(tmp_path / "grey.png", rgb[:1].expand(3, -1, -1))
    assert read_depth(tmp_path / "grey.png").shape == (5, 7)
    write_rgb(tmp_path / "colour.png", rgb)
    with pytest.raises(UserError, match="is a colour picture, not a depth map"):
        read_depth(tmp_path / "colour.png")


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.png", None, "no such file"),
        ("empty.png", b"", "is empty (size 0)"),
        ("text.png", b"hello, I am a text", "is not a picture in any format known here, whatever its ending says"),
        ("cut.png", _png()[:900], "is damaged or cut short"),
        ("text.npy", b"hello", "is not a .npy array of numbers"),
        ("none.npy", _npy(np.zeros((0, 4), np.float32)), "has no pixels (0 x 4)"),
        ("nan.npy", _npy(np.array([[1, np.nan]], np.float32)), "holds 1 NaN values"),
        ("flat.npy", _npy(np.ones((3, 3), np.float32)), "has the same value everywhere"),
        ("cube.npy", _npy(np.ones((2, 3, 3, 3), np.float32)), "has the shape 2 x 3 x 3 x 3"),
        ("words.npy", _npy(np.array([["a"]])), "is not a .npy array of real numbers"),
        ("complex.npy", _npy(np.ones((2, 2), np.complex64)), "is not a .npy array of real numbers"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_depth(path)
    assert str(caught.value).startswith(f"--input_depth {path}: {message}")
    if name.endswith(".png"):
        with pytest.raises(UserError) as caught:
            read_rgb(path)
        assert str(caught.value).startswith(f"--input_image {path}: {message}")


def test_folders_and_float_pictures_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder; give a file$"):
        read_rgb(tmp_path)
    path = _saved(Image.fromarray(np.full((2, 2), 7, np.float32)), tmp_path / "hdr.tif")
    with pytest.raises(UserError, match="floating-point picture with values outside 0 to 1"):
        read_rgb(path)


def test_exr_without_its_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.exr").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    with pytest.raises(UserError, match=r"needs one more package: pip install -e '\.\[exr\]'$"):
        read_depth(tmp_path / "d.exr")


def test_exr_is_read_where_its_package_is(tmp_path: Path, disparity: torch.Tensor) -> None:
    exr = pytest.importorskip("OpenEXR", reason="the extra 'exr' is not installed")
    path = tmp_path / "d.exr"
    exr.File({"compression": exr.ZIP_COMPRESSION, "type": exr.scanlineimage}, {"Z": disparity.numpy()}).write(str(path))
    assert torch.equal(read_depth(path), disparity)
    path.write_bytes(b"not an EXR at all")
    with pytest.raises(UserError, match="is not an EXR file that can be read"):
        read_depth(path)


def test_colours_run_from_dark_far_to_light_near() -> None:
    ramp = colorize(torch.linspace(0, 1, 101).view(1, -1))
    lightness = (ramp * torch.tensor([0.2126, 0.7152, 0.0722]).view(3, 1, 1)).sum(0)[0]
    assert ramp.shape == (3, 1, 101) and ramp.min() >= 0 and ramp.max() <= 1 and (lightness.diff() > 0).all()
