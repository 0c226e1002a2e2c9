"""Batched ray casting against spheres, boxes, cylinders and cones, inside a room or on open ground.

Legend: B frames, N rays of a frame, K object slots of a frame, M (frame, slot) pairs of one kind of solid.

Every solid is convex, so a ray is inside it during one interval [near, far] of its parameter t. All arithmetic is made
of correctly rounded operations (+ - * / sqrt, comparisons), therefore a ray's result has the same bits in any batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("sphere", "box", "cylinder", "cone")
FLOOR, CEILING, WALL_X, WALL_Z, SKY = 0, 1, 2, 3, 4
MAX_DEPTH = 20.0
"""Open ground ends at this depth in metres along the camera's axis; what lies beyond is sky."""

_TINY = 1e-9  # keeps divisors off zero; too small to change any other value in float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Rays:
    """Rays origin + t * direction; components of shape (B, N) or (B, 1), metres. Directions need not have length 1."""

    ox: Tensor
    oy: Tensor
    oz: Tensor
    dx: Tensor
    dy: Tensor
    dz: Tensor

    def of_pairs(self, frame_M: Tensor) -> "Rays":
        """The rays of each pair's frame, components (M, N)."""
        if self.dx.shape[0] == 1:  # all pairs share the one frame: no copies
            return self
        return Rays(**{name: getattr(self, name)[frame_M] for name in Rays.__slots__})


@dataclass(frozen=True, kw_only=True, slots=True)
class Solids:
    """All solids of one kind in a batch: their frames and slots, centres, half sizes and turns about the vertical.

    Columns are (M, 1). A cone's apex points up; radius = sx, half height = sy.
    """

    kind: str
    frame_M: Tensor
    slot_M: Tensor
    cx: Tensor
    cy: Tensor
    cz: Tensor
    sx: Tensor
    sy: Tensor
    sz: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """Inside of a box turned about the vertical, columns (B, 1); open ground is a room too large for walls to show."""

    cos: Tensor
    sin: Tensor
    x0: Tensor
    x1: Tensor
    z0: Tensor
    z1: Tensor
    height: Tensor


def _slab(o: Tensor, d: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """Interval during which |o + t d| <= half."""
    inverse = 1 / (d + _TINY)
    middle = o * inverse
    reach = (half * inverse).abs()
    return -(middle + reach), reach - middle


def _roots(a: Tensor, half_b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Interval between the roots of a t^2 + 2 half_b t + c with a > 0; empty (near = far) where there are none."""
    root = (half_b * half_b - a * c).clamp_min_(0).sqrt_()  # no roots: near = far, which is a miss too
    inverse = 1 / a
    return -(half_b + root) * inverse, (root - half_b) * inverse


def _sphere(s: Solids, x: Tensor, y: Tensor, z: Tensor, r: Rays) -> tuple[Tensor, Tensor]:
    a = r.dx * r.dx + r.dy * r.dy + r.dz * r.dz
    half_b = x * r.dx + y * r.dy + z * r.dz
    return _roots(a, half_b, x * x + y * y + z * z - s.sx * s.sx)


def _box(s: Solids, x: Tensor, y: Tensor, z: Tensor, r: Rays) -> tuple[Tensor, Tensor]:
    near_x, far_x = _slab(s.cos * x - s.sin * z, s.cos * r.dx - s.sin * r.dz, s.sx)
    near_y, far_y = _slab(y, r.dy, s.sy)
    near_z, far_z = _slab(s.sin * x + s.cos * z, s.sin * r.dx + s.cos * r.dz, s.sz)
    return torch.maximum(torch.maximum(near_x, near_y), near_z), torch.minimum(torch.minimum(far_x, far_y), far_z)


def _cylinder(s: Solids, x: Tensor, y: Tensor, z: Tensor, r: Rays) -> tuple[Tensor, Tensor]:
    a = r.dx * r.dx + r.dz * r.dz + _TINY
    near, far = _roots(a, x * r.dx + z * r.dz, x * x + z * z - s.sx * s.sx)
    near_y, far_y = _slab(y, r.dy, s.sy)
    return torch.maximum(near, near_y), torch.minimum(far, far_y)


def _cone(s: Solids, x: Tensor, y: Tensor, z: Tensor, r: Rays) -> tuple[Tensor, Tensor]:
    """x^2 + z^2 <= k^2 (apex - y)^2 is a double cone; the slab of heights keeps its lower half.

    A ray steeper than the flank (a < 0) is inside outside the roots: once in each half, in the lower one after the
    larger root when it falls and before the smaller one when it rises.
    """
    slope = s.sx / (2 * s.sy)
    slope = slope * slope
    down = s.sy - y
    a = r.dx * r.dx + r.dz * r.dz - slope * r.dy * r.dy
    half_b = x * r.dx + z * r.dz + slope * down * r.dy
    c = x * x + z * z - slope * down * down
    disc = half_b * half_b - a * c
    root = disc.clamp_min(0).sqrt_()
    inverse = 1 / (a + _TINY)
    first, second = -(half_b + root) * inverse, (root - half_b) * inverse
    low, high = torch.minimum(first, second), torch.maximum(first, second)
    shallow, falls = a > 0, r.dy < 0
    near = torch.where(shallow, low, torch.where(falls, high, -torch.inf))
    far = torch.where(shallow, high, torch.where(falls, torch.inf, low))
    far = torch.where(disc > 0, far, -torch.inf)
    near_y, far_y = _slab(y, r.dy, s.sy)
    return torch.maximum(near, near_y), torch.minimum(far, far_y)


_INTERVALS = {"sphere": _sphere, "box": _box, "cylinder": _cylinder, "cone": _cone}


def interval(solids: Solids, rays: Rays) -> tuple[Tensor, Tensor]:
    """First and last t of each ray inside each solid, two (M, N) tensors; a miss has near >= far."""
    r = rays.of_pairs(solids.frame_M)
    return _INTERVALS[solids.kind](solids, r.ox - solids.cx, r.oy - solids.cy, r.oz - solids.cz, r)


def cast(groups: list[Solids], rays: Rays, *, slots: int) -> tuple[Tensor, Tensor]:
    """Nearest solid of each ray: t (B, N), inf where nothing is hit, and its slot (B, N), -1 where nothing is hit."""
    batch, count = rays.dx.shape
    t_BKN = torch.full((batch, slots, count), torch.inf, device=rays.dx.device)
    for solids in groups:
        near, far = interval(solids, rays)
        t_BKN[solids.frame_M, solids.slot_M] = torch.where((near < far) & (near > 0), near, torch.inf)
    t_BN, slot_BN = t_BKN.min(1)
    return t_BN, torch.where(t_BN < torch.inf, slot_BN, -1)


def blocked(groups: list[Solids], rays: Rays) -> Tensor:
    """Whether a solid lies between each ray's origin and its end at t = 1, bool (B, N)."""
    blocked_BN = torch.zeros(rays.dx.shape, dtype=torch.bool, device=rays.dx.device)
    for solids in groups:
        near, far = interval(solids, rays)
        hit_MN = (near < far) & (far > 0) & (near < 1)
        if rays.dx.shape[0] == 1:
            blocked_BN |= hit_MN.any(0)
        else:
            count_BN = torch.zeros_like(blocked_BN, dtype=torch.uint8)
            blocked_BN |= count_BN.index_add_(0, solids.frame_M, hit_MN.byte()) > 0
    return blocked_BN


def cast_room(room: Room, rays: Rays) -> tuple[Tensor, Tensor]:
    """Where each ray leaves the room: t (B, N) and the surface code (B, N); beyond MAX_DEPTH it is SKY with t = inf.

    The rays must start inside, and their t must be depth along the camera's axis.
    """
    dx, dz = room.cos * rays.dx - room.sin * rays.dz, room.sin * rays.dx + room.cos * rays.dz
    ox, oz = room.cos * rays.ox - room.sin * rays.oz, room.sin * rays.ox + room.cos * rays.oz
    dx, dy, dz = (torch.where(d.abs() < _TINY, _TINY, d) for d in (dx, rays.dy, dz))
    t_x = (torch.where(dx > 0, room.x1, room.x0) - ox) / dx
    t_y = (torch.where(dy > 0, room.height, 0.0) - rays.oy) / dy
    t_z = (torch.where(dz > 0, room.z1, room.z0) - oz) / dz
    t = torch.minimum(torch.minimum(t_x, t_y), t_z)
    surface = torch.where(t == t_y, torch.where(dy > 0, CEILING, FLOOR), torch.where(t == t_x, WALL_X, WALL_Z))
    sky = t > MAX_DEPTH
    return torch.where(sky, torch.inf, t), torch.where(sky, SKY, surface)
