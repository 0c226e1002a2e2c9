"""Pictures during training: the three tasks at fixed seeds, so that steps can be compared.

Shape suffixes: M modality (RGB, depth), B batch (1 here), C channels, h w rows and columns, L tokens, D width.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from library.batches import Batch, PromptFeatures, text_rows
from library.files import write_text
from library.flux.autoencoder import Autoencoder
from library.flux.latents import PATCH, image_ids, pack, unpack
from library.flux.schedule import timestep_schedule
from library.flux.text import TextFeatures
from library.images import colorize, write_rgb
from library.modality import MODALITIES
from library.randomness import generator_for
from library.sampling import Condition, sample
from library.tasks import TASKS

log = logging.getLogger(__name__)

MARGIN = 4  # pixels between the pictures of a sheet


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewSettings:
    """How previews are made; `latent_size` is (rows, columns) of jointly generated latents."""

    folder: Path
    latent_size: tuple[int, int]
    steps: int
    guidance: float
    shift_schedule: bool
    depth_transform: str
    seed: int


class Previewer:
    """Makes one sheet for each evaluation prompt, and one for each known pair, in `FOLDER/steps_N`."""

    def __init__(
        self,
        settings: PreviewSettings,
        *,
        autoencoder: Autoencoder,
        prompts: PromptFeatures,
        pairs: Sequence[Batch],
        rank: int = 0,
        processes: int = 1,
        writes: bool = True,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Keep what is previewed; `pairs` have one sample each; each process makes its share; it may leave writing.

        Previews can take minutes: once `asked_to_stop()` they end with the sheet at hand.
        """
        self.settings = settings
        self.autoencoder = autoencoder
        self.prompts = prompts
        self.pairs = pairs
        self.rank = rank
        self.processes = processes
        self.writes = writes
        self.asked_to_stop = asked_to_stop

    @torch.no_grad()
    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """Make all sheets with the model as it is after `step` steps."""
        folder = self.settings.folder / f"steps_{step}"
        numbers = range(self.rank, len(self.prompts.prompts) + len(self.pairs), self.processes)
        for number in numbers:
            if self.asked_to_stop():
                log.warning("Previews of step %d are left unfinished: asked to stop", step)
                break
            if number < len(self.prompts.prompts):
                name, sheet = f"prompt_{number + 1:05d}", self.prompt_sheet(model, number)
            else:
                pair = self.pairs[number - len(self.prompts.prompts)]
                name, sheet = f"pair_{pair.names[0]}", self.pair_sheet(model, pair)
            if self.writes:
                write_rgb(folder / f"{name}.png", sheet)
        if self.writes and self.rank == 0:
            write_text(folder / "prompts.txt", "".join(f"{prompt}\n" for prompt in self.prompts.prompts))
        return {}

    def prompt_sheet(self, model: nn.Module, number: int) -> Tensor:
        """Picture and depth generated jointly for one prompt, side by side: (3, h, w) in [0, 1]."""
        assert self.prompts.evaluation is not None
        device = self.prompts.evaluation.tokens_BLD.device
        text = text_rows(self.prompts.evaluation, slice(number, number + 1))
        rows, columns = self.settings.latent_size
        shape = (self.autoencoder.config.z_channels, rows, columns)
        noise_MBChw = self.noise(f"prompt {number}", shape).to(device)
        latents = self.generate(model, "joint_generation", noise_MBChw, text=text)
        return row([self.picture(name, latents[m]) for m, name in enumerate(MODALITIES)])

    def pair_sheet(self, model: nn.Module, pair: Batch) -> Tensor:
        """A known pair, then its depth estimated from its picture, and a picture made for its depth."""
        given = {"rgb": pair.rgb_BChw, "depth": pair.depth_BChw}
        shown = [self.picture(name, latent) for name, latent in given.items()]
        noise_MBChw = self.noise(f"pair {pair.names[0]}", pair.rgb_BChw.shape[1:]).to(pair.rgb_BChw)
        for task in TASKS.values():
            if task.given is not None:
                # Without a prompt where none is needed: that is how a picture's depth is asked for.
                text = pair.text if task.prompt_needed else self.prompts.empty
                latents = self.generate(model, task.name, noise_MBChw, text=text, given=given[task.given])
                shown += [self.picture(name, latents[m]) for m, name in enumerate(MODALITIES) if name != task.given]
        return row(shown)

    def generate(
        self,
        model: nn.Module,
        task: str,
        noise_MBChw: Tensor,
        *,
        text: TextFeatures,
        given: Tensor | None = None,
    ) -> Tensor:
        """Denoise one pair: latents (M, 1, C, h, w)."""
        rows, columns = (side // PATCH for side in noise_MBChw.shape[-2:])
        ids = image_ids(rows, columns, device=noise_MBChw.device)
        guidance_B = torch.full((1,), self.settings.guidance, device=noise_MBChw.device)

        def velocity(x_MBLD: Tensor, t_MB: Tensor) -> Tensor:
            return model(x_MBLD, t_MB=t_MB, text=text, image_ids=ids, guidance_B=guidance_B).float()

        name = TASKS[task].given
        condition = None
        if given is not None and name is not None:
            condition = Condition(modality=MODALITIES[name].index, x_BLD=pack(given))
        schedule = timestep_schedule(self.settings.steps, rows * columns, shift=self.settings.shift_schedule)
        x_MBLD = sample(velocity, pack(noise_MBChw), schedule=schedule, condition=condition)
        return unpack(x_MBLD, height=rows, width=columns)

    def noise(self, name: str, shape: Sequence[int]) -> Tensor:
        """Starting noise (M, 1, C, h, w), the same at every preview."""
        generator = generator_for(self.settings.seed, "preview", name)
        return torch.randn(len(MODALITIES), 1, *shape, generator=generator)

    def picture(self, name: str, latent_BChw: Tensor) -> Tensor:
        """Decode one modality's latent (1, C, h, w) to colours (3, h, w) in [0, 1]; depth is coloured."""
        pixels = self.autoencoder.decode(latent_BChw.to(next(self.autoencoder.parameters())))[0].float().cpu()
        values = MODALITIES[name].from_pixels(pixels, transform=self.settings.depth_transform)
        return values if values.dim() == 3 else colorize(values)


def row(pictures: Sequence[Tensor]) -> Tensor:
    """Put pictures (3, h, w) side by side on white."""
    height = max(picture.shape[1] for picture in pictures)
    width = sum(picture.shape[2] for picture in pictures) + MARGIN * (len(pictures) - 1)
    sheet = torch.ones(3, height, width)
    left = 0
    for picture in pictures:
        sheet[:, : picture.shape[1], left : left + picture.shape[2]] = picture
        left += picture.shape[2] + MARGIN
    return sheet
