"""Light and colour at the points that rays hit: soft shadows, contact darkening, highlights, textures, sky.

Legend: B frames, N rays of a frame, K object slots, M (frame, slot) pairs of one kind, c colour channels (a tuple of three).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dataset.synthetic.geometry import CEILING, FLOOR, KINDS, WALL_X, Rays, Room, Solids, blocked, cast, cast_room
from dataset.synthetic.palette import PALETTE
from dataset.synthetic.scene import PATTERNS, SLOTS, WALLS, Scene
from dataset.synthetic.textures import TEXTURES

SHADOW_SAMPLES = 8
_SHIFT = 2e-3  # metres a shadow ray starts above its surface

# Points evenly over a disc (Vogel's spiral): where the key light is sampled.
_DISC = [
    (math.sqrt((k + 0.5) / SHADOW_SAMPLES) * math.cos(2.399963 * k), math.sqrt((k + 0.5) / SHADOW_SAMPLES) * math.sin(2.399963 * k))
    for k in range(SHADOW_SAMPLES)
]

Colour = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """A batch of scenes as tensors. `table` columns are (B, K), `frame` columns (B, 1)."""

    groups: list[Solids]
    room: Room
    table: dict[str, Tensor]
    frame: dict[str, Tensor]
    floors: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Hits:
    """What rays hit: t (B, N), inf for the sky; object slot, -1 for none; surface code of the background."""

    t: Tensor
    slot: Tensor
    surface: Tensor


def _item_columns(scene: Scene) -> list[dict[str, float]]:
    rows = []
    for item in scene.items:
        albedo = PALETTE[item.colour]
        rows.append(
            {
                "cx": item.centre[0],
                "cy": item.centre[1],
                "cz": item.centre[2],
                "sx": item.half[0],
                "sy": item.half[1],
                "sz": item.half[2],
                "cos": math.cos(item.turn),
                "sin": math.sin(item.turn),
                "kind": KINDS.index(item.shape),
                "pattern": PATTERNS.index(item.pattern),
                "bands": item.bands / (2 * item.half[1]),
                "gloss": item.gloss,
                "round": 0.9 * min(item.half),
                "r": albedo[0],
                "g": albedo[1],
                "b": albedo[2],
            }
        )
    return rows


def _light_axes(scene: Scene) -> tuple[list[float], list[float]]:
    """Two vectors that span the disc of the key light, as seen from the objects."""
    x, y, z = scene.light.position
    flat = math.hypot(x, z)
    length = math.sqrt(x * x + y * y + z * z)
    r = scene.light.radius
    return [r * z / flat, 0.0, -r * x / flat], [-r * x * y / (flat * length), r * flat / length, -r * z * y / (flat * length)]


def _frame_columns(scene: Scene) -> dict[str, float]:
    s, light, camera = scene.surroundings, scene.light, scene.camera
    right, up, forward = camera.axes()
    first, second = _light_axes(scene)
    vectors = {
        "right": right,
        "up": up,
        "forward": forward,
        "eye": camera.position,
        "light": light.position,
        "disc1": first,
        "disc2": second,
        "key": light.colour,
        "sky": light.sky,
        "zenith": light.zenith,
        "horizon": light.horizon,
        "floor1": s.floor_colours[0],
        "floor2": s.floor_colours[1],
        "wall1": s.wall_colours[0],
        "wall2": s.wall_colours[1],
    }
    columns = {f"{name}{axis}": value for name, vector in vectors.items() for axis, value in enumerate(vector)}
    return columns | {
        "tan": camera.tan_half,
        "fades": float(light.fades),
        "reach": math.dist(light.position, camera.look_at),
        "open": float(s.kind == "open"),
        "cos": math.cos(s.turn),
        "sin": math.sin(s.turn),
        "x0": s.extent[0],
        "x1": s.extent[1],
        "z0": s.extent[2],
        "z1": s.extent[3],
        "height": s.height,
        "floor_cos": math.cos(s.floor_turn) / s.floor_scale,
        "floor_sin": math.sin(s.floor_turn) / s.floor_scale,
        "wall": float(WALLS.index(s.wall)),
        "wall_scale": s.wall_scale,
        "glow": float(light.kind == "evening"),
    }


def build_world(scenes: list[Scene], device: torch.device) -> World:
    """Scenes as tensors on a device; the values are rounded to float32 here, once."""
    rows = [_item_columns(scene) for scene in scenes]
    frames = [_frame_columns(scene) for scene in scenes]
    stacked = torch.tensor([list(f.values()) for f in frames], dtype=torch.float32, device=device)
    frame = {name: stacked[:, i : i + 1] for i, name in enumerate(frames[0])}
    names = list(rows[0][0])
    blank = dict.fromkeys(names, 0.0) | {"sx": 1.0, "sy": 1.0, "sz": 1.0, "cos": 1.0}
    padded = [[list(r.values()) for r in row + [blank] * (SLOTS - len(row))] for row in rows]
    cube = torch.tensor(padded, dtype=torch.float32, device=device)
    table = {name: cube[:, :, i] for i, name in enumerate(names)}
    groups = []
    for number, kind in enumerate(KINDS):
        pairs = [(b, k) for b, row in enumerate(rows) for k, r in enumerate(row) if r["kind"] == number]
        if pairs:
            frame_M, slot_M = (torch.tensor(column, device=device) for column in zip(*pairs, strict=True))
            shape = {n: table[n][frame_M, slot_M][:, None] for n in ("cx", "cy", "cz", "sx", "sy", "sz", "cos", "sin")}
            groups.append(Solids(kind=kind, frame_M=frame_M, slot_M=slot_M, **shape))
    room = Room(**{name: frame[name] for name in Room.__slots__})
    kinds = [scene.surroundings.floor for scene in scenes]
    floors = {
        kind: torch.tensor([b for b, k in enumerate(kinds) if k == kind], device=device) for kind in dict.fromkeys(kinds)
    }
    return World(groups=groups, room=room, table=table, frame=frame, floors=floors)


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
    falloff = torch.where(f["fades"] > 0, (1.5 * f["reach"] * f["reach"]) / (square + 0.5 * f["reach"] * f["reach"]), 1.0)
    return lambert * clear * falloff.clamp_max(1.35), direction, clear


def _sky(world: World, rays: Rays) -> Colour:
    f = world.frame
    length = (rays.dx * rays.dx + rays.dy * rays.dy + rays.dz * rays.dz).sqrt()
    rise = (rays.dy / length).clamp(0, 1)
    share = _smooth(rise.sqrt() * 1.15)
    toward = (f["light0"] * rays.dx + f["light2"] * rays.dz) / (length * (f["light0"] * f["light0"] + f["light2"] * f["light2"]).sqrt())
    glow = f["glow"] * (0.5 + 0.5 * toward) * (1 - share) * 0.35
    warm = (1.0, 0.62, 0.28)
    return tuple(_mix(f[f"horizon{c}"], f[f"zenith{c}"], share) + glow * warm[c] for c in range(3))


def _surface(world: World, hits: Hits, point: Colour, footprint: Tensor) -> tuple[Colour, Colour, Tensor, Tensor]:
    """Albedo, normal, gloss and corner darkening of what was hit, object or background."""
    f = world.frame
    x, y, z = point
    along = f["cos"] * x - f["sin"] * z, f["sin"] * x + f["cos"] * z
    floor = _floor_albedo(world, x, z, footprint)
    on_x, on_floor = hits.surface == WALL_X, hits.surface == FLOOR
    wall = _wall_albedo(world, torch.where(on_x, along[1], along[0]), y)
    back = tuple(torch.where(on_floor, a, torch.where(hits.surface == CEILING, 0.8, b)) for a, b in zip(floor, wall, strict=True))
    sign_x, sign_z = torch.where(along[0] > 0, -1.0, 1.0), torch.where(along[1] > 0, -1.0, 1.0)
    wall_normal = (torch.where(on_x, f["cos"] * sign_x, f["sin"] * sign_z), torch.where(on_x, -f["sin"] * sign_x, f["cos"] * sign_z))
    upright = on_floor | (hits.surface == CEILING)
    back_normal = (
        torch.where(upright, 0.0, wall_normal[0]),
        torch.where(on_floor, 1.0, torch.where(upright, -1.0, 0.0)),
        torch.where(upright, 0.0, wall_normal[1]),
    )
    slot = hits.slot.clamp_min(0)
    p = {name: column.gather(1, slot) for name, column in world.table.items()}
    own = (x - p["cx"], y - p["cy"], z - p["cz"])
    normal = _object_normal(p, *own)
    band = (own[1] + p["sy"]) * p["bands"]
    dark = ((p["pattern"] == 1) & (band - 2 * (band * 0.5).floor() >= 1)) | ((p["pattern"] == 2) & (own[1] < -0.1 * p["sy"]))
    paint = torch.where(dark, 0.78, 1.0)
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
    half_square = half[0] * half[0] + half[1] * half[1] + half[2] * half[2]
    shine = (normal[0] * half[0] + normal[1] * half[1] + normal[2] * half[2]).clamp_min(0) / half_square.sqrt().clamp_min(1e-4)
    for _ in range(6):  # to the 64th
        shine = shine * shine
    shine = shine * gloss * clear
    edge = 1 - (normal[0] * view[0] + normal[1] * view[1] + normal[2] * view[2]).clamp(0, 1)
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
