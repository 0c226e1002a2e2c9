"""The check agrees with what training refuses of a cache."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_folder import NAMES, write_cache, write_pictures, write_prompts

from dataset.cache import CachedPair, read_meta, read_pair, stamp_of, write_pair
from dataset.check import CheckArgs, check_folder
from dataset.check_report import Report
from dataset.layout import Layout
from dataset.shards import write_shard
from dataset.training_data import open_training_data
from library.args import parse
from library.data_order import DataOrder, MicroBatches
from library.errors import UserError
from library.files import write_json
from library.loading import load_batches
from library.training_args import TrainingArgs

BROKEN = NAMES[3]


def check(folder: Path, *flags: str) -> Report:
    return check_folder(parse(["--image_folder", str(folder), "--is_latent_training", *flags], CheckArgs))


def found(report: Report) -> dict[str, int]:
    figures = report.figures()["findings"]
    return {kind: count for kind, count in figures.items() if count}


def train(folder: Path, *flags: str) -> None:
    """Open the data as train.py does and read one epoch; what would spoil a step is an error here."""
    words = ["--image_folder", str(folder), "--is_latent_training", "--prompt_folder", str(folder), *flags]
    args = parse([*words, "--max_train_steps", "1"], TrainingArgs)
    pairs = open_training_data(args, device=torch.device("cpu"), dtype=torch.float32).pairs
    order = DataOrder(count=len(pairs.names), batch_size=2, buckets=pairs.buckets)
    epoch = MicroBatches(order=order, start=0, stop=order.steps_for(1))
    for batch in load_batches(pairs, epoch, workers=0, pin=False, max_bad_samples=args.max_bad_samples):
        tensors = [torch.stack([batch.rgb_BChw, batch.depth_BChw]), batch.text.tokens_BLD, batch.text.pooled_BD]
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise UserError("the loss isn't finite")  # as library.training says of such a step


def pair_of(layout: Layout) -> CachedPair:
    return read_pair(layout.cached(BROKEN), stamp=stamp(layout))


def stamp(layout: Layout) -> str:
    meta = read_meta(layout.cache_meta, flag="--image_folder")
    assert meta is not None
    return stamp_of(meta)


def put(layout: Layout, pair: CachedPair, *, other_stamp: str | None = None) -> None:
    write_pair(layout.cached(BROKEN), pair, dtype=torch.float32, stamp=other_stamp or stamp(layout))


def cut(layout: Layout) -> None:
    whole = layout.cached(BROKEN).read_bytes()
    layout.cached(BROKEN).write_bytes(whole[: len(whole) // 2])


def strange(layout: Layout) -> None:
    put(layout, pair_of(layout), other_stamp="another")


def nan_latent(layout: Layout) -> None:
    pair = pair_of(layout)
    put(layout, replace(pair, depth_Chw=pair.depth_Chw * torch.nan))


def nan_text(layout: Layout) -> None:
    pair = pair_of(layout)
    put(layout, replace(pair, text=replace(pair.text, tokens_BLD=pair.text.tokens_BLD / 0)))


def unlike_latents(layout: Layout) -> None:
    pair = pair_of(layout)
    put(layout, replace(pair, depth_Chw=pair.depth_Chw[:, :2]))


def unlike_text(layout: Layout) -> None:
    pair = pair_of(layout)
    put(layout, replace(pair, text=replace(pair.text, tokens_BLD=pair.text.tokens_BLD[:, :3])))


def larger(layout: Layout) -> None:
    put(layout, replace(pair_of(layout), rgb_Chw=torch.randn(16, 6, 6), depth_Chw=torch.randn(16, 6, 6)))


def unknown_models(layout: Layout) -> None:
    retell(layout, {"ae": "unknown", "t5xxl": "unknown"})


def retell(layout: Layout, changes: dict[str, object]) -> None:
    """Change what is said to have made the cache, and the stamps with it."""
    meta = read_meta(layout.cache_meta, flag="--image_folder")
    assert meta is not None
    pairs = {name: read_pair(layout.cached(name), stamp=stamp_of(meta)) for name in NAMES}
    write_json(layout.cache_meta, meta | changes)
    for name, pair in pairs.items():
        write_pair(layout.cached(name), pair, dtype=torch.float32, stamp=stamp(layout))


def no_meta(layout: Layout) -> None:
    layout.cache_meta.unlink()


def later_format(layout: Layout) -> None:
    write_json(layout.cache_meta, {"format": 1000})


def nothing(layout: Layout) -> None:
    pass


CACHES = [
    (nothing, [], {}, True),
    (nothing, ["--depth_transform", "inverse"], {}, False),
    (nothing, ["--is_attnmask_training"], {}, False),
    (nothing, ["--clip_activation", "quick_gelu"], {}, False),
    (nothing, ["--t5xxl_max_token_length", "7"], {}, False),
    (nothing, ["--t5xxl_max_token_length", "5"], {}, True),
    (nothing, ["--ae", "assets/tiny/ae.safetensors"], {}, False),
    (cut, [], {"cached": 1}, False),
    (cut, ["--max_bad_samples", "1"], {"cached": 1}, True),
    (strange, ["--max_bad_samples", "8"], {"cached_strange": 1}, False),
    (nan_latent, ["--max_bad_samples", "8"], {"cached_nan": 1}, False),
    (nan_text, ["--max_bad_samples", "8"], {"cached_nan": 1}, False),
    (unlike_latents, ["--max_bad_samples", "8"], {"cached_shapes": 1}, False),
    (unlike_text, ["--max_bad_samples", "8"], {}, False),
    (larger, [], {}, True),
    (unknown_models, [], {}, False),
    (unknown_models, ["--trust_cache"], {}, True),
    (no_meta, [], {}, False),
    (later_format, [], {}, False),
]


@pytest.mark.parametrize(
    ("damage", "flags", "expected", "runs"), CACHES, ids=["-".join([row[0].__name__, *row[1]]) for row in CACHES]
)
def test_it_agrees_with_training_on_the_cache(tmp_path, damage, flags, expected, runs):
    layout = write_cache(tmp_path)
    damage(layout)
    if damage is unknown_models:
        write_prompts(tmp_path, t5xxl="unknown")
    else:
        write_prompts(tmp_path)
    report = check(tmp_path, *flags)
    assert found(report) == expected
    assert report.would_run == runs, report.verdicts
    if runs:
        train(tmp_path, *flags)
    else:
        with pytest.raises((UserError, RuntimeError)) as error:
            train(tmp_path, *flags)
        if isinstance(error.value, UserError) and damage not in (nan_latent, nan_text, unlike_latents):
            assert " ".join(str(error.value).split()) in report.verdicts[0].reasons


def test_pictures_and_cache_side_by_side(tmp_path):
    layout = write_pictures(tmp_path, names=NAMES[:6])
    write_cache(tmp_path, names=NAMES[2:])
    report = check_folder(parse(["--image_folder", str(tmp_path)], CheckArgs))
    assert [bool(verdict.reasons) for verdict in report.verdicts] == [False, False]
    assert found(report) == {"uncached": 2, "lone_cached": 2}
    assert report.tally.examples["uncached"] == [(NAMES[0], ""), (NAMES[1], "")]
    lines = "\n".join(report.lines())
    assert "cache                   6  missing for 2" in lines and "4 x 4 (6)" in lines.replace("16 x ", "")
    layout.prompt(NAMES[0]).unlink()  # one of the two ways would fail, and each can be asked for alone
    assert not check_folder(parse(["--image_folder", str(tmp_path)], CheckArgs)).would_run
    assert check(tmp_path).would_run
    assert not check_folder(parse(["--image_folder", str(tmp_path), "--no_is_latent_training"], CheckArgs)).would_run


def test_a_cache_alone_is_judged_as_a_cache(tmp_path):
    write_cache(tmp_path)
    report = check_folder(parse(["--image_folder", str(tmp_path)], CheckArgs))
    assert report.would_run and len(report.verdicts) == 1 and report.figures()["counts"]["cached"] == 8


def test_a_cache_without_text(tmp_path):
    layout = write_cache(tmp_path)
    retell(layout, {"text": False})
    for name in NAMES:
        pair = replace(read_pair(layout.cached(name), stamp=stamp(layout)), text=None, captions=("a red ball",))
        write_pair(layout.cached(name), pair, dtype=torch.float32, stamp=stamp(layout))
    report = check(tmp_path)
    assert report.would_run and found(report) == {}
    assert any(line.endswith("8 (without text)") for line in report.lines())


def test_shards_are_read_and_a_foreign_one_is_refused(tmp_path):
    layout = write_cache(tmp_path)
    samples = {name: (layout.cached(name).read_bytes(), 4, 4) for name in NAMES}
    for name in NAMES:
        layout.cached(name).unlink()
    write_shard(layout, 0, samples, stamp=stamp(layout))
    report = check(tmp_path)
    assert report.would_run and report.figures()["counts"]["cached"] == len(NAMES)
    write_shard(layout, 0, samples, stamp="another")
    report = check(tmp_path)
    assert "its shard was made by other models or settings" in report.verdicts[0].reasons[0]
    with pytest.raises(UserError, match="its shard was made by other models"):
        train(tmp_path)
