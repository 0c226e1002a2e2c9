"""Light and colour at the points that rays hit: soft shadows, contact darkening, highlights, textures, sky.

Legend: B frames, N rays of a frame, K object slots, M (frame, slot) pairs of one kind; a colour or a vector is a tuple
of three tensors, since whole-plane arithmetic on separate components is fastest.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dataset.synthetic.geometry import CEILING, FLOOR, WALL_X, Rays, blocked, cast, cast_room
from dataset.synthetic.looks import PATTERNS
from dataset.synthetic.scene import SLOTS
from dataset.synthetic.textures import TEXTURES
from dataset.synthetic.world import World

SHADOW_SAMPLES = 8
_SHIFT = 2e-3  # metres a shadow ray starts above its surface

# Points evenly over a disc (Vogel's spiral): where the key light is sampled.
_GOLDEN_ANGLE = 2.399963
_RADII = [math.sqrt((k + 0.5) / SHADOW_SAMPLES) for k in range(SHADOW_SAMPLES)]
_DISC = [(r * math.cos(_GOLDEN_ANGLE * k), r * math.sin(_GOLDEN_ANGLE * k)) for k, r in enumerate(_RADII)]

Colour = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Hits:
    """What rays hit: t (B, N), inf for the sky; object slot, -1 for none; surface code of the background."""

    t: Tensor
    slot: Tensor
    surface: Tensor


def trace(world: World, rays: Rays) -> Hits:
    """What each camera ray hits first."""
    t_object, slot = cast(world.groups, rays, slots=SLOTS)
    t_room, surface = cast_room(world.room, rays)
    nearer = t_object < t_room
    return Hits(t=torch.where(nearer, t_object, t_room), slot=torch.where(nearer, slot, -1), surface=surface)


def _mix(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    return a + (b - a) * share


def _smooth(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def _floor_albedo(world: World, x: Tensor, z: Tensor, footprint: Tensor) -> Colour:
    f = world.frame
    u, v = f["floor_cos"] * x - f["floor_sin"] * z, f["floor_sin"] * x + f["floor_cos"] * z
    share, tone = torch.empty_like(u), torch.empty_like(u)
    for kind, frames in world.floors.items():
        share[frames], tone[frames] = TEXTURES[kind](u[frames], v[frames])
    # Where one pixel covers much of the pattern, its mean is shown: no moire towards the horizon.
    scale = (f["floor_cos"] * f["floor_cos"] + f["floor_sin"] * f["floor_sin"]).sqrt()
    fade = _smooth(1.6 - 3.2 * footprint * scale)
    share, tone = _mix(torch.full_like(share, 0.4), share, fade), _mix(torch.ones_like(tone), tone, fade)
    return tuple(_mix(f[f"floor1{c}"], f[f"floor2{c}"], share) * tone for c in range(3))


def _wall_albedo(world: World, along: Tensor, y: Tensor) -> Colour:
    f = world.frame
    cell = along / f["wall_scale"]
    striped = (cell - 2 * (cell * 0.5).floor() >= 1) & (f["wall"] == 1)
    second = striped | (y < 0.14) | ((f["wall"] == 2) & (y < 1.0))
    rim = (f["wall"] == 2) & (y > 0.96) & (y < 1.04)
    tone = torch.where(rim, 0.72, 1.0) * torch.where((y < 0.15) & (y > 0.13), 0.75, 1.0)
    plinth = f["wall"] != 1
    second = torch.where(plinth, second, striped)
    return tuple(torch.where(second, f[f"wall2{c}"], f[f"wall1{c}"]) * tone for c in range(3))


def _object_normal(p: dict[str, Tensor], x: Tensor, y: Tensor, z: Tensor) -> Colour:
    """Outward normal of the hit object; x, y, z are relative to its centre."""
    kind = p["kind"]
    inverse_r = 1 / p["sx"]
    flat = (x * x + z * z).sqrt().clamp_min(1e-6)
    # box, in its own axes: the face whose relative coordinate is largest
    bx, bz = p["cos"] * x - p["sin"] * z, p["sin"] * x + p["cos"] * z
    ax, ay, az = (bx / p["sx"]).abs(), (y / p["sy"]).abs(), (bz / p["sz"]).abs()
    on_x, on_y = (ax >= ay) & (ax >= az), ay >= az
    ex = torch.where(on_x, bx.sign(), 0.0)
    ey = torch.where(~on_x & on_y, y.sign(), 0.0)
    ez = torch.where(~on_x & ~on_y, bz.sign(), 0.0)
    box = (p["cos"] * ex + p["sin"] * ez, ey, p["cos"] * ez - p["sin"] * ex)
    cap = ay > flat * inverse_r
    cylinder = (torch.where(cap, 0.0, x / flat), torch.where(cap, y.sign(), 0.0), torch.where(cap, 0.0, z / flat))
    lean = 0.5 * p["sx"] / p["sy"]
    length = 1 / (1 + lean * lean).sqrt()
    cone = (x / flat * length, lean * length, z / flat * length)
    sphere = (x * inverse_r, y * inverse_r, z * inverse_r)
    return tuple(
        torch.where(kind == 0, s, torch.where(kind == 1, b, torch.where(kind == 2, c, k)))
        for s, b, c, k in zip(sphere, box, cylinder, cone, strict=True)
    )


def _occlusion(world: World, point: Colour, normal: Colour, slot: Tensor) -> Tensor:
    """Share of the surroundings' light left: each other object hides the cone of the ball within it."""
    open_BN = torch.ones_like(point[0])
    table = world.table
    for k in range(SLOTS):
        radius = table["round"][:, k : k + 1]
        if not bool((radius > 0).any()):
            break
        dx, dy, dz = (table[n][:, k : k + 1] - q for n, q in zip(("cx", "cy", "cz"), point, strict=True))
        square = dx * dx + dy * dy + dz * dz
        facing = (normal[0] * dx + normal[1] * dy + normal[2] * dz) / square.sqrt().clamp_min(1e-4)
        hidden = (0.15 + 0.85 * facing).clamp_min(0) * radius * radius / square.clamp_min(1e-4)
        open_BN = open_BN * (1 - torch.where(slot == k, 0.0, hidden).clamp(0, 0.8))
    return open_BN


def _corner_darkening(world: World, along: tuple[Tensor, Tensor], y: Tensor, surface: Tensor) -> Tensor:
    """Rooms darken softly towards their edges."""
    f = world.frame

    def near(distance: Tensor, own: Tensor) -> Tensor:
        return 1 - 0.26 * torch.where(own, 0.0, _smooth(1 - distance / 0.7))

    walls = near((along[0] - f["x0"]).minimum(f["x1"] - along[0]), surface == WALL_X)
    walls = walls * near((along[1] - f["z0"]).minimum(f["z1"] - along[1]), surface > WALL_X)
    return walls * near(y, surface == FLOOR) * near(f["height"] - y, surface == CEILING)


def _clear(world: World, origin: Colour, wanted: Tensor, samples: slice) -> Tensor:
    """Share of the key light's disc that each wanted point sees; 0 elsewhere."""
    f = world.frame
    result = torch.zeros_like(origin[0])
    alone = len(result) == 1
    if alone:  # of a single frame, only the wanted points are looked at: a third of the time
        place = wanted[0].nonzero()[:, 0]
        origin = tuple(c[:, place] for c in origin)
    seen = torch.zeros_like(origin[0])
    disc = _DISC[samples]
    for a, b in disc:
        d = tuple(f[f"light{c}"] + (a * f[f"disc1{c}"] + b * f[f"disc2{c}"]) - origin[c] for c in range(3))
        rays = Rays(ox=origin[0], oy=origin[1], oz=origin[2], dx=d[0], dy=d[1], dz=d[2])
        seen += (~blocked(world.groups, rays)).float()
    seen = seen * (1 / len(disc))
    if alone:
        result[:, place] = seen
        return result
    return torch.where(wanted, seen, result)


def _key_light(
    world: World, point: Colour, normal: Colour, away: Tensor, samples: slice
) -> tuple[Tensor, Colour, Tensor]:
    """Lambert term with soft shadow, unit direction to the light, and the shadow's share of light alone."""
    f = world.frame
    to = tuple(f[f"light{c}"] - point[c] for c in range(3))
    square = to[0] * to[0] + to[1] * to[1] + to[2] * to[2]
    inverse = 1 / square.sqrt()
    direction = tuple(c * inverse for c in to)
    lambert = (normal[0] * direction[0] + normal[1] * direction[1] + normal[2] * direction[2]).clamp(0, 1)
    lambert = torch.where(away, 0.0, lambert)
    origin = tuple(q + _SHIFT * n for q, n in zip(point, normal, strict=True))
    clear = _clear(world, origin, lambert > 0, samples)
    falloff = (1.5 * f["reach"] * f["reach"]) / (square + 0.5 * f["reach"] * f["reach"])
    falloff = torch.where(f["fades"] > 0, falloff, 1.0)
    return lambert * clear * falloff.clamp_max(1.35), direction, clear


def _sky(world: World, rays: Rays) -> Colour:
    f = world.frame
    length = (rays.dx * rays.dx + rays.dy * rays.dy + rays.dz * rays.dz).sqrt()
    rise = (rays.dy / length).clamp(0, 1)
    share = _smooth(rise.sqrt() * 1.15)
    light_x, light_z = f["light0"], f["light2"]
    toward = (light_x * rays.dx + light_z * rays.dz) / (length * (light_x * light_x + light_z * light_z).sqrt())
    glow = f["glow"] * (0.5 + 0.5 * toward) * (1 - share) * 0.35
    warm = (1.0, 0.62, 0.28)
    return tuple(_mix(f[f"horizon{c}"], f[f"zenith{c}"], share) + glow * warm[c] for c in range(3))


def _room_normal(
    world: World, along: tuple[Tensor, Tensor], *, on_x: Tensor, on_floor: Tensor, on_ceiling: Tensor
) -> Colour:
    """Normal into the room of its floor, ceiling or wall."""
    f = world.frame
    sign_x, sign_z = torch.where(along[0] > 0, -1.0, 1.0), torch.where(along[1] > 0, -1.0, 1.0)
    level = on_floor | on_ceiling
    return (
        torch.where(level, 0.0, torch.where(on_x, f["cos"] * sign_x, f["sin"] * sign_z)),
        torch.where(on_floor, 1.0, torch.where(on_ceiling, -1.0, 0.0)),
        torch.where(level, 0.0, torch.where(on_x, -f["sin"] * sign_x, f["cos"] * sign_z)),
    )


def _dot(a: Colour, b: Colour) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _surface(world: World, hits: Hits, point: Colour, footprint: Tensor) -> tuple[Colour, Colour, Tensor, Tensor]:
    """Albedo, normal, gloss and corner darkening of what was hit, object or background."""
    f = world.frame
    x, y, z = point
    along = f["cos"] * x - f["sin"] * z, f["sin"] * x + f["cos"] * z
    floor = _floor_albedo(world, x, z, footprint)
    on_x, on_floor = hits.surface == WALL_X, hits.surface == FLOOR
    wall = _wall_albedo(world, torch.where(on_x, along[1], along[0]), y)
    on_ceiling = hits.surface == CEILING
    back = tuple(torch.where(on_floor, a, torch.where(on_ceiling, 0.8, b)) for a, b in zip(floor, wall, strict=True))
    back_normal = _room_normal(world, along, on_x=on_x, on_floor=on_floor, on_ceiling=on_ceiling)
    slot = hits.slot.clamp_min(0)
    p = {name: column.gather(1, slot) for name, column in world.table.items()}
    own = (x - p["cx"], y - p["cy"], z - p["cz"])
    normal = _object_normal(p, *own)
    band = (own[1] + p["sy"]) * p["bands"]
    striped = (p["pattern"] == PATTERNS.index("stripes")) & (band - 2 * (band * 0.5).floor() >= 1)
    two_tone = (p["pattern"] == PATTERNS.index("two_tone")) & (own[1] < -0.1 * p["sy"])
    paint = torch.where(striped | two_tone, 0.78, 1.0)
    is_object = hits.slot >= 0
    albedo = tuple(torch.where(is_object, p[n] * paint, b) for n, b in zip("rgb", back, strict=True))
    normal = tuple(torch.where(is_object, n, b) for n, b in zip(normal, back_normal, strict=True))
    gloss = torch.where(is_object, p["gloss"], 0.0)
    corner = torch.where(is_object, 1.0, _corner_darkening(world, along, y, hits.surface))
    return albedo, normal, gloss, corner


def shade(world: World, rays: Rays, hits: Hits, *, size: int, samples: slice = slice(None)) -> Tensor:
    """Linear RGB of each ray, (B, 3, N) in [0, 1]; `size` is the picture's side in pixels.

    `samples` chooses among the points of the key light's disc.
    """
    f = world.frame
    is_sky = hits.t == torch.inf
    t = torch.where(is_sky, 1.0, hits.t)
    point = (rays.ox + t * rays.dx, rays.oy + t * rays.dy, rays.oz + t * rays.dz)
    inverse = 1 / (rays.dx * rays.dx + rays.dy * rays.dy + rays.dz * rays.dz).sqrt()
    view = (-rays.dx * inverse, -rays.dy * inverse, -rays.dz * inverse)
    footprint = t * f["tan"] * (2 / size) / view[1].abs().clamp_min(0.02)
    albedo, normal, gloss, corner = _surface(world, hits, point, footprint)
    lambert, direction, clear = _key_light(world, point, normal, is_sky, samples)
    ambient = _occlusion(world, point, normal, hits.slot) * corner
    # Light of the surroundings: from above the sky's, from below what the floor throws back, less of it near the floor.
    rise = 0.5 + 0.5 * normal[1]
    low = _smooth(point[1] / 0.5)
    bounce = 0.35 + 0.4 * low
    half = tuple(d + v for d, v in zip(direction, view, strict=True))
    shine = _dot(normal, half).clamp_min(0) / _dot(half, half).sqrt().clamp_min(1e-4)
    for _ in range(6):  # to the 64th
        shine = shine * shine
    shine = shine * gloss * clear
    edge = 1 - _dot(normal, view).clamp(0, 1)
    rim = edge * edge * edge * gloss * 0.25 * ambient
    haze = torch.where(f["open"] > 0, _smooth((t - 9) / 11), 0.0)
    sky = _sky(world, rays)
    channels = []
    for c in range(3):
        floor_mean = 0.5 * (f[f"floor1{c}"] + f[f"floor2{c}"])
        around = f[f"sky{c}"] * _mix(bounce * (0.45 + 0.8 * floor_mean), torch.ones_like(rise), rise)
        light = albedo[c] * (f[f"key{c}"] * lambert + around * ambient) + f[f"key{c}"] * shine + f[f"sky{c}"] * rim
        knee = (light - 0.8).clamp_min(0)
        light = light.clamp_max(0.8) + knee / (1 + knee * 5)
        channels.append(torch.where(is_sky, sky[c], _mix(light, sky[c], haze)).clamp(0, 1))
    return torch.stack(channels, 1)
