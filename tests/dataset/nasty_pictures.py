"""Pictures and other files as people really have them, each with what must become of it.

A case makes a file at a path; `outcome` and `reason` are what the report must say, `name` the sample it must become and
`corner` the colour that the top left of the processed picture must have.
"""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

RED, GREEN, BLUE, WHITE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (128, 128, 128)
READY, SMALL, NOT_READ, LEFT_OUT = "ready", "too small", "not read", "left out"


@dataclass(frozen=True)
class Case:
    path: str
    make: Callable[[Path], object]
    outcome: str = READY
    reason: str | None = None
    name: str | None = None
    corner: tuple[int, int, int] | None = None
    linked: bool = False


def picture(width=48, height=40, mode="RGB", color=RED):
    """Top left `color`, the rest blue, of any mode that RGB converts to."""
    image = Image.new("RGB", (width, height), BLUE)
    image.paste(color, (0, 0, max(1, width // 2), max(1, height // 2)))
    return image.convert(mode)


def noisy(seed, width=48, height=40):
    """A picture like no other, the same for the same seed."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def save(image, format="PNG", **options):
    return lambda path: path.write_bytes(saved(image, format, **options))


def write(content):
    return lambda path: path.write_bytes(content)


def link(target):
    return lambda path: path.symlink_to(target)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def raw_png(width, height, *, bits=8, kind=2, rows=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_16_bit_rgb(path):
    row = b"\0" + struct.pack(">3H", 65535, 0, 0) * 40
    path.write_bytes(raw_png(40, 40, bits=16, rows=row * 40))


def turned(orientation):
    """Return a picture that, once turned as its EXIF says, has red in the top left corner."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose; 6 and 8 undo each other
    image = picture(60, 40)
    if orientation != 1:
        image = image.transpose(Image.Transpose(undo[orientation]))
    return lambda path: path.write_bytes(saved(image, "JPEG", quality=95, exif=exif))


def frames(format):
    first, second = picture(color=RED), picture(color=GREEN)
    return lambda path: first.save(path, format, save_all=True, append_images=[second], duration=50, lossless=True)


def transparent(mode):
    image = Image.new("RGBA", (48, 40), (255, 0, 0, 0))  # fully transparent red: white
    image.paste((0, 0, 255, 255), (24, 0, 48, 40))
    return image.convert(mode) if mode != "P" else image.quantize(8)


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", saved(picture()))


def bad_crc(path):
    content = bytearray(saved(picture()))
    content[content.index(b"IDAT") + 8] ^= 0xFF
    path.write_bytes(bytes(content))


def no_permission(path):
    path.write_bytes(saved(picture()))
    path.chmod(0)


def read_only(path):
    path.write_bytes(saved(picture()))
    path.chmod(0o444)


def folder_with_picture(path):
    path.mkdir()
    (path / "inside.png").write_bytes(saved(picture()))


def grey_values(values, mode):
    return Image.fromarray(np.tile(np.asarray(values), (40, 24)).astype(mode))


PNG, JPEG = saved(picture()), saved(picture(), "JPEG", quality=95)
LONG = "long " + "ü" * 115

CASES = [
    Case("plain.png", save(picture()), name="plain", corner=RED),
    Case("plain jpeg.jpg", write(JPEG), name="plain jpeg", corner=RED),
    Case("truncated.jpg", write(JPEG[: len(JPEG) // 2]), NOT_READ, "damaged or cut short"),
    Case("truncated.png", write(PNG[:-40]), NOT_READ, "damaged or cut short"),
    Case("truncated.gif", write(saved(picture(), "GIF")[:60]), NOT_READ, "damaged or cut short"),
    Case("header only.jpg", write(JPEG[:20]), NOT_READ, "(damaged or cut short|not a picture)"),
    Case("bad checksum.png", bad_crc, NOT_READ, "damaged or cut short"),
    Case("zero bytes.jpg", write(b""), NOT_READ, "is empty"),
    Case("text.png", write(b"I am not a picture\n"), NOT_READ, "not a picture in any format"),
    Case("page.jpg", write(b"<!DOCTYPE html><html></html>"), NOT_READ, "not a picture in any format"),
    Case("drawing.svg", write(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), NOT_READ, "not a picture in any format"),
    Case("archive.zip", zipped, NOT_READ, "not a picture in any format"),
    Case("archive.png", zipped, NOT_READ, "not a picture in any format"),
    Case("noise.jpg", write(bytes(range(256)) * 8), NOT_READ, "not a picture in any format"),
    Case("numbers.npy", lambda path: np.save(path, np.zeros(4)), NOT_READ, "not a picture in any format"),
    Case("program.eps", write(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n"), NOT_READ, "not a picture"),
    Case("1 wide.png", save(picture(1, 200)), SMALL, "1 x 200, smaller than 32 x 32"),
    Case("1 pixel.png", save(picture(1, 1)), SMALL, "1 x 1"),
    Case("nearly.png", save(picture(31, 400)), SMALL, "31 x 400"),
    Case("exactly.png", save(picture(32, 32)), corner=RED),
    Case("20000 wide.png", save(picture(20000, 40))),
    Case("bomb.png", write(raw_png(60000, 60000)), NOT_READ, "too large to open safely"),
    Case("claims more.png", write(raw_png(500, 500, rows=b"\0" * 100)), NOT_READ, "damaged or cut short"),
    Case("16 bit grey.png", save(grey_values([32896, 32896], np.uint16)), corner=GREY),
    Case("16 bit grey.tif", save(grey_values([32896, 32896], np.uint16), "TIFF"), corner=GREY),
    Case("16 bit colour.png", png_16_bit_rgb, corner=RED),
    Case("32 bit grey.tif", save(grey_values([32896, 32896], np.int32), "TIFF"), corner=GREY),
    Case("float grey.tif", save(grey_values([0.5, 0.5], np.float32), "TIFF"), corner=GREY),
    Case("float large.tif", save(grey_values([7.0, 9.0], np.float32), "TIFF"), NOT_READ, "values outside 0 to 1"),
    Case("1 bit.png", save(picture(color=WHITE).convert("1")), corner=WHITE),
    Case("grey.jpg", save(picture(color=GREY, mode="L"), "JPEG"), corner=GREY),
    Case("grey alpha.png", save(transparent("LA")), corner=WHITE),
    Case("alpha.png", save(transparent("RGBA")), corner=WHITE),
    Case("palette.png", save(picture().quantize(4)), corner=RED),
    Case("palette alpha.png", save(transparent("P")), corner=WHITE),
    Case("transparent.gif", save(transparent("RGBA"), "GIF"), corner=WHITE),
    Case("cmyk.jpg", save(picture(mode="CMYK"), "JPEG", quality=95), corner=RED),
    Case("cmyk.tif", save(picture(mode="CMYK"), "TIFF"), corner=RED),
    Case("lab.tif", save(Image.new("LAB", (48, 40), (137, 128, 128)), "TIFF"), corner=GREY),
    Case("bitmap.bmp", save(picture(), "BMP"), corner=RED),
    Case("portable.ppm", save(picture(), "PPM"), corner=RED),
    Case("targa.tga", save(picture(), "TGA"), corner=RED),
    Case("web.webp", save(picture(), "WEBP", lossless=True), corner=RED),
    Case("pages.tif", frames("TIFF"), corner=RED),
    Case("animated.gif", frames("GIF"), corner=RED),
    Case("animated.webp", frames("WEBP"), corner=RED),
    Case("animated.png", frames("PNG"), corner=RED),
    *(Case(f"turned {number}.jpg", turned(number), corner=RED) for number in range(1, 9)),
    Case("broken exif.jpg", write(saved(picture(), "JPEG", quality=95, exif=b"Exif\0\0garbage")), corner=RED),
    Case("garbage after.jpg", write(JPEG + b"garbage" * 100), corner=RED),
    Case("huge profile.png", save(picture(), icc_profile=os.urandom(3 << 20)), NOT_READ, "damaged or cut short"),
    Case("large profile.jpg", save(picture(), "JPEG", icc_profile=bytes(1 << 20), quality=95), corner=RED),
    Case("jpeg called.png", write(JPEG), corner=RED),
    Case("png called.txt", write(PNG), corner=RED),
    Case("no ending", write(PNG), name="no ending", corner=RED),
    Case("LOUD.JPG", write(JPEG), name="LOUD", corner=RED),
    Case("bild ñ 图片 🖼.png", write(PNG), name="bild ñ 图片 🖼", corner=RED),
    Case("two\nlines.png", write(PNG), name="two_lines", corner=RED),
    Case("-rf.png", write(PNG), name="_rf", corner=RED),
    Case("--help.png", write(PNG), name="_-help", corner=RED),
    Case('odd ~ "*?|.png', write(PNG), name="odd _ ____", corner=RED),
    Case("dots.and more.of.them.png", write(PNG), name="dots.and more.of.them", corner=RED),
    Case(" . .png", write(PNG), name="_", corner=RED),
    Case(os.fsdecode(b"latin \xe9.png"), write(PNG), name="latin _", corner=RED),
    Case(f"{LONG}.png", write(PNG), corner=RED),
    Case("twin.jpg", write(JPEG), name="twin~jpg", corner=RED),
    Case("twin.png", write(PNG), name="twin~png", corner=RED),
    Case("twin.PNG", save(picture(color=GREEN)), name="twin", corner=GREEN),  # capitals sort first
    Case("deep/er/twin.png", write(PNG), name="deep__er__twin", corner=RED),
    Case("deep__er__twin.png", save(picture(color=GREEN)), name="deep__er__twin~png", corner=GREEN),
    Case("folder.png", folder_with_picture),
    Case("read only.png", read_only, corner=RED),
    Case("forbidden.png", no_permission, NOT_READ, "may not be read"),
    Case("pipe.png", os.mkfifo, LEFT_OUT, "not a regular file"),
    Case("loop", link("."), LEFT_OUT, "a link to a place in this folder"),
    Case("itself.png", link("itself.png"), LEFT_OUT, "a link to a place in this folder"),
    Case("second name.png", link("plain.png"), LEFT_OUT, "a link to a place in this folder"),
    Case("dangling.png", link("/nowhere/at/all.png"), LEFT_OUT, "a link that leads nowhere"),
    Case("elsewhere.png", link("../outside/picture.png"), name="elsewhere", corner=RED, linked=True),
    Case("linked folder", link("../outside"), LEFT_OUT, "a link to a folder"),
]
