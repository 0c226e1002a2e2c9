"""The pipeline on a random tiny model: tasks, sizes, seeds, and what is loaded when."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_model import FLUX, T5_LENGTH, tiny_model

from library.errors import UserError
from library.flux.variants import VARIANTS
from library.modality import normalize_disparity
from library.pipeline import EMPTY_PROMPT, Pipeline
from library.weight_paths import WeightPaths

SIZE = (40, 56)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(WeightPaths(**tiny_model()))


@pytest.fixture
def image() -> torch.Tensor:
    return torch.rand(3, 37, 51, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def depth() -> torch.Tensor:
    return torch.rand(37, 51, generator=torch.Generator().manual_seed(1)) * 9 + 2


def test_results_are_pictures_and_maps_in_range(pipeline: Pipeline) -> None:
    (result,) = pipeline.run("joint_generation", prompt="a red ball", steps=2, size=SIZE)
    assert result.rgb_3hw.shape == (3, *SIZE) and result.depth_hw.shape == SIZE
    for values in (result.rgb_3hw, result.depth_hw):
        assert values.dtype == torch.float32 and values.min() >= 0 and values.max() <= 1 and values.std() > 0.01


def test_a_seed_gives_the_same_bytes_alone_and_in_company(pipeline: Pipeline) -> None:
    together = pipeline.run("joint_generation", prompt="a red ball", seeds=(1, 2, 3), steps=2, size=SIZE)
    (alone,) = Pipeline(pipeline.paths).run("joint_generation", prompt="a red ball", seeds=(3,), steps=2, size=SIZE)
    assert torch.equal(together[2].rgb_3hw, alone.rgb_3hw) and torch.equal(together[2].depth_hw, alone.depth_hw)
    assert not torch.equal(together[0].rgb_3hw, together[1].rgb_3hw)
    assert [result.seed for result in together] == [1, 2, 3]


@pytest.mark.parametrize("processing_resolution", [0, 32, None])
def test_odd_inputs_come_back_as_given_in_their_own_size(
    pipeline: Pipeline, image: torch.Tensor, depth: torch.Tensor, processing_resolution: int | None
) -> None:
    if processing_resolution is None:  # the variant's own 128 pixels: once is enough
        image, depth = image[:, :, :37], depth[:, :37]
    common = {"steps": 1, "processing_resolution": processing_resolution}
    (estimated,) = pipeline.run("depth_estimation", image=image, **common)
    assert torch.equal(estimated.rgb_3hw, image) and estimated.depth_hw.shape == depth.shape
    (painted,) = pipeline.run("depth_to_image", depth=depth, prompt="a box", **common)
    assert torch.equal(painted.depth_hw, normalize_disparity(depth)) and painted.rgb_3hw.shape == image.shape


def test_an_output_size_is_also_the_size_the_model_works_at(
    pipeline: Pipeline, image: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pipeline._sizes(image, size=None, processing_resolution=None) == ((37, 51), (128, 176))
    assert pipeline._sizes(image, size=None, processing_resolution=0) == ((37, 51), (37, 51))
    assert pipeline._sizes(image, size=SIZE, processing_resolution=None) == (SIZE, SIZE)
    assert pipeline._sizes(image, size=SIZE, processing_resolution=74) == (SIZE, (74, 102))
    assert pipeline._sizes(None, size=None, processing_resolution=None) == ((128, 128), (128, 128))
    (result,) = pipeline.run("depth_estimation", image=image, size=SIZE, steps=1)
    assert result.rgb_3hw.shape == (3, *SIZE) and result.depth_hw.shape == SIZE


def test_the_size_the_model_works_at_is_said_once(
    pipeline: Pipeline, image: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        for seed in (1, 2):
            pipeline.run("depth_estimation", image=image, steps=1, processing_resolution=48, seeds=(seed,))
    assert caplog.messages.count("Input of 51 x 37 pixels: the model works at 66 x 48") == 1


def test_the_prompt_and_a_loose_condition_act(pipeline: Pipeline, image: torch.Tensor) -> None:
    def estimate(**options) -> torch.Tensor:
        (result,) = pipeline.run("depth_estimation", image=image, steps=2, processing_resolution=0, **options)
        assert torch.equal(result.rgb_3hw, image)
        return result.depth_hw

    plain = estimate()
    assert torch.equal(plain, estimate(prompt=EMPTY_PROMPT))
    assert not torch.equal(plain, estimate(prompt="a green cone"))
    assert not torch.equal(plain, estimate(condition_noise=0.5))


def test_steps_are_told(pipeline: Pipeline) -> None:
    told: list[int] = []
    pipeline.run("joint_generation", prompt="x", seeds=(1, 2), steps=3, size=(16, 16), on_step=told.append)
    assert told == [1, 2, 3, 1, 2, 3]


def test_a_task_takes_what_it_is_given_and_nothing_else(pipeline: Pipeline, image: torch.Tensor) -> None:
    for task, inputs in (
        ("joint_generation", {"image": image}),
        ("depth_estimation", {}),
        ("depth_to_image", {"image": image}),
    ):
        with pytest.raises(ValueError, match=f"task {task} is given"):
            pipeline.run(task, **inputs)


@pytest.mark.parametrize(
    ("task", "wrong", "message"),
    [
        ("depth_estimation", {"image": torch.zeros(3, 9, 8, dtype=torch.uint8)}, r"image: is uint8 of shape \(3, 9"),
        ("depth_estimation", {"image": torch.zeros(4, 9, 8)}, r"image: is float32 of shape \(4, 9, 8\); give floats"),
        ("depth_estimation", {"image": torch.full((3, 9, 8), 254.0)}, "image: has values from 254 to 254; all must"),
        ("depth_estimation", {"image": torch.full((3, 9, 8), torch.nan)}, "image: has values from nan to nan; all"),
        ("depth_to_image", {"depth": torch.zeros(1, 9, 8)}, r"depth: is float32 of shape \(1, 9, 8\); give floats of"),
        ("depth_to_image", {"depth": torch.full((9, 8), torch.nan)}, "depth: holds 72 NaN or infinite values; fill"),
        ("joint_generation", {"steps": 0}, "steps: is 0; must be at least 1"),
        ("depth_to_image", {"depth": torch.eye(9), "condition_noise": 2}, r"condition_noise: is 2; must be in \[0"),
    ],
)
def test_arguments_that_would_spoil_a_result_in_silence_are_refused(
    pipeline: Pipeline, task: str, wrong: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        pipeline.run(task, prompt="x", **wrong)


def test_variant_and_parts_are_loaded_when_needed() -> None:
    pipeline = Pipeline(WeightPaths(**tiny_model()))
    assert pipeline.variant is VARIANTS["tiny"] and pipeline.depth_transform == "none"
    assert pipeline._text_encoders is pipeline._model is pipeline._autoencoder is None
    pipeline.encode_prompt("a ball")
    assert pipeline._text_encoders is not None and pipeline._model is None
    assert pipeline.encode_prompt("a ball") is pipeline.encode_prompt("a ball")


def test_tokens_of_the_variant_of_the_file_and_of_the_flag() -> None:
    def length(**changed: object) -> int:
        pipeline = Pipeline(WeightPaths(**tiny_model(), **changed))
        pipeline.variant = replace(VARIANTS["schnell"], flux=FLUX, t5_length=7)
        return pipeline.encode_prompt("a ball").tokens_BLD.shape[1]

    assert length() == 7
    assert length(t5xxl_max_token_length=9) == 9
    assert Pipeline(WeightPaths(**tiny_model())).encode_prompt("a ball").tokens_BLD.shape[1] == T5_LENGTH


def test_lower_precision_stays_inside_the_model() -> None:
    pipeline = Pipeline(WeightPaths(**tiny_model()), dtype=torch.bfloat16)
    (result,) = pipeline.run("joint_generation", prompt="a ball", steps=2, size=(32, 32))
    (exact,) = Pipeline(pipeline.paths).run("joint_generation", prompt="a ball", steps=2, size=(32, 32))
    assert result.rgb_3hw.dtype == torch.float32
    assert 0 < (result.rgb_3hw - exact.rgb_3hw).abs().mean() < 0.05
    assert next(pipeline._loaded_model().parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("flag", "other"),
    [
        ("pretrained_model_name_or_path", "ae"),
        ("ae", "clip_l"),
        ("clip_l", "t5xxl"),
        ("t5xxl", "ae"),
        ("jointdit_addons_path", "ae"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_by_flag_and_file(flag: str, other: str) -> None:
    paths = tiny_model()
    with pytest.raises(UserError) as caught:
        Pipeline(WeightPaths(**{**paths, flag: paths[other]})).run(
            "joint_generation", prompt="x", steps=1, size=(16, 16)
        )
    assert str(caught.value).startswith(f"--{flag} {paths[other]}: ")


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "flux.safetensors").write_text("hello")
    with pytest.raises(UserError, match=r"^--pretrained_model_name_or_path .*flux.safetensors: not a readable"):
        Pipeline(WeightPaths(**{**tiny_model(), "pretrained_model_name_or_path": tmp_path / "flux.safetensors"}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("blocks_to_swap", [0, 2])
def test_a_gpu_gives_the_cpus_picture_with_and_without_block_swap(pipeline: Pipeline, blocks_to_swap: int) -> None:
    on_gpu = Pipeline(pipeline.paths, device="cuda", blocks_to_swap=blocks_to_swap)
    (expected,) = pipeline.run("joint_generation", prompt="a ball", steps=4, size=SIZE)
    (result,) = on_gpu.run("joint_generation", prompt="a ball", steps=4, size=SIZE)
    assert on_gpu._text_encoders is None
    torch.testing.assert_close(result.rgb_3hw, expected.rgb_3hw, atol=2e-3, rtol=0)
    (again,) = on_gpu.run("joint_generation", prompt="another ball", steps=4, size=SIZE)
    assert not torch.equal(again.rgb_3hw, result.rgb_3hw)


def test_a_wrong_autoencoder_is_found_before_the_sampling(pipeline: Pipeline) -> None:
    with pytest.raises(UserError, match=r"^--ae .*clip_l\.safetensors: no tensor encoder\.conv_in\.weight"):
        Pipeline(replace(pipeline.paths, ae=pipeline.paths.clip_l))
