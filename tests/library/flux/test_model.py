"""The plain backbone against recorded outputs of the original."""

import pytest
import torch
from golden_files import assert_near, joint_case, tensors, tiny_config

from library import TextFeatures
from library.flux.attention import KERNELS
from library.flux.layers import rotary_table, sinusoidal_embedding
from library.flux.model import Flux


@pytest.fixture(scope="module")
def case():
    return tensors("flux_tiny.cases")


def make(*, guidance_embed):
    weights = tensors("jointdit_tiny.base")
    if not guidance_embed:
        weights = {name: weight for name, weight in weights.items() if not name.startswith("guidance_in.")}
    model = Flux(tiny_config(guidance_embed=guidance_embed)).eval().requires_grad_(False)
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="module")
def distilled():
    return make(guidance_embed=True)


@pytest.fixture(scope="module")
def plain():
    return make(guidance_embed=False)


def inputs_of(case):
    text = TextFeatures(tokens_BLD=case["in/txt"], pooled_BD=case["in/y"], ids_BL3=case["in/txt_ids"])
    return {"t_B": case["in/timesteps"], "text": text, "image_ids": case["in/img_ids"][0]}


def test_velocities_with_guidance_are_the_originals(distilled, case):
    actual = distilled(case["in/img"], **inputs_of(case), guidance_B=case["in/guidance"])
    assert_near(actual, case["out/guidance"])


def test_velocities_without_guidance_are_the_originals(plain, case):
    actual = plain(case["in/img"], **inputs_of(case))
    assert_near(actual, case["out/schnell"])
    assert torch.equal(plain(case["in/img"], **inputs_of(case), guidance_B=case["in/guidance"]), actual)


def test_missing_guidance_is_refused(distilled, case):
    with pytest.raises(ValueError, match="guidance_B is needed"):
        distilled(case["in/img"], **inputs_of(case))


def test_leading_axes_are_free(distilled, case):
    inputs, guidance = inputs_of(case), case["in/guidance"]
    text = inputs["text"]
    one = TextFeatures(tokens_BLD=text.tokens_BLD[0], pooled_BD=text.pooled_BD[0], ids_BL3=text.ids_BL3[0])
    single = distilled(
        case["in/img"][0], t_B=inputs["t_B"][0], text=one, image_ids=inputs["image_ids"], guidance_B=guidance[0]
    )
    assert_near(single, case["out/guidance"][0])

    many = distilled(
        case["in/img"].expand(3, -1, -1, -1),
        t_B=inputs["t_B"].expand(3, -1),
        text=text,
        image_ids=inputs["image_ids"],
        guidance_B=guidance,
    )
    assert_near(many, case["out/guidance"].expand(3, -1, -1, -1))


def test_text_without_ids_stands_at_zero(distilled, case):
    inputs = inputs_of(case)
    assert not inputs["text"].ids_BL3.any()
    inputs["text"] = TextFeatures(tokens_BLD=case["in/txt"], pooled_BD=case["in/y"])
    assert_near(distilled(case["in/img"], **inputs, guidance_B=case["in/guidance"]), case["out/guidance"])


def test_a_masked_token_is_not_read(plain, case):
    inputs = inputs_of(case)
    mask = torch.ones(case["in/txt"].shape[:2], dtype=torch.bool)
    mask[:, -2:] = False
    outputs = []
    for filler in (0.0, 5.0):
        tokens = case["in/txt"].clone()
        tokens[:, -2:] = filler
        inputs["text"] = TextFeatures(tokens_BLD=tokens, pooled_BD=case["in/y"], mask_BL=mask)
        outputs.append(plain(case["in/img"], **inputs))
    assert_near(*outputs, within=1e-6)
    inputs["text"] = TextFeatures(tokens_BLD=tokens, pooled_BD=case["in/y"])
    assert (plain(case["in/img"], **inputs) - outputs[0]).abs().max() > 1e-2


def test_plain_matrix_products_attend_alike(case):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8, generator=generator) for _ in range(3))
    mask = torch.tensor([[True, True, False, True, False], [False, True, True, True, True]])[:, None, None]
    for chosen in (None, mask):
        assert_near(KERNELS["matmul"](q, k, v, chosen), KERNELS["sdpa"](q, k, v, chosen), within=1e-6)


def test_sinusoids_are_the_originals():
    recorded = tensors("jointdit_tiny.cases")
    actual = sinusoidal_embedding(recorded["piece/timestep_embedding_t"])
    assert_near(actual, recorded["piece/timestep_embedding_out"], within=1e-6)


def test_rotary_tables_are_the_originals():
    recorded = tensors("jointdit_tiny.cases")
    config = tiny_config()
    for name, piece in (("b", "pe"), ("e", "pe_nonzero_txt_ids")):
        case = joint_case(name)
        text_ids = case.inputs["text"].ids_BL3[0]
        ids = torch.cat([text_ids, case.inputs["image_ids"].expand(len(text_ids), -1, -1)], dim=-2)
        # The original keeps whole matrices [[cos, -sin], [sin, cos]]: its first column is our table.
        expected = recorded[f"piece/{piece}"][..., 0]
        actual = rotary_table(ids, axes_dim=config.axes_dim, theta=config.theta)
        assert_near(actual[: len(expected)], expected, within=1e-6)
