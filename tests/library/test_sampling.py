"""The sampler against recorded four-step trajectories of the three tasks."""

import pytest
import torch
from golden_files import assert_near, lay_tiny_model, tensors

from library import TextFeatures, load_jointdit
from library.flow import noise_to
from library.flux.latents import image_ids, pack
from library.flux.schedule import timestep_schedule
from library.modality import MODALITIES
from library.sampling import Condition, sample
from library.tasks import TASKS


@pytest.fixture(scope="module")
def recorded():
    return tensors("denoise")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    flux, addons = lay_tiny_model(tmp_path_factory.mktemp("tiny"))
    return load_jointdit(flux=flux, addons=addons)


@pytest.fixture(scope="module")
def noise_MBLD(recorded):
    return recorded["noise"].unsqueeze(1)


def follow(model, recorded, *, condition, noise_MBLD):
    """Sample with the recorded text; return the tokens and what the model was asked and answered."""
    text = TextFeatures(tokens_BLD=recorded["txt"].unsqueeze(1), pooled_BD=recorded["y"].unsqueeze(1))
    calls = []

    def velocity(x_MBLD, t_MB):
        v_MBLD = model(x_MBLD, t_MB=t_MB, text=text, image_ids=image_ids(4, 6), guidance_B=torch.full((1,), 3.5))
        calls.append((x_MBLD.clone(), t_MB.clone(), v_MBLD))
        return v_MBLD

    with torch.no_grad():
        tokens = sample(velocity, noise_MBLD, schedule=timestep_schedule(4, 24), condition=condition)
    return tokens, calls


@pytest.mark.parametrize("name", TASKS)
def test_trajectories_are_the_released_codes(model, recorded, noise_MBLD, name):
    given = TASKS[name].given
    condition = None
    if given is not None:
        condition = Condition(modality=MODALITIES[given].index, x_BLD=recorded["condition_packed"])
    untouched = noise_MBLD.clone()
    tokens, calls = follow(model, recorded, condition=condition, noise_MBLD=noise_MBLD)
    assert torch.equal(noise_MBLD, untouched)

    assert len(calls) == 4
    for number, (x_MBLD, t_MB, v_MBLD) in enumerate(calls):
        assert_near(x_MBLD[:, 0], recorded[f"{name}/step{number}/model_in"])
        assert torch.equal(t_MB[:, 0], recorded[f"{name}/step{number}/t"])
        assert_near(v_MBLD[:, 0], recorded[f"{name}/step{number}/pred"])

    final = recorded[f"{name}/final"]
    for modality in MODALITIES.values():
        if modality.name == given:
            # We differ on purpose: what is given comes back as given, the released code moves it by one Euler step.
            assert torch.equal(tokens[modality.index], recorded["condition_packed"])
            assert (tokens[modality.index, 0] - final[modality.index]).abs().max() > 1
        else:
            assert_near(tokens[modality.index, 0], final[modality.index])


def test_the_recorded_condition_is_its_packed_latent(recorded):
    assert torch.equal(pack(recorded["condition_latent"]), recorded["condition_packed"])


def test_the_recorded_schedule_is_ours(recorded):
    assert timestep_schedule(4, 24) == recorded["timesteps"].tolist()


def noise(*, batch=1, seed=0):
    return torch.randn(2, batch, 3, 4, generator=torch.Generator().manual_seed(seed))


def test_a_loose_condition_is_held_at_its_level_but_never_above_the_other():
    clean_BLD = torch.ones(1, 3, 4)
    start = noise()
    seen = []

    def velocity(x_MBLD, t_MB):
        seen.append((x_MBLD[1].clone(), t_MB[:, 0].tolist()))
        return torch.zeros_like(x_MBLD)

    schedule = [1.0, 0.75, 0.5, 0.25, 0.0]
    condition = Condition(modality=1, x_BLD=clean_BLD, level=0.5)
    tokens = sample(velocity, start, schedule=schedule, condition=condition)
    assert [levels for _, levels in seen] == [[1.0, 0.5], [0.75, 0.5], [0.5, 0.5], [0.25, 0.25]]
    for held, (_, level) in seen:
        assert torch.equal(held, noise_to(clean_BLD, start[1], level))
    assert torch.equal(tokens[1], clean_BLD)
    assert torch.equal(tokens[0], start[0])


def test_the_true_velocity_leads_to_the_data_in_any_number_of_steps():
    clean, start = noise(seed=1), noise(seed=2)
    for steps in (1, 3):
        tokens = sample(lambda x, t: start - clean, start, schedule=timestep_schedule(steps, 24))
        assert_near(tokens, clean, within=1e-5)


def test_every_step_is_told():
    told = []
    sample(lambda x, t: torch.zeros_like(x), noise(), schedule=[1.0, 0.6, 0.3, 0.0], on_step=told.append)
    assert told == [1, 2, 3]


def test_levels_are_given_for_every_modality_and_sample():
    shapes = []

    def velocity(x_MBLD, t_MB):
        shapes.append((t_MB.shape, t_MB.dtype))
        return x_MBLD

    sample(velocity, noise(batch=5), schedule=[1.0, 0.0])
    assert shapes == [((2, 5), torch.float32)]
