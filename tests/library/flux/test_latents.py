"""Latents to tokens and back."""

import torch
from golden_files import tensors

from library.flux.latents import image_ids, pack, unpack


def test_packing_is_the_originals():
    recorded = tensors("latent_packing")
    assert torch.equal(pack(recorded["latent"]), recorded["packed"])
    assert torch.equal(unpack(recorded["packed"], height=2, width=3), recorded["unpacked"])


def test_packing_there_and_back_with_any_leading_axes():
    for shape in ((16, 2, 2), (3, 16, 4, 6), (2, 3, 16, 6, 4)):
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        tokens = pack(latents)
        assert tokens.shape == (*shape[:-3], shape[-2] * shape[-1] // 4, 64)
        assert torch.equal(unpack(tokens, height=shape[-2] // 2, width=shape[-1] // 2), latents)


def test_positions_are_the_originals():
    recorded = tensors("latent_packing")
    actual = image_ids(2, 3)
    assert actual.dtype == torch.float32
    for expected in recorded["img_ids"]:
        assert torch.equal(actual, expected)


def test_positions_follow_the_order_of_tokens():
    rows = torch.arange(4.0).repeat_interleave(2)[:, None].expand(8, 10)  # each latent holds its token's row
    ids = image_ids(4, 5)
    assert torch.equal(pack(rows[None])[:, 0], ids[:, 1])
    assert torch.equal(ids[:5, 2], torch.arange(5.0))
