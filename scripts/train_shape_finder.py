"""Train the networks behind `shape_words`: python scripts/train_shape_finder.py --output FILE.

They see true scenes of a seed of their own, with the objects' places, colours and solids; under three minutes on one
core. One thread, the same machine and the same versions give the same bytes.

Shapes: N scenes, B batch, O objects, P palette colours, C channels, h w pixels or cells.
"""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from dataset.evaluation_scenes import SHAPE_FINDER
from dataset.synthetic import GENERATOR_VERSION, SceneBatch, render_batch
from dataset.synthetic.geometry import KINDS
from dataset.synthetic.palette import COLOURS
from library.args import Flags, flag, parse
from library.cli import run_main, say, set_threads
from library.evaluation.shapes import (
    CELL,
    SIDE,
    VIEW,
    ColorCells,
    FinderSettings,
    ShapeFinder,
    SolidNet,
    save_finder,
    views,
)
from library.randomness import generator_for

SEED = 11  # of the scenes; neither the training's (0), the validation's (7) nor the evaluation's
MIN_PIXELS = 40  # visible, of the objects shown to the network of solids
AROUND = 1.5  # how much wider the stored views are than those the network gets, to move them
MIN_CELLS = 3  # on 256 other scenes of the seed: finds 0.93 of the named solids, and 0.90 of what it finds is there
RENDERED_AT_ONCE = 32
WEIGHT_DECAY = 1e-2
LEARNING_RATE = 4e-3


@dataclass(frozen=True, kw_only=True)
class FinderTrainingArgs(Flags):
    """Training of the shape finder."""

    output: Path = flag(SHAPE_FINDER, help="file to write", metavar="FILE")
    scenes: int = flag(2000, help="scenes to train on", minimum=64)
    color_epochs: int = flag(3, help="how often the network of colours sees each scene", minimum=1)
    solid_epochs: int = flag(9, help="how often the network of solids sees each object", minimum=1)
    num_threads: int = flag(1, help="CPU threads; 0 takes the cores this process may use", minimum=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Rendered scenes and the objects in them.

    Attributes:
        rgb_N3hw: pictures in 0 .. 255.
        cover_NChw: for each cell the share of background, then of each colour, in 0 .. 255.
        view_O4hw: a wide view of each object (`views`) in 0 .. 255.
        solid_O: its solid.
    """

    rgb_N3hw: Tensor
    cover_NChw: Tensor
    view_O4hw: Tensor
    solid_O: Tensor


def main() -> None:
    """Render, train, write."""
    args = parse(sys.argv[1:], FinderTrainingArgs, description=__doc__)
    set_threads(args.num_threads)
    started = time.perf_counter()
    examples = render_examples(SEED, args.scenes)
    say(f"{args.scenes} scenes and {len(examples.solid_O)} objects after {time.perf_counter() - started:.0f} s")
    cells, solids = ColorCells(colors=len(COLOURS)), SolidNet(solids=len(KINDS))
    for name, epochs in (
        ("colours", train_colors(cells, examples, epochs=args.color_epochs)),
        ("solids", train_solids(solids, examples, epochs=args.solid_epochs)),
    ):
        for loss in epochs:
            say(f"{name}: mean loss of an epoch {loss:.3f} after {time.perf_counter() - started:.0f} s")
    settings = FinderSettings(solids=KINDS, colors=COLOURS, generator_version=GENERATOR_VERSION, min_cells=MIN_CELLS)
    save_finder(args.output, ShapeFinder(cells=cells, solids=solids, settings=settings))
    say(f"{args.output}: {args.output.stat().st_size} bytes")


def render_examples(seed: int, count: int) -> Examples:
    """Render the first `count` scenes of a seed."""
    rgb, cover, view, solid = [], [], [], []
    for start in range(0, count, RENDERED_AT_ONCE):
        batch = render_batch(seed, range(start, min(start + RENDERED_AT_ONCE, count)), SIDE)
        rgb.append((batch.rgb_B3hw * 255).round().to(torch.uint8))
        for number in range(len(batch.records)):
            share_Ohw = object_shares(batch, number)
            objects = batch.records[number]["objects"]
            color_O = torch.tensor([COLOURS.index(item["colour"]) for item in objects])
            cover_Phw = torch.zeros(len(COLOURS), *share_Ohw.shape[1:]).index_add_(0, color_O, share_Ohw)
            cover.append((torch.cat([1 - share_Ohw.sum(0, keepdim=True), cover_Phw]) * 255).round().to(torch.uint8))
            for item, share_hw in zip(objects, share_Ohw, strict=True):
                if item["visible_pixels"] >= MIN_PIXELS and (share_hw >= 0.5).any():
                    seen_4hw = views(batch.rgb_B3hw[number][None], share_hw[None] >= 0.5, around=AROUND)[0]
                    view.append((seen_4hw * 255).round().to(torch.uint8))
                    solid.append(KINDS.index(item["shape"]))
    return Examples(
        rgb_N3hw=torch.cat(rgb),
        cover_NChw=torch.stack(cover),
        view_O4hw=torch.stack(view),
        solid_O=torch.tensor(solid),
    )


def object_shares(batch: SceneBatch, number: int) -> Tensor:
    """Return the share of each cell that each object of one scene covers, (O, h/4, w/4)."""
    place_O11 = torch.arange(len(batch.records[number]["objects"]))[:, None, None]
    return F.avg_pool2d((batch.ids_Bhw[number] == place_O11).float(), CELL)


def train_colors(net: ColorCells, examples: Examples, *, epochs: int) -> Iterator[float]:
    """Train the network of colours on whole pictures, yielding the mean loss of each epoch."""

    def loss(index_B: Tensor, generator: Generator) -> Tensor:
        rgb_B3hw, cover_BChw = examples.rgb_N3hw[index_B] / 255, examples.cover_NChw[index_B] / 255
        if torch.rand(1, generator=generator) < 0.5:
            rgb_B3hw, cover_BChw = rgb_B3hw.flip(-1), cover_BChw.flip(-1)
        return -(net(worn(rgb_B3hw, generator)).log_softmax(1) * cover_BChw).sum(1).mean()

    return train(net, loss, name="colors", count=len(examples.rgb_N3hw), batch=16, epochs=epochs)


def train_solids(net: SolidNet, examples: Examples, *, epochs: int) -> Iterator[float]:
    """Train the network of solids on views of single objects, yielding the mean loss of each epoch."""

    def loss(index_B: Tensor, generator: Generator) -> Tensor:
        seen_B4hw = moved(examples.view_O4hw[index_B] / 255, generator)
        shuffled_B3hw = seen_B4hw[:, torch.randperm(3, generator=generator)]  # other colours, the same solid
        view_B4hw = torch.cat([worn(shuffled_B3hw, generator), (seen_B4hw[:, 3:] > 0.5).float()], 1)
        return F.cross_entropy(net(view_B4hw), examples.solid_O[index_B], label_smoothing=0.02)

    return train(net, loss, name="solids", count=len(examples.solid_O), batch=32, epochs=epochs)


def moved(view_B4hw: Tensor, generator: Generator) -> Tensor:
    """Return a part of each view as large as the network's own, moved, scaled and half of them mirrored."""
    count = len(view_B4hw)
    x_B, y_B, scale_B, mirror_B = (torch.rand(4, count, generator=generator) - 0.5).unbind()
    scale_B = (1 + 0.4 * scale_B) / AROUND
    zero_B = torch.zeros(count)
    across_B23 = torch.stack([scale_B * mirror_B.sign(), zero_B, 0.3 * scale_B * x_B], 1)
    down_B23 = torch.stack([zero_B, scale_B, 0.3 * scale_B * y_B], 1)
    grid = F.affine_grid(torch.stack([across_B23, down_B23], 1), [count, 1, VIEW, VIEW], align_corners=False)
    return F.grid_sample(view_B4hw, grid, padding_mode="border", align_corners=False)


def train(
    net: nn.Module, loss_of: Callable[[Tensor, Generator], Tensor], *, name: str, count: int, batch: int, epochs: int
) -> Iterator[float]:
    """Train and yield the mean loss of each epoch; the last batch of an epoch that isn't full is left out."""
    start_afresh(net, generator_for("shape finder", name))
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=epochs * (count // batch), pct_start=0.2
    )
    net.train()
    for epoch in range(epochs):
        generator = generator_for("shape finder", name, epoch)
        losses = []
        for index_B in torch.randperm(count, generator=generator)[: count // batch * batch].split(batch):
            loss = loss_of(index_B, generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        yield sum(losses) / len(losses)


@torch.no_grad()
def start_afresh(net: nn.Module, generator: Generator) -> None:
    """Give a network a start that comes from the generator alone (He et al., 2015)."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * (2 / weight[0].numel()) ** 0.5)
            if module.bias is not None:
                module.bias.zero_()


def worn(rgb_B3hw: Tensor, generator: Generator) -> Tensor:
    """Return pictures with a little noise and now and then blur, as a decoder leaves them."""
    blur, noise = torch.rand(2, generator=generator).tolist()
    if blur < 0.3:
        rgb_B3hw = F.avg_pool2d(F.pad(rgb_B3hw, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return rgb_B3hw + 0.04 * noise * torch.randn(rgb_B3hw.shape, generator=generator)


if __name__ == "__main__":
    run_main(main)
