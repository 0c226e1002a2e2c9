"""Latents <-> tokens.

Shape suffixes: B batch, C channels, h w latent rows and columns, L tokens, D width.
"""

import torch
from einops import rearrange
from torch import Tensor

PATCH = 2  # latents to a side of one token
PIXELS_PER_LATENT = 8  # pixels to a side of one latent
PIXELS_PER_TOKEN = PIXELS_PER_LATENT * PATCH


def pack(z_BChw: Tensor) -> Tensor:
    """Cut latents (..., C, h, w) into 2 x 2 patches: tokens (..., h/2 * w/2, 4 C), row by row."""
    return rearrange(z_BChw, "... C (h ph) (w pw) -> ... (h w) (C ph pw)", ph=PATCH, pw=PATCH)


def unpack(x_BLD: Tensor, *, height: int, width: int) -> Tensor:
    """Undo `pack` for a grid of `height` x `width` tokens: latents (..., C, 2 height, 2 width)."""
    return rearrange(x_BLD, "... (h w) (C ph pw) -> ... C (h ph) (w pw)", h=height, w=width, ph=PATCH, pw=PATCH)


def image_ids(height: int, width: int, *, device: torch.device | str | None = None) -> Tensor:
    """Positions (0, row, column) of a grid of tokens, (height * width, 3) float32, in the order of `pack`."""
    rows = torch.arange(height, dtype=torch.float32, device=device)
    columns = torch.arange(width, dtype=torch.float32, device=device)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    return torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=-1)
