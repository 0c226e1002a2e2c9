import pytest
import torch

from library.evaluation.generation import BatchedModel
from library.evaluation.progress import Progress
from library.flux.autoencoder import Autoencoder
from library.flux.text import TextFeatures
from library.flux.variants import AutoencoderConfig, FluxConfig
from library.jointdit.addons import AddonSettings
from library.jointdit.model import JointDiT, LoraRanks

FLUX = FluxConfig(
    vec_in_dim=8,
    context_in_dim=8,
    hidden_size=24,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(4, 4, 4),
    guidance_embed=False,
)
PROMPTS = ["red", "blue", "green"]


class TextByLength:
    """Text features that differ between prompts, without encoders."""

    def encode(self, prompts, *, with_mask=False, with_ids=False):
        size_B = torch.tensor([float(len(prompt)) for prompt in prompts])
        return TextFeatures(
            tokens_BLD=size_B[:, None, None].expand(-1, 4, 8) / 5, pooled_BD=size_B[:, None].expand(-1, 8) / 5
        )


def model(*, batch: int) -> BatchedModel:
    torch.manual_seed(0)
    ranks = LoraRanks(**dict.fromkeys(LoraRanks.__dataclass_fields__, 2))
    jointdit = JointDiT(FLUX, ranks=ranks).eval()
    for parameter in jointdit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return BatchedModel(
        model=jointdit,
        autoencoder=Autoencoder(AutoencoderConfig(ch=8, num_res_blocks=1, num_groups=1)).eval(),
        text=TextByLength(),
        settings=AddonSettings(),
        progress=Progress(total=1),
        batch=batch,
        size=32,
    )


def test_results_do_not_depend_on_the_batch_size():
    one, many = model(batch=1), model(batch=3)
    for first, second in zip(
        one.generate_jointly(PROMPTS, steps=2), many.generate_jointly(PROMPTS, steps=2), strict=True
    ):
        assert torch.allclose(first, second, atol=1e-4)
    rgb = torch.rand(3, 3, 32, 32)
    first, second = (each.estimate_depth(rgb, steps=2, purpose="test") for each in (one, many))
    assert first.shape == (3, 32, 32) and torch.allclose(first, second, atol=1e-4)
    assert torch.allclose(one.reconstruct_rgb(rgb, noise=0.1), many.reconstruct_rgb(rgb, noise=0.1), atol=1e-4)


def test_depth_to_image_gives_pictures_that_follow_the_depth():
    disparity = torch.linspace(0, 1, 32).expand(3, 32, 32)
    answers = model(batch=2)
    pictures = answers.depth_to_image(disparity, PROMPTS, steps=2)
    assert pictures.shape == (3, 3, 32, 32)
    assert 0 <= pictures.min() and pictures.max() <= 1
    assert not torch.equal(pictures, answers.depth_to_image(disparity.flip(-1), PROMPTS, steps=2))


def test_latent_noise_changes_the_reconstruction():
    answers = model(batch=2)
    disparity = torch.rand(3, 32, 32)
    assert not torch.equal(
        answers.reconstruct_disparity(disparity), answers.reconstruct_disparity(disparity, noise=0.1)
    )


def test_progress_counts_the_work():
    answers = model(batch=2)
    answers.generate_jointly(PROMPTS, steps=2)
    assert answers.progress.done == pytest.approx(3 * (2 + 2 * 2.0))
