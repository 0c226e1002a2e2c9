"""The training of the embedded model's autoencoder: its optimizer, its start and that stopping changes nothing."""

import numpy as np
import pytest
import torch
from cache_latents import cache_latents, read_names
from pca_init import start_from_pca
from pictures import Pictures, load_pictures, sample_names
from PIL import Image
from reconstruction import hues_kept, measure, measure_pca
from safetensors.torch import load_file
from train_autoencoder import AutoencoderTrainingArgs, Trainer, finish

from dataset.layout import Layout
from library.errors import UserError
from library.files import write_json
from library.flux.autoencoder import Autoencoder
from library.flux.variants import VARIANTS


@pytest.fixture(scope="module")
def pictures():
    """Smooth random pictures of 32 x 32."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(40, 4, 6, 6, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
    return Pictures(rgb_N3hw=(fine[:, :3] * 255).to(torch.uint8), disparity_Nhw=fine[:, 3].half())


def test_the_start_encodes_as_well_as_pca(pictures):
    torch.manual_seed(0)
    model = Autoencoder(VARIANTS["tiny"].autoencoder).requires_grad_(False)
    pixels = torch.cat([pictures.rgb(), pictures.depth()])
    start_from_pca(model, pixels)
    mean, log_variance = model.moments(pixels)
    assert mean.std(dim=(0, 2, 3)).sub(1).abs().max() < 0.1  # whitened
    assert torch.equal(log_variance, torch.full_like(mean, -5.0))
    latents_nd = torch.nn.functional.pad(mean.flatten(2).mT.flatten(0, 1), (0, 1), value=1.0)
    patches_nd = torch.nn.functional.unfold(pixels, 8, stride=8).mT.flatten(0, 1)
    error = latents_nd @ torch.linalg.lstsq(latents_nd, patches_nd).solution - patches_nd
    basis = torch.linalg.eigh(torch.cov(patches_nd.T))[1][:, -16:]
    centred = patches_nd - patches_nd.mean(dim=0)
    best = centred - centred @ basis @ basis.T
    assert error.square().mean() < 1.5 * best.square().mean()
    assert measure(model, pictures).hues > 0.9


def test_stopping_and_going_on_changes_nothing(pictures, tmp_path):
    args = AutoencoderTrainingArgs(scenes=tmp_path, output=tmp_path, steps=4, crop=16, crops_per_batch=2)
    straight, stopped, resumed = (Trainer(args, pictures) for _ in range(3))
    losses = list(straight.run())
    run = stopped.run()
    first = [next(run), next(run)]
    stopped.save(tmp_path / "state.safetensors")
    resumed.load(tmp_path / "state.safetensors")
    assert first + list(resumed.run()) == losses
    for name, tensor in straight.average.state_dict().items():
        assert torch.equal(tensor, resumed.average.state_dict()[name]), name


def test_the_released_file_has_standard_latents_and_fills_the_cache(pictures, tmp_path):
    layout = Layout(tmp_path)
    layout.processed_images.mkdir()
    layout.depthmaps.mkdir()
    layout.instances.mkdir()
    for index in range(3):
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(layout.instance_map(f"{index:08d}"))
        write_json(layout.scene(f"{index:08d}"), {"objects": []})
        Image.fromarray(pictures.rgb_N3hw[index].permute(1, 2, 0).numpy()).save(layout.image(f"{index:08d}"))
        np.save(layout.depthmap(f"{index:08d}"), pictures.disparity_Nhw[index].float().numpy())
    names = sample_names(tmp_path, flag="--scenes")
    assert torch.equal(load_pictures(tmp_path, names, flag="--scenes").rgb_N3hw, pictures.rgb_N3hw[:3])
    args = AutoencoderTrainingArgs(scenes=tmp_path, output=tmp_path, steps=1)
    released = finish(Trainer(args, pictures).average, pictures, tmp_path)
    latents = released.encode(torch.cat([pictures.rgb(), pictures.depth()]))
    assert abs(latents.mean()) < 0.01 and abs(latents.std() - 1) < 0.01
    output = tmp_path / "latents.safetensors"
    cache_latents(tmp_path, ae=tmp_path / "ae.safetensors", output=output)
    cached = load_file(output)
    assert read_names(output) == names
    torch.testing.assert_close(cached["rgb"].float(), latents[:3], atol=0.02, rtol=0.01)
    assert cached["depth"].shape == (3, 16, 4, 4)
    assert torch.equal(cached["objects"], torch.zeros(3, 8, 8, dtype=torch.uint8))


def test_pca_measures_and_hues(pictures):
    result = measure_pca(pictures[:30], pictures[30:])
    assert result.rgb > 25 and result.hues > 0.95
    assert hues_kept(pictures.rgb(), pictures.rgb()) == 1
    assert hues_kept(pictures.rgb()[:, [1, 2, 0]], pictures.rgb()) < 0.1


def test_errors_name_the_flag(tmp_path):
    with pytest.raises(UserError, match="--scenes .*holds no scenes; make them with dataset/make_scenes.py"):
        sample_names(tmp_path, flag="--scenes")
    with pytest.raises(UserError, match="--minutes: give either --minutes or --steps"):
        AutoencoderTrainingArgs(scenes=tmp_path, output=tmp_path)
