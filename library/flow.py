"""Rectified flow (Liu et al., arXiv 2209.03003): straight paths from data at t = 0 to noise at t = 1."""

from torch import Tensor


def noise_to(clean: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """x_t = (1 - t) x_0 + t noise; `t` in [0, 1] broadcasts against the data."""
    return (1 - t) * clean + t * noise


def velocity(clean: Tensor, noise: Tensor) -> Tensor:
    """dx_t / dt = noise - x_0: what the model predicts."""
    return noise - clean


def step(x: Tensor, v: Tensor, *, t: float, t_next: float) -> Tensor:
    """One Euler step from noise level `t` to `t_next`."""
    return x + (t_next - t) * v
