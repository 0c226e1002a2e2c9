"""Connected regions of label maps, all pictures of a batch at once.

Shapes: B batch, h w pixels, R regions.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def connected_regions(labels_Bhw: Tensor) -> Tensor:
    """Return an id for each pixel: equal within a 4-connected region of equal labels, different between regions.

    An id is the place of the region's last pixel in the flattened batch. Each round takes the largest id among equal
    neighbours, then follows the ids found (pointer jumping), so that long thin regions need few rounds too.
    """
    batch, height, width = labels_Bhw.shape
    ids_Bhw = torch.arange(labels_Bhw.numel(), device=labels_Bhw.device).reshape(batch, height, width)
    down = labels_Bhw[:, 1:] == labels_Bhw[:, :-1]
    right = labels_Bhw[:, :, 1:] == labels_Bhw[:, :, :-1]
    while True:
        before = ids_Bhw
        ids_Bhw = ids_Bhw.clone()
        for same, first, second in ((down, _ROWS[0], _ROWS[1]), (right, _COLUMNS[0], _COLUMNS[1])):
            larger = torch.where(same, torch.maximum(ids_Bhw[first], ids_Bhw[second]), -1)
            ids_Bhw[first] = torch.maximum(ids_Bhw[first], larger)
            ids_Bhw[second] = torch.maximum(ids_Bhw[second], larger)
        roots = before.flatten().scatter_reduce(0, before.flatten(), ids_Bhw.flatten(), "amax")
        ids_Bhw = roots[roots[ids_Bhw.flatten()]].reshape(before.shape)
        if torch.equal(ids_Bhw, before):
            return ids_Bhw


_ROWS = ((slice(None), slice(None, -1)), (slice(None), slice(1, None)))
_COLUMNS = ((slice(None), slice(None), slice(None, -1)), (slice(None), slice(None), slice(1, None)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Regions:
    """The regions of a batch of label maps, one entry each.

    Attributes:
        index_Bhw: region of each pixel.
        image_R: picture of the batch.
        label_R: label.
        area_R: pixels.
        border_R: pixels on the picture's border.
        box_R: pixels of the bounding box.
    """

    index_Bhw: Tensor
    image_R: Tensor
    label_R: Tensor
    area_R: Tensor
    border_R: Tensor
    box_R: Tensor


def describe_regions(labels_Bhw: Tensor) -> Regions:
    """Find the connected regions of each label map and measure them."""
    batch, height, width = labels_Bhw.shape
    _, index = connected_regions(labels_Bhw).flatten().unique(return_inverse=True)
    count = int(index.max()) + 1
    device = labels_Bhw.device
    image, row, column = (axis.flatten() for axis in _grid(batch, height, width, device))
    border = (row == 0) | (row == height - 1) | (column == 0) | (column == width - 1)

    def reduced(values: Tensor, how: str) -> Tensor:
        return torch.zeros(count, dtype=values.dtype, device=device).scatter_reduce(
            0, index, values, how, include_self=False
        )

    sides = [reduced(axis, "amax") - reduced(axis, "amin") + 1 for axis in (row, column)]
    return Regions(
        index_Bhw=index.reshape(labels_Bhw.shape),
        image_R=reduced(image, "amax"),
        label_R=reduced(labels_Bhw.flatten(), "amax"),
        area_R=reduced(torch.ones_like(index), "sum"),
        border_R=reduced(border.long(), "sum"),
        box_R=sides[0] * sides[1],
    )


def opened(mask_Bhw: Tensor, *, radius: int) -> Tensor:
    """Return the mask without what is thinner than a square of side 2 radius + 1 (morphological opening)."""
    size = 2 * radius + 1
    outside_Bhw = F.max_pool2d((~mask_Bhw).float()[:, None], size, stride=1, padding=radius)
    return F.max_pool2d(1 - outside_Bhw, size, stride=1, padding=radius)[:, 0] > 0.5


def _grid(batch: int, height: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
    axes = [torch.arange(size, device=device) for size in (batch, height, width)]
    return torch.meshgrid(*axes, indexing="ij")
