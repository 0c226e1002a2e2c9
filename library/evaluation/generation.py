"""The three tasks on many samples at once, for measuring: same parts and same sampler as inference, without its files.

Every sample has its own noise, drawn on the CPU from (seed, purpose, index), so that a figure does not depend on the
batch size.

Shapes: M modality, N all samples, B batch, C channels, h w pixels or latents, L tokens, D width.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.evaluation.progress import Progress
from library.flux.autoencoder import Autoencoder
from library.flux.latents import PATCH, PIXELS_PER_LATENT, image_ids, pack, unpack
from library.flux.schedule import timestep_schedule
from library.flux.text import EMPTY_PROMPT, TextEncoders, load_text_encoders
from library.flux.weights import load_autoencoder, variant_of
from library.jointdit.addons import AddonSettings, load_jointdit, read_settings
from library.jointdit.model import JointDiT
from library.modality import MODALITIES
from library.pipeline import GUIDANCE_SCALE
from library.randomness import generator_for
from library.sampling import Condition, sample
from library.tasks import TASKS

PASS_WORK = 2.0  # one encoding or decoding, told in transformer calls, for the time left


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchedModel:
    """A whole model that answers for many samples at once, `batch` at a time.

    All pictures and maps are float32 on the CPU, in [0, 1]; maps are disparity, near = large.
    """

    model: JointDiT
    autoencoder: Autoencoder
    text: TextEncoders
    settings: AddonSettings
    progress: Progress
    batch: int = 32
    seed: int = 0
    size: int = 128
    shift_schedule: bool = True
    guidance: float = GUIDANCE_SCALE
    device: torch.device = torch.device("cpu")

    def reconstruct_rgb(self, rgb_N3hw: Tensor, *, noise: float = 0.0) -> Tensor:
        """Return pictures through the autoencoder, with noise of `noise` times the latents' standard deviation."""
        return self._reconstruct("rgb", rgb_N3hw, noise=noise)

    def reconstruct_disparity(self, disparity_Nhw: Tensor, *, noise: float = 0.0) -> Tensor:
        """Return disparity maps through the autoencoder, as `reconstruct_rgb` does pictures."""
        return self._reconstruct("depth", disparity_Nhw, noise=noise)

    def estimate_depth(self, rgb_N3hw: Tensor, *, steps: int, purpose: str) -> Tensor:
        """Return the disparity (N, h, w) of pictures, without a prompt; each `purpose` has noise of its own."""
        prompts = [EMPTY_PROMPT] * len(rgb_N3hw)
        return self._run("depth_estimation", prompts, given=rgb_N3hw, steps=steps, purpose=purpose)["depth"]

    def depth_to_image(self, disparity_Nhw: Tensor, prompts: Sequence[str], *, steps: int) -> Tensor:
        """Return pictures (N, 3, h, w) for disparity maps and prompts."""
        return self._run("depth_to_image", prompts, given=disparity_Nhw, steps=steps, purpose="depth_to_image")["rgb"]

    def generate_jointly(self, prompts: Sequence[str], *, steps: int) -> tuple[Tensor, Tensor]:
        """Return pictures (N, 3, h, w) and disparity maps (N, h, w) for prompts."""
        made = self._run("joint_generation", prompts, given=None, steps=steps, purpose="joint_generation")
        return made["rgb"], made["depth"]

    @torch.inference_mode()
    def _run(
        self, task: str, prompts: Sequence[str], *, given: Tensor | None, steps: int, purpose: str
    ) -> dict[str, Tensor]:
        """Return what a task makes: the modalities that aren't given."""
        held = TASKS[task].given
        made: dict[str, list[Tensor]] = {name: [] for name in MODALITIES if name != held}
        for part in self._parts(len(prompts)):
            latents = None if given is None or held is None else self._encode(held, given[part])
            z_MBChw = self._denoise(
                task, prompts[part], given_BChw=latents, steps=steps, start=part.start, purpose=purpose
            )
            for name, results in made.items():
                results.append(self._decode(name, z_MBChw[MODALITIES[name].index]))
            self.progress.advance((steps + PASS_WORK * len(MODALITIES)) * len(prompts[part]))
        return {name: torch.cat(results) for name, results in made.items()}

    def _denoise(
        self,
        task: str,
        prompts: Sequence[str],
        *,
        given_BChw: Tensor | None,
        steps: int,
        start: int,
        purpose: str,
    ) -> Tensor:
        """Return the latents (M, B, C, h, w) of one batch; `start` is its first sample's index."""
        side = self.size // PIXELS_PER_LATENT
        shape = (len(MODALITIES), self.autoencoder.config.z_channels, side, side)
        generators = (generator_for(self.seed, purpose, start + number) for number in range(len(prompts)))
        noise_MBChw = torch.stack([torch.randn(shape, generator=generator) for generator in generators], dim=1)
        condition = None
        held = TASKS[task].given
        if given_BChw is not None and held is not None:
            condition = Condition(modality=MODALITIES[held].index, x_BLD=pack(given_BChw))
        text = self.text.encode(
            prompts, with_mask=self.settings.is_attnmask_training, with_ids=self.settings.is_txt_ids_training
        )
        ids = image_ids(side // PATCH, side // PATCH, device=self.device)
        guidance_B = torch.full((len(prompts),), self.guidance, device=self.device)
        x_MBLD = sample(
            lambda x_MBLD, t_MB: self.model(x_MBLD, t_MB=t_MB, text=text, image_ids=ids, guidance_B=guidance_B),
            pack(noise_MBChw.to(self.device)),
            schedule=timestep_schedule(steps, len(ids), shift=self.shift_schedule),
            condition=condition,
        )
        return unpack(x_MBLD, height=side // PATCH, width=side // PATCH)

    @torch.inference_mode()
    def _reconstruct(self, name: str, values: Tensor, *, noise: float) -> Tensor:
        latents = [self._encode(name, values[part]) for part in self._parts(len(values))]
        spread = torch.cat(latents).std()
        results = []
        for part, z_BChw in zip(self._parts(len(values)), latents, strict=True):
            if noise:
                added = [
                    torch.randn(z_BChw.shape[1:], generator=generator_for(self.seed, "latent noise", name, index))
                    for index in range(part.start, part.start + len(z_BChw))
                ]
                z_BChw = z_BChw + noise * spread * torch.stack(added).to(z_BChw)
            results.append(self._decode(name, z_BChw))
            self.progress.advance(PASS_WORK * 2 * len(z_BChw))
        return torch.cat(results)

    def _encode(self, name: str, values: Tensor) -> Tensor:
        transform = self.settings.depth_transform if name == "depth" else "none"
        return self.autoencoder.encode(MODALITIES[name].to_pixels(values.to(self.device), transform=transform))

    def _decode(self, name: str, z_BChw: Tensor) -> Tensor:
        transform = self.settings.depth_transform if name == "depth" else "none"
        return MODALITIES[name].from_pixels(self.autoencoder.decode(z_BChw), transform=transform).float().cpu()

    def _parts(self, count: int) -> Iterator[slice]:
        for start in range(0, count, self.batch):
            yield slice(start, min(start + self.batch, count))


def load_batched_model(
    paths: Mapping[str, Path],
    *,
    progress: Progress,
    batch: int = 32,
    size: int = 128,
    device: torch.device | str = "cpu",
) -> BatchedModel:
    """Load all parts in float32; `paths` holds a file for each of the five weight flags, by the flag's name.

    Raises:
        UserError: naming the flag and the file, if one isn't what it should be.
    """
    flux, addons = paths["pretrained_model_name_or_path"], paths["jointdit_addons_path"]
    model = load_jointdit(flux=flux, addons=addons, device=device)
    return BatchedModel(
        model=model,
        autoencoder=load_autoencoder(paths["ae"], device=device),
        text=load_text_encoders(paths["clip_l"], paths["t5xxl"], device=device),
        settings=read_settings(addons),
        progress=progress,
        batch=batch,
        size=size,
        shift_schedule=variant_of(model.config, path=flux).shift_schedule,
        device=torch.device(device),
    )
