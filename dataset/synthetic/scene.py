"""Sampling of scenes: what stands where, under which light, and the camera that frames it. Metres; y points up.

Each scene depends on (seed, index) alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dataset.synthetic.draws import Draws
from dataset.synthetic.geometry import KINDS
from dataset.synthetic.looks import (
    FLOOR_LOOKS,
    FLOOR_SCALE,
    GROUNDS,
    LIGHT_LOOKS,
    LIGHTS,
    PATTERNS,
    ROOM_FLOORS,
    WALL_LOOKS,
    WALLS,
    Vector,
)
from dataset.synthetic.palette import COLOURS

SLOTS = 6
"""Most objects in a scene."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """An object: half sizes along its own axes (round ones: x = z = radius), centre, turn about the vertical [rad]."""

    shape: str
    colour: str
    half: Vector
    centre: Vector
    turn: float
    pattern: str
    bands: float
    gloss: float
    stacked_on: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Camera:
    """A pinhole camera; `tan_half` is the tangent of half its (square) field of view."""

    position: Vector
    look_at: Vector
    tan_half: float

    def axes(self) -> tuple[Vector, Vector, Vector]:
        """Unit vectors to the right, up and forward."""
        forward = _unit(tuple(a - b for a, b in zip(self.look_at, self.position, strict=True)))
        right = _unit((-forward[2], 0.0, forward[0]))
        up = (
            right[1] * forward[2] - right[2] * forward[1],
            right[2] * forward[0] - right[0] * forward[2],
            right[0] * forward[1] - right[1] * forward[0],
        )
        return right, up, forward


@dataclass(frozen=True, kw_only=True, slots=True)
class Light:
    """The key light, a disc at `position` with `radius`, and the light of sky and surroundings (linear RGB)."""

    kind: str
    position: Vector
    radius: float
    colour: Vector
    fades: bool
    sky: Vector
    zenith: Vector
    horizon: Vector
    side: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """A room or open ground: extents in its own axes (turned by `turn`), floor and wall looks (linear RGB)."""

    kind: str
    turn: float
    extent: tuple[float, float, float, float]
    height: float
    floor: str
    floor_colours: tuple[Vector, Vector]
    floor_scale: float
    floor_turn: float
    wall: str
    wall_colours: tuple[Vector, Vector]
    wall_scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Everything a picture is made of."""

    seed: int
    index: int
    items: tuple[Item, ...]
    camera: Camera
    light: Light
    surroundings: Surroundings


def _unit(v: Sequence[float]) -> Vector:
    length = math.sqrt(sum(c * c for c in v))
    return (v[0] / length, v[1] / length, v[2] / length)


def _half_sizes(draws: Draws, shape: str, scale: float) -> Vector:
    if shape == "sphere":
        r = scale * draws.uniform(0.28, 0.52)
        return (r, r, r)
    if shape == "box":
        return (scale * draws.uniform(0.22, 0.46), scale * draws.uniform(0.2, 0.5), scale * draws.uniform(0.22, 0.46))
    if shape == "cylinder":
        r = scale * draws.uniform(0.2, 0.42)
        return (r, scale * draws.uniform(0.22, 0.54), r)
    r = scale * draws.uniform(0.28, 0.48)
    return (r, scale * draws.uniform(0.3, 0.54), r)


def _footprint(half: Vector) -> float:
    """Radius of the circle an object covers on the ground, corners rounded off a little."""
    return half[0] if half[0] == half[2] else 0.97 * math.hypot(half[0], half[2])


def _stacked(draws: Draws, items: list[Item], shape: str) -> tuple[Vector, Vector, int] | None:
    """Half sizes, centre and parent of an object put on a free box or cylinder; None where there is none."""
    taken = {item.stacked_on for item in items}
    parents = [
        i
        for i, item in enumerate(items)
        if item.shape in ("box", "cylinder")
        and i not in taken
        and item.stacked_on is None
        and min(item.half[0], item.half[2]) > 0.2
    ]
    if not parents:
        return None
    parent = draws.pick(parents)
    below = items[parent]
    room = min(below.half[0], below.half[2])
    half = _half_sizes(draws, shape, 1.0)
    shrink = max(room * draws.uniform(0.7, 0.92) / max(half[0], half[2]), 0.105 / min(half))
    half = (half[0] * shrink, min(half[1] * shrink, 0.6), half[2] * shrink)
    top = below.centre[1] + below.half[1]
    return half, (below.centre[0], top + half[1], below.centre[2]), parent


def _placed(
    draws: Draws, items: list[Item], half: Vector, spread: tuple[float, float], distance: float
) -> Vector | None:
    """A free place on the ground that does not hide, or hide behind, what is there; None after many tries."""
    reach = _footprint(half)
    for attempt in range(24):
        x, z = draws.uniform(-spread[0], spread[0]), draws.uniform(-spread[1], spread[1])
        apart = 0.95 - 0.02 * attempt
        for other in items:
            if other.stacked_on is not None:
                continue
            other_reach = _footprint(other.half)
            if math.hypot(x - other.centre[0], z - other.centre[2]) < reach + other_reach + 0.06:
                break
            far, other_far = distance - z, distance - other.centre[2]
            if abs(x / far - other.centre[0] / other_far) < apart * (reach / far + other_reach / other_far):
                break
        else:
            return (x, half[1], z)
    return None


def _items(draws: Draws, scale: float, distance: float) -> tuple[Item, ...]:
    wanted = draws.pick((2, 3, 4, 5, 6), (0.10, 0.28, 0.32, 0.20, 0.10))
    spread = ((0.38 + 0.14 * wanted) * scale, (0.60 + 0.26 * wanted) * scale)
    colours = draws.shuffled(COLOURS)
    items: list[Item] = []
    for number in range(SLOTS):
        if number >= wanted and len(items) >= 2:
            break
        shape = draws.pick(KINDS)
        item = Item(
            shape=shape,
            colour=colours[number],
            half=(0.0, 0.0, 0.0),
            centre=(0.0, 0.0, 0.0),
            turn=draws.uniform(0, math.pi / 2),
            pattern=draws.pick(PATTERNS, (0.7, 0.16, 0.14)),
            bands=draws.uniform(3.0, 5.0),
            gloss=draws.uniform(0.08, 0.6),
        )
        place = _stacked(draws, items, shape) if draws.chance(0.3) else None
        if place:
            items.append(replace(item, half=place[0], centre=place[1], stacked_on=place[2]))
            continue
        half = _half_sizes(draws, shape, scale * draws.pick((0.72, 1.0, 1.2), (0.3, 0.45, 0.25)))
        centre = _placed(draws, items, half, spread, distance)
        if centre:
            items.append(replace(item, half=half, centre=centre))
    return tuple(items)


def _corners(item: Item) -> list[Vector]:
    """Points whose hull nearly holds the object."""
    (x, y, z), (a, b, c) = item.centre, item.half
    if item.shape == "box":
        cos, sin = math.cos(item.turn), math.sin(item.turn)
        flat = [(cos * p + sin * q, cos * q - sin * p) for p in (-a, a) for q in (-c, c)]
    else:
        flat = [(-a, 0.0), (a, 0.0), (0.0, -a), (0.0, a)]
    low = [(x + p, y - b, z + q) for p, q in flat]
    return low + ([(x, y + b, z)] if item.shape == "cone" else [(x + p, y + b, z + q) for p, q in flat])


def _moved(point: Vector, along: Vector, by: float) -> Vector:
    return (point[0] + by * along[0], point[1] + by * along[1], point[2] + by * along[2])


def _seen_extent(camera: Camera, points: list[Vector]) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of the points in the picture plane at distance 1."""
    seen = []
    for point in points:
        offset = [a - b for a, b in zip(point, camera.position, strict=True)]
        x, y, z = (sum(a * b for a, b in zip(offset, axis, strict=True)) for axis in camera.axes())
        seen.append((x / max(z, 0.3), y / max(z, 0.3)))
    across, upward = zip(*seen, strict=True)
    return min(across), max(across), min(upward), max(upward)


def _framed(draws: Draws, items: tuple[Item, ...], distance: float) -> Camera:
    """A camera whose picture the objects fill: it turns to their middle, then its field of view fits them."""
    pitch = math.radians(draws.uniform(8, 40))
    aim: Vector = (0.0, 0.3, 0.0)
    margin = draws.uniform(1.0, 1.16)
    points = [point for item in items for point in _corners(item)]
    for _ in range(3):
        position = (0.0, 0.3 + distance * math.sin(pitch), distance * math.cos(pitch))
        camera = Camera(position=position, look_at=aim, tan_half=1.0)
        for _ in range(2):
            right, up, _ = camera.axes()
            x0, x1, y0, y1 = _seen_extent(camera, points)
            aim = _moved(_moved(aim, right, (x0 + x1) / 2 * distance), up, (y0 + y1) / 2 * distance)
            camera = replace(camera, look_at=aim)
        tan_half = margin * max(x1 - x0, y1 - y0) / 2
        if tan_half <= 0.62:
            break
        distance = min(distance * tan_half / 0.56, 5.8)
    look_at = _moved(position, camera.axes()[2], distance)
    return replace(camera, look_at=look_at, tan_half=min(max(tan_half, 0.19), 0.66))


def _light(draws: Draws, distance: float) -> Light:
    kind = draws.pick(LIGHTS)
    look = LIGHT_LOOKS[kind]
    rise = math.radians(draws.uniform(*look["rise"]))
    left = draws.chance(0.5)
    around = math.radians(draws.uniform(35, 100)) * (-1 if left else 1)  # 0 is behind the camera
    far = draws.uniform(0.75, 0.95) * distance if kind == "lamp" else 100.0
    position = (far * math.cos(rise) * math.sin(around), far * math.sin(rise), far * math.cos(rise) * math.cos(around))
    return Light(
        kind=kind,
        position=position,
        radius=far * math.tan(math.radians(look["size"])),
        colour=look["key"],
        fades=kind == "lamp",
        sky=look["sky"],
        zenith=look["zenith"],
        horizon=look["horizon"],
        side="left" if left else "right",
    )


def _mixed(a: Vector, b: Vector, share: float) -> Vector:
    return (a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share)


def _turned(point: Vector, turn: float) -> tuple[float, float]:
    """Ground coordinates of a point in axes turned about the vertical."""
    return math.cos(turn) * point[0] - math.sin(turn) * point[2], math.sin(turn) * point[0] + math.cos(turn) * point[2]


def _surroundings(draws: Draws, camera: Camera, items: tuple[Item, ...]) -> Surroundings:
    room = draws.chance(0.62)
    floor = draws.pick(ROOM_FLOORS if room else GROUNDS)
    share = draws.uniform(0, 1)
    first, second = (_mixed(a, b, share) for a, b in FLOOR_LOOKS[floor])
    wall = draws.pick(WALLS, (0.5, 0.25, 0.25))
    paint = _mixed(draws.pick(WALL_LOOKS), (0.7, 0.7, 0.68), draws.uniform(0.0, 0.35))
    shade = (paint[0] * 0.8, paint[1] * 0.8, paint[2] * 0.8) if wall == "stripes" else (0.84, 0.83, 0.80)
    turn = math.radians(draws.uniform(-38, 38))
    back = draws.uniform(1.6, 5.5)
    side = draws.uniform(2.6, 4.4), draws.uniform(2.6, 4.4)
    height = max(draws.uniform(2.8, 3.6), camera.position[1] + 0.6, *(i.centre[1] + i.half[1] + 0.3 for i in items))
    camera_x, camera_z = _turned(camera.position, turn)
    stand = [(*_turned(item.centre, turn), _footprint(item.half) + 0.12) for item in items]
    extent = (
        min(-side[0], camera_x - 0.6, *(x - reach for x, _, reach in stand)),
        max(side[1], camera_x + 0.6, *(x + reach for x, _, reach in stand)),
        min(-back, *(z - reach for _, z, reach in stand)),
        max(camera_z + 1.5, *(z + reach for _, z, reach in stand)),
    )
    if not room:
        extent, height = (-1e6, 1e6, -1e6, 1e6), 1e6
    return Surroundings(
        kind="room" if room else "open",
        turn=turn,
        extent=extent,
        height=height,
        floor=floor,
        floor_colours=(first, second),
        floor_scale=FLOOR_SCALE[floor] * draws.uniform(0.85, 1.25),
        floor_turn=turn + (0.0 if draws.chance(0.7) else math.pi / 4),
        wall=wall,
        wall_colours=(paint, shade),
        wall_scale=draws.uniform(0.3, 0.5),
    )


def sample_scene(seed: int, index: int) -> Scene:
    """The scene with this seed and index."""
    draws = Draws(seed, index)
    scale = draws.uniform(0.78, 1.14)
    distance = scale * draws.uniform(2.6, 5.2)
    items = _items(draws, scale, distance)
    camera = _framed(draws, items, distance)
    light = _light(draws, distance)
    return Scene(
        seed=seed,
        index=index,
        items=items,
        camera=camera,
        light=light,
        surroundings=_surroundings(draws, camera, items),
    )
