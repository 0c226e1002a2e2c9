"""The released code's caches: numbers come over unchanged, and nothing in a file is run."""

import io
import json
import os
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dataset.cache import TEXT_KEYS, read_meta
from dataset.check import CheckArgs, check_folder
from dataset.import_released import ImportArgs, import_prompts, import_samples, main
from dataset.jointdit_dataset import CachedPairs
from dataset.layout import Layout
from dataset.prompt_features import read_prompt_features
from library.args import parse
from library.errors import UserError

NAMES = tuple(f"{number:05d}" for number in range(1, 6))
LENGTH, WIDTH, POOLED = 7, 12, 9
KINDS = {
    "image_latents": (16, 4, 6),
    "depth_latents": (16, 4, 6),
    "clip_latents": (POOLED,),
    "t5_latents": (LENGTH, WIDTH),
    "txt_ids": (LENGTH, 3),
    "attn_masks": (LENGTH,),
}


def tensor_of(kind: str, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(sum(f"{kind}{name}".encode()))
    if kind == "txt_ids":
        return torch.zeros(KINDS[kind])
    if kind == "attn_masks":
        return torch.arange(LENGTH) < 3
    return torch.randn(KINDS[kind], generator=generator).bfloat16()


def put(folder: Path, kind: str, name: str, value: object) -> None:
    (folder / kind).mkdir(parents=True, exist_ok=True)
    torch.save(value, folder / kind / f"{name}.pt")


def write_released(folder: Path, names: tuple[str, ...] = NAMES, *, batched: bool = False) -> Path:
    """Write a cache as the released code lays it out; `batched` with a first axis of length 1 everywhere."""
    for name in names:
        for kind in KINDS:
            tensor = tensor_of(kind, name)
            put(folder, kind, name, tensor[None] if batched else tensor)
    (folder / "depth_transform.json").write_text(json.dumps({"depth_transform": "inverse"}))
    return folder


def arguments(source: Path, target: Path, *flags: str) -> ImportArgs:
    return parse(["--cache", str(source), "--output", str(target), *flags], ImportArgs)


@pytest.mark.parametrize("batched", [False, True])
def test_numbers_come_over_unchanged(tmp_path, batched):
    source = write_released(tmp_path / "old", batched=batched)
    assert import_samples(arguments(source, tmp_path / "new")) == []
    pairs = CachedPairs(tmp_path / "new", depth_transform="inverse")
    assert list(pairs.names) == list(NAMES)
    for index, name in enumerate(NAMES):
        _, pair = pairs.read(index)
        assert torch.equal(pair.rgb_Chw, tensor_of("image_latents", name)) and pair.rgb_Chw.dtype == torch.bfloat16
        assert torch.equal(pair.depth_Chw, tensor_of("depth_latents", name))
        assert torch.equal(pair.text.tokens_BLD[0], tensor_of("t5_latents", name))
        assert torch.equal(pair.text.pooled_BD[0], tensor_of("clip_latents", name))
        assert pair.text.mask_BL is None and pair.text.ids_BL3 is None


def test_masks_positions_and_precision(tmp_path, capsys):
    source = write_released(tmp_path / "old")
    numbered = torch.zeros(LENGTH, 3)
    numbered[:, 0] = torch.arange(LENGTH)
    for name in NAMES:
        put(source, "txt_ids", name, numbered)
    import_samples(arguments(source, tmp_path / "new", "--is_attnmask_training", "--save_precision", "fp32"))
    assert "train with --is_txt_ids_training" in capsys.readouterr().out
    _, pair = CachedPairs(tmp_path / "new", depth_transform="inverse").read(0)
    assert pair.rgb_Chw.dtype == torch.float32
    assert pair.text.mask_BL[0].tolist() == [True] * 3 + [False] * (LENGTH - 3)
    assert torch.equal(pair.text.ids_BL3[0], numbered)


class Malicious:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def claims_more_than_it_holds() -> bytes:
    stream = io.BytesIO()
    torch.save(torch.zeros(1).expand(16, 4, 6), stream)
    return stream.getvalue()


def test_what_is_no_tensor_is_refused_and_never_run(tmp_path, monkeypatch, capsys):
    source = write_released(tmp_path / "old", tuple(f"{number:05d}" for number in range(16)))
    mark = tmp_path / "it_ran"
    bad: dict[str, tuple[str, object, str]] = {
        "00001": ("depth_latents", Malicious(mark), "asks for \\S*mkdir, which wasn't run"),
        "00002": ("t5_latents", pickle.dumps(Malicious(mark)), "holds more than tensors, or is none"),
        "00003": ("image_latents", {"latent": torch.zeros(16, 4, 6)}, "holds a dict, not a plain tensor"),
        "00004": ("clip_latents", np.zeros(POOLED), "holds more than tensors, or is none"),
        "00005": ("image_latents", b"", "damaged"),
        "00006": ("image_latents", torch.full((16, 4, 6), torch.nan), "holds NaN or infinite values"),
        "00007": ("depth_latents", torch.zeros(4, 4, 6), "has 4 channels, a latent has 16"),
        "00008": ("depth_latents", torch.zeros(16, 4, 4), r"has the shape \(16, 4, 4\), the image latent"),
        "00009": ("t5_latents", torch.zeros(LENGTH, WIDTH, dtype=torch.int64), "not floats"),
        "00010": ("t5_latents", torch.zeros(LENGTH + 1, WIDTH), "but the first sample has"),
        "00011": ("txt_ids", torch.ones(LENGTH, 3), "neither zero nor"),
        "00012": ("image_latents", claims_more_than_it_holds(), "claims the shape"),
        "00013": ("image_latents", torch.eye(16).to_sparse(), "holds a special tensor"),
    }
    for name, (kind, value, _) in bad.items():
        if isinstance(value, bytes):
            (source / kind / f"{name}.pt").write_bytes(value)
        else:
            put(source, kind, name, value)
    (source / "clip_latents" / "00014.pt").unlink()
    (source / "txt_ids" / "00010.pt").unlink()
    monkeypatch.setattr(sys, "argv", ["import_released", "--cache", str(source), "--output", str(tmp_path / "new")])
    with pytest.raises(SystemExit) as status:
        main()
    refused = import_samples(arguments(source, tmp_path / "new"))
    assert status.value.code == 1
    assert not mark.exists()
    assert sorted(path.stem for path in Layout(tmp_path / "new").cache.glob("*.safetensors")) == ["00000", "00015"]
    assert len(refused) == 14
    by_name = {text.split(".pt")[0][-5:]: text for text in refused}
    for name, (kind, _, reason) in bad.items():
        assert re.search(rf"{kind}/{name}\.pt: .*{reason}", by_name[name]), by_name[name]
    assert by_name["00014"].endswith("clip_latents/00014.pt: missing")
    assert "train with --trust_cache" in capsys.readouterr().out


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_broken_run_goes_on(tmp_path, capsys):
    source = write_released(tmp_path / "old")
    import_samples(arguments(source, tmp_path / "new"))
    cache = Layout(tmp_path / "new").cache
    whole = content(cache)
    kept = cache / f"{NAMES[0]}.safetensors"
    before = kept.stat().st_mtime_ns
    (cache / f"{NAMES[2]}.safetensors").unlink()
    capsys.readouterr()
    import_samples(arguments(source, tmp_path / "new"))
    assert content(cache) == whole and kept.stat().st_mtime_ns == before
    assert "1 of 5 samples converted" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--output .*: was made with text_mask False, now it is True"):
        import_samples(arguments(source, tmp_path / "new", "--is_attnmask_training"))


def test_an_unknown_origin_is_accepted_knowingly(tmp_path):
    source, target = write_released(tmp_path / "old"), tmp_path / "new"
    import_samples(arguments(source, target))
    words = ["--image_folder", str(target), "--depth_transform", "inverse"]
    report = check_folder(parse(words, CheckArgs))
    assert "nobody knows which clip_l, t5xxl, ae made its imported cache" in report.verdicts[0].reasons[0]
    assert check_folder(parse([*words, "--trust_cache"], CheckArgs)).would_run


def test_a_known_origin_is_checked(tmp_path):
    tiny = Path(__file__).resolve().parents[2] / "assets" / "tiny"
    models = [f"--ae={tiny}/ae.safetensors", f"--clip_l={tiny}/clip_l.safetensors"]
    models.append(f"--t5xxl={tiny}/t5xxl_fp16.safetensors")
    import_samples(arguments(write_released(tmp_path / "old"), tmp_path / "new", *models))
    words = ["--image_folder", str(tmp_path / "new"), "--depth_transform", "inverse"]
    assert check_folder(parse([*words, *models], CheckArgs)).would_run
    report = check_folder(parse([*words, f"--ae={tiny}/clip_l.safetensors"], CheckArgs))
    assert "isn't the model that made the cache" in report.verdicts[0].reasons[0]


def test_prompts(tmp_path):
    source = write_released(tmp_path / "old")
    write_released(tmp_path / "work" / "empty_prompts", ("empty",))
    evaluation = write_released(tmp_path / "work" / "evaluation_prompts", NAMES[:2])
    target = tmp_path / "new"
    args = arguments(source, target, "--prompts", str(tmp_path / "work"))
    import_samples(args)
    with pytest.raises(UserError, match=r"--prompts .*: has 0 lists of prompts"):
        import_prompts(args, tmp_path / "work")
    (evaluation / "evaluation_prompts.txt").write_text("a red ball\na blue box\n")
    import_prompts(args, tmp_path / "work")
    meta = read_meta(Layout(target).cache_meta, flag="--image_folder")
    features = read_prompt_features(target, made_by={key: meta[key] for key in TEXT_KEYS})
    assert features.prompts == ("a red ball", "a blue box")
    assert torch.equal(features.evaluation.tokens_BLD[1], tensor_of("t5_latents", NAMES[1]).float())
    (evaluation / "evaluation_prompts.txt").write_text("a red ball\na blue box\na cone\n")
    with pytest.raises(UserError, match=r"--prompts .*00003.pt: missing"):
        import_prompts(args, tmp_path / "work")


def test_flags_are_checked(tmp_path):
    source = write_released(tmp_path / "old")
    with pytest.raises(UserError, match=r"--cache .*: has no folder image_latents"):
        arguments(tmp_path, tmp_path / "new")
    with pytest.raises(UserError, match=r"--prompts .*: has no folder empty_prompts"):
        arguments(source, tmp_path / "new", "--prompts", str(tmp_path))
    with pytest.raises(UserError, match=r"--t5_tokenizer x: no text is encoded here"):
        arguments(source, tmp_path / "new", "--t5_tokenizer", "x")
    with pytest.raises(UserError, match=rf"--t5xxl_max_token_length 512: the cache has {LENGTH}"):
        import_samples(arguments(source, tmp_path / "new", "--t5xxl_max_token_length", "512"))
    with pytest.raises(UserError, match=r"--depth_transform none: .*depth_transform.json says inverse"):
        import_samples(arguments(source, tmp_path / "new", "--depth_transform", "none"))
    stated = source / "depth_transform.json"
    stated.write_text('{"depth_transform": "sideways"}')
    with pytest.raises(UserError, match=r"--cache .*depth_transform.json: says 'sideways', not one of none, inverse"):
        import_samples(arguments(source, tmp_path / "new"))
    stated.write_text("{")
    with pytest.raises(UserError, match=r"--cache .*depth_transform.json: can't be read"):
        import_samples(arguments(source, tmp_path / "new"))
    stated.unlink()
    with pytest.raises(UserError, match=r"--cache .*: has no depth_transform.json; say --depth_transform"):
        import_samples(arguments(source, tmp_path / "new"))
    import_samples(arguments(source, tmp_path / "new", "--depth_transform", "none"))
    for path in (source / "image_latents").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"--cache .*: no sample in image_latents can be taken; there is none"):
        import_samples(arguments(source, tmp_path / "other", "--depth_transform", "none"))
