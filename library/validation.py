"""Loss on held-out pairs at fixed noise and a fixed grid of noise levels, one number for each task.

It is that of the modalities which the task makes: the noise of a given one, at level 0, can't be known.

Shape suffixes: M modality, B batch, L tokens, D width, C channels, h w latent rows and columns.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from library.batches import Batch
from library.joint_loss import noisy_pairs, predict
from library.modality import MODALITIES
from library.randomness import generator_for
from library.tasks import TASKS

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of whatever isn't given


def level_grid() -> dict[str, list[tuple[float, ...]]]:
    """Noise levels (RGB, depth) of each task: a given modality at 0, the others together at each of `LEVELS`."""
    return {
        task.name: [tuple(0.0 if name == task.given else level for name in MODALITIES) for level in LEVELS]
        for task in TASKS.values()
    }


def fixed_noise(batch: Batch) -> Tensor:
    """Noise (M, B, C, h, w) that depends on the samples' names only."""
    shape = (len(MODALITIES), *batch.rgb_BChw.shape[1:])
    noise = [torch.randn(shape, generator=generator_for("validation", name)) for name in batch.names]
    return torch.stack(noise, dim=1).to(batch.rgb_BChw)


@torch.no_grad()
def validation_loss(model: nn.Module, batches: Iterable[Batch], *, guidance: float) -> dict[str, float]:
    """Mean loss over pairs and grid, by task name; each pair counts the same."""
    sums = dict.fromkeys(TASKS, 0.0)
    count = 0
    for batch in batches:
        noise_MBChw = fixed_noise(batch)
        size = len(batch.names)
        count += size
        for name, levels in level_grid().items():
            for level_M in levels:
                t_MB = torch.tensor(level_M, device=noise_MBChw.device)[:, None].expand(-1, size)
                noisy = noisy_pairs(batch, noise_MBChw=noise_MBChw, t_MB=t_MB)
                v_MBLD = predict(model, noisy, text=batch.text, guidance=guidance)
                error_M = (v_MBLD - noisy.target_MBLD.float()).square().mean(dim=(1, 2, 3))
                made_M = torch.tensor(level_M, device=error_M.device) > 0
                sums[name] += float(error_M[made_M].mean()) * size / len(levels)
    return {name: value / max(count, 1) for name, value in sums.items()}
