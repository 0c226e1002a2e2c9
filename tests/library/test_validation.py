"""The validation loss: the same every time, and only about what a task makes."""

import torch

from library.batches import Batch
from library.flux.text import TextFeatures
from library.modality import MODALITIES
from library.tasks import TASKS
from library.validation import LEVELS, level_grid, validation_loss

RGB, DEPTH = (MODALITIES[name].index for name in ("rgb", "depth"))


def batch(*, names=("a", "b")):
    generator = torch.Generator().manual_seed(0)
    rgb, depth = (torch.randn(len(names), 16, 4, 4, generator=generator) for _ in range(2))
    text = TextFeatures(tokens_BLD=torch.zeros(len(names), 1, 1), pooled_BD=torch.zeros(len(names), 1))
    return Batch(rgb_BChw=rgb, depth_BChw=depth, text=text, names=names)


def knows(modality):
    """A model that is right about one modality where that is noisy and clean zeros, and far off elsewhere."""

    def model(x_MBLD, *, t_MB, **_others):
        answer = torch.full_like(x_MBLD, 7.0)
        answer[modality] = x_MBLD[modality] / t_MB[modality].clamp(min=1e-6)[:, None, None]
        return answer

    return model


def test_a_given_modality_does_not_count():
    clean = batch()
    zeros = Batch(
        rgb_BChw=0 * clean.rgb_BChw, depth_BChw=0 * clean.depth_BChw, text=clean.text, names=clean.names
    )  # then the velocity is x_t / t
    losses = validation_loss(knows(DEPTH), [zeros], guidance=1.0)
    assert losses["depth_estimation"] < 1e-10
    assert losses["depth_to_image"] > 40 and losses["joint_generation"] > 20
    assert validation_loss(knows(RGB), [zeros], guidance=1.0)["depth_to_image"] < 1e-10


def test_it_depends_on_names_and_not_on_batches():
    def model(x_MBLD, **_others):
        return 0.5 * x_MBLD

    whole = validation_loss(model, [batch(names=("a", "b"))], guidance=1.0)
    again = validation_loss(model, [batch(names=("a", "b"))], guidance=1.0)
    other = validation_loss(model, [batch(names=("c", "d"))], guidance=1.0)
    assert whole == again and whole.keys() == TASKS.keys()
    assert all(whole[name] != other[name] for name in whole)


def test_every_task_is_asked_at_every_level():
    for name, levels in level_grid().items():
        assert len(levels) == len(LEVELS)
        for level_M in levels:
            assert len(level_M) == len(MODALITIES)
            assert (0.0 in level_M) == (TASKS[name].given is not None)
