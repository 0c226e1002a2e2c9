"""Captions that are true of the picture, and the record of what is in it.

Only objects with enough visible pixels are named. "left of" and "right of" speak of the picture, "in front of" and
"behind" of depth along the camera's axis, "on" of true stacks.
"""

import math
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from dataset.synthetic.draws import Draws
from dataset.synthetic.scene import Camera, Scene

NAMED_MOST = 4
MAX_WORDS = 36
VISIBLE_PIXELS = 50
"""An object is named from this many visible pixels on, at 128 px; in proportion at other sizes."""
ASIDE = 0.13
"""Share of the picture's width by which an object is left or right of another."""
APART = 0.45
"""Metres of mean visible depth by which an object is in front of or behind another."""

_NOUNS = {"sphere": ("sphere", "ball"), "box": ("box", "block"), "cylinder": ("cylinder",), "cone": ("cone",)}
_FLOORS = {
    "planks": "a wooden floor",
    "checker": "a checkered floor",
    "tiles": "a tiled floor",
    "stripes": "a striped floor",
    "speckle": "a stone floor",
    "plain": "a plain floor",
}
_GROUNDS = {
    "grass": "on grass",
    "sand": "on sand",
    "paving": "on paving stones",
    "checker": "on a checkered ground",
    "stripes": "on a striped ground",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A visible object: place in the scene's list, words, mean column (share of the width), mean depth in metres."""

    place: int
    words: str
    column: float
    depth: float
    pixels: int


def _size_word(scene: Scene, place: int) -> str:
    """small or large, against the middle of the scene's objects; nothing when it is neither."""
    sizes = [(i.half[0] * i.half[1] * i.half[2]) ** (1 / 3) for i in scene.items]
    ratio = sizes[place] / median(sizes)
    return "small" if ratio < 0.78 else "large" if ratio > 1.25 else ""


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _relations(these: list[Seen], those: list[Seen]) -> list[str]:
    """What is true of each of these against each of those, of left, right, front and behind."""
    pairs = [(a, b) for a in these for b in those]
    facts = {
        "left of": all(a.column < b.column - ASIDE for a, b in pairs),
        "right of": all(a.column > b.column + ASIDE for a, b in pairs),
        "in front of": all(a.depth < b.depth - APART for a, b in pairs),
        "behind": all(a.depth > b.depth + APART for a, b in pairs),
    }
    return [words for words, true in facts.items() if true]


_AFTER = {
    "left of": "on the left",
    "right of": "on the right",
    "in front of": "in front of them",
    "behind": "behind them",
}


def _setting(scene: Scene) -> str:
    if scene.surroundings.kind == "room":
        return f"on {_FLOORS[scene.surroundings.floor]} in a room"
    return _GROUNDS[scene.surroundings.floor] + " outdoors"


def _light(scene: Scene, draws: Draws) -> str:
    room = scene.surroundings.kind == "room"
    if scene.light.kind == "sun":
        return draws.pick(("in bright sunlight", f"in sunlight from the {scene.light.side}"))
    if scene.light.kind == "overcast":
        return "in soft daylight" if room else draws.pick(("in soft daylight", "under a cloudy sky"))
    if scene.light.kind == "lamp":
        return "under warm lamp light" if room else "under warm lamp light at night"
    return draws.pick(("in low evening light", f"in evening light from the {scene.light.side}"))


def _group(scene: Scene, seen: list[Seen], draws: Draws) -> str:
    """All named objects and how they stand. A stack is one thing: "a on b"."""
    places = {s.place: s for s in seen}
    riders = {scene.items[s.place].stacked_on: s for s in seen if scene.items[s.place].stacked_on in places}
    things: list[tuple[str, list[Seen]]] = []
    for s in seen:
        if scene.items[s.place].stacked_on in places:
            continue
        rider = riders.get(s.place)
        things.append((f"{rider.words} on {s.words}", [rider, s]) if rider else (s.words, [s]))
    if len(things) > 1 and len(things[0][1]) > len(things[1][1]):
        things[:2] = things[1], things[0]  # "a left of b on c" is clear, "b on c left of a" is not
    text, before = things[0]
    taken: set[str] = set()
    for number, (words, members) in enumerate(things[1:]):
        said = [r for r in _relations(members, before) if r not in taken]
        if number == 0:
            said = _relations(before, members)
            text += f" {draws.pick(said)} {words}" if said else f" and {words}"
        else:
            relation = draws.pick(said) if said else ""
            taken.add(relation)
            text += (" with " if number == 1 else " and ") + words + (f" {_AFTER[relation]}" if relation else "")
        before = before + members
    return text


def _caption(scene: Scene, seen: list[Seen], draws: Draws) -> str:
    group = _group(scene, seen, draws)
    setting, light = _setting(scene), _light(scene, draws)
    return draws.pick(
        (
            f"{group}, {setting}, {light}",
            f"{group} {setting}, {light}",
            f"{light}, {group} {setting}",
            f"{setting}, {group}, {light}",
        ),
        (0.4, 0.3, 0.15, 0.15),
    )


def _see(scene: Scene, measured: dict[int, dict], smallest: float, *, sized: bool) -> list[Seen]:
    """The objects to be named, the largest in the picture first; ids are kept, so relations use what is visible."""
    draws = Draws(scene.seed, scene.index, stream=1)
    seen = []
    for place, item in enumerate(scene.items):
        noun = draws.pick(_NOUNS[item.shape])
        facts = measured.get(place)
        if facts and facts["visible_pixels"] >= smallest:
            words = " ".join(w for w in (_size_word(scene, place) if sized else "", item.colour, noun) if w)
            seen.append(
                Seen(
                    place=place,
                    words=_article(words),
                    column=facts["column"],
                    depth=facts["mean_depth"],
                    pixels=facts["visible_pixels"],
                )
            )
    return sorted(seen, key=lambda s: -s.pixels)[:NAMED_MOST]


def _measure(scene: Scene, ids_hw: Tensor, metric_hw: Tensor) -> dict[int, dict]:
    """Visible pixels, bounding box, mean column and mean depth of each object that shows at all."""
    facts = {}
    for place in range(len(scene.items)):
        rows, columns = (ids_hw == place).nonzero(as_tuple=True)
        if len(rows):
            facts[place] = {
                "visible_pixels": len(rows),
                "box": [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1],
                "column": float(columns.double().mean() + 0.5) / ids_hw.shape[1],
                "mean_depth": float(metric_hw[rows, columns].double().mean()),
            }
    return facts


def _camera_record(camera: Camera, size: int) -> dict:
    """Pose in metres and intrinsics in pixels of a picture of this size; pixel (0, 0) covers [0, 1) x [0, 1)."""
    right, up, forward = camera.axes()
    focal = size / (2 * camera.tan_half)
    return {
        "position": list(camera.position),
        "look_at": list(camera.look_at),
        "axes": {"right": list(right), "up": list(up), "forward": list(forward)},
        "fov_degrees": math.degrees(2 * math.atan(camera.tan_half)),
        "fx": focal,
        "fy": focal,
        "cx": size / 2,
        "cy": size / 2,
    }


def describe(scene: Scene, ids_hw: Tensor, metric_hw: Tensor, *, generator_version: int) -> dict:
    """The JSON-ready record of a rendered scene, its caption included.

    Lengths are metres, angles radians; boxes are left, top, right, bottom in pixels, right and bottom exclusive.
    """
    size = ids_hw.shape[-1]
    measured = _measure(scene, ids_hw, metric_hw)
    smallest = VISIBLE_PIXELS * (size / 128) ** 2
    seen = _see(scene, measured, smallest, sized=True)
    caption = _caption(scene, seen, Draws(scene.seed, scene.index, stream=2))
    if len(caption.split()) > MAX_WORDS:
        seen = _see(scene, measured, smallest, sized=False)
        caption = _caption(scene, seen, Draws(scene.seed, scene.index, stream=2))
    named = {s.place for s in seen}
    return {
        "generator_version": generator_version,
        "seed": scene.seed,
        "index": scene.index,
        "size": size,
        "caption": caption,
        "light": {"kind": scene.light.kind, "side": scene.light.side, "position": list(scene.light.position)},
        "setting": scene.surroundings.kind,
        "floor": scene.surroundings.floor,
        "camera": _camera_record(scene.camera, size),
        "objects": [
            {
                "shape": item.shape,
                "colour": item.colour,
                "size": [2 * h for h in item.half],
                "position": list(item.centre),
                "rotation": item.turn,
                "pattern": item.pattern,
                "stacked_on": item.stacked_on,
                "visible_pixels": measured.get(place, {}).get("visible_pixels", 0),
                "bounding_box": measured.get(place, {}).get("box"),
                "mean_column": measured.get(place, {}).get("column"),
                "mean_depth": measured.get(place, {}).get("mean_depth"),
                "named": place in named,
            }
            for place, item in enumerate(scene.items)
        ],
    }
