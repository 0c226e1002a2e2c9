"""Rectified flow: straight paths."""

import torch
from golden_files import assert_near, tensors

from library.flow import noise_to, step, velocity


def test_noising_and_target_are_the_released_codes():
    recorded = tensors("training_step")
    clean = torch.cat([recorded["rgb_latents"], recorded["depth_latents"]])
    t = (recorded["timesteps"] / 1000)[:, None, None, None]
    assert_near(noise_to(clean, recorded["noise"], t), recorded["noisy_latents"], within=1e-6)
    assert torch.equal(velocity(clean, recorded["noise"]), recorded["target"])


def test_ends_of_the_path():
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    assert torch.equal(noise_to(clean, noise, 0.0), clean)
    assert torch.equal(noise_to(clean, noise, 1.0), noise)


def test_steps_along_the_velocity_stay_on_the_path():
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    v = velocity(clean, noise)
    for t, t_next in ((1.0, 0.4), (0.4, 0.0), (0.2, 0.9)):
        moved = step(noise_to(clean, noise, t), v, t=t, t_next=t_next)
        assert_near(moved, noise_to(clean, noise, t_next), within=1e-6)
