"""Baselines that a model must beat to have shown anything.

Each depth baseline gives a map in the place of a predicted disparity and is then aligned like a prediction.
Shapes: B batch, C channels, h w pixels, P numbers in one 8x8x3 patch, K kept components.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

PATCH = 8  # pixels; the same cell that one latent of the autoencoder covers
PATCH_COMPONENTS = 16  # the autoencoder's latent channels, so that the comparison is at equal compression
LUMINANCE_WEIGHTS = (0.299, 0.587, 0.114)  # Rec. 601


def constant_map(rgb_B3hw: Tensor) -> Tensor:
    """Return the same disparity everywhere, (B, h, w): what is left when only each image's shift is fitted."""
    return torch.full_like(rgb_B3hw[:, 0], 0.5)


def luminance_map(rgb_B3hw: Tensor) -> Tensor:
    """Return the luminance (Rec. 601) of pictures in [0, 1] as if it were disparity, (B, h, w)."""
    return torch.einsum("bchw,c->bhw", rgb_B3hw, rgb_B3hw.new_tensor(LUMINANCE_WEIGHTS))


def repeated_map(map_hw: Tensor, like_B3hw: Tensor) -> Tensor:
    """Return one map for every picture, (B, h, w): the per-pixel mean of the training scenes knows only the layout."""
    return map_hw.expand(like_B3hw.shape[0], *map_hw.shape)


def patches(x_B3hw: Tensor) -> Tensor:
    """Cut pictures whose sides are multiples of 8 into rows of 8x8x3 numbers, (patches, 192)."""
    return rearrange(x_B3hw, "b c (h p) (w q) -> (b h w) (c p q)", p=PATCH, q=PATCH)


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchPCA:
    """A linear autoencoder: principal components of 8x8x3 patches, as many numbers a patch as a latent has."""

    mean_P: Tensor
    basis_KP: Tensor

    def reconstruct(self, x_B3hw: Tensor) -> Tensor:
        """Return pictures projected on the components and back, clipped to [0, 1]."""
        rows = patches(x_B3hw) - self.mean_P
        rows = rows @ self.basis_KP.T @ self.basis_KP + self.mean_P
        height = x_B3hw.shape[-2] // PATCH
        width = x_B3hw.shape[-1] // PATCH
        x_B3hw = rearrange(rows, "(b h w) (c p q) -> b c (h p) (w q)", h=height, w=width, p=PATCH, q=PATCH)
        return x_B3hw.clamp(0, 1)


class PatchStatistics:
    """Sums up what `PatchPCA` needs batch by batch, so that thousands of scenes need little memory."""

    def __init__(self) -> None:
        size = 3 * PATCH * PATCH
        self._count = 0
        self._sum_P = torch.zeros(size, dtype=torch.float64)
        self._products_PP = torch.zeros(size, size, dtype=torch.float64)

    def add(self, x_B3hw: Tensor) -> None:
        """Add pictures in [0, 1]."""
        rows = patches(x_B3hw)
        self._count += len(rows)
        self._sum_P += rows.sum(0, dtype=torch.float64).cpu()
        self._products_PP += (rows.T @ rows).double().cpu()

    def fit(self, *, components: int = PATCH_COMPONENTS) -> PatchPCA:
        """Return the mean and the components of largest variance of everything added."""
        mean_P = self._sum_P / self._count
        covariance_PP = self._products_PP / self._count - torch.outer(mean_P, mean_P)
        _, vectors_PP = torch.linalg.eigh(covariance_PP)  # ascending
        return PatchPCA(mean_P=mean_P.float(), basis_KP=vectors_PP[:, -components:].T.flip(0).float().contiguous())
