"""Which object each cell of 4 x 4 pixels shows, of what solid and colour, as small maps to learn from.

Shapes: N scenes, B batch, h w cells, L tokens, C cells in a token.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from dataset.layout import Layout
from dataset.synthetic.geometry import KINDS
from dataset.synthetic.palette import COLOURS
from library.errors import UserError
from library.flux.latents import PATCH, PIXELS_PER_LATENT

CELL = 4  # pixels
CELLS = (PATCH * PIXELS_PER_LATENT // CELL) ** 2  # in a token
SOLIDS, COLORS = 1 + len(KINDS), 1 + len(COLOURS)  # with the background


def read_object_cells(folder: Path, names: Sequence[str]) -> Tensor:
    """Read scenes as codes of what most of each cell shows: uint8 (N, h, w), see `solids_and_colors`.

    Raises:
        UserError: a scene has no map of its objects, as those of an earlier version.
    """
    layout = Layout(folder)
    cells = []
    for name in names:
        path = layout.instance_map(name)
        if not path.exists():
            raise UserError(f"--scenes {path}: no such file; make the scenes anew with dataset/make_scenes.py")
        objects = json.loads(layout.scene(name).read_text(encoding="utf-8"))["objects"]
        codes = [1 + KINDS.index(o["shape"]) * len(COLOURS) + COLOURS.index(o["colour"]) for o in objects]
        table = torch.tensor([0, *codes], dtype=torch.uint8)
        shown_hw = table[torch.from_numpy(np.array(Image.open(path))).long()]
        cells.append(rearrange(shown_hw, "(h a) (w b) -> h w (a b)", a=CELL, b=CELL).mode(dim=-1).values)
    return torch.stack(cells)


def pack_cells(code_Nhw: Tensor) -> Tensor:
    """Gather the cells of each token, (N, L, C)."""
    side = round(CELLS**0.5)
    return rearrange(code_Nhw, "n (h a) (w b) -> n (h w) (a b)", a=side, b=side)


def solids_and_colors(code: Tensor) -> tuple[Tensor, Tensor]:
    """Return the classes of solid and of colour, int64 of the same shape: 0 is background, the others from 1."""
    code = code.long()
    seen = code > 0
    solid, color = (code - 1) // len(COLOURS), (code - 1) % len(COLOURS)
    return torch.where(seen, 1 + solid, 0), torch.where(seen, 1 + color, 0)
