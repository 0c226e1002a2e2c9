"""A prepared scene folder in memory, and batches of pixels from it.

Shapes: N scenes, B batch, h w rows and columns. Colours are kept as uint8 and disparity, min-max normalised, as
float16: 80 kB for a scene of 128 x 128.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from dataset.layout import Layout
from library.errors import UserError
from library.images import read_depth, read_rgb
from library.modality import MODALITIES, normalize_disparity


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """Scenes of one size; both kinds of picture leave as pixels (B, 3, h, w) in [-1, 1]."""

    rgb_N3hw: Tensor
    disparity_Nhw: Tensor

    def __len__(self) -> int:
        return len(self.rgb_N3hw)

    def __getitem__(self, which: slice) -> "Pictures":
        return Pictures(rgb_N3hw=self.rgb_N3hw[which], disparity_Nhw=self.disparity_Nhw[which])

    def rgb(self, which: slice | Tensor = slice(None)) -> Tensor:
        """Return the chosen scenes' colours as pixels."""
        return MODALITIES["rgb"].to_pixels(self.rgb_N3hw[which].float() / 255)

    def depth(self, which: slice | Tensor = slice(None)) -> Tensor:
        """Return the chosen scenes' disparity as pixels, normalised over the whole picture."""
        return MODALITIES["depth"].to_pixels(self.disparity_Nhw[which].float())

    def draw(self, count: int, *, size: int, generator: Generator) -> Tensor:
        """Draw a batch (count, 3, size, size): half colours, half disparity, each a random crop, mirrored or not."""
        height, width = self.rgb_N3hw.shape[-2:]
        index = torch.randint(len(self), (count,), generator=generator)
        whole = torch.cat([self.rgb(index[: count // 2]), self.depth(index[count // 2 :])])
        rows = torch.randint(height - size + 1, (count,), generator=generator).tolist()
        columns = torch.randint(width - size + 1, (count,), generator=generator).tolist()
        mirrored = torch.rand(count, generator=generator) < 0.5
        crops = [x[:, r : r + size, c : c + size] for x, r, c in zip(whole, rows, columns, strict=True)]
        return torch.stack([x.flip(-1) if flip else x for x, flip in zip(crops, mirrored, strict=True)])


def sample_names(folder: Path, *, flag: str) -> list[str]:
    """Return the sorted names of the samples of a prepared folder that have both an image and a disparity map."""
    layout = Layout(folder)
    names = sorted(path.stem for path in layout.depthmaps.glob("*.npy") if layout.image(path.stem).exists())
    if not names:
        raise UserError(f"{flag} {folder}: holds no scenes; make them with dataset/make_scenes.py")
    return names


def load_pictures(folder: Path, names: Sequence[str], *, flag: str) -> Pictures:
    """Read the named samples of a prepared folder into memory."""
    layout = Layout(folder)
    rgb = [(read_rgb(layout.image(name), flag=flag) * 255).round().to(torch.uint8) for name in names]
    disparity = [normalize_disparity(read_depth(layout.depthmap(name), flag=flag)).half() for name in names]
    return Pictures(rgb_N3hw=torch.stack(rgb), disparity_Nhw=torch.stack(disparity))
