"""What the backbone is trained on: noise levels, the velocity asked for, and all its losses.

Shape suffixes: B batch, L tokens, D width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from object_cells import solids_and_colors
from text_data import Batch, Samples
from text_to_image import TextToImage
from torch import Generator, Tensor

from library.flux.text import TextFeatures


def draw_levels(count: int, *, shift: float, clean_share: float, generator: Generator) -> Tensor:
    """Draw noise levels: most shifted logit-normal (Esser et al., arXiv 2403.03206), 15 % uniform, some nearly clean.

    The clean ones matter here: a given image is later a pass at t = 0 through this backbone, and must show its depth.
    """
    normal = torch.randn(count, generator=generator)
    most = torch.sigmoid(normal + torch.tensor(shift).log())
    clean = torch.sigmoid(normal + torch.tensor(0.1).log())
    kind = torch.rand(count, generator=generator)
    uniform = torch.rand(count, generator=generator)
    return torch.where(kind < 0.85 - clean_share, most, torch.where(kind < 1 - clean_share, uniform, clean))


@dataclass(frozen=True, kw_only=True, slots=True)
class VelocityTask:
    """What the model is asked, and the velocity (B, L, D) that is right."""

    noisy_BLD: Tensor
    t_B: Tensor
    guidance_B: Tensor
    text: TextFeatures
    velocity_BLD: Tensor


def velocity_task(batch: Batch, noise_BLD: Tensor, *, t_B: Tensor, text: TextFeatures) -> VelocityTask:
    """Noise a batch, x_t = (1 - t) x_0 + t noise, and ask for noise - x_0 without guidance, which is scale 1."""
    t, x_BLD = t_B[:, None, None], batch.x_BLD.float()
    return VelocityTask(
        noisy_BLD=(1 - t) * x_BLD + t * noise_BLD,
        t_B=t_B,
        guidance_B=torch.ones_like(t_B),
        text=text,
        velocity_BLD=noise_BLD - x_BLD,
    )


@torch.no_grad()
def guided_velocity(teacher: TextToImage, task: VelocityTask, batch: Batch, samples: Samples, *, count: int) -> Tensor:
    """Return a teacher's velocity (count, L, D) of the first samples under the guidance that they are asked with.

    v = v(no caption) + g (v(caption) - v(no caption)), classifier-free guidance (Ho and Salimans, arXiv 2207.12598);
    Meng et al. (arXiv 2210.03142) distil it into a model that is told g. The teacher must stay as it is: a model that
    learns from its own guided velocities extrapolates what it has extrapolated, and diverges.
    """
    clip_ids, t5_ids = (
        torch.cat([ids_BL[:count], empty_1L.long().expand(count, -1)])
        for ids_BL, empty_1L in ((batch.clip_ids_BL, samples.empty_clip_1L), (batch.t5_ids_BL, samples.empty_t5_1L))
    )
    noisy_BLD, t_B = task.noisy_BLD[:count].repeat(2, 1, 1), task.t_B[:count].repeat(2)
    answer = teacher(noisy_BLD, t_B=t_B, guidance_B=torch.ones_like(t_B), text=teacher.encode(clip_ids, t5_ids))
    with_caption, without = answer.velocity_BLD.float().chunk(2)
    return without + task.guidance_B[:count, None, None] * (with_caption - without)


def losses(model: TextToImage, task: VelocityTask, batch: Batch) -> dict[str, Tensor]:
    """Squared errors of velocity and depth latents, cross-entropies of solids and colours: means for each sample."""
    answer = model(task.noisy_BLD, t_B=task.t_B, guidance_B=task.guidance_B, text=task.text)
    flow_B = (answer.velocity_BLD.float() - task.velocity_BLD).square().mean(dim=(1, 2))
    depth_B = (answer.depth_BLD.float() - batch.depth_BLD.float()).square().mean(dim=(1, 2))
    classes = zip(("solid", "color"), answer[2:], solids_and_colors(batch.object_BLC), strict=True)
    entropies = {
        name: F.cross_entropy(logits.float().movedim(-1, 1), truth, reduction="none").mean(dim=(1, 2))
        for name, logits, truth in classes
    }
    return {"flow": flow_B, "depth": depth_B} | entropies
