"""Train the embedded model's autoencoder on a prepared scene folder.

    python scripts/tiny/train_autoencoder.py --scenes FOLDER --output FOLDER --minutes 16

writes `ae.safetensors` (fp16) and `ae.json` (its `AutoencoderConfig`) into --output. Stopped, it goes on from the last
checkpoint when started again. Shapes: B batch, C channels, h w rows and columns.
"""

import copy
import json
import sys
from dataclasses import asdict, dataclass, replace
from math import cos, pi
from pathlib import Path

import torch
from pca_init import start_from_pca
from pictures import Pictures, load_pictures, sample_names
from reconstruction import Reconstruction, measure, measure_pca, save_sheet
from safetensors import safe_open
from torch import Generator, Tensor, nn
from training_stage import TrainingStage, load_optimizers, optimizer_tensors

from library.allocator import keep_freed_memory
from library.cli import run_main, say, set_threads
from library.errors import UserError
from library.files import save_tensors, write_json
from library.flags import Flags, flag, parse
from library.flux.autoencoder import Autoencoder
from library.flux.variants import VARIANTS
from library.muon import Muon
from library.randomness import generator_for

HELD_OUT = 64
CHARBONNIER = 1e-3
CLIP = 1.0
WARM_UP = 0.04
EMA = 0.999
STATE = Path("training", "autoencoder_state.safetensors")


@dataclass(frozen=True, kw_only=True)
class AutoencoderTrainingArgs(Flags):
    """Flags of the autoencoder's training."""

    scenes: Path = flag(help="prepared scene folder (dataset/make_scenes.py); its first 64 scenes are held out")
    output: Path = flag(help="folder for ae.safetensors and ae.json; the checkpoint lies in its training/")
    minutes: float | None = flag(None, help="train this long, or give --steps", minimum=0.01)
    steps: int | None = flag(None, help="train this many steps, the same each time", minimum=1)
    limit: int = flag(6000, help="scenes held in memory, 80 kB each", minimum=HELD_OUT + 1)
    crop: int = flag(64, help="side of the crops before whole pictures come, in pixels", minimum=16)
    crops_per_batch: int = flag(8, help="crops in a batch, half of them depth", minimum=2)
    pictures_per_batch: int = flag(4, help="whole pictures in a batch, half of them depth", minimum=2)
    whole_share: float = flag(0.25, help="share of the budget, at its end, on whole pictures", minimum=0, maximum=1)
    muon_lr: float = flag(0.005, help="learning rate of the inner convolutions (Muon)", minimum=0)
    adam_lr: float = flag(2e-3, help="learning rate of everything else (AdamW)", minimum=0)
    gradient_weight: float = flag(0.5, help="weight of the loss on differences of neighbouring pixels", minimum=0)
    kl_weight: float = flag(1e-5, help="weight of the KL divergence, a mean over the latents", minimum=0)
    variance_weight: float = flag(
        1e-3,
        help="weight of the squared logarithm of each latent channel's variance, which keeps all near 1",
        minimum=0,
    )
    noise: float = flag(
        0.15,
        help="most extra noise on half the latents, in their standard deviations, for a forgiving decoder",
        minimum=0,
    )
    save_minutes: float = flag(2.0, help="minutes between checkpoints", minimum=0)
    seed: int = flag(0, help="seed of the start and of all batches")
    num_threads: int = flag(0, help="CPU threads; 0 takes all this process may use", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.minutes is None) == (self.steps is None):
            raise UserError("--minutes: give either --minutes or --steps")


class Trainer(TrainingStage):
    """Model, average, optimizers and how far they are."""

    def __init__(self, args: AutoencoderTrainingArgs, pictures: Pictures) -> None:
        super().__init__(minutes=args.minutes, steps=args.steps)
        self.args, self.pictures = args, pictures
        torch.manual_seed(args.seed)  # the layers' own random start draws from the global generator
        self.model = Autoencoder(replace(VARIANTS["tiny"].autoencoder, scale_factor=1.0, shift_factor=0.0))
        start_from_pca(self.model, torch.cat([pictures[:32].rgb(), pictures[:32].depth()]))
        self.model.to(memory_format=torch.channels_last)  # a fifth faster in bf16 on a CPU
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        outer = ("conv_in.weight", "conv_out.weight")
        inner = {n for n, p in self.model.named_parameters() if p.ndim == 4 and not n.endswith(outer)}
        self.optimizers = {
            "muon": Muon([p for n, p in self.model.named_parameters() if n in inner], lr=args.muon_lr),
            "adam": torch.optim.AdamW(
                [p for n, p in self.model.named_parameters() if n not in inner], lr=args.adam_lr, weight_decay=0.0
            ),
        }

    def _update(self) -> Tensor:
        """Take one optimizer step, drawn from (seed, step) alone."""
        args, generator = self.args, generator_for(self.args.seed, "batch", self.step)
        whole = self.progress >= 1 - args.whole_share
        size = min(self.pictures.rgb_N3hw.shape[-2:])
        count, size = (args.pictures_per_batch, size) if whole else (args.crops_per_batch, args.crop)
        pixels = self.pictures.draw(count, size=size, generator=generator)
        rate = min(1.0, (self.progress + 1e-3) / WARM_UP) * 0.5 * (1 + cos(pi * self.progress))
        for optimizer, peak in zip(self.optimizers.values(), (args.muon_lr, args.adam_lr), strict=True):
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = rate * peak
        with torch.autocast("cpu", torch.bfloat16):
            loss = training_loss(self.model, pixels, args=args, generator=generator)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for optimizer in self.optimizers.values():
            optimizer.step()
        decay = min(EMA, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        return loss.detach()

    def save(self, path: Path) -> None:
        """Write everything needed to go on."""
        tensors = {f"model.{n}": t for n, t in self.model.state_dict().items()}
        tensors |= {f"average.{n}": t for n, t in self.average.state_dict().items()}
        tensors |= optimizer_tensors(self.optimizers)
        save_tensors(path, tensors, {"step": self.step, "seconds": self.seconds})

    def load(self, path: Path) -> None:
        """Go on from `save`'s file."""
        with safe_open(path, "pt") as file:
            position = json.loads(file.metadata()["jointdit"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.step, self.seconds = position["step"], position["seconds"]
        for kind, module in (("model", self.model), ("average", self.average)):
            module.load_state_dict({n: tensors[f"{kind}.{n}"] for n in module.state_dict()})
        load_optimizers(self.optimizers, tensors)


def training_loss(
    model: Autoencoder, pixels_B3hw: Tensor, *, args: AutoencoderTrainingArgs, generator: Generator
) -> Tensor:
    """Return Charbonnier + MSE + gradient L1 of the reconstruction, plus weak terms that keep the latents in shape.

    The latents are samples of the posterior; half of them bear extra noise besides, in proportion to the batch's own
    standard deviation, since what a flow model hands to the decoder is never quite right.
    """
    mean, log_variance = (x.float() for x in model.moments(pixels_B3hw))
    log_variance = log_variance.clamp(-20, 10)
    amount_B = torch.rand(len(mean), generator=generator) * (torch.rand(len(mean), generator=generator) < 0.5)
    extra = args.noise * mean.detach().std() * amount_B.view(-1, 1, 1, 1)
    deviation = (log_variance.exp() + extra**2).sqrt()
    decoded = model.decoder(mean + deviation * torch.randn(mean.shape, generator=generator)).float()
    error = decoded - pixels_B3hw
    pixel_loss = (error**2 + CHARBONNIER**2).sqrt().mean() + (error**2).mean()
    gradient_loss = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    spread = mean.var(dim=(0, 2, 3)).log().square().mean()
    reconstruction = pixel_loss + args.gradient_weight * gradient_loss
    return reconstruction + args.kl_weight * divergence + args.variance_weight * spread


@torch.no_grad()
def finish(model: Autoencoder, pictures: Pictures, output: Path) -> Autoencoder:
    """Measure scale and shift of the latents, write the released form, and return it as it will be read."""
    latents = torch.cat([model.moments(p)[0] for i in range(0, min(512, len(pictures)), 32)
                         for p in (pictures[i : i + 32].rgb(), pictures[i : i + 32].depth())])  # fmt: skip
    config = replace(model.config, scale_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    tensors = {name: tensor.half() for name, tensor in model.state_dict().items()}
    write_json(output / "ae.json", asdict(config))
    save_tensors(output / "ae.safetensors", tensors)
    released = Autoencoder(config).requires_grad_(False)
    released.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return released


def report(label: str, result: Reconstruction) -> None:
    """Print one line of measurements."""
    say(f"{label}: {result}")


def main() -> None:
    """Train, with progress lines, checkpoints and a last report."""
    args = parse(sys.argv[1:], AutoencoderTrainingArgs, description=__doc__)
    set_threads(args.num_threads)
    keep_freed_memory()
    names = sample_names(args.scenes, flag="--scenes")[: args.limit]
    if len(names) <= HELD_OUT:
        raise UserError(f"--scenes {args.scenes}: holds {len(names)} scenes; more than {HELD_OUT} are needed")
    pictures = load_pictures(args.scenes, names, flag="--scenes")
    training, held_out = pictures[HELD_OUT:], pictures[:HELD_OUT]
    say(f"{len(training)} scenes to train on, {HELD_OUT} held out")
    trainer = Trainer(args, training)
    report("linear PCA, 16 components", measure_pca(training[:256], held_out))
    if (args.output / STATE).exists():
        trainer.load(args.output / STATE)
    saved, shown, losses = trainer.seconds, -1.0, []
    for loss in trainer.run():
        losses.append(float(loss))
        if trainer.progress - shown >= 0.05:
            shown = trainer.progress
            mean_loss = sum(losses) / len(losses)
            label = f"{trainer.progress:4.0%} step {trainer.step} {trainer.seconds / 60:.1f} min loss {mean_loss:.4f}"
            report(label, measure(trainer.average, held_out[:16]))
            losses.clear()
        if trainer.seconds - saved >= 60 * args.save_minutes:
            saved = trainer.seconds
            trainer.save(args.output / STATE)
    trainer.save(args.output / STATE)
    released = finish(trainer.average, training, args.output)
    report("held-out scenes", measure(released, held_out))
    save_sheet(args.output / "training" / "reconstructions.png", released, held_out[:6])


if __name__ == "__main__":
    run_main(main)
