"""The scene generator: repeatable bits, exact depth, captions that are true, colours that can be told."""

import math
import re
import statistics

import pytest
import torch

import dataset.synthetic.render as render
from dataset.synthetic import GENERATOR_VERSION, HELD_OUT_SEED, render_batch
from dataset.synthetic.captions import APART, ASIDE, MAX_WORDS, VISIBLE_PIXELS
from dataset.synthetic.geometry import KINDS, MAX_DEPTH, Rays, Solids, blocked, cast
from dataset.synthetic.palette import COLOURS, PALETTE, nearest_colour

SIZE = 64
COUNT = 32
NOUNS = {"sphere": "sphere", "ball": "sphere", "box": "box", "block": "box", "cylinder": "cylinder", "cone": "cone"}
A_THING = rf"an? (?:(?:small|large) )?({'|'.join(COLOURS)}) ({'|'.join(NOUNS)})"
GOLDEN_CAPTION = (
    "a blue cylinder left of a yellow cone with a purple cone "
    "behind them on a striped floor in a room, in low evening light"
)
GOLDEN_COLOUR = [0.49206, 0.45963, 0.52971]
GOLDEN_DISPARITY = 0.36685


@pytest.fixture(scope="module")
def batch():
    return render_batch(HELD_OUT_SEED, range(COUNT), SIZE)


def directions(count: int) -> torch.Tensor:
    """Unit vectors all around, (count, 3), in float64."""
    v_N3 = torch.randn(count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return v_N3 / v_N3.norm(dim=1, keepdim=True)


def solid(kind: str, half: tuple[float, float, float], turn: float) -> Solids:
    columns = dict(zip(("cx", "cy", "cz"), (0.3, 0.5, -0.2), strict=True))
    columns |= dict(zip(("sx", "sy", "sz"), half, strict=True)) | {"cos": math.cos(turn), "sin": math.sin(turn)}
    first = torch.zeros(1, dtype=torch.long)
    tensors = {name: torch.tensor([[value]]) for name, value in columns.items()}
    return Solids(kind=kind, frame_M=first, slot_M=first, **tensors)


def level(kind: str, half: tuple[float, float, float], turn: float, point_N3: torch.Tensor) -> torch.Tensor:
    """An implicit function of each solid: at most 0 inside, 0 on its surface. Written anew, not the ray caster's."""
    x, y, z = (point_N3 - point_N3.new_tensor([0.3, 0.5, -0.2])).unbind(1)
    a, b, c = half
    flat = (x * x + z * z).sqrt()
    if kind == "sphere":
        return (flat * flat + y * y).sqrt() - a
    if kind == "cylinder":
        return torch.maximum(flat - a, y.abs() - b)
    if kind == "cone":
        return torch.maximum(flat - a * (b - y) / (2 * b), -b - y)
    u, v = math.cos(turn) * x - math.sin(turn) * z, math.sin(turn) * x + math.cos(turn) * z
    return torch.maximum(torch.maximum(u.abs() - a, y.abs() - b), v.abs() - c)


@pytest.mark.parametrize("kind", KINDS)
def test_rays_meet_the_surface_they_are_said_to_meet(kind):
    half = (0.4, 0.4, 0.4) if kind == "sphere" else (0.4, 0.6, 0.3 if kind == "box" else 0.4)
    turn = 0.7
    origin_N3 = 3 * directions(4000)
    middle = origin_N3.new_tensor([0.3, 0.5, -0.2])
    aim_N3 = middle + 0.9 * directions(4001)[1:] - origin_N3
    o, d = origin_N3.float(), aim_N3.float()
    parts = {f"o{axis}": o[None, :, i] for i, axis in enumerate("xyz")}
    parts |= {f"d{axis}": d[None, :, i] for i, axis in enumerate("xyz")}
    rays = Rays(**parts)
    group = [solid(kind, half, turn)]
    t_BN, slot_BN = cast(group, rays, slots=1)
    hit_N = slot_BN[0] == 0
    assert 0.05 < hit_N.float().mean() < 0.95
    on_N3 = origin_N3 + t_BN[0].double()[:, None] * aim_N3
    assert level(kind, half, turn, on_N3[hit_N]).abs().max() < 2e-4
    # Nothing of the solid lies before the hit, nor anywhere on a ray that misses.
    for share in torch.linspace(0.01, 0.99, 60).tolist():
        until_N = torch.where(hit_N, t_BN[0].double(), 2.0)
        assert level(kind, half, turn, origin_N3 + (share * until_N)[:, None] * aim_N3).min() > -2e-4
    clear_N = (t_BN[0] - 1).abs() > 1e-3
    assert torch.equal(blocked(group, rays)[0][clear_N], (t_BN[0] < 1)[clear_N])


def test_a_frame_depends_on_seed_and_index_alone(batch, monkeypatch):
    monkeypatch.setattr(render, "_CHUNK", 5)  # several frames in one tensor, as on a GPU
    indices = [11, 3, 0, 20, 7]
    again = render_batch(HELD_OUT_SEED, indices, SIZE)
    for name in ("rgb_B3hw", "metric_Bhw", "disparity_Bhw", "ids_Bhw"):
        assert torch.equal(getattr(again, name), getattr(batch, name)[indices]), name
    assert again.captions == [batch.captions[i] for i in indices]
    assert again.records == [batch.records[i] for i in indices]
    assert not torch.equal(render_batch(0, [3], SIZE).rgb_B3hw, again.rgb_B3hw[1:2])


def test_generator_has_not_moved():
    # Raise GENERATOR_VERSION when this has to change: trained weights belong to the old pictures.
    frame = render_batch(0, [0], SIZE)
    assert GENERATOR_VERSION == 1
    assert frame.captions == [GOLDEN_CAPTION]
    torch.testing.assert_close(frame.rgb_B3hw.mean((0, 2, 3)), torch.tensor(GOLDEN_COLOUR), atol=2e-4, rtol=0)
    torch.testing.assert_close(frame.disparity_Bhw.mean(), torch.tensor(GOLDEN_DISPARITY), atol=2e-4, rtol=0)


def test_maps_have_their_types_and_ranges(batch):
    assert batch.rgb_B3hw.shape == (COUNT, 3, SIZE, SIZE) and batch.rgb_B3hw.dtype == torch.float32
    assert 0 <= batch.rgb_B3hw.min() and batch.rgb_B3hw.max() <= 1
    sky = batch.metric_Bhw == torch.inf
    assert 0 < sky.float().mean() < 0.4
    assert torch.equal(sky, batch.disparity_Bhw == 0)
    assert 0.1 < batch.metric_Bhw[~sky].min() and batch.metric_Bhw[~sky].max() <= MAX_DEPTH
    assert torch.equal(batch.disparity_Bhw[~sky], 1 / batch.metric_Bhw[~sky])
    assert (batch.ids_Bhw[sky] == -1).all()


def unproject(record: dict, metric_hw: torch.Tensor) -> torch.Tensor:
    """World points of all pixels (h, w, 3) from a record's camera."""
    camera = record["camera"]
    rows, columns = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    right, up, forward, eye = (
        torch.tensor(v, dtype=torch.float64) for v in (*camera["axes"].values(), camera["position"])
    )
    x = (columns.double() - camera["cx"]) / camera["fx"]
    y = (camera["cy"] - rows.double()) / camera["fy"]
    direction = x[..., None] * right + y[..., None] * up + forward
    return eye + metric_hw.double()[..., None] * direction


def test_depth_and_camera_of_the_record_give_back_floor_and_spheres(batch):
    floors = spheres = 0
    for b, record in enumerate(batch.records):
        point_hw3 = unproject(record, batch.metric_Bhw[b])
        assert point_hw3[batch.metric_Bhw[b] < torch.inf][:, 1].min() > -1e-4  # nothing below the floor
        if record["setting"] == "open":
            ground = (batch.ids_Bhw[b] == -1) & (batch.metric_Bhw[b] < torch.inf)
            floors += 1
            assert point_hw3[ground][:, 1].abs().max() < 1e-4
        for place, item in enumerate(record["objects"]):
            mask = batch.ids_Bhw[b] == place
            if item["shape"] == "sphere" and mask.any():
                spheres += 1
                distance_N = (point_hw3[mask] - torch.tensor(item["position"], dtype=torch.float64)).norm(dim=1)
                assert (distance_N - item["size"][0] / 2).abs().max() < 1e-3
    assert floors > 3 and spheres > 10


def test_objects_do_not_meet_and_stand_on_something(batch):
    for record in batch.records:
        items = record["objects"]
        assert 2 <= len(items) <= 6
        assert len({item["colour"] for item in items}) == len(items)
        for item in items:
            bottom = item["position"][1] - item["size"][1] / 2
            below = None if item["stacked_on"] is None else items[item["stacked_on"]]
            assert bottom == pytest.approx(below["position"][1] + below["size"][1] / 2 if below else 0, abs=1e-6)
            assert min(item["size"]) >= 0.2 and max(item["size"]) <= 1.5
            assert below is None or below["shape"] in ("box", "cylinder")


def named_in(caption: str) -> list[tuple[str, str]]:
    return [(colour, NOUNS[noun]) for colour, noun in re.findall(A_THING, caption)]


def test_captions_name_exactly_the_named_objects(batch):
    smallest = VISIBLE_PIXELS * (SIZE / 128) ** 2
    for b, (caption, record) in enumerate(zip(batch.captions, batch.records, strict=True)):
        assert record["caption"] == caption == caption.lower() and len(caption.split()) <= MAX_WORDS
        named = [o for o in record["objects"] if o["named"]]
        assert sorted(named_in(caption)) == sorted((o["colour"], o["shape"]) for o in named)
        assert 1 <= len(named) <= 4
        for place, item in enumerate(record["objects"]):
            assert item["visible_pixels"] == int((batch.ids_Bhw[b] == place).sum())
            assert not item["named"] or item["visible_pixels"] >= smallest
        light = {"sun": "sunlight", "overcast": "daylight|cloudy", "lamp": "lamp", "evening": "evening"}
        assert re.search(light[record["light"]["kind"]], caption)
        assert ("in a room" in caption) == (record["setting"] == "room")


RELATIONS = ("left of", "right of", "in front of", "behind", "on")
TOGETHER = {
    "behind them": "behind",
    "in front of them": "in front of",
    "on the left": "left of",
    "on the right": "right of",
}


def holds(relation: str, a: dict, b: dict, place_b: int) -> bool:
    if relation == "on":
        return a["stacked_on"] == place_b
    return {
        "left of": a["mean_column"] < b["mean_column"] - ASIDE,
        "right of": a["mean_column"] > b["mean_column"] + ASIDE,
        "in front of": a["mean_depth"] < b["mean_depth"] - APART,
        "behind": a["mean_depth"] > b["mean_depth"] + APART,
    }[relation]


def test_relations_are_true():
    # The captions of many scenes: the pictures need not be large for that.
    small = render_batch(HELD_OUT_SEED, range(100, 180), 24)
    seen = dict.fromkeys(RELATIONS, 0)
    for caption, record in zip(small.captions, small.records, strict=True):
        items = record["objects"]
        places = {item["colour"]: k for k, item in enumerate(items)}
        for first, _, relation, second, _ in re.findall(rf"{A_THING} ({'|'.join(RELATIONS)}) (?={A_THING})", caption):
            a, b = places[first], places[second]
            assert holds(relation, items[a], items[b], b), caption
            seen[relation] += 1
        for end, relation in TOGETHER.items():
            for match in re.finditer(rf"{A_THING} {end}", caption):
                one = places[match.group(1)]
                before = [places[colour] for colour, _ in named_in(caption[: match.start()])]
                for other in before:
                    if items[other]["stacked_on"] != one:  # "a on b behind them": a belongs to b
                        assert holds(relation, items[one], items[other], other), caption
                seen[end] = seen.get(end, 0) + 1
    assert min(seen[relation] for relation in RELATIONS) >= 5, seen
    assert set(TOGETHER) <= set(seen)


def test_colours_can_be_told_from_the_picture():
    # At the size of the evaluation; 97 of 100 is what it must be over many scenes.
    large = render_batch(HELD_OUT_SEED, range(24), 128)
    right = [
        nearest_colour(large.rgb_B3hw[b], large.ids_Bhw[b] == place) == item["colour"]
        for b, record in enumerate(large.records)
        for place, item in enumerate(record["objects"])
        if item["visible_pixels"] >= VISIBLE_PIXELS
    ]
    assert len(right) > 60 and statistics.mean(right) >= 0.97


def test_each_palette_colour_is_nearest_to_itself_in_light_and_shade():
    for name, albedo in PALETTE.items():
        for light in (0.6, 0.8, 1.0):
            rgb_3hw = (torch.tensor(albedo) * light).clamp(0, 1).sqrt()[:, None, None].expand(3, 4, 4)
            assert nearest_colour(rgb_3hw, torch.ones(4, 4, dtype=torch.bool)) == name
    with pytest.raises(ValueError, match="at least one pixel"):
        nearest_colour(rgb_3hw, torch.zeros(4, 4, dtype=torch.bool))


def test_scenes_are_hard_enough_to_mean_something(batch):
    assert statistics.median(sum(o["visible_pixels"] >= 12 for o in r["objects"]) for r in batch.records) >= 3
    assert {o["colour"] for r in batch.records for o in r["objects"]} == set(COLOURS)
    errors = []
    for metric_hw in batch.metric_Bhw:
        depth_N = metric_hw[metric_hw < torch.inf].double()
        constant = 1 / (1 / depth_N).mean()  # the best constant disparity
        errors.append(float(((constant - depth_N).abs() / depth_N).mean()))
    assert statistics.mean(errors) >= 0.28


def test_render_batch_refuses_nonsense():
    for arguments in ((0, [], 64), (0, [-1], 64), (-1, [0], 64), (0, [0], 8)):
        with pytest.raises(ValueError, match="needs indices"):
            render_batch(*arguments)
