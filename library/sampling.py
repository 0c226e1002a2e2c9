"""The sampler: a pure function of a velocity function and noise. Which task it is lies in what is held at which level.

Shape suffixes: M modality (RGB, depth), B batch, L tokens, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from library import flow

Velocity = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """A given modality: clean tokens, put in before every model call at a noise level that stays.

    Attributes:
        modality: its place on the axis M.
        x_BLD: clean tokens.
        level: noise level in [0, 1) it is held at: 0 binds exactly, above 0 loosely.
    """

    modality: int
    x_BLD: Tensor
    level: float = 0.0


def sample(
    velocity: Velocity,
    noise_MBLD: Tensor,
    *,
    schedule: Sequence[float],
    condition: Condition | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Integrate dx/dt = v from the first noise level of `schedule` to the last by Euler steps.

    Args:
        velocity: v(x_MBLD, t_MB), the shape of x.
        noise_MBLD: standard normal noise; for modalities that aren't given, x starts here.
        schedule: noise levels, falling, such as `timestep_schedule` gives.
        condition: a modality that is given instead of generated.
        on_step: told the number of finished steps after each.

    Returns:
        Tokens (M, B, L, D); a given modality comes back exactly as given.
    """
    x_MBLD = noise_MBLD.clone()
    t_MB = torch.empty(x_MBLD.shape[:2], dtype=torch.float32, device=x_MBLD.device)
    for number, (t, t_next) in enumerate(zip(schedule[:-1], schedule[1:], strict=True), start=1):
        t_MB.fill_(t)
        if condition is not None:
            m = condition.modality
            # Never noisier than the other one: that would turn the condition around.
            level = min(condition.level, t)
            t_MB[m] = level
            x_MBLD[m] = flow.noise_to(condition.x_BLD, noise_MBLD[m], level)
        x_MBLD = flow.step(x_MBLD, velocity(x_MBLD, t_MB), t=t, t_next=t_next)
        if on_step is not None:
            on_step(number)
    if condition is not None:
        x_MBLD[condition.modality] = condition.x_BLD
    return x_MBLD
