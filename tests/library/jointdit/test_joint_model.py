"""JointDiT against recorded calls of the released code."""

import math

import pytest
import torch
from golden_files import (
    GOLDENS,
    RANKS,
    assert_near,
    by_modality,
    facts,
    joint_case,
    lay_tiny_model,
    tensors,
    tiny_config,
)
from safetensors.torch import load_file

import library.jointdit.attention as joint_attention
from library import TextFeatures, load_jointdit
from library.flux.attention import KERNELS
from library.flux.layers import rotate, sinusoidal_embedding
from library.flux.model import Flux
from library.jointdit.addons import freeze_backbone, new_jointdit
from library.jointdit.attention import WEIGHTINGS, JointAttention
from library.jointdit.model import JointDiT


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return lay_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(paths):
    return load_jointdit(flux=paths[0], addons=paths[1])


@pytest.mark.parametrize("name", sorted(facts("jointdit_tiny")["cases"]))
def test_velocities_are_the_released_codes(model, name):
    case = joint_case(name)
    with torch.no_grad():
        assert_near(model(case.x_MBLD, **case.inputs), case.v_MBLD)


def test_the_same_through_plain_matrix_products(model, monkeypatch):
    monkeypatch.setattr(model, "kernel", KERNELS["matmul"])
    case = joint_case("c_diff")
    with torch.no_grad():
        assert_near(model(case.x_MBLD, **case.inputs), case.v_MBLD)


class Recorder:
    """What passes through the model in one call, by the names of the recording."""

    def __init__(self, model, monkeypatch):
        self.seen = {}
        self.names = {id(module): name for name, module in model.named_modules()}
        self.weights = None
        self.handles = [module.register_forward_hook(self.hook) for module in model.modules()]
        original = JointAttention.__call__

        def call(attention, block, q, k, v):
            where = self.names[id(block)]
            self.weights = attention.weight_MB11[..., 0, 0]
            reads = []

            def attend(*tensors, **settings):
                reads.append(attend_before(*tensors, **settings))
                return reads[-1]

            attend_before = joint_attention.attend
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(joint_attention, "attend", attend)
                out = original(attention, block, q, k, v)
            self.seen[where, "own"], self.seen[where, "cross"] = reads
            self.seen[where, "qkv"] = q, k, v
            self.seen[where, "mixed"] = out
            return out

        monkeypatch.setattr(JointAttention, "__call__", call)

    def hook(self, module, inputs, output):
        self.seen[self.names[id(module)]] = output

    def close(self):
        for handle in self.handles:
            handle.remove()


@pytest.fixture
def recorder(model, monkeypatch):
    recorder = Recorder(model, monkeypatch)
    case = joint_case("b")
    with torch.no_grad():
        model(case.x_MBLD, **case.inputs)
    recorder.close()
    return recorder


@pytest.fixture(scope="module")
def expected():
    return {name: by_modality(tensor) for name, tensor in tensors("jointdit_tiny.intermediates_b").items()}


def test_embeddings_are_the_released_codes(recorder, expected):
    for name in ("img_in", "txt_in", "time_in", "guidance_in", "vector_in"):
        assert_near(recorder.seen[name], expected[name])
    assert_near(sum(recorder.seen[name] for name in ("time_in", "guidance_in", "vector_in")), expected["vec"])


def test_every_block_gives_what_the_released_one_gives(recorder, expected):
    for index in range(2):
        image, text = recorder.seen[f"double_blocks.{index}"]
        assert_near(image, expected[f"double_blocks.{index}/img"])
        assert_near(text, expected[f"double_blocks.{index}/txt"])
    for index in range(3):
        assert_near(recorder.seen[f"single_blocks.{index}"], expected[f"single_blocks.{index}/x"])


def test_queries_keys_and_values_are_the_released_codes(model, recorder, expected):
    case = joint_case("b")
    rotary = model.rotary(case.inputs["text"], image_ids=case.inputs["image_ids"])
    q, k, v = recorder.seen["double_blocks.0", "qkv"]
    assert_near(q, rotate(expected["double_blocks.0/q"], rotary))
    assert_near(k, rotate(expected["double_blocks.0/k"], rotary))
    assert_near(v, expected["double_blocks.0/v"])


@pytest.mark.parametrize(("where", "linear"), [("double_blocks.0", "joint1"), ("single_blocks.0", "joint2")])
def test_the_joint_connection_is_the_released_codes(recorder, where, linear):
    released = tensors("jointdit_tiny.intermediates_b")

    def pair(name):
        return torch.stack([released[f"{where}/{name}_rgb"], released[f"{where}/{name}_depth"]])

    assert_near(recorder.seen[where, "own"], by_modality(released[f"{where}/self_attention"]))
    assert_near(recorder.seen[where, "cross"], pair("joint_raw"))
    out = recorder.seen[f"{where}.{linear}"]
    assert_near(torch.stack(out.chunk(2, dim=-1)), pair("joint_linear"))
    weights = [released[f"{where}/weight_on_{name}_branch"] for name in ("rgb", "depth")]
    assert_near(recorder.weights, torch.stack(weights), within=1e-6)
    assert_near(recorder.seen[where, "mixed"] - recorder.seen[where, "own"], pair("joint_weighted"))


def test_gradients_of_every_addon_are_the_released_codes(model):
    released = tensors("jointdit_tiny.grads_b")
    case = joint_case("b")
    loss = (model(case.x_MBLD, **case.inputs) - by_modality(released["target"])).square().mean()
    assert loss.item() == pytest.approx(float(released["loss"]), rel=1e-5)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    assert {f"grad/{name}" for name in parameters} == {name for name in released if name.startswith("grad/")}
    for name, gradient in zip(parameters, gradients, strict=True):
        expected = released[f"grad/{name}"]
        assert gradient.shape == expected.shape, name
        assert (gradient - expected).norm() <= 1e-3 * expected.norm(), name


def test_scheduling_weights_are_the_released_codes():
    recorded = tensors("jointdit_tiny.cases")
    t_MB = torch.stack([recorded["piece/blend_t_rgb"], recorded["piece/blend_t_depth"]])
    expected = torch.stack(
        [recorded["piece/blend_factor_on_rgb_branch"], recorded["piece/blend_factor_on_depth_branch"]]
    )
    undefined = (t_MB == 0).all(dim=0)
    assert undefined.any() and (expected[:, undefined] == -1).all()  # the recording writes -1 for NaN
    actual = WEIGHTINGS["released"](t_MB)
    assert_near(actual[:, ~undefined], expected[:, ~undefined], within=1e-6)
    # We differ on purpose: the released code gives NaN where both levels are 0, we give both an equal share.
    assert (actual[:, undefined] == 0.5).all()


def test_two_clean_modalities_give_finite_velocities(model):
    # Again on purpose: for such pairs the released code gives nothing but NaN.
    assert facts("jointdit_tiny")["verified_facts"]["t_rgb_plus_t_depth_equals_0"]["sample_all_nan"][1]
    case = joint_case("b")
    inputs = case.inputs | {"t_MB": torch.tensor([[0.9, 0.0], [0.3, 0.0]])}
    with torch.no_grad():
        velocities = model(case.x_MBLD, **inputs)
    assert velocities.isfinite().all()
    assert_near(velocities[:, 0], case.v_MBLD[:, 0])  # the other pair is untouched: its levels are those recorded


def test_the_papers_weights_are_equation_6():
    t_MB = torch.tensor([[0.9, 0.0, 0.3, 1.0, 0.0, 1.0], [0.3, 0.6, 0.3, 0.2, 0.0, 1.0]])
    expected = torch.empty_like(t_MB)
    for pair, (t_rgb, t_depth) in enumerate(t_MB.T.tolist()):
        clean_rgb, clean_depth = 1 - t_rgb, 1 - t_depth
        # At t = 1, the first step of every joint generation, equation 6 is 0/0: an equal share there.
        total = clean_rgb + clean_depth
        shares = (clean_depth / total, clean_rgb / total) if total else (0.5, 0.5)
        for m, share in enumerate(shares):
            expected[m, pair] = 1 / (1 + math.exp(-3 * (share - 0.5)))
    assert_near(WEIGHTINGS["paper"](t_MB), expected, within=1e-6)
    assert (WEIGHTINGS["none"](t_MB) == 1).all()


def test_the_noisier_modality_listens_more():
    t_MB = torch.tensor([[0.9, 0.2], [0.3, 0.7]])
    for name in ("released", "paper"):
        rgb_B, depth_B = WEIGHTINGS[name](t_MB)
        assert rgb_B[0] > 0.5 > depth_B[0] and rgb_B[1] < 0.5 < depth_B[1]


def test_controls_of_the_weights():
    t_MB = torch.tensor([[0.9, 0.2, 1.0, 0.4], [0.3, 0.7, 0.0, 0.4]])
    released = WEIGHTINGS["released"](t_MB)
    assert torch.equal(WEIGHTINGS["reversed"](t_MB), released.flip(0))
    for name, value in (("constant_0.5", 0.5), ("constant_0.82", 0.82), ("unconnected", 0.0)):
        assert_near(WEIGHTINGS[name](t_MB), torch.full_like(t_MB, value), within=1e-7)
    # The two constants are what the released weights are at equal levels, and at most.
    assert released[0, 3] == 0.5 and released[0, 2] == pytest.approx(0.82, abs=5e-3)


def test_bfloat16_levels_are_rounded_as_in_the_released_code():
    released = load_file(GOLDENS / "bf16_timesteps.safetensors")
    t = released["t_fp32"].bfloat16()
    assert torch.equal(t, released["t_bf16_inference"])
    assert torch.equal(1000.0 * t, released["t1000_bf16_inference"])
    embedding = sinusoidal_embedding(t)
    assert embedding.dtype == torch.bfloat16
    assert torch.equal(embedding, released["embedding_bf16_inference"])
    assert torch.equal(released["t1000_bf16_training"] / 1000, released["t_bf16_training"])

    weights = WEIGHTINGS["released"](torch.stack([t, t.flip(0)]))
    assert weights.dtype == torch.bfloat16
    expected = torch.stack([released["weight_on_rgb_branch_bf16"], released["weight_on_depth_branch_bf16"]])
    defined = expected.isfinite()
    assert torch.equal(weights[defined], expected[defined])
    assert (weights[~defined] == 0.5).all()


def test_bfloat16_weights_stay_near(paths):
    model = load_jointdit(flux=paths[0], addons=paths[1], dtype=torch.bfloat16)
    case = joint_case("b")
    text = case.inputs["text"].to(dtype=torch.bfloat16)
    inputs = {name: case.inputs[name].bfloat16() for name in ("t_MB", "guidance_B")}
    with torch.no_grad():
        actual = model(case.x_MBLD.bfloat16(), text=text, image_ids=case.inputs["image_ids"], **inputs)
    assert actual.dtype == torch.bfloat16
    # The released code's own relative error under bf16 is 0.0105.
    assert (actual.float() - case.v_MBLD).norm() < 0.02 * case.v_MBLD.norm()


def test_a_pair_does_not_depend_on_its_batch_mates(model):
    case = joint_case("b_indep")
    text = case.inputs["text"]
    inputs = {
        "t_MB": case.inputs["t_MB"][:, 1:],
        "guidance_B": case.inputs["guidance_B"][:, 1:],
        "text": TextFeatures(tokens_BLD=text.tokens_BLD[:, 1:], pooled_BD=text.pooled_BD[:, 1:]),
        "image_ids": case.inputs["image_ids"],
    }
    with torch.no_grad():
        assert_near(model(case.x_MBLD[:, 1:], **inputs), case.v_MBLD[:, 1:])


def test_fresh_addons_give_two_plain_passes(paths):
    generator = torch.Generator().manual_seed(0)
    fresh = new_jointdit(flux=paths[0], ranks=RANKS, generator=generator)
    plain = Flux(tiny_config()).eval()
    plain.load_state_dict(tensors("jointdit_tiny.base"))
    case = joint_case("b")
    t_MB, text, guidance_MB = (case.inputs[name] for name in ("t_MB", "text", "guidance_B"))
    ids = case.inputs["image_ids"]
    with torch.no_grad():
        joint = fresh(case.x_MBLD, **case.inputs)
        # Bit for bit where the same matrix products run: both modalities in one pass.
        assert torch.equal(joint, plain(case.x_MBLD, t_B=t_MB, text=text, image_ids=ids, guidance_B=guidance_MB))
        for m in range(2):
            own = TextFeatures(tokens_BLD=text.tokens_BLD[m], pooled_BD=text.pooled_BD[m])
            alone = plain(case.x_MBLD[m], t_B=t_MB[m], text=own, image_ids=ids, guidance_B=guidance_MB[m])
            assert_near(joint[m], alone, within=1e-5)


def test_the_seed_decides_fresh_addons(paths):
    def draw(seed):
        model = new_jointdit(flux=paths[0], ranks=RANKS, generator=torch.Generator().manual_seed(seed))
        return {name: value for name, value in model.state_dict().items() if name.endswith("lora_A.weight")}

    first, again, other = draw(1), draw(1), draw(2)
    assert len(first) == 21
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)
    bound = math.sqrt(6 / (8 + 64))  # Xavier's
    drawn = first["double_blocks.0.img_attn.qkv.lora_A.weight"]
    assert 0.9 * bound < drawn.abs().max() <= bound


def test_only_addons_require_gradients(model):
    released = load_file(GOLDENS / "jointdit_tiny.addons.safetensors")
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(released)
    assert not model.training
    with torch.device("meta"):
        fresh = freeze_backbone(JointDiT(tiny_config(), ranks=RANKS))
    assert {name for name, parameter in fresh.named_parameters() if parameter.requires_grad} == set(released)
    assert set(fresh.state_dict()) == set(released) | set(tensors("jointdit_tiny.base"))


def test_the_rgb_modality_sees_the_frozen_base(model):
    case = joint_case("b")
    text = case.inputs["text"]
    with torch.no_grad():
        for name, x in (("txt_in", text.tokens_BLD), ("vector_in.in_layer", text.pooled_BD)):
            layer = model.get_submodule(name)
            out = layer(x)
            plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
            assert torch.equal(out[0], plain[0])
            branch = x[1] @ layer.lora_A.weight.T @ layer.lora_B.weight.T
            assert_near(out[1], plain[1] + branch / 2, within=1e-5)  # alpha = rank / 2


@pytest.mark.parametrize("shape", [(24, 64), (3, 1, 24, 64), (1, 24, 64), (4, 24, 64)])
def test_other_than_two_modalities_are_refused(model, shape):
    case = joint_case("a")
    with pytest.raises(ValueError, match="modalities = 2"):
        model(torch.zeros(shape), **case.inputs)


def test_levels_of_another_shape_are_refused(model):
    case = joint_case("b")
    with pytest.raises(ValueError, match="t_MB"):
        model(case.x_MBLD, **case.inputs | {"t_MB": torch.rand(2)})


def test_missing_guidance_is_refused(model):
    case = joint_case("a")
    with pytest.raises(ValueError, match="guidance_B is needed"):
        model(case.x_MBLD, **case.inputs | {"guidance_B": None})


@pytest.mark.parametrize("shape", [(2,), (2, 2)])
def test_one_guidance_serves_both_modalities(model, shape):
    case = joint_case("d")
    with torch.no_grad():
        actual = model(case.x_MBLD, **case.inputs | {"guidance_B": torch.full(shape, 3.5)})
    assert_near(actual, case.v_MBLD)


def test_one_text_serves_both_modalities(model):
    case = joint_case("b")
    text = case.inputs["text"]
    shared = TextFeatures(tokens_BLD=text.tokens_BLD[0], pooled_BD=text.pooled_BD[0])
    assert torch.equal(text.tokens_BLD[0], text.tokens_BLD[1])
    with torch.no_grad():
        assert_near(model(case.x_MBLD, **case.inputs | {"text": shared}), case.v_MBLD)
