"""Train the embedded model's text-to-image backbone with its two text encoders: rectified flow on cached latents.

Beside the flow's loss stand those of linear heads which read off the middle blocks how deep the picture is and which
solids are where (`--depth_weight`, `--object_weight`).

    python scripts/tiny/train_backbone.py --scenes FOLDER --output GUIDED --init FOLDER --teacher FOLDER --minutes 20

then distils guidance, as FLUX.1-dev's was: half of each batch learns to answer at once what the teacher does with and
without the caption, extrapolated by a guidance scale that the model is told.

    python scripts/tiny/train_backbone.py --scenes FOLDER --output FOLDER --minutes 60

writes `flux1-tiny.safetensors`, `clip_l.safetensors` and `t5xxl_fp16.safetensors` (with JSON) into --output when the
time is used up, and all along keeps in `--output/training`: the state to go on from, a snapshot of the three files,
pictures of the same prompts, and a log. Stopped, it goes on when started again, with another --minutes too.
This stage makes the frozen base; JointDiT itself is trained by train.py.
"""

import copy
import json
import sys
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path

import torch
from flow_losses import draw_levels, guided_velocity, losses, velocity_task
from master_weights import MasterWeights
from safetensors import safe_open
from text_data import Samples, load_samples
from text_to_image import TextToImage, is_hidden_matrix, load_model, new_model, save_model
from torch import Tensor
from train_tokenizers import CLIP_FOLDER, T5_FOLDER
from training_stage import TrainingStage

from library.allocator import keep_freed_memory
from library.cli import run_main, say, set_threads
from library.errors import UserError
from library.files import save_tensors, write_json
from library.flags import Flags, flag, parse
from library.flux.latents import unpack
from library.flux.schedule import timestep_schedule
from library.flux.text import load_clip_tokenizer, load_t5_tokenizer
from library.flux.weights import load_autoencoder
from library.images import write_rgb
from library.modality import MODALITIES
from library.pipeline import GUIDANCE_SCALE
from library.randomness import generator_for

HELD_OUT = 256
SHEET_ROWS, SHEET_COLUMNS = 3, 8
STEPS = 20
VALIDATION_LEVELS = (0.02, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.98)


@dataclass(frozen=True, kw_only=True)
class BackboneArgs(Flags):
    """Flags of the backbone's training."""

    scenes: Path = flag(help="prepared scene folder (dataset/make_scenes.py); its last 256 scenes are held out")
    output: Path = flag(help="folder for the three files; it holds tokenizer/ and tokenizer_2/ already")
    minutes: float = flag(60.0, help="training time", minimum=0)
    latents: Path | None = flag(
        None, help="latents of the scenes (scripts/tiny/cache_latents.py); made with the autoencoder if absent"
    )
    ae: Path | None = flag(None, help="autoencoder, for latents and pictures (default: ae.safetensors in --output)")
    init: Path | None = flag(None, help="folder with the three files of an earlier training to go on from")
    limit: int | None = flag(None, help="use this many scenes", minimum=HELD_OUT + 1)
    batch_size: int = flag(64, help="pictures in a step", minimum=1)
    muon_lr: float = flag(
        0.02, help="learning rate of the hidden matrices (Muon); 0 gives them to AdamW too", minimum=0
    )
    adam_lr: float = flag(1e-3, help="learning rate of everything else (AdamW)", minimum=0)
    weight_decay: float = flag(0.0, help="decoupled decay of the hidden matrices", minimum=0)
    clip: float = flag(1.0, help="largest norm of the gradient", minimum=1e-6)
    ema: float = flag(0.999, help="decay of the running average that is kept", minimum=0, below=1)
    shift: float = flag(1.8, help="shift of most noise levels; 1 is none, more is noisier", minimum=1e-6)
    clean_share: float = flag(0.2, help="share of nearly clean pictures", minimum=0, maximum=0.85)
    text_dropout: float = flag(0.1, help="share of captions replaced by the empty prompt", minimum=0, maximum=1)
    depth_weight: float = flag(1.0, help="weight of the middle blocks' depth; 0 trains on colours alone", minimum=0)
    object_weight: float = flag(0.3, help="weight of the middle blocks' objects", minimum=0)
    teacher: Path | None = flag(
        None, help="folder with the three files of a finished training whose guided velocities half of a batch learns"
    )
    max_guidance: float = flag(6.0, help="largest guidance scale that is learnt from the teacher", minimum=1)
    save_minutes: float = flag(4.0, help="minutes between checkpoints", minimum=0)
    sheet_minutes: float = flag(8.0, help="minutes between sheets of pictures", minimum=0)
    seed: int = flag(0, help="seed of the start and of all batches")
    num_threads: int = flag(0, help="CPU threads; 0 takes all this process may use", minimum=0)


class Trainer(TrainingStage):
    """Model, weights to train, and how far they are."""

    def __init__(
        self, args: BackboneArgs, model: TextToImage, samples: Samples, *, teacher: TextToImage | None = None
    ) -> None:
        super().__init__(minutes=args.minutes)
        self.args, self.model, self.samples = args, model, samples
        self.teacher = None if teacher is None else teacher.to(torch.bfloat16)
        self.average = copy.deepcopy(model).to(torch.bfloat16).requires_grad_(False)
        self.weights = MasterWeights(
            model,
            for_muon=is_hidden_matrix,
            muon_lr=args.muon_lr,
            adam_lr=args.adam_lr,
            weight_decay=args.weight_decay,
        )

    def rate(self) -> float:
        """Learning rate relative to its peak: warm-up over 200 steps, then half a cosine down to 2 %."""
        return min(1.0, (self.step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + cos(pi * self.progress)))

    def _update(self) -> Tensor:
        """Take one optimizer step, drawn from (seed, step) alone."""
        args, generator = self.args, generator_for(self.args.seed, "backbone", self.step)
        batch = self.samples.draw(args.batch_size, text_dropout=args.text_dropout, generator=generator)
        t_B = draw_levels(args.batch_size, shift=args.shift, clean_share=args.clean_share, generator=generator)
        noise_BLD = torch.randn(batch.x_BLD.shape, generator=generator)
        task = velocity_task(batch, noise_BLD, t_B=t_B, text=self.model.encode(batch.clip_ids_BL, batch.t5_ids_BL))
        guided = 0
        if self.teacher is not None:
            guided = args.batch_size // 2
            task.guidance_B[:guided] += (args.max_guidance - 1) * torch.rand(guided, generator=generator)
            task.velocity_BLD[:guided] = guided_velocity(self.teacher, task, batch, self.samples, count=guided)
        each = losses(self.model, task, batch)
        loss = each["flow"][guided:].mean()
        objects = each["solid"].mean() + each["color"].mean()
        (each["flow"].mean() + args.depth_weight * each["depth"].mean() + args.object_weight * objects).backward()
        decay = min(args.ema, (1 + self.step) / (10 + self.step))
        self.weights.step(rate=self.rate(), clip=args.clip, decay=decay)
        return loss.detach()

    def refresh_average(self) -> TextToImage:
        """Return the module of the running average, up to date."""
        with torch.no_grad():
            for name, weight in self.average.named_parameters():
                weight.copy_(self.weights.average[name])
        return self.average

    def save(self, path: Path) -> None:
        """Write everything needed to go on."""
        position = {"step": self.step, "seconds": self.seconds}
        save_tensors(path, self.weights.tensors(), position)

    def load(self, path: Path) -> None:
        """Go on from `save`'s file."""
        with safe_open(path, "pt") as file:
            position = json.loads(file.metadata()["jointdit"])
            self.weights.load({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        self.step, self.seconds = position["step"], position["seconds"]


@torch.no_grad()
def validate(model: TextToImage, samples: Samples) -> dict[str, float]:
    """Losses on held-out scenes with noise and levels that never change, the flow's for each level too."""
    noise_BLD = torch.randn(samples.x_NLD.shape, generator=generator_for("validation"))
    t_B = torch.tensor(VALIDATION_LEVELS).repeat(len(noise_BLD) // len(VALIDATION_LEVELS) + 1)[: len(noise_BLD)]
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(t_B), 64):
        part = slice(start, start + 64)
        batch = samples[part].all()
        text = model.encode(batch.clip_ids_BL, batch.t5_ids_BL)
        task = velocity_task(batch, noise_BLD[part], t_B=t_B[part], text=text)
        parts.append(losses(model, task, batch))
    each = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    figures = {name: float(each_B.mean()) for name, each_B in each.items()}
    return figures | {f"t{t:g}": float(each["flow"][t_B == t].mean()) for t in VALIDATION_LEVELS}


@torch.no_grad()
def save_sheet(path: Path, model: TextToImage, samples: Samples, *, ae: Path) -> None:
    """Write pictures of the first held-out captions: Euler steps on the usual schedule, noise that never changes."""
    autoencoder = load_autoencoder(ae)
    batch = samples.all()
    count = SHEET_ROWS * SHEET_COLUMNS
    x_BLD = torch.randn(batch.x_BLD[:count].shape, generator=generator_for("sheet"))
    text = model.encode(batch.clip_ids_BL[:count], batch.t5_ids_BL[:count])
    levels = timestep_schedule(STEPS, x_BLD.shape[1])
    for t, t_next in zip(levels[:-1], levels[1:], strict=True):
        answer = model(x_BLD, t_B=torch.full((count,), t), guidance_B=torch.full((count,), GUIDANCE_SCALE), text=text)
        x_BLD = x_BLD + (t_next - t) * answer.velocity_BLD.float()
    side = round(x_BLD.shape[1] ** 0.5)
    pixels = MODALITIES["rgb"].from_pixels(autoencoder.decode(unpack(x_BLD, height=side, width=side)))
    rows = [torch.cat(list(row), dim=-1) for row in pixels.unflatten(0, (SHEET_ROWS, -1))]
    write_rgb(path, torch.cat(rows, dim=-2))


class Report:
    """Progress lines, checkpoints and pictures of a running training."""

    def __init__(self, trainer: Trainer, held_out: Samples, *, ae: Path, t5_length: int) -> None:
        self.trainer, self.held_out, self.ae, self.t5_length = trainer, held_out, ae, t5_length
        self.folder = trainer.args.output / "training"
        self.saved = self.shown = trainer.seconds
        self.losses: list[Tensor] = []
        self.history = json.loads((self.folder / "log.json").read_text()) if (self.folder / "log.json").exists() else []

    @property
    def state(self) -> Path:
        """File to go on from."""
        return self.folder / "state.safetensors"

    def after_step(self, loss: Tensor) -> None:
        """Collect the loss; every few minutes write a checkpoint."""
        trainer, args = self.trainer, self.trainer.args
        self.losses.append(loss)
        if trainer.seconds - self.saved >= 60 * args.save_minutes:
            self.checkpoint(sheet=trainer.seconds - self.shown >= 60 * args.sheet_minutes)

    def checkpoint(self, *, sheet: bool) -> None:
        """Measure the running average; write state, snapshot, log and, where asked, a sheet of pictures."""
        trainer, average = self.trainer, self.trainer.refresh_average()
        figures = validate(average, self.held_out)
        speed = len(self.losses) * trainer.args.batch_size / max(trainer.seconds - self.saved, 1e-9)
        train_loss = float(torch.stack(self.losses).mean()) if self.losses else float("nan")
        minutes = trainer.seconds / 60
        levels = " ".join(f"{figures[f't{t:g}']:.3f}" for t in VALIDATION_LEVELS)
        say(
            f"{trainer.progress:4.0%} {minutes:.1f} min step {trainer.step} {speed:.1f} samples/s "
            f"loss {train_loss:.4f} held-out {figures['flow']:.4f} (by level {levels}) depth {figures['depth']:.4f} "
            f"solid {figures['solid']:.4f} colour {figures['color']:.4f}"
        )
        self.history.append({"minutes": minutes, "step": trainer.step, "train": train_loss, **figures})
        write_json(self.folder / "log.json", self.history)
        trainer.save(self.state)
        save_model(average, self.folder / "snapshot", t5_length=self.t5_length)
        if sheet and self.ae.exists():
            save_sheet(self.folder / f"pictures_{trainer.step:07d}.png", average, self.held_out, ae=self.ae)
            self.shown = trainer.seconds
        self.saved = trainer.seconds
        self.losses.clear()


def main() -> None:
    """Train, with progress lines, checkpoints and pictures."""
    args = parse(sys.argv[1:], BackboneArgs, description=__doc__)
    set_threads(args.num_threads)
    keep_freed_memory()
    ae = args.ae or args.output / "ae.safetensors"
    for name in (CLIP_FOLDER, T5_FOLDER):
        if not (args.output / name).is_dir():
            raise UserError(f"--output {args.output}: holds no {name}/; make it with scripts/tiny/train_tokenizers.py")
    clip_tokenizer = load_clip_tokenizer(args.output / CLIP_FOLDER, beside=args.output)
    t5_tokenizer = load_t5_tokenizer(args.output / T5_FOLDER, beside=args.output)
    samples = load_samples(
        args.scenes,
        latents=args.latents or args.output / "training" / "latents.safetensors",
        ae=ae,
        clip_tokenizer=clip_tokenizer,
        t5_tokenizer=t5_tokenizer,
        limit=args.limit,
    )
    if len(samples) <= HELD_OUT:
        raise UserError(
            f"--scenes {args.scenes}: {len(samples)} scenes are used; {HELD_OUT} are held out, so give more than that"
        )
    if args.init is not None:
        model = load_model(args.init)
    else:
        generator = generator_for(args.seed, "start")
        model = new_model(clip_tokenizer=clip_tokenizer, t5_tokenizer=t5_tokenizer, generator=generator)
    held_out = samples[-HELD_OUT:]
    teacher = None if args.teacher is None else load_model(args.teacher).requires_grad_(False)
    trainer = Trainer(args, model, samples[:-HELD_OUT], teacher=teacher)
    report = Report(trainer, held_out, ae=ae, t5_length=t5_tokenizer.model_max_length)
    say(f"{len(samples) - HELD_OUT} scenes to train on, {sum(w.numel() for w in model.parameters()):,} parameters")
    if report.state.exists():
        trainer.load(report.state)
        report.saved = report.shown = trainer.seconds
    for loss in trainer.run():
        report.after_step(loss)
    report.checkpoint(sheet=True)
    save_model(trainer.refresh_average(), args.output, t5_length=t5_tokenizer.model_max_length)


if __name__ == "__main__":
    run_main(main)
